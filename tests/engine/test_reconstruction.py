"""Training on a library: a hypernetwork learns its adapters by their descriptions, exactly resumable."""

from __future__ import annotations

import json

import pytest
import torch

from hl_scale.base import load_base
from hl_scale.config import ConfigError
from hl_scale.engine.loop import train
from hl_scale.engine.run import load_run
from hl_scale.lora import LoraFactors
from hl_scale.lora_algebra import delta_distance
from hl_scale.serving.export import write_peft_adapter

pytestmark = pytest.mark.usefixtures("single_process")
TASKS = ("first", "last", "twice")
HYPERNETWORK = {"kind": "text_to_lora", "size": "L", "latent_width": 32, "head_width": 64}


@pytest.fixture(scope="module")
def base(tiny_config, tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("base"))
    return load_base(config.base, config.lora)


@pytest.fixture(scope="module")
def write_library(base, tiny_config, tmp_path_factory):
    """write_library(names, fingerprint) -> directory with an adapter of random factors for each task."""

    def write(names=TASKS, fingerprint=None):
        root = tmp_path_factory.mktemp("library")
        lora = tiny_config(root).lora
        generator = torch.Generator().manual_seed(5)
        for name in names:
            a = {s.path: torch.randn(1, lora.rank, s.in_features, generator=generator) for s in base.slots}
            b = {s.path: 0.1 * torch.randn(1, s.out_features, lora.rank, generator=generator) for s in base.slots}
            write_peft_adapter(
                LoraFactors(base.slots, a, b, 1.0),
                root / name,
                base_model_name_or_path="tiny",
                lora=lora,
                task_type="CAUSAL_LM",
                provenance={"base_fingerprint": fingerprint or base.fingerprint},
            )
        return root

    return write


def settings(tiny_tasks, library, **objective):
    conditions = {"encoder": "base"}
    objective = {"kind": "reconstruction", "library": str(library), **objective}
    return {"data": tiny_tasks["data"], "conditions": conditions, "objective": objective, "hypernetwork": HYPERNETWORK}


@pytest.mark.parametrize("targets", ["delta", "factors"])
def test_a_library_is_learnt_by_its_descriptions(targets, tiny_config, tiny_tasks, write_library, base, tmp_path):
    library = write_library()
    steps = {"training.steps": 150, "training.save_every": 75, "training.learning_rate": 1e-2}
    train(tiny_config(tmp_path, settings(tiny_tasks, library, targets=targets) | steps))
    first, *_, last = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert last["loss"] < 0.15 * first["loss"] and last["condition_effect"] > 1.0 * last["loss"]
    run = load_run(tmp_path, base=base)
    from hl_scale.data.library import Library

    there = Library(library, base.slots)
    for name in TASKS:
        vector = torch.from_numpy(run.conditions.parse(f"task:{name}").vector)[None]
        made, target = run.hypernetwork(vector), there.read(name)
        error = norm = 0.0
        for slot in base.slots:
            wanted = target.a[slot.path], target.b[slot.path]
            error += delta_distance(made.a[slot.path], made.b[slot.path], *wanted, made.scale, target.scale).item()
            zero = torch.zeros_like(wanted[0]), torch.zeros_like(wanted[1])
            norm += delta_distance(*zero, *wanted, made.scale, target.scale).item()
        assert error < 0.15 * norm


def test_a_stopped_reconstruction_goes_on_bit_for_bit(tiny_config, tiny_tasks, write_library, losses_of, tmp_path):
    overrides = settings(tiny_tasks, write_library())
    train(tiny_config(tmp_path / "whole", overrides))
    train(tiny_config(tmp_path / "parts", overrides), stop_at=3)
    train(tiny_config(tmp_path / "parts", overrides))
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")


def test_a_library_of_some_tasks_is_enough_and_one_of_none_is_refused(tiny_config, tiny_tasks, write_library, tmp_path):
    assert train(tiny_config(tmp_path / "two", settings(tiny_tasks, write_library(("first", "last"))))).step == 6
    with pytest.raises(ConfigError, match="no adapter for a seen task"):
        train(tiny_config(tmp_path / "none", settings(tiny_tasks, write_library(("second",)))))
    assert not (tmp_path / "none").exists()
    unlike = settings(tiny_tasks, write_library(("first", "last"))) | {"conditions": {"kind": "one_hot"}}
    with pytest.raises(ConfigError, match="lacks adapters of 1 seen tasks"):
        train(tiny_config(tmp_path / "numbered", unlike))


def test_adapters_of_another_base_are_refused(tiny_config, tiny_tasks, write_library, tmp_path):
    with pytest.raises(ConfigError, match="were trained on base ffffffffffff"):
        train(tiny_config(tmp_path / "run", settings(tiny_tasks, write_library(fingerprint="f" * 64))))


def test_a_library_that_changed_is_not_gone_on_with(tiny_config, tiny_tasks, write_library, tmp_path):
    library = write_library()
    train(tiny_config(tmp_path / "run", settings(tiny_tasks, library)), stop_at=3)
    (library / "last").rename(library / "kept")
    (library / "first").rename(library / "last")
    (library / "kept").rename(library / "first")
    with pytest.raises(ValueError, match="was trained with data_fingerprint"):
        train(tiny_config(tmp_path / "run", settings(tiny_tasks, library)))
