"""Products of LoRA factors compared without forming them, and the singular form; formed updates are the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hl_scale.lora_algebra import canonical, delta_distance, delta_inner

IN, OUT = 11, 7


def pair(rank: int, conditions: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * seed + rank)
    a = torch.randn(conditions, rank, IN, generator=generator, dtype=torch.float64)
    return a.to(dtype), torch.randn(conditions, OUT, rank, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("rank", "other"), [(1, 1), (2, 5), (4, 4)])
def test_inner_products_are_those_of_the_updates(rank: int, other: int) -> None:
    (a, b), (c, d) = pair(rank), pair(other, seed=1)
    torch.testing.assert_close(delta_inner(a, b, c, d), ((b @ a) * (d @ c)).sum((1, 2)))


@pytest.mark.parametrize(("rank", "other"), [(1, 1), (2, 5), (4, 4)])
def test_distances_and_their_gradients_are_those_of_the_updates(rank: int, other: int) -> None:
    (a, b), (c, d) = pair(rank), pair(other, seed=1)
    a.requires_grad_(), b.requires_grad_()
    distance = delta_distance(a, b, c, d, 1.5, -0.5)
    expected = (1.5 * b @ a + 0.5 * d @ c).square().sum((1, 2))
    torch.testing.assert_close(distance, expected)
    upstream = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(distance, [a, b], upstream), torch.autograd.grad(expected, [a, b], upstream)
    )


def test_the_distance_of_equal_updates_is_zero_up_to_rounding_also_in_other_factors_and_scales() -> None:
    a, b = pair(3)
    mixing = torch.randn(3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    other = torch.linalg.solve(mixing, a), b @ mixing
    distance = delta_distance(a, b, *other, 2.0, 2.0)
    assert (distance >= 0).all()
    assert (distance <= 1e-13 * 4 * delta_inner(a, b, a, b)).all()
    assert (delta_distance(a, b, a, 2 * b, 2.0, 1.0) <= 1e-13 * 4 * delta_inner(a, b, a, b)).all()


def test_the_distance_of_float32_updates_that_almost_agree_does_not_drown_in_rounding() -> None:
    a, b = pair(3, dtype=torch.float32)
    near = b + 1e-4
    expected = (near.double() @ a.double() - b.double() @ a.double()).square().sum((1, 2))
    torch.testing.assert_close(delta_distance(a, near, a, b, 1.0, 1.0), expected, rtol=1e-4, atol=0)


def test_no_update_is_at_the_squared_norm_of_the_target() -> None:
    (a, b), (c, d) = pair(2), pair(4, seed=1)
    torch.testing.assert_close(delta_distance(a, 0 * b, c, d, 1.0, 3.0), (3 * d @ c).square().sum((1, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 2, 7])
def test_the_singular_form_has_the_same_product_and_dtype(rank: int, dtype: torch.dtype) -> None:
    a, b = pair(rank, dtype=dtype)
    new_a, new_b = canonical(a, b)
    assert (new_a.shape, new_b.shape, new_a.dtype, new_b.dtype) == (a.shape, b.shape, dtype, dtype)
    torch.testing.assert_close(new_b @ new_a, b @ a, rtol=1e-5, atol=1e-5)


def test_the_singular_form_is_balanced_orthogonal_and_descending() -> None:
    a, b = canonical(*pair(4))
    gram = b.mT @ b
    values = torch.linalg.svdvals(pair(4)[1] @ pair(4)[0])[:, :4]
    torch.testing.assert_close(gram, torch.diag_embed(values))
    torch.testing.assert_close(a @ a.mT, gram)
    assert (values[:, :-1] > values[:, 1:]).all()


def test_the_singular_form_is_the_same_for_all_factors_of_an_update() -> None:
    a, b = pair(4)
    generator = torch.Generator().manual_seed(2)
    for mixing in (
        torch.randn(3, 4, 4, generator=generator, dtype=torch.float64),
        -torch.eye(4).double().expand(3, 4, 4),
    ):
        new = canonical(torch.linalg.solve(mixing, a), b @ mixing)
        torch.testing.assert_close(new, canonical(a, b), rtol=1e-9, atol=1e-9)


def test_signs_make_the_largest_entry_of_each_column_positive() -> None:
    b = canonical(*pair(5))[1]
    assert (b.gather(-2, b.abs().argmax(-2, keepdim=True)) > 0).all()


@pytest.mark.parametrize("present", [0, 1, 2])
def test_directions_that_an_update_lacks_are_exactly_zero(present: int) -> None:
    a, b = pair(4)
    keep = (torch.arange(4) < present).double()
    mixing = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]
    new_a, new_b = canonical(mixing.mT @ a, b * keep @ mixing)
    torch.testing.assert_close(new_b @ new_a, b * keep @ a)
    assert not new_a[:, present:].any() and not new_b[..., present:].any()
    assert new_a[:, :present].any(-1).all()


def test_one_adapter_without_a_leading_dimension_is_as_good() -> None:
    a, b = pair(3)
    torch.testing.assert_close(canonical(a[1], b[1]), tuple(factor[1] for factor in canonical(a, b)))
    torch.testing.assert_close(delta_inner(a[1], b[1], a[0], b[0]), delta_inner(a[1:2], b[1:2], a[:1], b[:1])[0])


def test_a_rank_beyond_the_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 8 exceeds the layer's 11 inputs or 7 outputs"):
        canonical(*pair(8))
