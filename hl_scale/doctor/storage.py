"""Storage as a run uses it: files forced to disk, directories renamed, files replaced, one process kept out by another.

Each check works in a directory of its own, `.hl-scale-doctor-*`, in the nearest directory that exists, and removes it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from hl_scale.data.durable import flush
from hl_scale.doctor.findings import Finding, ok, problem, warning

_LARGEST_SKEW = 5.0
_PROBE_BYTES = 1 << 20
_LOCK_SECONDS = 10
_NODE_LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/run")


def check_storage(
    name: str,
    path: Path,
    *,
    several_nodes: bool = False,
    required: int = 0,
    clock: Callable[[], float] = time.time,
) -> list[Finding]:
    """Whether checkpoints can be written at a path that need not exist yet.

    Args:
        name: what is kept there, for example "run.directory".
        path: the directory.
        several_nodes: it must be the same directory on other nodes.
        required: bytes that have to be free.
        clock: of this machine, in seconds.
    """
    check, directory = f"storage: {name}", nearest_directory(path)
    where = str(path) if directory == path.absolute() else f"{path} (tried in {directory})"
    try:
        skew, locks = _exercise(directory, clock)
        with _step("asking for free space"):
            free = shutil.disk_usage(directory).free
    except _Step as failed:
        fix = f"give this user a directory it can write to, with free space, and set {name} to it"
        return [problem(check, f"{where}: {failed}", fix)]
    findings = [ok(check, f"{where}: written, renamed, replaced, locked; {free / 1e9:.1f} GB free")]
    if free < required:
        fix = f"free space, lower training.keep_checkpoints, or set {name} elsewhere"
        findings = [problem(check, f"{where}: {free / 1e9:.1f} GB free, checkpoints take {required / 1e9:.1f} GB", fix)]
    if not locks:
        fix = "mount it with flock (Lustre: -o flock; NFS: version 4); until then, see that runs have directories apart"
        findings.append(warning(check, f"{where}: no locks by flock, so nothing keeps a second run out", fix))
    if skew > _LARGEST_SKEW:
        fix = "run chronyd or ntpd on this machine and on the file server"
        findings.append(warning(check, f"{where}: its clock and this machine's differ by {skew:.0f} s", fix))
    if several_nodes:
        findings += _node_local(check, name, path, directory)
    return [finding for finding in findings if finding.fix] or findings


def nearest_directory(path: Path) -> Path:
    """The path, or the closest of its parents that exists; absolute."""
    absolute = path.absolute()
    return next(place for place in (absolute, *absolute.parents) if place.exists())


class _Step(Exception):
    """A step that failed, in words."""


@contextmanager
def _step(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _Step(f"{name} failed: {error.strerror or error}") from None


def _exercise(parent: Path, clock: Callable[[], float]) -> tuple[float, bool]:
    """What saving a checkpoint does; returns seconds between its clock and ours, and whether flock is there.

    Raises:
        _Step: says which part failed and why.
    """
    if not parent.is_dir():
        raise _Step(f"{parent} is not a directory")
    with _step("making a directory"):
        own = Path(tempfile.mkdtemp(prefix=".hl-scale-doctor-", dir=parent))
    try:
        staging, final, content = own / "staging", own / "final", os.urandom(_PROBE_BYTES)
        before = clock()
        with _step("writing a file"):
            staging.mkdir()
            (staging / "data").write_bytes(content)
            after, written = clock(), (staging / "data").stat().st_mtime
        with _step("forcing it to disk (fsync)"):
            flush(staging / "data")
            flush(staging)
        with _step("renaming a directory"):
            os.rename(staging, final)
            flush(own)
        with _step("replacing a file"):
            (final / "other").write_bytes(b"")
            os.replace(final / "data", final / "other")
        with _step("reading back"):
            if (final / "other").read_bytes() != content:
                raise _Step("what is read back is not what was written")
        with _step("locking a file"):
            locks = _locks(own / "lock")
        return max(before - written, written - after, 0.0), locks
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _locks(path: Path) -> bool:
    """Whether flock is supported; without it filelock makes do with the existence of a file.

    Raises:
        _Step: a second lock on a file that is locked was granted.
    """
    with FileLock(path, timeout=_LOCK_SECONDS) as lock:
        if isinstance(lock, SoftFileLock):
            return False
        if not is_locked(path):
            raise _Step("a file that was locked could be locked again")
    return True


def is_locked(path: Path) -> bool:
    """Whether another holder has this file locked."""
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def _node_local(check: str, name: str, path: Path, directory: Path) -> Iterator[Finding]:
    """Paths that look as if each node had a directory of its own by that name."""
    fix = f"set {name} to an absolute path on storage that every node mounts"
    if not path.is_absolute():
        yield warning(check, f"{path} is relative, so it depends on where each process starts", fix)
    elif any(path.is_relative_to(place) for place in _NODE_LOCAL):
        yield warning(check, f"{path} looks like storage of one node, which other nodes do not see", fix)
    elif directory == Path(path.anchor):
        found = f"nothing of {path} exists, so it would be made on the disk of each node"
        yield warning(check, found, "mount the shared storage there first")
