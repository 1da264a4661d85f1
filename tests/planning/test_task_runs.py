"""Plans of runs on tasks: supervised ones, and those on a library of adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hl_scale.config import load_config
from hl_scale.planning import plan_memory, plan_step, plan_wire
from hl_scale.planning.jobs import Job
from hl_scale.planning.phases import DESCRIPTIONS, ENCODER, GATHERED, LIBRARY, OBJECTIVE, PACKED
from hl_scale.planning.tracing import ACTIVATIONS, FACTORS
from hl_scale.planning.wire import BASE_BACKWARD, BASE_FORWARD, HYPERNETWORK_FORWARD

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TEXT_TO_LORA = {"kind": "text_to_lora", "latent_width": 16, "head_width": 32}


@pytest.fixture
def config(tiny_config, tiny_tasks, tmp_path):
    """config({"section.key": value}) -> a supervised run on tiny tasks."""

    def make(overrides=None):
        sections = {**tiny_tasks, "hypernetwork": TEXT_TO_LORA}
        return tiny_config(tmp_path / "run", json.loads(json.dumps(sections)) | (overrides or {}))

    return make


@pytest.fixture
def reconstruction(config, tmp_path):
    objective = {"kind": "reconstruction", "library": str(tmp_path / "library")}
    return lambda **options: config({"objective": {**objective, **options}, "base.placement": "zero3"})


def parts(plan):
    return {phase.name: phase.parts for phase in plan.phases}


def test_the_loss_holds_logits_of_some_tokens_whatever_the_batch(config):
    vocabulary = Job(config()).base.output_head.weight.shape[0]
    few, many = (
        parts(plan_memory(config({"objective.logit_tokens": rows}), 2, device="cuda", tokens=16))["loss"][OBJECTIVE]
        for rows in (3, 43)
    )
    assert many - few == pytest.approx(40 * (vocabulary + 64) * 4, rel=0.05)


def test_conditions_of_all_wordings_lie_in_host_memory(config):
    def held(device, **conditions):
        tokens = conditions.get("maximum_tokens") if conditions["encoder"] == "base_tokens" else None
        network = {**TEXT_TO_LORA, "condition_tokens": tokens}
        plan = plan_memory(config({"conditions": conditions, "hypernetwork": network}), 2, device=device)
        return {phase.name: phase.parts.get(DESCRIPTIONS) for phase in plan.phases}

    each = 4 * (4 * 4) * 64  # four tasks with four wordings each
    assert held("cpu", encoder="base")["forward"] == each
    assert held("cpu", encoder="base_tokens", maximum_tokens=12)["forward"] == 12 * each
    assert held("cuda", encoder="base_tokens", maximum_tokens=12)["forward"] == 0


def test_examples_of_a_condition_share_its_factors(config):
    each, shared = (
        Job(config({"data.examples_per_condition": group, "objective.weight_penalty": 0.0})).trace(8, 9).kept[FACTORS]
        for group in (1, 4)
    )
    assert each == pytest.approx(4 * shared, rel=0.2)


def test_large_batches_follow_from_two_small_ones(config):
    job = Job(config())
    two, four, many = (job.trace(groups * job.group, 9) for groups in (2, 4, 16))
    extended = four.extended(two, 6)
    for name in ("generated", "forward", "kept", "loss", "backward"):
        assert getattr(extended, name) == pytest.approx(getattr(many, name), rel=0.02), name


def test_the_output_layer_is_gathered_for_the_loss(config):
    freed = {"base.placement": "zero3", "zero3.maximum_reuse_distance": 0}
    head = Job(config()).base.output_head.weight
    gathered = parts(plan_memory(config(freed), 2, device="cuda", tokens=16))["loss"][GATHERED]
    assert gathered == head.numel() * head.element_size()


def test_a_base_that_encodes_descriptions_runs_before_training_and_an_encoder_stays(config):
    assert parts(plan_memory(config(), 2, process=1, tokens=16))["descriptions"][ACTIVATIONS] > 0
    sentences = config({"conditions.encoder": "package:all-minilm-l6-v2"})
    on_cpu, on_gpu = (parts(plan_memory(sentences, 2, device=d, process=1, tokens=16)) for d in ("cpu", "cuda"))
    assert on_cpu["step"][ENCODER] == pytest.approx(90.9e6, rel=0.01)
    assert on_gpu["step"][ENCODER] == 0


def test_a_reconstruction_run_loads_the_base_and_never_runs_it(reconstruction):
    plan = plan_memory(reconstruction(), 2, process=1)
    phases = parts(plan)
    assert plan.tokens == 0 and phases["library"][LIBRARY] > 0
    assert all(phase.get(ACTIVATIONS, 0) <= phases["forward"].get(FACTORS, 0) for phase in phases.values())
    assert phases["step"][PACKED] == phases["load"][PACKED]  # outside the engine
    sent = plan_wire(reconstruction(), 2).parts
    assert sent[BASE_FORWARD] == sent[BASE_BACKWARD] == 0 < sent[HYPERNETWORK_FORWARD]
    step = plan_step(reconstruction(), 2, 1, matmul=1e9, network=1e9)
    assert step.tokens == 0 < step.flops < plan_step(reconstruction(targets="delta"), 1, 1).flops


def test_spreads_of_a_library_stay_where_errors_are_divided_by_them(reconstruction):
    job = Job(reconstruction())
    numbers = sum(4 * (slot.in_features + slot.out_features) for slot in job.base.slots)
    held = parts(plan_memory(reconstruction(targets="factors"), 1, device="cuda"))["step"][LIBRARY]
    assert held == 4 * numbers
    assert parts(plan_memory(reconstruction(), 1, device="cuda"))["step"][LIBRARY] == 0


def test_an_encoder_is_known_by_its_configuration_and_one_that_is_not_is_refused_with_a_fix(config, tmp_path):
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "config.json").write_text('{"hidden_size": 1024}')
    wide = config({"conditions.encoder": str(tmp_path / "encoder")})
    assert Job(wide).hypernetwork.condition_size == 1024
    assert Job(config({"conditions.kind": "one_hot"})).hypernetwork.condition_size == 3
    (tmp_path / "encoder" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"width of conditions.encoder(.|\n)*fix: "):
        Job(wide)


def test_the_largest_recipe_has_2_7_billion_parameters(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 1024}')
    places = ["base.model=random:mistral-7b", f"conditions.encoder={tmp_path}"]
    network = Job(load_config(CONFIGS / "t2l_mistral7b_all_linear_r16_zero3.yaml", places)).hypernetwork
    assert sum(p.numel() for p in network.parameters()) == 2_697_482_880
    assert sum(p.numel() for p in network.heads.parameters()) == 2_685_665_280
