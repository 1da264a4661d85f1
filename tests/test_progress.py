import io
import sys

import pytest

from hl_scale import progress
from hl_scale.progress import counting_bar


def lines_of(monkeypatch: pytest.MonkeyPatch, seconds: list[float], shown: bool = True) -> list[str]:
    """What is written while four of eight items are done at these times."""
    clock = iter(seconds)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with counting_bar("evaluating", 8, shown, unit="answers") as advance:
        for _ in seconds[1:]:
            advance(2)
    return sys.stderr.getvalue().splitlines()


def test_without_a_terminal_a_line_says_every_half_minute_how_far_work_is(monkeypatch):
    assert lines_of(monkeypatch, [0.0, 29.0, 30.0, 59.0, 60.0]) == [
        "evaluating: 50% of 8 answers, 0.5 min left",
        "evaluating: 100% of 8 answers, 0.0 min left",
    ]


def test_short_or_silenced_work_writes_nothing_without_a_terminal(monkeypatch):
    assert lines_of(monkeypatch, [0.0, 10.0, 20.0]) == []
    assert lines_of(monkeypatch, [0.0, 100.0, 200.0], shown=False) == []


def test_what_is_being_done_is_told_with_how_far_it_is(monkeypatch):
    clock = iter([0.0, 31.0, 40.0, 62.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with counting_bar("measuring", 4, True, unit="cells") as bar:
        bar.say("training")
        bar(1)
        bar.say("predicting")
    assert sys.stderr.getvalue().splitlines() == ["training: 0% of 4 cells", "predicting: 25% of 4 cells, 3.1 min left"]
