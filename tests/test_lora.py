"""LoRA factors: scale conventions, selection, and norms without forming the update."""

from __future__ import annotations

import math

import pytest
import torch

from hl_scale.lora import LoraFactors, Slot, lora_scale

SLOTS = (Slot(0, "q_proj", "layers.0.q_proj", 7, 5), Slot(0, "v_proj", "layers.0.v_proj", 7, 3))


def factors(conditions: int = 3, rank: int = 2, scale: float = -1.5) -> LoraFactors:
    generator = torch.Generator().manual_seed(conditions)
    return LoraFactors(
        SLOTS,
        {s.path: torch.randn(conditions, rank, s.in_features, generator=generator) for s in SLOTS},
        {s.path: torch.randn(conditions, s.out_features, rank, generator=generator) for s in SLOTS},
        scale,
    )


def test_scale_follows_its_convention() -> None:
    assert lora_scale("alpha_over_rank", 16.0, 8) == 2.0
    assert lora_scale("alpha_over_sqrt_rank", 16.0, 8) == pytest.approx(16 / math.sqrt(8))
    assert lora_scale("one", 16.0, 8) == 1.0


def test_an_unknown_scale_convention_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'alpha'; use one of alpha_over_rank, alpha_over_sqrt_rank, one"):
        lora_scale("alpha", 1.0, 1)


def test_the_number_of_conditions_and_the_rank_are_those_of_the_factors() -> None:
    assert (factors(3, 2).conditions, factors(3, 2).rank) == (3, 2)


def test_selecting_by_an_index_tensor_allows_repeats_and_any_order() -> None:
    all_factors, index = factors(), torch.tensor([2, 0, 0, 1, 2])
    selected = all_factors.select(index)
    assert selected.conditions == 5 and selected.slots == SLOTS and selected.scale == all_factors.scale
    for row, source in enumerate(index.tolist()):
        for slot in SLOTS:
            assert torch.equal(selected.a[slot.path][row], all_factors.a[slot.path][source])
            assert torch.equal(selected.b[slot.path][row], all_factors.b[slot.path][source])


def test_selecting_one_condition_keeps_the_leading_dimension() -> None:
    assert factors().select(1).a[SLOTS[0].path].shape == (1, 2, 7)


def test_gradients_of_repeated_conditions_add_up() -> None:
    all_factors = factors()
    a = all_factors.a[SLOTS[0].path].requires_grad_()
    all_factors.select(torch.tensor([1, 1, 2])).a[SLOTS[0].path].sum().backward()
    assert a.grad is not None and a.grad[:, 0, 0].tolist() == [0.0, 2.0, 1.0]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_delta_norms_are_the_frobenius_norms_of_the_updates(rank: int) -> None:
    all_factors = factors(4, rank)
    squares = sum(
        (all_factors.scale * all_factors.b[s.path].double() @ all_factors.a[s.path].double()).square().sum((1, 2))
        for s in SLOTS
    )
    torch.testing.assert_close(all_factors.delta_norms(), torch.as_tensor(squares).sqrt(), rtol=1e-6, atol=0)
