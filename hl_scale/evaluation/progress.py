"""The progress bar of evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress_bar(total: int, unit: str, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function that is told how many units were just done."""
    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), disable=not shown) as bar:
        task = bar.add_task("evaluating", total=total)
        yield lambda done: bar.update(task, advance=done)
