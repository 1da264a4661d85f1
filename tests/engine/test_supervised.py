"""Training on tasks: what a batch is does not matter to its loss, a run goes on where it stopped, and it learns."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from hl_scale.base import load_base
from hl_scale.config import ConfigError
from hl_scale.data.tasks import open_tasks
from hl_scale.engine import checkpoint
from hl_scale.engine.loop import train
from hl_scale.engine.run import load_run
from hl_scale.engine.supervised import SupervisedWorkload
from hl_scale.hypernetwork import build_hypernetwork

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture(scope="module")
def base(tiny_config, tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("base"))
    return load_base(config.base, config.lora)


@pytest.fixture
def job(tiny_config, tiny_tasks, base, tmp_path):
    """job(overrides) -> workload and module with random factors that change something."""

    def make(overrides=None):
        config = tiny_config(tmp_path / "run", {**tiny_tasks, **(overrides or {})})
        workload = SupervisedWorkload(config, base, open_tasks(config.tasks))
        workload.vectors.prepare()
        torch.manual_seed(3)
        hypernetwork = build_hypernetwork(config.hypernetwork, config.lora, base.slots, workload.condition_size)
        for parameter in hypernetwork.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return workload, workload.module(hypernetwork)

    return make


def gradients(module):
    return torch.cat([parameter.grad.flatten() for parameter in module.hypernetwork.parameters()])


def test_packed_and_padded_batches_have_one_loss_and_gradient(job):
    found = []
    for packed in (False, True):
        workload, module = job({"training.packed": packed})
        loss = module(workload.collate(workload.sampler.batch(1)))
        loss.backward()
        found.append((loss.item(), gradients(module)))
    (padded, one), (packed, other) = found
    assert packed == pytest.approx(padded, rel=1e-5)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(one.abs().max()))


def test_an_example_has_the_same_loss_whatever_it_is_batched_with(job):
    workload, module = job({"training.packed": True})
    module.eval()
    rows = workload.sampler.batch(0)
    batch = workload.collate(rows)
    together = module.example_losses(batch, module.hypernetwork(batch.conditions))
    order = sorted(rows.tolist(), key=lambda row: (row[0], row[1]))
    for number, row in enumerate(order):
        first = next(other for other in order if other[:2] == row[:2])
        alone = workload.collate(np.array([row]))
        vector = workload.vectors.vector(row[0], row[1], first[3])
        alone = dataclasses.replace(alone, conditions=torch.from_numpy(vector)[None])
        loss = module.example_losses(alone, module.hypernetwork(alone.conditions))
        assert loss.item() == pytest.approx(together[number].item(), rel=1e-4)


def test_a_stopped_run_goes_on_bit_for_bit(tiny_config, tiny_tasks, losses_of, tmp_path):
    overrides = {**tiny_tasks, "training.packed": True}
    train(tiny_config(tmp_path / "whole", overrides))
    train(tiny_config(tmp_path / "parts", overrides), stop_at=3)
    train(tiny_config(tmp_path / "parts", overrides))
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")
    one, other = (
        checkpoint.read_full(checkpoint.newest(tmp_path / name / "checkpoints")[0]) for name in ("whole", "parts")
    )
    assert all(one[name][kind].equal(other[name][kind]) for name in one for kind in one[name])


def test_training_learns_its_tasks_and_the_adapter_depends_on_the_description(tiny_config, tiny_tasks, tmp_path):
    quiet = {"conditions": {"encoder": "base"}, "objective": {"kind": "supervised"}}
    steps = {"training.steps": 40, "training.save_every": 20, "training.learning_rate": 2e-2}
    train(tiny_config(tmp_path, {**tiny_tasks, **quiet, **steps}))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert lines[-1]["condition_effect"] > 0.01
    run = load_run(tmp_path)
    named, worded = run.conditions.parse("task:last"), run.conditions.parse("description:said the last")
    np.testing.assert_allclose(named.vector, worded.vector, atol=1e-4)
    with pytest.raises(ConfigError, match="is not understood"):
        run.conditions.parse("dialect:Nigerian English")


def test_a_prompted_run_reads_the_description_before_the_input(job, base):
    workload, _ = job({"data": {**workload_data(job), "description_in_prompt": True}})
    (row,) = workload.sampler.batch(0)[:1].tolist()
    batch = workload.collate(np.array([row]))
    text = base.tokenizer.decode(batch.input_ids[0])
    task = workload.tasks[row[0]]
    words = (task.descriptions[row[1]] + " " + task.train[row[2]].input).split()
    assert "".join(text.split()).startswith("<bos>" + "".join(words))


def workload_data(job):
    return job()[0].config.data.model_dump()


def test_a_variety_follows_the_description_where_it_is_asked_for(job):
    from hl_scale.conditions import typology

    plain, _ = job()
    workload, _ = job({"conditions": {"encoder": "base", "with_typology": True}})
    assert workload.condition_size == plain.condition_size + typology.NUM_FEATURES
    found = workload.vectors.conditions.parse("task:first; dialect:NgE")
    np.testing.assert_array_equal(found.vector[plain.condition_size :], typology.vector("Nigerian English"))
    assert not workload.vectors.vector(0, 0, 0)[plain.condition_size :].any()


def test_one_hot_conditions_know_the_trained_tasks_alone(job):
    workload, _ = job({"conditions": {"kind": "one_hot"}})
    assert workload.condition_size == 3
    conditions = workload.vectors.conditions
    np.testing.assert_allclose(np.linalg.norm(conditions.parse("task:last").vector), np.sqrt(3))
    with pytest.raises(ConfigError, match="is no trained task"):
        conditions.parse("task:second")


def test_an_answer_longer_than_the_context_is_refused_before_anything_is_written(tiny_config, tiny_tasks, tmp_path):
    data = {**tiny_tasks["data"], "maximum_tokens": 5}
    with pytest.raises(ConfigError, match=r"task first: an example has \d+ tokens \(\d+ of its answer\), more than 5"):
        train(tiny_config(tmp_path / "run", {**tiny_tasks, "data": data}))
    assert not (tmp_path / "run").exists()
