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


class Counter:
    """How far a piece of work is. Called with how many were just done.

    Attributes:
        count: done so far.
        text: what is being done.
    """

    def __init__(self, text: str, show: Callable[[Counter], None]) -> None:
        self.count, self.text, self._show = 0, text, show

    def __call__(self, done: int) -> None:
        self.count += done
        self._show(self)

    def say(self, text: str) -> None:
        """Say what is being done."""
        self.text = text
        self._show(self)


@contextmanager
def counting_bar(
    doing: str, total: int, shown: bool, amount: ProgressColumn | None = None, unit: str = ""
) -> Iterator[Counter]:
    """Yields what is told how many were just done, and if it changes, what is being done. All is written to stderr.

    Args:
        doing: what is done.
        total: how many there are to do.
        shown: whether to show anything.
        amount: how a bar writes what is done of the total; as a count unless given.
        unit: what is counted.
    """
    console = Console(stderr=True)
    if not sys.stderr.isatty():
        yield Counter(doing, _lines(total, unit) if shown else lambda counter: None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), amount or MofNCompleteColumn(), TextColumn(unit))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not shown) as bar:
        task = bar.add_task(doing, total=total)
        yield Counter(doing, lambda counter: bar.update(task, completed=counter.count, description=counter.text))


def _lines(total: int, unit: str) -> Callable[[Counter], None]:
    begun = time.monotonic()
    last = begun

    def show(counter: Counter) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LINE_SECONDS:
            return
        last = now
        text = f"{counter.text}: {100 * counter.count // max(total, 1)}% of {total} {unit}".rstrip()
        if 20 * counter.count >= total and counter.count:  # before, the start weighs too much
            text += f", {(now - begun) / counter.count * (total - counter.count) / 60:.1f} min left"
        print(text, file=sys.stderr, flush=True)

    return show
