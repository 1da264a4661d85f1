"""Interrupting a run: the first signal lets the step at hand finish."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any


class stop_on_signal:
    """While active, the first SIGINT or SIGTERM asks the loop to save and stop; a second one acts as usual."""

    def __enter__(self) -> Callable[[], bool]:
        self._asked = False
        self._previous: dict[int, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread: a cluster worker, which is stopped by its controller
                break
        return lambda: self._asked

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True
        signal.signal(number, self._previous[number])

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
