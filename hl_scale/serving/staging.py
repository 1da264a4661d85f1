"""Output directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hl_scale.data.durable import flush
from hl_scale.data.peft_directory import PROVENANCE_FILE  # only a directory that holds it is ever replaced

__all__ = ["PROVENANCE_FILE", "OutputError", "check_replaceable", "staged_directory"]


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
        _publish(staging)
        _commit(staging, target, force=force)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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


def _commit(staging: Path, target: Path, *, force: bool) -> None:
    check_replaceable(target, force=force)
    if not target.exists():
        os.rename(staging, target)
        flush(target.parent)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=".old", dir=target.parent))
    try:
        os.rename(target, retired / target.name)
        try:
            os.rename(staging, target)
        except BaseException:
            os.rename(retired / target.name, target)
            raise
        flush(target.parent)
    finally:
        shutil.rmtree(retired, ignore_errors=True)


def _publish(directory: Path) -> None:
    """Readable by every account, as a server's often is another one, and on disk."""
    for path in [*sorted(directory.rglob("*")), directory]:
        path.chmod(0o755 if path.is_dir() else 0o644)
        flush(path)
