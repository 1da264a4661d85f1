"""How far long work is: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
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

LINE_SECONDS = 30.0
"""Lines are so far apart; work that takes less writes none."""


@contextmanager
def counting_bar(
    doing: str, total: int, shown: bool, amount: ProgressColumn | None = None, unit: str = ""
) -> Iterator[Callable[[int], None]]:
    """Yields a function that is told how many were just done. All is written to stderr.

    Args:
        doing: what is done.
        total: how many there are to do.
        shown: whether to show anything.
        amount: how a bar writes what is done of the total; as a count unless given.
        unit: what is counted.
    """
    console = Console(stderr=True)
    if not sys.stderr.isatty():
        yield _lines(doing, total, unit) if shown else lambda done: None
        return
    columns = (TextColumn(doing), BarColumn(), amount or MofNCompleteColumn(), TextColumn(unit))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not shown) as bar:
        task = bar.add_task(doing, total=total)
        yield lambda done: bar.update(task, advance=done)


def _lines(doing: str, total: int, unit: str) -> Callable[[int], None]:
    count, begun = 0, time.monotonic()
    last = begun

    def advance(done: int) -> None:
        nonlocal count, last
        count, now = count + done, time.monotonic()
        if now - last >= LINE_SECONDS and count:
            last = now
            left = (now - begun) / count * (total - count) / 60
            text = f"{doing}: {100 * count // max(total, 1)}% of {total} {unit}".rstrip()
            print(f"{text}, {left:.1f} min left", file=sys.stderr, flush=True)

    return advance
