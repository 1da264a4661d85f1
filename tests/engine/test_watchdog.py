"""A process that hangs ends itself and says where, whether it waits or holds the interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hl_scale.engine.watchdog import EXIT_STATUS, Watchdog

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import ctypes, sys, threading
from pathlib import Path
from hl_scale.engine import watchdog
watchdog._GRACE_SECONDS = 0.5

def waits_for_a_peer():
    threading.Event().wait(60)

def holds_the_interpreter():
    ctypes.PyDLL(None).sleep(60)

with watchdog.Watchdog(1.0, Path(sys.argv[1]), rank=3) as dog:
    dog.beat("step 7")
    globals()[sys.argv[2]]()
"""


@pytest.fixture
def hanging(tmp_path):
    """hanging(function) -> the finished process that hung in it."""
    return lambda function: subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), function],
        cwd=ROOT, capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip


def test_a_process_that_waits_too_long_writes_its_stacks_and_ends(hanging, tmp_path):
    done = hanging("waits_for_a_peer")
    assert done.returncode == EXIT_STATUS
    assert "rank 3" in done.stderr and "has made no progress for 1 s in: step 7" in done.stderr
    assert "fix:" in done.stderr
    stacks = (tmp_path / "stacks-rank-0003.txt").read_text()
    assert "in waits_for_a_peer" in stacks and stacks.startswith("rank 3 (process ")


def test_a_call_that_holds_the_interpreter_is_ended_too(hanging):
    done = hanging("holds_the_interpreter")
    assert done.returncode != 0
    assert "Timeout" in done.stderr and "in holds_the_interpreter" in done.stderr


def test_one_that_goes_on_is_left_alone_and_without_a_timeout_nothing_watches(tmp_path):
    with Watchdog(0.4, tmp_path, rank=0) as dog:
        for beat in range(8):
            dog.beat(f"step {beat}")
            dog._stopped.wait(0.1)
    with Watchdog(None, tmp_path, rank=0) as dog:
        assert not dog._thread.is_alive()
    assert list(tmp_path.iterdir()) == []
