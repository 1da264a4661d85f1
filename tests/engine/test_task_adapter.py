"""Training on top of a frozen task adapter: its targets, its gradients, and what a run keeps of it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hl_scale.base import load_base, read_task_adapter
from hl_scale.cli import app
from hl_scale.config import ConfigError
from hl_scale.data.corpus import load_corpus
from hl_scale.data.peft_directory import AdapterError
from hl_scale.engine import checkpoint, inputs
from hl_scale.engine.alignment import AlignmentWorkload
from hl_scale.engine.loop import train
from hl_scale.engine.run import composed_factors, load_generator, load_run, load_task_adapter, settings_fingerprint
from hl_scale.engine.targets import TargetCache, tokenize
from hl_scale.engine.zero3 import World
from hl_scale.hypernetwork import build_hypernetwork
from hl_scale.objectives.alignment import AlignmentObjective
from hl_scale.serving import validate_adapter

pytestmark = pytest.mark.usefixtures("single_process")
ALONE = World(0, 1, torch.device("cpu"))
TEXTS = ["the old man", "nobody asked them to leave before it rained again", "she said that"]


def write_adapter(tiny_model, directory, seed=0):
    """A LoRA that PEFT made, for query, key and down projections: one module shared with the slots, two beyond."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "k_proj", "down_proj"]),
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    return write_adapter(tiny_model, tmp_path_factory.mktemp("adapters") / "task")


@pytest.fixture(scope="module")
def trained(single_process, tiny_config, adapter, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "on-task"
    train(tiny_config(directory, {"lora.task_adapter": adapter}))
    return directory


def opened(config):
    base = load_base(config.base, config.lora)
    return base, load_task_adapter(config, base)


def test_targets_are_the_states_of_the_base_with_the_task_adapter(tiny_config, adapter, tmp_path):
    base, task = opened(tiny_config(tmp_path, {"lora.task_adapter": adapter}))
    objective = AlignmentObjective(tiny_config(tmp_path).alignment)
    cache = TargetCache(tmp_path / "targets", base, objective, task)
    cache.prepare(TEXTS, ALONE)
    for text in TEXTS:
        ids, mask = tokenize(base, [text])
        with torch.no_grad():
            expected, bare = (base.hidden_states(ids, mask, f)[0, 1:] / 8 for f in (task.factors, None))
        torch.testing.assert_close(cache.get(text), expected, rtol=1e-5, atol=1e-6)
        assert (expected - bare).abs().max() > 0.05


def test_targets_are_kept_apart_by_task_adapter_and_shared_with_earlier_ones_without(
    tiny_config, tiny_model, adapter, tmp_path
):
    config = tiny_config(tmp_path)
    base, objective = load_base(config.base, config.lora), AlignmentObjective(config.alignment)
    other = write_adapter(tiny_model, tmp_path / "other", seed=1)
    tasks = [None, *(read_task_adapter(path, base, config.base) for path in (adapter, other))]
    directories = {TargetCache(tmp_path / "targets", base, objective, task).directory.name for task in tasks}
    assert len(directories) == 3
    assert TargetCache(tmp_path / "targets", base, objective).directory.name in directories


WAYS = {
    "plain": {},
    "packed": {"training.packed": True},
    "everything": {
        "training.packed": True, "base.gradient_checkpointing": True, "base.mlp_tile_tokens": 7,
        "hypernetwork.generate_per_block": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_gradients_on_top_of_a_task_adapter_are_those_of_a_float64_model_with_both(
    way, tiny_config, adapter, tmp_path, reference_gradients
):
    config = tiny_config(tmp_path, {"lora.task_adapter": adapter, **WAYS[way]})
    base, task = opened(config)
    workload = AlignmentWorkload(config, base, load_corpus(config.data.directory), task)
    workload.targets = TargetCache(tmp_path / "targets", base, workload.objective, task)
    workload.prepare(ALONE, lambda text: None)
    check_gradients(config, workload, reference_gradients(config))


@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_tasks_on_top_of_a_task_adapter_are_those_of_a_float64_model_with_both(
    way, tiny_config, tiny_tasks, adapter, tmp_path, reference_gradients
):
    overrides = {**tiny_tasks, "lora.task_adapter": adapter, **WAYS[way]}
    if way == "everything":  # factors that exist for one block at a time have no penalty
        overrides["objective"] = {**tiny_tasks["objective"], "weight_penalty": 0.0, "unfamiliar_penalty": 0.0}
    config = tiny_config(tmp_path, overrides)
    workload = inputs.load_inputs(config, ALONE)
    workload.prepare(ALONE, lambda text: None)
    check_gradients(config, workload, reference_gradients(config))


def check_gradients(config, workload, expected):
    torch.manual_seed(config.run.seed)
    hypernetwork = build_hypernetwork(config.hypernetwork, config.lora, workload.base.slots, workload.condition_size)
    workload.module(hypernetwork)(workload.collate(workload.sampler.batch(0))).backward()
    assert any(gradient.norm() > 0 for gradient in expected.values())
    for name, parameter in hypernetwork.named_parameters():
        error = torch.linalg.norm(parameter.grad.double() - expected[name])
        assert error <= 1e-3 * torch.linalg.norm(expected[name]), name


def test_a_run_stopped_and_resumed_elsewhere_on_its_task_adapter_is_the_uninterrupted_one(
    trained, tiny_config, adapter, losses_of, tmp_path
):
    moved = shutil.copytree(adapter, tmp_path / "moved")
    train(tiny_config(tmp_path / "run", {"lora.task_adapter": adapter}), stop_at=2)
    train(tiny_config(tmp_path / "run", {"lora.task_adapter": str(moved)}))
    assert losses_of(tmp_path / "run") == losses_of(trained)


@pytest.mark.parametrize("change", ["other", "none"])
def test_a_run_does_not_go_on_with_another_task_adapter_or_without(trained, tiny_config, tiny_model, change, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    other = write_adapter(tiny_model, tmp_path / "other", seed=1) if change == "other" else None
    config = tiny_config(run, {"lora.task_adapter": other, "training.steps": 6})
    workload = inputs.load_inputs(config, ALONE)
    with pytest.raises(checkpoint.CheckpointError, match=r"trained on task adapter \w{12}, lora.task_adapter is now"):
        inputs.find_checkpoint(config, workload, ALONE)


def test_a_run_that_was_trained_without_one_does_not_go_on_with_one(tiny_config, adapter, tmp_path):
    train(tiny_config(tmp_path / "run"), stop_at=2)
    config = tiny_config(tmp_path / "run", {"lora.task_adapter": adapter})
    with pytest.raises(checkpoint.CheckpointError, match=r"trained on task adapter None, lora\.task_adapter is now"):
        inputs.find_checkpoint(config, inputs.load_inputs(config, ALONE), ALONE)


def test_a_loaded_run_knows_its_task_adapter_and_a_generator_its_fingerprint(trained, adapter, tiny_config):
    run, generator = load_run(trained), load_generator(trained)
    assert run.task_adapter.fingerprint == run.task_adapter_fingerprint == generator.task_adapter_fingerprint
    assert generator.task_adapter is None
    composed = composed_factors(run, torch.ones(2, 235), run.task_adapter)
    alone = composed_factors(run, torch.ones(235))
    assert (composed.conditions, composed.rank, alone.conditions, alone.rank) == (2, 7, 1, 4)
    assert {slot.module for slot in composed.slots} == {"q_proj", "k_proj", "v_proj", "down_proj"}


def test_the_command_writes_the_sum_and_says_what_the_run_was_trained_on(trained, adapter, tmp_path):
    options = ["--condition", "dialect:Nigerian English", "--device", "cpu"]
    for name, more in (("alone", []), ("both", ["--with-adapter", adapter, "--profile", "portable"])):
        done = CliRunner().invoke(app, ["generate", str(trained), *options, *more, "--out", str(tmp_path / name)])
        assert done.exit_code == 0, done.exception
    alone, both = (validate_adapter(tmp_path / name) for name in ("alone", "both"))
    assert (alone.rank, len(alone.slots), both.rank, len(both.slots)) == (4, 4, 8, 8)
    run = load_run(trained)
    assert both.provenance["task_adapter_fingerprint"] == run.task_adapter.fingerprint
    assert "task_adapter_fingerprint" not in alone.provenance
    for facts in (alone, both):
        assert facts.provenance["trained_on_task_adapter"] == run.task_adapter.fingerprint


def test_the_command_adds_to_every_one_of_many_adapters(trained, adapter, tmp_path):
    arguments = ["generate", str(trained), "--all-dialects", "--with-adapter", adapter, "--out", str(tmp_path / "all")]
    done = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert done.exit_code == 0 and "50 written" in done.output
    ranks = {validate_adapter(directory).rank for directory in (tmp_path / "all").iterdir()}
    assert ranks == {7} and len(list((tmp_path / "all").iterdir())) == 50


def test_a_run_whose_task_adapter_was_changed_is_not_opened(trained, adapter, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    task = shutil.copytree(adapter, tmp_path / "task")
    settings = json.loads((task / "adapter_config.json").read_text())
    (task / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 6}))
    text = (run / "config.yaml").read_text().replace(adapter, str(task))
    (run / "config.yaml").write_text(text)
    with pytest.raises(checkpoint.CheckpointError, match="restore that adapter"):
        load_run(run)
    shutil.rmtree(task)
    with pytest.raises(AdapterError, match="no such directory"):
        load_run(run)


def test_the_settings_of_a_run_without_a_task_adapter_have_the_fingerprint_they_had(tiny_config, adapter, tmp_path):
    plain = tiny_config(tmp_path)
    assert "task_adapter" not in str(plain.model_dump(exclude_defaults=True))
    assert settings_fingerprint(plain) == settings_fingerprint(tiny_config(tmp_path, {"lora.task_adapter": adapter}))


def test_a_task_adapter_is_for_runs_that_run_the_base(tiny_config, tiny_tasks, adapter, tmp_path):
    with pytest.raises(ConfigError, match=r"'reconstruction' does not run the base: leave lora.task_adapter out"):
        objective = {"kind": "reconstruction", "library": str(tmp_path)}
        tiny_config(tmp_path, {**tiny_tasks, "objective": objective, "lora.task_adapter": adapter})
