"""The loop on one rank: resuming, skipping, stopping, schedules, and that it learns."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal

import pytest

from hl_scale.config import ConfigError
from hl_scale.engine import checkpoint
from hl_scale.engine.alignment import AlignmentWorkload
from hl_scale.engine.loop import TrainingAborted, _Loop, learning_rate, train

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture(scope="module")
def uninterrupted(single_process, tiny_config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "uninterrupted"
    train(tiny_config(directory))
    return directory


def state(directory):
    return checkpoint.read_full(checkpoint.newest(directory / "checkpoints")[0])


def equal(one, other):
    return all(one[name][kind].equal(other[name][kind]) for name in other for kind in other[name])


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def poison(monkeypatch, steps):
    """Make the targets of these steps (from 0) NaN."""
    collate, step = AlignmentWorkload.collate, _Loop.step
    current = []

    def watched(self, number, *arguments):
        current[:] = [number]
        return step(self, number, *arguments)

    def poisoned(self, samples):
        batch = collate(self, samples)
        if current[0] in steps:
            batch.target[0, 0, 0] = math.nan
        return batch

    monkeypatch.setattr(_Loop, "step", watched)
    monkeypatch.setattr(AlignmentWorkload, "collate", poisoned)


def test_stopping_and_resuming_equals_an_uninterrupted_run_bit_for_bit(uninterrupted, tiny_config, losses_of, tmp_path):
    config = tiny_config(tmp_path / "run")
    assert train(config, stop_at=3).step == 3
    assert train(config).step == 6
    assert losses_of(tmp_path / "run") == losses_of(uninterrupted)
    assert equal(state(tmp_path / "run"), state(uninterrupted))


def test_steps_after_the_last_checkpoint_are_repeated_and_logged_once(uninterrupted, tiny_config, losses_of, tmp_path):
    config = tiny_config(tmp_path / "run", {"training.save_every": 4})
    train(config)
    (tmp_path / "run" / "checkpoints" / "step-000006" / "manifest.json").unlink()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # cut short by a crash
    train(config)
    assert losses_of(tmp_path / "run") == losses_of(uninterrupted)


def test_a_finished_run_is_left_alone_and_gives_its_last_loss(uninterrupted, tiny_config, losses_of):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    result = train(tiny_config(uninterrupted))
    assert (result.step, result.loss, result.interrupted) == (6, losses_of(uninterrupted)[-1], False)
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_a_non_finite_step_is_skipped_and_counted_and_resuming_after_it_is_exact(
    tiny_config, tmp_path, monkeypatch, compute_dtype
):
    poison(monkeypatch, {2})
    settings = {"base.compute_dtype": compute_dtype, "training.save_every": 1}
    train(tiny_config(tmp_path / "whole", settings))
    train(tiny_config(tmp_path / "parts", settings), stop_at=4)
    train(tiny_config(tmp_path / "parts", settings))
    checkpoints = [checkpoint.read_full(checkpoint.verify(path)) for path in
                   checkpoint.find(tmp_path / "whole" / "checkpoints")]  # fmt: skip
    assert equal(checkpoints[2], checkpoints[1]) and not equal(checkpoints[3], checkpoints[2])
    assert [line["skipped_steps"] for line in metrics(tmp_path / "parts")] == [0, 0, 1, 1, 1, 1]
    assert math.isnan(metrics(tmp_path / "whole")[2]["loss"])
    assert equal(state(tmp_path / "parts"), state(tmp_path / "whole"))


def test_a_run_whose_first_step_is_skipped_saves_and_resumes_exactly(tiny_config, tmp_path, monkeypatch):
    poison(monkeypatch, {0})
    train(tiny_config(tmp_path / "whole", {"training.save_every": 1}))
    train(tiny_config(tmp_path / "parts", {"training.save_every": 1}), stop_at=1)
    train(tiny_config(tmp_path / "parts", {"training.save_every": 1}))
    assert [line["skipped_steps"] for line in metrics(tmp_path / "parts")] == [1] * 6
    assert equal(state(tmp_path / "parts"), state(tmp_path / "whole"))


def test_a_run_that_stays_non_finite_aborts_naming_its_pairs_and_keeps_its_last_weights(
    tiny_config, tmp_path, monkeypatch
):
    poison(monkeypatch, set(range(3, 40)))
    config = tiny_config(tmp_path / "run", {"training.steps": 40, "training.save_every": 1})
    with pytest.raises(TrainingAborted, match=r"5 non-finite steps in a row.*nonfinite-step-000008.json"):
        train(config)
    saved = [checkpoint.read_full(checkpoint.verify(path)) for path in checkpoint.find(tmp_path / "run/checkpoints")]
    assert [line["skipped_steps"] for line in metrics(tmp_path / "run")] == [0, 0, 0, 1, 2, 3, 4]
    assert all(equal(after, saved[2]) for after in saved[3:]) and not equal(saved[1], saved[2])
    dumps = sorted((tmp_path / "run").glob("nonfinite-step-*.json"))
    assert [path.name for path in dumps] == [f"nonfinite-step-{step:06d}.json" for step in (4, 5, 6, 7, 8)]
    (share,) = json.loads(dumps[0].read_text())["ranks"]
    assert share["passes"][0]["loss"] == "nan" and len(share["passes"][0]["samples"]) == 8


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_call_goes_on(uninterrupted, tiny_config, losses_of, tmp_path, monkeypatch, number):
    collate = AlignmentWorkload.collate
    calls = []

    def interrupted(self, samples):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return collate(self, samples)

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(AlignmentWorkload, "collate", interrupted)
        result = train(tiny_config(tmp_path / "run"))
    # Within the step it arrived in.
    assert (result.step, result.interrupted) == (3, True)
    assert result.checkpoint.name == "step-000003"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    train(tiny_config(tmp_path / "run"))
    assert losses_of(tmp_path / "run") == losses_of(uninterrupted)


def test_a_short_run_reduces_the_loss(tiny_config, losses_of, tmp_path):
    # One epoch is 6 steps: the mean over an epoch compares the same pairs.
    train(tiny_config(tmp_path / "run", {"training.steps": 24, "training.save_every": 24}))
    losses = losses_of(tmp_path / "run")
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])


def test_geomloss_gives_the_same_losses_as_the_native_solver(uninterrupted, tiny_config, losses_of, tmp_path):
    pytest.importorskip("geomloss")
    train(tiny_config(tmp_path / "run", {"objective.solver": "geomloss"}))
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(uninterrupted), rel=1e-4)


def test_a_changed_setting_is_refused_with_both_values(uninterrupted, tiny_config):
    before = (uninterrupted / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=r"training.learning_rate: 0.01 there, 0.5 now"):
        train(tiny_config(uninterrupted, {"training.learning_rate": 0.5}))
    assert (uninterrupted / "config.yaml").read_bytes() == before


def test_another_corpus_under_the_same_name_is_refused(tiny_config, write_tiny_corpus, tmp_path):
    corpus = write_tiny_corpus(tmp_path / "corpus")
    config = tiny_config(tmp_path / "run", {"data.directory": str(corpus)})
    train(config, stop_at=1)
    manifest = corpus / "manifest.json"
    manifest.write_text(manifest.read_text().replace("c" * 64, "d" * 64))
    with pytest.raises(checkpoint.CheckpointError, match="data_fingerprint cccccccccccc, now it is dddddddddddd"):
        train(config)


@pytest.fixture
def rates(tiny_config, tmp_path):
    def make(steps=100, **settings):
        overrides = {f"training.{key}": value for key, value in settings.items()}
        training = tiny_config(tmp_path, {"training.steps": steps, **overrides}).training
        return [learning_rate(training, step) / training.learning_rate for step in range(steps + 1)]

    return make


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_grows_linearly_to_the_peak(rates, schedule):
    values = rates(schedule=schedule, warmup_ratio=0.1)
    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert values[10] == pytest.approx(1.0)


def test_cosine_and_linear_end_at_the_minimum_and_pass_the_middle_half_way(rates):
    for schedule in ("cosine", "linear"):
        values = rates(schedule=schedule, warmup_ratio=0.0, minimum_learning_rate_ratio=0.2)
        assert values[50] == pytest.approx(0.6)
        assert values[100] == pytest.approx(0.2)
        assert all(now > later for now, later in itertools.pairwise(values))
    assert rates(schedule="linear", warmup_ratio=0.0)[25] == pytest.approx(0.75)
    assert rates(schedule="cosine", warmup_ratio=0.0)[25] == pytest.approx(0.5 * (1 + math.sqrt(0.5)))


def test_constant_stays_at_the_peak(rates):
    assert set(rates(schedule="constant", warmup_ratio=0.0)) == {1.0}


def test_one_step_with_warm_up_has_a_rate(rates):
    assert rates(steps=1, warmup_ratio=0.9)[0] == 1.0


def test_with_a_diameter_losses_are_those_of_each_pair_s_own_up_to_convergence(
    uninterrupted, tiny_config, losses_of, tmp_path
):
    train(tiny_config(tmp_path / "run", {"objective.diameter": 30.0}))
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(uninterrupted), rel=0.05)
    assert losses_of(tmp_path / "run") != losses_of(uninterrupted)
