"""Ragged clouds packed one after the other: a few batched launches instead of a loop over pairs."""

from __future__ import annotations

from typing import Any

import torch

from hl_scale.sinkhorn.divergence import sinkhorn_divergence

SMALLEST_GRADE = 6
"""Base-2 logarithm of the size up to which all clouds are solved together."""


def packed_sinkhorn_divergence(
    x: torch.Tensor, y: torch.Tensor, x_offsets: torch.Tensor, y_offsets: torch.Tensor, **settings: Any
) -> torch.Tensor:
    """Sinkhorn divergence of B pairs of clouds of different sizes.

    Pairs whose longer clouds are of similar size are padded to the longest of them and solved together; values do not
    depend on who is solved with whom.

    Args:
        x: (T, D), the points of all first clouds, one cloud after the other.
        y: (S, D), of all second clouds, same dtype and device.
        x_offsets: (B + 1,) integers, 0, ends of the clouds, ..., T.
        y_offsets: (B + 1,) integers.
        settings: `blur`, `epsilon`, `scaling`, `debias`, `memory_budget`, `tolerance`, `maximum_iterations`,
            `relaxation` of `sinkhorn_divergence`.

    Returns:
        (B,) divergences, differentiable in x and y.

    Raises:
        ValueError: offsets that do not cover the points, an empty cloud, and whatever `sinkhorn_divergence` refuses.
    """
    sizes = [_sizes("x", x, x_offsets), _sizes("y", y, y_offsets)]
    if len(sizes[0]) != len(sizes[1]):
        raise ValueError(f"x_offsets has {len(sizes[0])} clouds, y_offsets {len(sizes[1])}: they must pair up")
    starts = [torch.cumsum(size, 0) - size for size in sizes]
    # Powers of two: clouds are padded to less than twice the longer one of their own pair. Up to 64 points, padding
    # costs less than another launch.
    grade = torch.maximum(*sizes).double().log2().ceil().clamp(min=SMALLEST_GRADE)
    order, values = [], []
    for level in grade.unique():
        pairs = (grade == level).nonzero()[:, 0]
        x_points, x_mask = _padded(x, starts[0][pairs], sizes[0][pairs])
        y_points, y_mask = _padded(y, starts[1][pairs], sizes[1][pairs])
        values.append(sinkhorn_divergence(x_points, y_points, x_mask=x_mask, y_mask=y_mask, **settings))
        order.append(pairs)
    return torch.cat(values)[torch.cat(order).argsort().to(x.device)]


def _sizes(name: str, points: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """(B,) int64 on the CPU."""
    if points.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(points.shape)}, expected (points of all clouds, D)")
    if offsets.dim() != 1 or len(offsets) < 2 or offsets.is_floating_point():
        raise ValueError(f"{name}_offsets must be a vector of at least two integers: 0, the end of each cloud")
    ends = offsets.detach().cpu().long()
    sizes = ends.diff()
    if ends[0] != 0 or ends[-1] != len(points):
        raise ValueError(f"{name}_offsets run from {int(ends[0])} to {int(ends[-1])}, expected 0 to {len(points)}")
    if not bool((sizes > 0).all()):
        raise ValueError(
            f"{name} (sample {int((sizes <= 0).nonzero()[0, 0])}) is an empty cloud: offsets must increase"
        )
    return sizes


def _padded(points: torch.Tensor, starts: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The clouds as (B, longest, D), filled up with their first points, and their mask (B, longest)."""
    position = torch.arange(int(sizes.max()))
    mask = position < sizes[:, None]
    source = starts[:, None] + torch.where(mask, position, 0)
    padded = points.index_select(0, source.flatten().to(points.device))
    return padded.view(*mask.shape, -1), mask.to(points.device)
