"""LoRA factors: scale conventions, selection, norms without forming the update, and sums of adapters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hl_scale.kernels import generated_lora_linear
from hl_scale.lora import LoraFactors, Slot, SummedFactors, lora_scale, sum_factors

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


K = Slot(0, "k_proj", "layers.0.k_proj", 7, 4)
O = Slot(1, "o_proj", "layers.1.o_proj", 5, 7)  # noqa: E741


def draw(slots: tuple[Slot, ...], conditions: int, rank: int, scale: float, seed: int = 0) -> LoraFactors:
    """Random float64 factors that want gradients."""
    generator = torch.Generator().manual_seed(seed)

    def side(shape: Callable[[Slot], tuple[int, int]]) -> dict[str, Tensor]:
        return {
            slot.path: torch.randn(conditions, *shape(slot), generator=generator, dtype=torch.float64).requires_grad_()
            for slot in slots
        }

    return LoraFactors(slots, side(lambda s: (rank, s.in_features)), side(lambda s: (s.out_features, rank)), scale)


def deltas(part: LoraFactors, slot: Slot, conditions: int) -> Tensor:
    """(E, out, in) s B A, zero in a slot that the part lacks."""
    if slot.path not in part.a:
        return torch.zeros(conditions, slot.out_features, slot.in_features, dtype=torch.float64)
    return (part.scale * part.b[slot.path] @ part.a[slot.path]).expand(conditions, -1, -1)


CASES = [
    # slots, conditions, rank and scale of each part
    [(SLOTS, 3, 2, 1.0), (SLOTS, 3, 2, 1.0)],
    [(SLOTS, 3, 2, 0.5), (SLOTS, 1, 5, 2.83)],
    [(SLOTS, 1, 3, 1.7), (SLOTS, 4, 1, -0.3)],
    [(SLOTS, 2, 3, 1.7), ((K, SLOTS[1], O), 1, 2, 0.1)],
    [((K,), 3, 1, 2.0), ((O,), 1, 4, 1e-3)],
    [(SLOTS, 1, 2, 0.0), (SLOTS, 3, 2, 1.5)],
    [(SLOTS, 3, 2, 1.5), (SLOTS, 1, 2, 0.0)],
    [(SLOTS, 1, 2, 1.1), ((K, O), 3, 1, 0.7), ((O, SLOTS[0]), 1, 3, -2.0)],
]


@pytest.mark.parametrize("case", CASES)
def test_the_update_of_a_sum_and_its_gradients_are_the_sums_of_the_dense_ones(case: Any) -> None:
    parts = [draw(*arguments, seed=number) for number, arguments in enumerate(case)]
    total = sum_factors(*parts)
    count = max(part.conditions for part in parts)
    assert {slot.path for slot in total.slots} == {slot.path for part in parts for slot in part.slots}
    assert total.scale == (parts[0].scale or 1.0)
    leaves = [factor for part in parts for factor in (*part.a.values(), *part.b.values())]
    found = [deltas(total, slot, count) for slot in total.slots]
    expected = [sum((deltas(part, slot, count) for part in parts), torch.zeros(())) for slot in total.slots]
    for slot, one, other in zip(total.slots, found, expected, strict=True):
        assert total.a[slot.path].shape[0] == total.b[slot.path].shape[0] == count
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
    gradients = [torch.autograd.grad(sum(d.sin().sum() for d in all_), leaves) for all_ in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("apply", ["lowrank", "merged"])
def test_a_layer_with_a_sum_adds_what_each_part_adds(case: Any, apply: Any) -> None:
    parts = [draw(*arguments, seed=number) for number, arguments in enumerate(case)]
    total = sum_factors(*parts)
    count = total.conditions
    for slot in total.slots:
        generator = torch.Generator().manual_seed(9)
        x = torch.randn(count, 4, slot.in_features, generator=generator, dtype=torch.float64)
        weight = torch.randn(slot.out_features, slot.in_features, generator=generator, dtype=torch.float64)
        y = generated_lora_linear(x, weight, total.a[slot.path], total.b[slot.path], total.scale, apply=apply)
        expected = x @ weight.T + sum(x @ deltas(part, slot, count).mT for part in parts)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_the_first_part_of_a_sum_is_stored_as_it_is_and_the_others_a_too() -> None:
    first, other = factors(3, 2, scale=0.3), factors(3, 4, scale=1.7)
    total = sum_factors(first, other)
    for slot in SLOTS:
        assert torch.equal(total.a[slot.path], torch.cat((first.a[slot.path], other.a[slot.path]), dim=1))
        assert torch.equal(total.b[slot.path][..., :2], first.b[slot.path])


@pytest.mark.parametrize("ratio", [1.0, 0.25, 8.0])
def test_scales_that_differ_by_a_power_of_two_are_folded_without_rounding(ratio: float) -> None:
    first, other = factors(1, 2, scale=0.3), factors(1, 4, scale=0.3 * ratio)
    total = sum_factors(first, other)
    assert all(torch.equal(total.b[s.path][..., 2:].double(), ratio * other.b[s.path].double()) for s in SLOTS)


def test_folding_a_scale_into_float32_factors_costs_two_roundings_at_most() -> None:
    other = factors(1, 4, scale=2.83)
    folded = other.rescaled(0.7)
    for slot in SLOTS:
        exact = other.b[slot.path].double() * (2.83 / 0.7)
        assert ((folded.b[slot.path] - exact).abs() <= 2**-23 * exact.abs()).all()
        assert folded.a[slot.path] is other.a[slot.path]


def test_a_sum_has_the_wider_dtype_of_its_parts() -> None:
    total = sum_factors(factors(1, 2).to("cpu", torch.bfloat16), factors(1, 2))
    assert {factor.dtype for factor in (*total.a.values(), *total.b.values())} == {torch.float32}


def test_the_rank_of_a_sum_is_that_of_its_widest_slot() -> None:
    total = sum_factors(draw((K, SLOTS[0]), 1, 2, 1.0), draw((SLOTS[0], O), 1, 3, 1.0))
    assert (total.rank, total.a[K.path].shape[1], total.a[O.path].shape[1]) == (5, 2, 3)


def test_slots_of_a_sum_are_in_the_order_of_layers() -> None:
    total = sum_factors(draw((SLOTS[0], O), 1, 2, 1.0), draw((K, O), 1, 2, 1.0))
    assert total.slots == (SLOTS[0], K, O)


def test_numbers_of_conditions_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match=r"of 3 and of 2 conditions(.|\n)*fix:"):
        sum_factors(factors(3), factors(2))


def test_adapters_of_layers_of_other_sizes_are_refused_with_the_slot() -> None:
    with pytest.raises(ValueError, match=r"layers.0.q_proj has \(7, 5\) features .* \(7, 6\) in the other"):
        sum_factors(factors(1), draw((Slot(0, "q_proj", SLOTS[0].path, 7, 6),), 1, 2, 1.0))


def test_a_source_that_adds_refuses_scales_that_were_not_made_equal() -> None:
    with pytest.raises(ValueError, match="are not added as they are: rescale them"):
        SummedFactors(factors(1, scale=1.0), factors(1, scale=2.0))


def test_a_source_that_adds_builds_any_slots_in_the_order_they_are_asked_for() -> None:
    first, fixed = draw((SLOTS[0], O), 3, 2, 1.0), draw((K, O), 1, 1, 1.0, seed=1)
    source, total = SummedFactors(first, fixed), sum_factors(first, fixed)
    for asked in [(O,), (K, O), (O, SLOTS[0], K), (K,), ()]:
        for slot, (a, b) in zip(asked, source.build(asked, source.inputs(asked)), strict=True):
            assert torch.equal(a, total.a[slot.path]) and torch.equal(b, total.b[slot.path])
