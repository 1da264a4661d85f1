"""Bytes on the wire against DeepSpeed's own log of its collectives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hl_scale.planning import wire
from hl_scale.planning.wire import plan_wire

STEPS = 5
ZERO3 = {"base.placement": "zero3"}
SCENARIOS = {
    "replicated": {},
    "zero3": ZERO3,
    "accumulated": {**ZERO3, "training.micro_batch_size": 1},
    "small parameters stay": {**ZERO3, "zero3.parameter_persistence_threshold": 1000},
    "freed after use": {**ZERO3, "zero3.maximum_reuse_distance": 0},
    "no prefetch": {**ZERO3, "zero3.maximum_reuse_distance": 0, "zero3.prefetch_bucket_size": 0},
    "some reuse": {**ZERO3, "zero3.maximum_reuse_distance": 20_000, "zero3.prefetch_bucket_size": 5_000},
    "recomputed": {**ZERO3, "zero3.maximum_reuse_distance": 0, "base.gradient_checkpointing": True},
    "tiled": {**ZERO3, "base.mlp_tile_tokens": 3},
    "generated per block": {
        **ZERO3, "zero3.maximum_reuse_distance": 0, "base.gradient_checkpointing": True,
        "hypernetwork.generate_per_block": True,
    },
    "text to lora": {
        **ZERO3, "zero3.maximum_reuse_distance": 0, "base.gradient_checkpointing": True,
        "hypernetwork": {
            "kind": "text_to_lora", "size": "S", "latent_width": 16, "head_width": 32, "generate_per_block": True,
        },
    },
    "answers of tasks": {**ZERO3, "zero3.maximum_reuse_distance": 0, "zero3.prefetch_bucket_size": 0},
}  # fmt: skip
TASKS = {"answers of tasks"}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def logged(request, tiny_config, tiny_tasks, write_yaml, on_ranks, tmp_path_factory):
    """ranks, configurations, and what DeepSpeed's collectives had sent after each step of each."""
    root, ranks = tmp_path_factory.mktemp("wire"), request.param
    configs = {
        name: tiny_config(
            root / name,
            {
                "training.steps": STEPS,
                "training.save_every": STEPS,
                "zero3.log_communication": True,
                **settings,
                **(tiny_tasks if name in TASKS else {}),
            },
        )
        for name, settings in SCENARIOS.items()
    }
    paths = {name: str(write_yaml(config, root / f"{name}.yaml")) for name, config in configs.items()}
    (root / "scenarios.json").write_text(json.dumps(paths))
    script = Path(__file__).with_name("communication_scenarios.py")
    done = on_ranks(script, str(root / "scenarios.json"), str(root / "answer.json"), ranks=ranks)
    assert done.returncode == 0, done.stderr[-4000:]
    return ranks, configs, json.loads((root / "answer.json").read_text())


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_step_sends_what_was_planned(logged, name):
    ranks, configs, answers = logged
    before, after = answers[name][-2:]
    sent = {key: entry["bytes"] - before[key]["bytes"] for key, entry in after.items()}
    planned = plan_wire(configs[name], ranks, tokens=16).parts
    reduced = planned.pop(wire.GRADIENTS)
    sums = planned.pop(wire.SUMS)
    assert sent.get("all_gather_into_tensor", 0) == pytest.approx(sum(planned.values()), rel=0.03)
    assert sent["reduce_scatter_tensor"] == pytest.approx(reduced, rel=0.03)
    assert sent["all_reduce"] == pytest.approx(sums)


def test_metrics_hold_bytes_and_seconds_of_each_step(logged):
    ranks, configs, _ = logged
    lines = (Path(configs["zero3"].run.directory) / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["communication_bytes"] == pytest.approx(plan_wire(configs["zero3"], ranks, tokens=16).total, rel=0.03)
    assert 0 < last["communication_seconds"] < last["seconds"]


def test_one_rank_sends_nothing(tiny_config, tmp_path):
    assert plan_wire(tiny_config(tmp_path, ZERO3), 1).total == 0
