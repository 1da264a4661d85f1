"""One group of ranks at a time in a run directory, and all of them in the same one."""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from hl_scale.config import ConfigError
from hl_scale.engine import zero3
from hl_scale.engine.run import write_text
from hl_scale.engine.zero3 import World

LOCK, OWNER = ".lock", ".lock.json"
WAIT_SECONDS = 20.0
"""How long a new group waits: one that is being ended by its launcher lets go when its last process is gone."""


@contextmanager
def exclusive(directory: Path, world: World, wait: float = WAIT_SECONDS) -> Iterator[None]:
    """Hold a run directory, which is created; collective. The system lets go of it when rank 0 ends, however it ends.

    Raises:
        ConfigError: another process holds it; says which.
    """
    lock = None
    with zero3.together(world):
        if world.is_main:
            lock = _acquire(directory, wait)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _acquire(directory: Path, wait: float) -> FileLock | None:
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / LOCK, timeout=wait, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"{directory} is in use by {_owner(directory)}\n"
            "  fix: wait until that run has ended, or end it; two runs need two directories (run.directory)"
        ) from None
    if isinstance(lock, SoftFileLock):  # filelock's way out: a file that a killed process would leave behind for good
        lock.release()
        logging.getLogger(__name__).warning(
            "%s is on storage without flock: nothing keeps a second run out of it", directory
        )
        return None
    owner = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    write_text(directory / OWNER, json.dumps(owner))
    return lock


def _owner(directory: Path) -> str:
    try:
        owner = json.loads((directory / OWNER).read_text(encoding="utf-8"))
        return f"process {owner['process']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def check_shared(directory: Path, world: World) -> None:
    """See that all ranks write to the same storage: each must find a file that rank 0 has just written; collective.

    Raises:
        ConfigError: on every rank, naming the hosts whose directory is another one.
    """
    if world.size == 1:
        return
    token = directory / f".shared-{zero3.gather_objects(secrets.token_hex(8), world)[0]}"
    with zero3.together(world):
        if world.is_main:
            token.touch()
    try:
        seen = zero3.gather_objects((socket.gethostname(), token.is_file()), world)
    finally:
        if world.is_main:
            token.unlink(missing_ok=True)
    apart = [f"rank {rank} on {host}" for rank, (host, found) in enumerate(seen) if not found]
    if apart:
        raise ConfigError(
            f"{directory} is not the same directory everywhere: {', '.join(apart[:4])} and rank 0 on {seen[0][0]} do "
            "not share it\n  fix: put run.directory on storage that every node mounts at the same path"
        )
