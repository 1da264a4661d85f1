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
    heads = sum(p.numel() for name, p in network.named_parameters() if p.ndim == 2)
    forward = 2 * tokens * (weights + low_rank) + attention
    # Gradients of inputs as in forward; low-rank factors get gradients too; attention computes its scores again.
    backward = 2 * tokens * (weights + 2 * low_rank) + 2.5 * attention
    ours = count_flops(base, network, PAIRS, TOKENS, packed)
    expected = (2 if recomputed else 1) * forward + backward
    assert ours >= expected
    # Heads run once for each slot of their shape and condition, and get gradients twice.
    assert ours == pytest.approx(expected + 3 * 2 * PAIRS * len(base.slots) * heads / 3, rel=0.1)


def test_operations_grow_with_the_batch_and_shrink_with_the_ranks(tiny_config, tmp_path):
    one, two = (plan_step(tiny_config(tmp_path), ranks, 0, tokens=16) for ranks in (1, 2))
    assert one.flops == 2 * two.flops and one.tokens == two.tokens == 8 * 16


def test_this_machine_multiplies():
    assert 1e8 < measure_matmul(0.05) < 1e15
