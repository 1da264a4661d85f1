"""Output directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from hl_scale.data.durable import flush
from hl_scale.data.peft_directory import PROVENANCE_FILE  # only a directory that holds it is ever replaced

__all__ = ["PROVENANCE_FILE", "OutputError", "check_replaceable", "staged_directory"]

_FLUSHING = 8
"""Files flushed at the same time: a journaling file system then writes its journal once for several of them."""


class OutputError(ValueError):
    """An output directory that cannot be written as asked."""


@contextmanager
def staged_directory(target: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """A hidden sibling directory that is renamed to ``target`` when the block ends without an exception.

    Files are flushed to disk before the rename. If the block raises, the sibling is removed and an existing ``target``
    stays as it was.

    Args:
        target: the directory to create; its parent is created where missing.
        force: replace an existing directory, provided it was written by hl_scale.

    Raises:
        OutputError: ``target`` exists and may not be replaced. Raised before the block runs.
    """
    target = Path(os.path.abspath(target))
    check_replaceable(target, force=force)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=".tmp", dir=target.parent))
    try:
        yield staging
        publish([staging], [target], force=force)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def staging_area(parent: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden directory inside ``parent``, which is created where missing, for directories to `publish`; removed at
    the end with what is left in it."""
    parent = Path(os.path.abspath(parent))
    parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".staging-", suffix=".tmp", dir=parent))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(staged: Sequence[Path], targets: Sequence[Path], *, force: bool = False) -> None:
    """Rename each staged directory to its target, siblings of one parent.

    All files are on disk before the first rename, so no target can be seen in part, after a power failure either; the
    renames themselves are on disk on return. Several directories together wait for the disk about once.

    Args:
        force: replace existing targets, provided they were written by hl_scale.

    Raises:
        OutputError: a target exists and may not be replaced; those before it are there.
    """
    for directory in staged:
        _make_readable(directory)
    with ThreadPoolExecutor(_FLUSHING) as pool:
        list(pool.map(flush, [path for directory in staged for path in (*directory.rglob("*"), directory)]))
    retired: list[Path] = []
    try:
        for directory, target in zip(staged, targets, strict=True):
            _replace(directory, target, force, retired)
        for parent in {target.parent for target in targets}:
            flush(parent)
    finally:
        for directory in retired:
            shutil.rmtree(directory, ignore_errors=True)


def check_replaceable(target: str | os.PathLike[str], *, force: bool) -> None:
    """Raise `OutputError` unless ``target`` is free, or may be replaced."""
    target = Path(target)
    if not os.path.lexists(target):
        return
    if not force:
        raise OutputError(f"{target} exists already\n  fix: choose another directory, or ask for it to be replaced")
    if target.is_symlink() or not (target / PROVENANCE_FILE).is_file():
        raise OutputError(
            f"{target} was not written by hl_scale (it has no {PROVENANCE_FILE}), so it is not replaced\n"
            "  fix: choose another directory, or remove this one yourself"
        )


def _replace(staging: Path, target: Path, force: bool, retired: list[Path]) -> None:
    """Rename; a directory in the way is put into one that is added to ``retired``."""
    check_replaceable(target, force=force)
    if not target.exists():
        os.rename(staging, target)
        return
    retired.append(Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=".old", dir=target.parent)))
    old = retired[-1] / target.name
    try:
        os.rename(target, old)
        os.rename(staging, target)
    except BaseException:  # an interruption too, between the two or right after
        if not target.exists():
            os.rename(old, target)
        raise


def _make_readable(directory: Path) -> None:
    """By every account, as a server's often is another one."""
    for path in (directory, *directory.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
