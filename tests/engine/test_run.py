"""Opening a run directory again."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from hl_scale.base import load_base
from hl_scale.config import ConfigError, load_config
from hl_scale.engine import checkpoint
from hl_scale.engine.loop import train
from hl_scale.engine.run import load_generator, load_run

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture(scope="module")
def finished(single_process, tiny_config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "finished"
    train(tiny_config(directory))
    return directory


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.parametrize("step", [None, 2])
def test_the_loaded_hypernetwork_has_the_trained_weights(finished, step):
    run = load_run(finished, step)
    assert run.step == (step or 6)
    saved = checkpoint.read_full(checkpoint.verify(finished / "checkpoints" / f"step-{run.step:06d}"))
    loaded = run.hypernetwork.state_dict()
    assert {f"hypernetwork.{name}" for name in loaded} == set(saved)
    for name, tensor in loaded.items():
        assert tensor.flatten().equal(saved[f"hypernetwork.{name}"]["master"])
    assert not any(parameter.requires_grad for parameter in run.hypernetwork.parameters())


def test_a_loaded_run_adapts_the_base(finished):
    run = load_run(finished)
    ids = torch.tensor([[1, 5, 9, 12]])
    with torch.no_grad():
        bare = run.base.hidden_states(ids, torch.ones_like(ids))
        adapted = run.base.hidden_states(ids, torch.ones_like(ids), run.hypernetwork(torch.ones(1, 235)))
    assert not torch.allclose(bare, adapted, atol=1e-4)


def test_a_generator_needs_the_bases_config_alone_and_gives_the_same_factors(finished, tiny_model, tmp_path):
    shutil.copy(tiny_model / "config.json", tmp_path)
    run, generator = load_run(finished), load_generator(finished, model=str(tmp_path))
    expected, factors = run.hypernetwork(torch.ones(1, 235)), generator.hypernetwork(torch.ones(1, 235))
    assert generator.base.slots == run.base.slots and generator.base.fingerprint == run.base.fingerprint
    for slot in run.base.slots:
        assert factors.a[slot.path].equal(expected.a[slot.path]) and factors.b[slot.path].equal(expected.b[slot.path])


def test_a_generator_for_a_base_of_another_shape_is_refused(finished, tiny_model, tmp_path):
    config = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "head_dim": 32}))
    with pytest.raises(checkpoint.CheckpointError, match="does not fit"):
        load_generator(finished, model=str(tmp_path))


def test_its_configuration_reads_back_equal(finished, tiny_config):
    assert load_config(finished / "config.yaml", environment={}) == tiny_config(finished)


def test_another_base_is_refused(copied, tiny_config):
    changed = tiny_config(copied, {"base.double_quantization": False})
    with pytest.raises(checkpoint.CheckpointError, match="was trained on base"):
        load_run(copied, base=load_base(changed.base, changed.lora))


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not a run directory"):
        load_run(tmp_path)


def test_a_run_without_a_checkpoint_is_refused(copied):
    shutil.rmtree(copied / "checkpoints")
    with pytest.raises(ConfigError, match="no usable checkpoint"):
        load_run(copied)


def test_a_run_whose_checkpoints_are_all_damaged_says_which_files(copied):
    for shard in copied.glob("checkpoints/*/*.safetensors"):
        shard.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"step-000006.*damaged.*step-000002.*damaged"):
        load_run(copied)


def test_a_step_that_was_not_saved_is_refused_with_those_that_were(copied):
    with pytest.raises(checkpoint.CheckpointError, match="found: step-000002, step-000004, step-000006"):
        load_run(copied, step=3)
