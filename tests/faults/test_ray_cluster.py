"""A Ray cluster of three nodes: nodes that go, come, and announce it, and workers that die or hang. The run goes on by
itself, from the newest checkpoint, at the world size there is."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hl_scale.engine import checkpoint

pytestmark = pytest.mark.faults
SCRIPT = Path(__file__).with_name("ray_cluster.py")
STEPS, SAVE_EVERY = 200, 10
TOLERANCE = 1e-3
"""Relative, of losses after up to 200 steps: float32 sums over other numbers of ranks round differently, and training
makes differences grow."""


@pytest.fixture(scope="module")
def ray_config(tiny_config):
    """ray_config(directory, overrides) -> 200 steps of 48 pairs in passes of 4, a checkpoint every 10, all kept."""

    def make(directory, overrides=None):
        return tiny_config(
            directory,
            {
                "training.steps": STEPS, "training.save_every": SAVE_EVERY, "training.keep_checkpoints": 1000,
                "training.global_batch_size": 48, "training.micro_batch_size": 4, "training.learning_rate": 1e-3,
                "cluster.storage_path": str(directory.parent / "ray"), "cluster.start_timeout_seconds": 15.0,
                "cluster.resize_interval_seconds": 3.0, **(overrides or {}),
            },
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def on_cluster(ray_config, write_yaml, process_environment):
    """on_cluster(directory, what, overrides) -> (what training returned, events) of one run on a cluster of its own."""

    def run(directory, what, overrides=None):
        directory.parent.mkdir(parents=True, exist_ok=True)
        config = write_yaml(ray_config(directory, overrides), directory.with_suffix(".yaml"))
        answer, log = directory.with_suffix(".json"), directory.with_suffix(".log")
        environment = {key: value for key, value in process_environment.items() if key != "RAY_ADDRESS"}
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, str(SCRIPT), str(config), what, str(answer)], env=environment,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(timeout=420)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        assert status == 0, log.read_text()[-6000:]
        told = json.loads(answer.read_text())
        assert told["error"] is None, told["error"] + log.read_text()[-6000:]
        assert told["outcome"]["step"] == STEPS
        return told["outcome"], told["events"]

    return run


@pytest.fixture(scope="module")
def expected(single_process, ray_config, losses_of, tmp_path_factory):
    """Losses of the same training in one process that nothing happens to."""
    from hl_scale.engine.loop import train

    directory = tmp_path_factory.mktemp("ray") / "undisturbed"
    train(ray_config(directory))
    return losses_of(directory)


def world_sizes(directory):
    """World size that wrote each checkpoint, repeats left out."""
    sizes = [checkpoint.read_manifest(path).world_size for path in checkpoint.find(directory / "checkpoints")]
    return [size for number, size in enumerate(sizes) if number == 0 or sizes[number - 1] != size]


def resumed(directory):
    """Steps of the checkpoints that the run went on from, in order."""
    log = directory.with_suffix(".log").read_text()
    # Two Ray nodes on one machine share a folder of logs, and each may pass a line on.
    return list(dict.fromkeys(int(step) for step in re.findall(r"resuming from step (\d+)", log)))


def test_a_node_goes_and_another_comes_and_the_run_ends_with_the_same_losses(
    on_cluster, expected, losses_of, record, tmp_path
):
    directory = tmp_path / "run"
    _, events = on_cluster(directory, "elastic", {"cluster.num_workers": (1, 3)})
    assert losses_of(directory) == pytest.approx(expected, rel=TOLERANCE)
    assert world_sizes(directory) == [3, 2, 3]
    for gone, back, kept in zip(events[0::2], events[1::2], resumed(directory), strict=True):
        # The group works on until Ray has seen what happened.
        assert kept >= gone[1] - SAVE_EVERY
        record(f"Ray: {gone[0]}, step {gone[1]}", f"step {kept}", "at most 10", back[2] - gone[2], "same losses (1e-3)")


@pytest.mark.parametrize(
    ("what", "overrides"), [("kill", {}), ("stop", {"training.hang_timeout_seconds": 10.0})], ids=["kill", "stop"]
)
def test_a_worker_that_dies_or_hangs_is_replaced_and_the_run_ends_with_the_same_losses(
    on_cluster, expected, losses_of, record, tmp_path, what, overrides
):
    directory = tmp_path / "run"
    _, (gone, back) = on_cluster(directory, what, overrides)
    assert losses_of(directory) == pytest.approx(expected, rel=TOLERANCE)
    (kept,) = resumed(directory)
    assert kept >= gone[1] - SAVE_EVERY
    record(f"Ray: {gone[0]}, step {gone[1]}", f"step {kept}", "at most 10", back[2] - gone[2], "same losses (1e-3)")


def test_a_node_that_announces_its_end_has_its_last_steps_saved(on_cluster, expected, losses_of, record, tmp_path):
    directory = tmp_path / "run"
    settings = {"cluster.num_workers": (1, 2), "training.save_every": 1000, "cluster.maximum_failures": 0}
    _, (announced, back) = on_cluster(directory, "preempt", settings)
    assert losses_of(directory) == pytest.approx(expected, rel=TOLERANCE)
    saved = [checkpoint.step_of(path) for path in checkpoint.find(directory / "checkpoints")]
    assert len(saved) >= 2 and announced[1] <= saved[0] < STEPS, "one checkpoint that no interval asked for"
    record(
        f"Ray: {announced[0]}, step {announced[1]}", f"step {saved[0]}", "to the end of the notice",
        back[2] - announced[2], "same losses (1e-3)",
    )  # fmt: skip
