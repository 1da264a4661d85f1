"""A rank that hangs says where, and ends, so that whoever started it can start again.

A process that waits for one that will not answer (stopped, swapping, cut off from the network) waits for half an hour
by the default of gloo and for ever by that of others, and shows nothing. Here every rank reports what it begins; one
that began nothing new for too long writes the stacks of its threads and exits.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from pathlib import Path

EXIT_STATUS = 75
"""Of a rank that ended itself: a temporary failure, in the sense of sysexits.h."""
_GRACE_SECONDS = 30.0


class Watchdog:
    """Watches one process from a thread, and from outside Python where a call holds the interpreter; a context manager.

    Args:
        timeout: seconds without a `beat` after which the process ends; None watches nothing.
        directory: where stacks-rank-0000.txt is written.
        rank: of this process.
    """

    def __init__(self, timeout: float | None, directory: Path, rank: int) -> None:
        self.timeout, self.directory, self.rank = timeout, directory, rank
        self._doing, self._since = "starting", time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.timeout is not None:
            self._arm()
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def beat(self, doing: str) -> None:
        """Something new begins, so what was before did not hang."""
        self._doing, self._since = doing, time.monotonic()

    def _watch(self) -> None:
        assert self.timeout is not None
        interval = min(1.0, self.timeout / 4)
        while not self._stopped.wait(interval):
            if time.monotonic() - self._since > self.timeout:
                self._end()
            self._arm()

    def _arm(self) -> None:
        """What fires if the thread does not come back to put it off, because something holds the interpreter."""
        assert self.timeout is not None
        if sys.__stderr__ is not None:
            faulthandler.dump_traceback_later(self.timeout + _GRACE_SECONDS, exit=True, file=sys.__stderr__)

    def _end(self) -> None:
        path = self.directory / f"stacks-rank-{self.rank:04d}.txt"
        text = (
            f"rank {self.rank} (process {os.getpid()} on {socket.gethostname()}) has made no progress for "
            f"{self.timeout:.0f} s in: {self._doing}"
        )
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                file.write(f"{text}, at {time.strftime('%Y-%m-%d %H:%M:%S')}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            where = f"stacks of its threads: {path}"
        except OSError as error:
            where = f"no stacks were written: {error}"
        print(
            f"error: {text}; {where}\n"
            "  fix: look there and in the files of other ranks for what they wait for; a rank without one is the one "
            "that did not answer. If it was only slow, raise training.hang_timeout_seconds. Run the same command "
            "again: it resumes from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_STATUS)
