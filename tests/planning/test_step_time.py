"""Operations of a step against arithmetic."""

from __future__ import annotations

import pytest
import torch

from hl_scale.base.loading import outline_base
from hl_scale.conditions import typology
from hl_scale.config import BaseModelConfig, HypernetworkConfig, LoraConfig
from hl_scale.hypernetwork import build_hypernetwork
from hl_scale.planning import plan_step
from hl_scale.planning.step_time import count_flops, measure_matmul
from hl_scale.planning.tracing import trace_pass

PAIRS, TOKENS, RANK = 2, 32, 4
LORA = LoraConfig(rank=RANK, target_modules=("q_proj", "v_proj", "down_proj"))


@pytest.mark.parametrize(("recomputed", "packed"), [(False, False), (True, False), (False, True)])
def test_products_of_a_pass_are_those_of_its_layers(recomputed, packed):
    options = {"model": "random:mistral-tiny", "gradient_checkpointing": recomputed, "compute_dtype": "float32"}
    base = outline_base(BaseModelConfig.model_validate(options), LORA)
    with torch.device("meta"):
        network = build_hypernetwork(HypernetworkConfig(hidden_width=16), LORA, base.slots, typology.NUM_FEATURES)
    tokens, blocks, width = PAIRS * TOKENS, 2, 128
    layers = [layer for path, layer in base.linears.items() if "lm_head" not in path]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    low_rank = RANK * sum(slot.in_features + slot.out_features for slot in base.slots)
    seen = tokens if packed else TOKENS  # a packed text is masked off from the others, not left out
    attention = 2 * 2 * tokens * seen * width * blocks  # scores and values
    once = sum(p.numel() for name, p in network.named_parameters() if name.startswith("trunk") and p.ndim == 2)
    generated = once * len(base.slots)
    for group, slots in network.groups.items():
        generated += len(slots) * (network.heads_a[group].weight.numel() + network.heads_b[group].weight.numel())
    generated += network.condition.weight.numel()
    forward = 2 * tokens * (weights + low_rank) + attention
    # Gradients of inputs as in forward, but not of embeddings, which query, key and value of the first block read;
    # low-rank factors get gradients too; attention computes its scores again.
    first = sum(layer.in_features * layer.out_features for layer in layers[:3])
    backward = 2 * tokens * (weights - first + 2 * low_rank) + 2.5 * attention
    expected = (2 if recomputed else 1) * forward + backward + 3 * 2 * PAIRS * generated
    ours = count_flops(lambda: trace_pass(base, network, PAIRS, TOKENS, packed))
    assert ours == pytest.approx(expected, rel=0.02)


def test_operations_grow_with_the_batch_and_shrink_with_the_ranks(tiny_config, tmp_path):
    one, two = (plan_step(tiny_config(tmp_path), ranks, 0, tokens=16) for ranks in (1, 2))
    assert one.flops == 2 * two.flops and one.tokens == two.tokens == 8 * 16


def test_this_machine_multiplies():
    assert 1e8 < measure_matmul(0.05) < 1e15
