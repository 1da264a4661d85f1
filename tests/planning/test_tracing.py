"""Tracing counts what code really allocates, whether tensors have data or not."""

from __future__ import annotations

import pytest
import torch

from hl_scale.base import load_base
from hl_scale.base.loading import outline_base
from hl_scale.conditions import typology
from hl_scale.config import AlignmentConfig, BaseModelConfig, HypernetworkConfig, LoraConfig
from hl_scale.hypernetwork import build_hypernetwork
from hl_scale.objectives import AlignmentObjective
from hl_scale.planning.tracing import (
    ACTIVATIONS,
    FACTORS,
    GRADIENTS,
    Allocations,
    trace_bare_pass,
    trace_call,
    trace_objective,
    trace_pass,
)

LORA = LoraConfig(rank=4, target_modules=("q_proj", "v_proj", "down_proj"))
KILOBYTE = 250  # float32 numbers


def base_config(**options) -> BaseModelConfig:
    options = {"model": "random:mistral-tiny", "compute_dtype": "float32", **options}
    return BaseModelConfig.model_validate(options)


def hypernetwork(base, **options):
    return build_hypernetwork(HypernetworkConfig(hidden_width=16, **options), LORA, base.slots, typology.NUM_FEATURES)


def outlined(base: BaseModelConfig, **options):
    model = outline_base(base, LORA)
    with torch.device("meta"):
        return model, hypernetwork(model, **options)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_peak_is_what_was_alive_together(device):
    with Allocations() as memory:
        first = torch.zeros(4 * KILOBYTE, device=device)
        second = first + 1  # 8 kB alive
        del first
        third = second[: 2 * KILOBYTE] * 2  # 6 kB alive
        assert sum(memory.live.values()) == 6000
        del second, third
    assert memory.peak == {ACTIVATIONS: 8000}
    assert sum(memory.live.values()) == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_views_and_updates_in_place_take_no_memory(device):
    with Allocations() as memory:
        x = torch.zeros(KILOBYTE, device=device)
        x.add_(1).mul_(2)
        torch.mul(x, 2, out=x)
        views = [x.view(2, -1), x[3:], x.detach(), x.reshape(-1)]
        assert views and sum(memory.live.values()) == 1000


def test_what_was_there_before_is_not_counted():
    weight = torch.zeros(KILOBYTE, device="meta")
    with Allocations() as memory:
        weight.mul_(2)
        assert weight.view(2, -1).T is not None
    assert memory.peak == {}


def test_what_is_saved_for_backward_is_alive_until_then():
    with Allocations() as memory:
        x = torch.zeros(KILOBYTE, device="meta", requires_grad=True)
        y = x.exp().sin().sum()  # exp saves its result, sin its input, which is the same
        assert memory.live[ACTIVATIONS] == 2000 + 4
        y.backward()
        del y
        assert memory.live[ACTIVATIONS] == 2000  # x and its gradient


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"mlp_tile_tokens": 4}])
@pytest.mark.parametrize("pairs", [1, 3])
def test_a_pass_without_data_takes_what_a_real_one_takes(options, pairs):
    base = base_config(**options)
    real = load_base(base, LORA)
    measured = trace_pass(real, hypernetwork(real), pairs, 9, packed=False)
    assert trace_pass(*outlined(base), pairs, 9, packed=False) == measured
    assert measured.kept[ACTIVATIONS] > 0 and measured.backward[GRADIENTS] > 0


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}])
def test_large_batches_follow_from_two_small_ones(options):
    model, network = outlined(base_config(**options))
    two, four, many = (trace_pass(model, network, pairs, 9, packed=False) for pairs in (2, 4, 16))
    extended = four.extended(two, 6)
    for name in ("forward", "kept", "backward"):
        assert getattr(extended, name) == pytest.approx(getattr(many, name), rel=0.005), name


def test_packed_passes_are_traced_too():
    base = base_config()
    real = load_base(base, LORA)
    measured = trace_pass(real, hypernetwork(real), 3, 9, packed=True)
    assert trace_pass(*outlined(base), 3, 9, packed=True) == measured


def test_factors_are_those_of_every_slot_and_condition():
    model, network = outlined(base_config())
    sizes = sum(slot.in_features + slot.out_features for slot in model.slots) * LORA.rank * 4
    for pairs in (1, 5):
        factors = trace_pass(model, network, pairs, 9, packed=False).kept[FACTORS]
        assert pairs * sizes <= factors <= 1.3 * pairs * sizes  # and what the hypernetwork's backward needs


def test_recomputed_blocks_keep_their_inputs_alone():
    whole = trace_pass(*outlined(base_config()), 2, 16, packed=False)
    model, network = outlined(base_config(gradient_checkpointing=True))
    recomputed = trace_pass(model, network, 2, 16, packed=False)
    state = 2 * 16 * model.hidden_size * 4
    assert recomputed.kept[ACTIVATIONS] < 0.2 * whole.kept[ACTIVATIONS]
    assert recomputed.kept[ACTIVATIONS] >= 2 * state  # two blocks
    assert recomputed.kept[ACTIVATIONS] < recomputed.forward[ACTIVATIONS]  # a block at work
    assert sum(recomputed.backward.values()) < sum(whole.backward.values())


def test_weights_and_their_gradients_are_not_counted_here():
    model, network = outlined(base_config())
    traced = trace_pass(model, network, 1, 2, packed=False)
    largest = max(layer.in_features * layer.out_features for layer in model.linears.values()) * 4
    assert sum(traced.forward.values()) < largest + traced.forward[FACTORS]
    assert all(parameter.grad is None for parameter in network.parameters())


def test_tracing_leaves_the_model_as_it_was():
    base = load_base(base_config(), LORA)
    ids = torch.tensor([[1, 8, 30]])
    before = base.hidden_states(ids, torch.ones_like(ids))
    trace_bare_pass(base, 2, 5)
    assert base.hidden_states(ids, torch.ones_like(ids)).equal(before)


def test_targets_need_no_graph():
    model, network = outlined(base_config())
    assert trace_bare_pass(model, 4, 16) < sum(trace_pass(model, network, 4, 16, packed=False).kept.values())


def test_the_objective_takes_at_least_its_costs_and_states():
    tokens, width = 33, 64
    measured = trace_objective(AlignmentObjective(AlignmentConfig()), tokens, width)
    assert measured >= 4 * ((tokens - 1) ** 2 + tokens * width)
    assert trace_call(lambda: torch.zeros(KILOBYTE)) == 1000


def test_long_clouds_are_not_computed_but_scaled_up():
    objective = AlignmentObjective(AlignmentConfig())
    long = trace_objective(objective, 2**20 + 1, 8)
    assert long == 2**24 * trace_objective(objective, 2**8 + 1, 8)
    assert long > 4 * 2**40  # costs alone
