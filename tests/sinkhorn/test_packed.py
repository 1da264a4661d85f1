"""Packed ragged clouds: the values and gradients of a loop over pairs."""

from __future__ import annotations

import pytest
import torch

from hl_scale.sinkhorn import packed_sinkhorn_divergence, sinkhorn_divergence

SIZES = [(3, 5), (1, 1), (40, 2), (8, 9), (16, 17), (4, 4), (70, 3), (9, 130)]


def packed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    offsets = [torch.tensor([0, *sizes]).cumsum(0) for sizes in zip(*SIZES, strict=True)]
    x, y = (torch.randn(int(ends[-1]), 3, generator=generator, dtype=torch.float64) for ends in offsets)
    return x, y, *offsets


def test_ragged_equals_a_loop_in_value_and_gradient() -> None:
    x, y, x_offsets, y_offsets = packed()
    x.requires_grad_(), y.requires_grad_()
    values = packed_sinkhorn_divergence(x, y, x_offsets, y_offsets, blur=0.2)
    looped = torch.stack(
        [
            sinkhorn_divergence(x[a:b], y[c:d], blur=0.2)
            for a, b, c, d in zip(x_offsets, x_offsets[1:], y_offsets, y_offsets[1:], strict=False)
        ]
    )
    torch.testing.assert_close(values, looped, rtol=1e-12, atol=1e-14)
    upstream = torch.arange(1.0, len(SIZES) + 1, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(values, [x, y], upstream), torch.autograd.grad(looped, [x, y], upstream), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda offsets: offsets + 1, "x_offsets run from 1 to 152, expected 0 to 151"),
        (lambda offsets: offsets[:-1], "expected 0 to 151"),
        (lambda offsets: offsets.double(), "at least two integers"),
        (lambda offsets: torch.tensor([0, 3, 3, 44, 52, 68, 72, 142, 151]), r"x \(sample 1\) is an empty cloud"),
        (lambda offsets: torch.tensor([0, 151]), "x_offsets has 1 clouds, y_offsets 8"),
    ],
)
def test_offsets_that_do_not_cover_the_points_are_refused(edit, message: str) -> None:
    x, y, x_offsets, y_offsets = packed()
    with pytest.raises(ValueError, match=message):
        packed_sinkhorn_divergence(x, y, edit(x_offsets), y_offsets)
