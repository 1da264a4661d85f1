"""An undisturbed run to compare with, and a table of faults: build/faults.json, and at the end of the tests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hl_scale.config import Config
from hl_scale.engine import checkpoint

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "build" / "faults.json"
STEPS, SAVE_EVERY = 12, 4
SETTINGS = {"training.steps": STEPS, "training.save_every": SAVE_EVERY, "training.keep_checkpoints": 2}
DEADLINE = 300
"""Seconds until launched processes count as hanging."""
_ROWS: list[dict[str, Any]] = []


@pytest.fixture(scope="session")
def fault_config(tiny_config: Callable[..., Config]) -> Callable[..., Config]:
    """fault_config(directory, overrides) -> 12 steps, a checkpoint every 4, the newest two kept."""
    return lambda directory, overrides=None: tiny_config(directory, {**SETTINGS, **(overrides or {})})


@pytest.fixture(scope="session")
def start(
    fault_config: Callable[..., Config],
    write_yaml: Callable[[Config, Path], Path],
    deepspeed_command: Callable[..., list[str]],
    process_environment: dict[str, str],
) -> Callable[..., subprocess.Popen[str]]:
    """start(directory, fault, overrides, script) -> the running launcher of two ranks, in a process group of its own.

    Its output goes to <directory>.log.
    """

    def run(
        directory: Path,
        fault: dict[str, Any] | None = None,
        overrides: dict[str, Any] | None = None,
        ranks: int = 2,
    ) -> subprocess.Popen[str]:
        config = write_yaml(fault_config(directory, overrides), directory.with_suffix(".yaml"))
        script = Path(__file__).with_name("faulty_train.py") if fault else ROOT / "launch" / "train.py"
        environment = {**process_environment, "FAULT": json.dumps(fault)}
        with directory.with_suffix(".log").open("a") as log:
            return subprocess.Popen(
                deepspeed_command(script, "--config", str(config), ranks=ranks), cwd=ROOT, env=environment,
                stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def finish() -> Callable[[subprocess.Popen[str]], int]:
    """finish(process) -> its exit status; nothing of its group is left."""

    def wait(process: subprocess.Popen[str]) -> int:
        try:
            return process.wait(timeout=DEADLINE)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    return wait


@pytest.fixture(scope="session")
def undisturbed(
    start: Callable[..., subprocess.Popen[str]],
    finish: Callable[[subprocess.Popen[str]], int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Run directory of 12 steps on two ranks that nothing happened to; all its checkpoints are kept."""
    directory = tmp_path_factory.mktemp("faults") / "undisturbed"
    assert finish(start(directory, overrides={"training.keep_checkpoints": 10})) == 0, _log_of(directory)
    return directory


@pytest.fixture(scope="session")
def same_result(undisturbed: Path, losses_of: Callable[[Path], list[float]]) -> Callable[[Path], None]:
    """same_result(directory): that run has the losses and the final state of the undisturbed one, bit for bit."""

    def compare(directory: Path) -> None:
        assert losses_of(directory) == losses_of(undisturbed)
        mine, other = (checkpoint.newest(path / "checkpoints")[0] for path in (directory, undisturbed))
        assert mine is not None and other is not None and mine.step == other.step == STEPS
        first, second = checkpoint.read_full(mine), checkpoint.read_full(other)
        assert all(first[name][kind].equal(second[name][kind]) for name in second for kind in second[name])

    return compare


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """record(fault, kept, redone, recovery, result): a row of the table of faults."""

    def add(fault: str, kept: str, redone: int | str, recovery: float | str, result: str) -> None:
        _ROWS.append({"fault": fault, "kept": kept, "redone": redone, "recovery": recovery, "result": result})

    return add


@pytest.fixture(scope="session")
def watching() -> SimpleNamespace:
    """watching.log(directory), .steps(directory) and .until(condition, process)."""
    return SimpleNamespace(log=_log_of, steps=_steps_logged, until=_wait_for)


def _log_of(directory: Path) -> str:
    """The end of what its launchers have printed."""
    return directory.with_suffix(".log").read_text()[-6000:]


def _steps_logged(directory: Path) -> int:
    """Number of the last whole line of metrics.jsonl, or 0."""
    path = directory / "metrics.jsonl"
    lines = [line for line in path.read_text().split("\n")[:-1] if line] if path.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


def _wait_for(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> float:
    """Look until a condition holds; the monotonic clock then."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        assert process is None or process.poll() is None or condition(), "the process ended before"
        time.sleep(0.02)  # between looks, not instead of them
    return time.monotonic()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _ROWS:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(json.dumps(_ROWS, indent=1))
        terminalreporter.write_sep("-", f"faults ({TABLE.relative_to(ROOT)})")
        terminalreporter.write_line(
            "| fault | kept | steps redone | seconds to recover | result |\n|---|---|---|---|---|"
        )
        for row in _ROWS:
            seconds = row["recovery"] if isinstance(row["recovery"], str) else f"{row['recovery']:.1f}"
            cells = (row["fault"], row["kept"], row["redone"], seconds, row["result"])
            terminalreporter.write_line("| " + " | ".join(map(str, cells)) + " |")
