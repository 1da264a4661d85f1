"""The progress bar of commands that write many things."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def counting_bar(
    doing: str, total: int, shown: bool, amount: ProgressColumn | None = None
) -> Iterator[Callable[[int], None]]:
    """Yields a function that is told how many were just done. Nothing is drawn where stderr is no terminal.

    Args:
        doing: what is done.
        total: how many there are to do.
        shown: whether to draw at all.
        amount: how to write what is done of the total; as a count unless given.
    """
    amount = amount or MofNCompleteColumn()
    columns = (TextColumn(doing), BarColumn(), amount, TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (shown and sys.stderr.isatty())) as bar:
        task = bar.add_task(doing, total=total)
        yield lambda done: bar.update(task, advance=done)
