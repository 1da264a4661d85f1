"""A run directory belongs to one process; the system gives it back however that one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hl_scale.config import ConfigError
from hl_scale.engine.run_lock import exclusive
from hl_scale.engine.zero3 import World

ROOT = Path(__file__).resolve().parents[2]
ALONE = World(0, 1, torch.device("cpu"))
HOLDER = """
import sys, torch
from pathlib import Path
from hl_scale.engine.run_lock import exclusive
from hl_scale.engine.zero3 import World
with exclusive(Path(sys.argv[1]), World(0, 1, torch.device("cpu"))):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_with_the_name_of_the_first(holder, tmp_path):
    second = exclusive(tmp_path / "run", ALONE, wait=0.1)
    with pytest.raises(ConfigError, match=rf"in use by process {holder.pid} on .*(?s:.)*fix: wait"):
        second.__enter__()


def test_a_killed_process_holds_nothing(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with exclusive(tmp_path / "run", ALONE, wait=0.1):
        assert str(os.getpid()) in (tmp_path / "run" / ".lock.json").read_text()


def test_one_process_after_the_other_is_fine(tmp_path):
    for _ in range(2):
        with exclusive(tmp_path / "run", ALONE, wait=0.1):
            pass
