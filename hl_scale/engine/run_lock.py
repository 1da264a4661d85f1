"""One group of ranks at a time in a run directory, and all of them in the same one."""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLock, Timeout

from hl_scale.config import ConfigError
from hl_scale.data.durable import write_text
from hl_scale.engine import zero3
from hl_scale.engine.zero3 import World

LOCK, OWNER = ".lock", ".lock.json"
WAIT_SECONDS, LEASE_SECONDS = 20.0, 100.0
"""How long a new group waits: for a process of this host, which its launcher may be ending, and for one of another
host, whose locks NFS gives back only when its lease has run out."""
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class RunInUse(ConfigError):
    """Another process holds the run directory."""


@dataclass(frozen=True)
class Claim:
    """A group's hold on a run directory: a token that every rank knows, and that the directory names while it lasts."""

    directory: Path
    token: str

    def holds(self) -> bool:
        """Whether no other group has taken the directory since, as can happen where locks are lost or missing."""
        return _read_owner(self.directory).get("token") == self.token


@contextmanager
def exclusive(directory: Path, world: World, wait: float | None = None) -> Iterator[Claim]:
    """Hold a run directory, which is created; collective. The system lets go of it when rank 0 ends, however it ends.

    Raises:
        RunInUse: another process holds it; says which.
    """
    lock = None
    claim = Claim(directory, zero3.gather_objects(secrets.token_hex(4), world)[0])
    with zero3.together(world):
        if world.is_main:
            lock = _acquire(claim, wait)
    try:
        yield claim
    finally:
        if lock is not None:
            lock.release()


def _acquire(claim: Claim, wait: float | None) -> Any:
    directory = claim.directory
    directory.mkdir(parents=True, exist_ok=True)
    lock: Any = FileLock(directory / LOCK, thread_local=False)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            owner = _read_owner(directory)
            if wait is None:
                wait = WAIT_SECONDS if owner.get("host") == socket.gethostname() else LEASE_SECONDS
            print(f"{directory} is in use by {_name(owner)}: waiting {wait:.0f} s for it to end", flush=True)
            lock.acquire(timeout=wait, poll_interval=0.2)
    except Timeout:
        if not isinstance(lock, SoftFileLock):
            raise RunInUse(
                f"{directory} is in use by {_name(_read_owner(directory))}\n"
                "  fix: wait until that run has ended, or end it; two runs need two directories (run.directory)"
            ) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
    if isinstance(lock, SoftFileLock) or not lock.is_locked:
        # Without flock, filelock makes do with a file, which a killed process would leave behind for good.
        lock.release()
        logging.getLogger(__name__).warning(
            "%s is on storage without flock: nothing keeps a second run out of it", directory
        )
        lock = None
    owner = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    write_text(directory / OWNER, json.dumps({**owner, "token": claim.token}))
    return lock


def _read_owner(directory: Path) -> dict[str, Any]:
    try:
        owner = json.loads((directory / OWNER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _name(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    return f"process {owner.get('process')} on {owner.get('host')} since {owner.get('since')}"


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
        seen = zero3.gather_objects((socket.gethostname(), _is_there(token)), world)
    finally:
        if world.is_main:
            token.unlink(missing_ok=True)
    apart = [f"rank {rank} on {host}" for rank, (host, found) in enumerate(seen) if not found]
    if apart:
        raise ConfigError(
            f"{directory} is not the same directory everywhere: {', '.join(apart[:4])} and rank 0 on {seen[0][0]} do "
            "not share it\n  fix: put run.directory on storage that every node mounts at the same path"
        )


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # no right to look
        return False
