"""Two ranks under the DeepSpeed launcher: what happens to them, what is kept, and that the same command goes on from
there to the result of a run that nothing happened to, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hl_scale.engine import checkpoint

pytestmark = pytest.mark.faults
ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVE_EVERY = 12, 4


@pytest.fixture
def recovered(start, finish, watching, same_result):
    """recovered(directory, overrides) -> (step it went on from, seconds to its first new step); checks the result."""

    def again(directory, overrides=None):
        found, _ = checkpoint.newest(directory / "checkpoints")
        kept = found.step if found else 0
        began = time.monotonic()
        process = start(directory, overrides=overrides)
        if kept < STEPS:  # metrics after the checkpoint are dropped first
            metrics, before = directory / "metrics.jsonl", time.time_ns()
            watching.until(
                lambda: metrics.is_file() and metrics.stat().st_mtime_ns > before and watching.steps(directory) > kept,
                process,
            )
        seconds = time.monotonic() - began
        assert finish(process) == 0, watching.log(directory)
        same_result(directory)
        left = [path.name for path in (directory / "checkpoints").iterdir() if path.name.startswith(".")]
        assert left == [], "nothing half written stays"
        assert (directory / "checkpoints" / "LATEST").read_text() == f"step-{STEPS:06d}\n"
        return kept, seconds

    return again


# Where the process dies, on which rank, at which step (from 1), and the newest checkpoint afterwards.
KILLS = [
    ("forward", 1, 7, 4),
    ("forward", 0, 3, 0),
    ("all_reduce", 1, 7, 4),
    ("all_reduce", 0, 6, 4),
    ("save_begun", 1, 8, 4),
    ("half_shard", 1, 8, 4),
    ("shard_unflushed", 0, 8, 4),
    ("shards_exchanged", 0, 8, 4),
    ("manifest_written", 0, 8, 4),
    ("renamed", 0, 8, 8),
    ("latest_replaced", 0, 8, 8),
    ("retention_begun", 0, 12, 12),
]


@pytest.mark.parametrize(("at", "rank", "step", "kept"), KILLS)
def test_a_killed_rank_costs_at_most_one_save_interval_and_changes_nothing(
    start, finish, recovered, watching, record, tmp_path, at, rank, step, kept
):
    directory = tmp_path / "run"
    fault = {"at": at, "rank": rank, "step": step, "marker": str(tmp_path / "happened")}
    assert finish(start(directory, fault)) != 0
    assert (tmp_path / "happened").exists(), watching.log(directory)
    done = watching.steps(directory)
    assert step - 1 <= done <= step
    went_on_from, seconds = recovered(directory)
    assert went_on_from == kept
    redone = done - kept
    assert 0 <= redone <= SAVE_EVERY
    record(
        f"SIGKILL of rank {rank}: {at.replace('_', ' ')}, step {step}", f"step {kept}", redone, seconds, "bit-identical"
    )


def test_a_kill_while_a_checkpoint_is_written_in_the_background_costs_no_more(
    start, finish, recovered, watching, record, tmp_path
):
    directory, settings = tmp_path / "run", {"training.save_in_background": True}
    fault = {"at": "half_shard", "rank": 1, "step": 8, "marker": str(tmp_path / "happened")}
    assert finish(start(directory, fault, settings)) != 0
    done = watching.steps(directory)
    kept, seconds = recovered(directory, settings)
    assert kept == 4 and done - kept <= 2 * SAVE_EVERY
    record("SIGKILL of rank 1: half a shard written in the background", "step 4", done - kept, seconds, "bit-identical")


def test_a_stopped_rank_ends_the_run_with_the_stacks_of_those_that_waited(
    start, finish, recovered, watching, record, tmp_path
):
    directory = tmp_path / "run"
    fault = {"at": "stopped", "rank": 1, "step": 7, "marker": str(tmp_path / "happened")}
    process = start(directory, fault, {"training.hang_timeout_seconds": 6.0})
    stopped = watching.until((tmp_path / "happened").exists, process)
    assert finish(process) != 0
    detected = time.monotonic() - stopped
    log = watching.log(directory)
    assert "rank 0" in log and "has made no progress for 6 s in: step 7" in log
    stacks = (directory / "stacks-rank-0000.txt").read_text()
    assert "loop.py" in stacks and "in step" in stacks
    assert not (directory / "stacks-rank-0001.txt").exists(), "the one without a file is the one that did not answer"
    done = watching.steps(directory)
    kept, seconds = recovered(directory)
    assert kept == 4
    record(
        "SIGSTOP of rank 1 in step 7 (hang, timeout 6 s)", "step 4", done - kept,
        f"{detected:.1f} to end, {seconds:.1f}", "bit-identical; stacks written",
    )  # fmt: skip


def test_a_disk_that_fills_up_during_a_save_leaves_the_earlier_checkpoint(
    start, finish, recovered, watching, record, tmp_path
):
    if os.geteuid() != 0:
        pytest.skip("a file system of its own to fill needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        directory, filler = disk / "run", disk / "filler"
        fault = {"at": "disk_full", "rank": 1, "step": 8, "marker": str(tmp_path / "happened"), "filler": str(filler)}
        assert finish(start(directory, fault)) != 0
        assert "the checkpoint of step 8 was not written" in _unwrapped(watching.log(directory))
        assert [path.name for path in (directory / "checkpoints").glob("*step*")] == ["step-000004"]
        filler.unlink()
        kept, seconds = recovered(directory)
        assert kept == 4
        record("disk full while rank 1 writes, step 8", "step 4", 4, seconds, "bit-identical; message names the space")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def _unwrapped(text: str) -> str:
    return " ".join(text.split())


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(_cut, "is damaged"), (_flip, "sha256 is not"), (Path.unlink, "is missing")],
    ids=["a truncated file", "a flipped bit", "a missing shard"],
)
@pytest.mark.parametrize("shard", [0, 1])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    undisturbed, start, finish, recovered, watching, record, tmp_path, damage, reason, shard, request
):
    directory = tmp_path / "run"
    shutil.copytree(undisturbed, directory)
    shutil.rmtree(directory / "checkpoints" / "step-000012")
    damage(directory / "checkpoints" / "step-000008" / f"rank-{shard:04d}-of-0002.safetensors")
    assert checkpoint.newest(directory / "checkpoints")[0].step == 4
    kept, seconds = recovered(directory)
    log = _unwrapped(watching.log(directory)).replace(" ", "")
    assert kept == 4 and reason.replace(" ", "") in log and "resumingfromstep4" in log
    if shard:
        record(
            f"{request.node.callspec.id.split('-', 1)[1]} of rank 1", "step 4", 4, seconds, "bit-identical; file named"
        )


def test_a_second_run_on_the_same_directory_is_refused_and_the_first_goes_on(
    start, finish, watching, same_result, process_environment, record, tmp_path
):
    directory = tmp_path / "run"
    fault = {"at": "stopped", "rank": 1, "step": 5, "marker": str(tmp_path / "happened")}
    process = start(directory, fault)  # held still while the second one tries
    watching.until((tmp_path / "happened").exists, process)
    second = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(directory.with_suffix(".yaml"))],
        env=process_environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    owner = json.loads((directory / ".lock.json").read_text())
    assert second.returncode == 2 and f"is in use by process {owner['process']} on {owner['host']}" in second.stderr
    _continue_stopped(process.pid)
    assert finish(process) == 0, watching.log(directory)
    same_result(directory)
    record("a second run on the same directory", "everything", 0, "none", "refused by name; the first bit-identical")


def _continue_stopped(group: int) -> None:
    import psutil

    for child in psutil.Process(group).children(recursive=True):
        if child.status() == psutil.STATUS_STOPPED:
            child.send_signal(signal.SIGCONT)


def test_ctrl_c_saves_the_step_at_hand(start, finish, recovered, watching, record, tmp_path):
    directory, settings = tmp_path / "run", {"training.save_every": STEPS}
    process = start(directory, overrides=settings)
    watching.until(lambda: watching.steps(directory) >= 3, process)
    os.killpg(process.pid, signal.SIGINT)
    assert finish(process) != 0
    done = watching.steps(directory)
    kept, seconds = recovered(directory, settings)
    assert kept == done
    record("Ctrl-C (SIGINT to the process group)", "the step at hand", 0, seconds, "bit-identical")
