"""Weighted token clouds: input checks, masks, weights and the extent of each pair."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hl_scale.sinkhorn.schedule import SMALLEST_DIAMETER

WEIGHT_SUM_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Clouds:
    """B pairs of weighted clouds, padded, without autograd history.

    A point outside the mask or of weight 0 is not part of its cloud: its coordinates are replaced by those of a point
    that is, so that it moves neither the bounding box nor any finite arithmetic.

    Attributes:
        x: (B, N, D) of any floating dtype.
        y: (B, M, D), same dtype.
        a: (B, N) weights of x that sum to 1, 0 outside the cloud; in the dtype to compute in, float32 or float64.
        b: (B, M) weights of y.
        diameters: (B,) float64 on the CPU, diagonal of the bounding box of both clouds of a pair.
    """

    x: torch.Tensor
    y: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    diameters: torch.Tensor


@dataclass(frozen=True)
class SolverOptions:
    """What a solver is asked for; see `sinkhorn_divergence`.

    Attributes:
        initial: potentials f, g, f_self, g_self to begin with instead of annealing from zero.
        y_self: (B,) values of <b, g_self> that are known already.
    """

    debias: bool
    want_gradient_x: bool
    want_gradient_y: bool
    want_error: bool
    tolerance: float | None = None
    maximum_iterations: int = 0
    relaxation: float = 1.0
    initial: tuple[torch.Tensor | None, ...] | None = None
    y_self: torch.Tensor | None = None


@dataclass(frozen=True)
class Solution:
    """What a solver returns for `Clouds`.

    Attributes:
        value: (B,) divergences.
        f, g: (B, N) and (B, M) potentials of OT(x, y), on x and on y.
        f_self, g_self: (B, N) and (B, M) potentials of OT(x, x) and OT(y, y); None without debiasing, g_self also
            where its value was known.
        gradient_x, gradient_y: gradients of the values, (B, N, D) and (B, M, D); None where not asked for.
        marginal_error: (B,) L1 distance of the plan's two marginals from a and b, summed; None where not asked for.
        iterations: (B,) int64 on the CPU, updates before the final one.
        converged: (B,) bool on the CPU, False where a tolerance was asked for and not reached.
    """

    value: torch.Tensor
    f: torch.Tensor
    g: torch.Tensor
    f_self: torch.Tensor | None
    g_self: torch.Tensor | None
    gradient_x: torch.Tensor | None
    gradient_y: torch.Tensor | None
    marginal_error: torch.Tensor | None
    iterations: torch.Tensor
    converged: torch.Tensor


def check_points(x: torch.Tensor, y: torch.Tensor) -> None:
    """Refuse clouds that do not belong together.

    Raises:
        ValueError: wrong rank, batch size, dimension, dtype or device.
    """
    for name, points in (("x", x), ("y", y)):
        if points.dim() not in (2, 3):
            raise ValueError(f"{name} has shape {tuple(points.shape)}, expected (points, D) or (batch, points, D)")
        if not points.is_floating_point():
            raise ValueError(f"{name} has dtype {points.dtype}, expected a floating-point type: call {name}.float()")
        if points.shape[-1] == 0 or points.shape[-2] == 0 or points.shape[0] == 0:
            raise ValueError(f"{name} has shape {tuple(points.shape)}: a cloud needs at least one point")
    if x.dim() != y.dim() or x.shape[:-2] != y.shape[:-2]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}: both must be (points, D), or (batch, points, D) "
            "with the same batch size"
        )
    for what, ours, theirs in (
        ("D (last dimension)", x.shape[-1], y.shape[-1]),
        ("dtype", x.dtype, y.dtype),
        ("device", x.device, y.device),
    ):
        if ours != theirs:
            raise ValueError(f"x and y differ in {what}: x has {ours}, y has {theirs}; convert one of them")


def largest_square(dtype: torch.dtype, blur: float) -> float:
    """Squared norms must stay below this: costs are at most four times the larger, and are divided by temperatures."""
    return torch.finfo(dtype).max / 8 * min(1.0, (SMALLEST_DIAMETER * blur) ** 2)


def make_clouds(
    x: torch.Tensor,
    y: torch.Tensor,
    x_mask: torch.Tensor | None,
    y_mask: torch.Tensor | None,
    x_weights: torch.Tensor | None,
    y_weights: torch.Tensor | None,
    *,
    blur: float,
    dtype: torch.dtype,
) -> Clouds:
    """Check masks, weights and values of (B, N, D) and (B, M, D) points; resolve them into `Clouds` of `dtype`.

    Raises:
        ValueError: an empty cloud, wrong weights, or coordinates that are not finite or too large.
    """
    x, a = _weighted("x", x, x_mask, x_weights, dtype)
    y, b = _weighted("y", y, y_mask, y_weights, dtype)
    boxes = [(points.amin(1).double(), points.amax(1).double()) for points in (x, y)]
    limit = largest_square(dtype, blur)
    for name, (low, high) in zip("xy", boxes, strict=True):
        bound = torch.maximum(low.abs(), high.abs()).square().sum(-1)
        bad = ~(bound < limit)
        if bad.any():
            row = int(bad.nonzero()[0, 0])
            reason = (
                f"squared norms up to {float(bound[row]):.3g} are beyond {limit:.3g}, where costs divided by epsilon "
                f"overflow {dtype}: scale the points down or raise blur"
                if bool((low[row].isfinite() & high[row].isfinite()).all())
                else "NaN or infinite coordinates"
            )
            raise ValueError(f"{name} (sample {row}): {reason}")
    low, high = torch.minimum(boxes[0][0], boxes[1][0]), torch.maximum(boxes[0][1], boxes[1][1])
    return Clouds(x, y, a, b, (high - low).norm(dim=-1).cpu())


def _weighted(
    name: str, points: torch.Tensor, mask: torch.Tensor | None, weights: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Points with those outside the cloud replaced, and their weights."""
    shape = points.shape[:2]
    if mask is None and weights is None:
        return points, points.new_full(shape, 1.0 / shape[1], dtype=dtype)
    if mask is not None:
        _check_companion(f"{name}_mask", mask, points)
        if mask.dtype != torch.bool:
            raise ValueError(f"{name}_mask has dtype {mask.dtype}, expected bool (True: part of the cloud)")
    if weights is None:
        assert mask is not None
        count = mask.sum(1, keepdim=True)
        _refuse_empty(name, count[:, 0] > 0)
        resolved = mask.to(dtype) / count
    else:
        resolved = _check_weights(name, weights, mask, points).to(dtype)
    inside = resolved > 0
    if bool(inside.all()):
        return points, resolved
    representative = inside.to(torch.uint8).argmax(1)
    first = points[torch.arange(shape[0], device=points.device), representative]
    return torch.where(inside[..., None], points, first[:, None]), resolved


def _check_weights(name: str, weights: torch.Tensor, mask: torch.Tensor | None, points: torch.Tensor) -> torch.Tensor:
    _check_companion(f"{name}_weights", weights, points)
    if not weights.is_floating_point():
        raise ValueError(f"{name}_weights has dtype {weights.dtype}, expected a floating-point type")
    weights = weights.double()
    if mask is not None:
        weights = torch.where(mask, weights, 0)
    if not bool((weights >= 0).all()):
        raise ValueError(f"{name}_weights holds a negative or NaN weight; weights must be >= 0 and sum to 1")
    totals = weights.sum(1, keepdim=True)
    _refuse_empty(name, totals[:, 0] > 0)
    wrong = (totals - 1).abs()[:, 0] > WEIGHT_SUM_TOLERANCE
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"{name}_weights of sample {row} sum to {float(totals[row, 0]):.6g} over the unmasked points, expected 1 "
            f"(tolerance {WEIGHT_SUM_TOLERANCE}): divide them by their sum"
        )
    return weights / totals


def _check_companion(name: str, tensor: torch.Tensor, points: torch.Tensor) -> None:
    if tensor.shape != points.shape[:2]:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, expected one entry a point: {tuple(points.shape[:2])}"
        )
    if tensor.device != points.device:
        raise ValueError(f"{name} is on {tensor.device}, its points on {points.device}; move one of them")


def _refuse_empty(name: str, present: torch.Tensor) -> None:
    if not bool(present.all()):
        row = int((~present).nonzero()[0, 0])
        raise ValueError(f"{name} (sample {row}) is an empty cloud: no point is unmasked and has a positive weight")
