"""Clouds whose points are spread over the ranks of a process group (sequence parallel), solved where they are.

Each rank holds costs between its own points of x and all of y. The potential on x stays with its points; the one on y
follows from column log-sum-exps that are merged over ranks, maxima first, then sums. Self terms need rows only. No peer
library was found that does this; the value is that of one rank up to rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from hl_scale.sinkhorn.clouds import check_points, largest_square
from hl_scale.sinkhorn.costs import Budget, Cloud, Costs, Potentials, divide_budget
from hl_scale.sinkhorn.divergence import check_temperature
from hl_scale.sinkhorn.schedule import annealing_schedule
from hl_scale.sinkhorn.softmin import LOG_2

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def sharded_sinkhorn_divergence(
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    blur: float = 0.05,
    scaling: float = 0.5,
    memory_budget: int | None = None,
    group: Any = None,
) -> torch.Tensor:
    """Sinkhorn divergence of one pair of clouds with uniform weights, sharded over a process group; collective.

    Args:
        x: (N_r, D), this rank's points of the first cloud; shards may differ in size, but none is empty.
        y: (M_r, D), of the second.
        blur, scaling: as in `sinkhorn_divergence`.
        memory_budget: bytes of intermediate results on this rank beside two tensors as large as all of x and y.
        group: process group; the default one unless given.

    Returns:
        The same () value on every rank. Backward gives each rank the gradient on its own points: the value is one
        loss that all ranks share, so gradients of x and y must not be averaged over the group.

    Raises:
        ValueError: points that do not fit together or are not finite; on every rank.
    """
    problem = _problem(x, y, blur, scaling)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    wanted = [torch.is_grad_enabled() and points.requires_grad for points in (x, y)]
    # Ranks must agree on what follows, or some would wait for ever.
    kind = [float(x.shape[-1]), float(_DTYPES.index(x.dtype)) if x.dtype in _DTYPES else -1.0, blur, scaling]
    kind = [value if math.isfinite(value) else 0.0 for value in kind]
    flags = [float(problem is not None), *map(float, wanted)]
    agreed = torch.tensor([*flags, *kind, *(-value for value in kind)], dtype=torch.float64, device=x.device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=group)
    if agreed[0]:
        raise ValueError(problem or "another rank of the group refused its points")
    if bool((agreed[3:7] != -agreed[7:]).any()):
        raise ValueError("ranks of the group differ in D, dtype, blur or scaling: all must pass the same")
    want_x, want_y = bool(agreed[1]), bool(agreed[2])
    x, y = x.to(dtype), y.to(dtype)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        ours = _Shard(x.detach(), group), _Shard(y.detach(), group)
        (low_x, high_x), (low_y, high_y) = (shard.extent() for shard in ours)
        diameter = (torch.maximum(high_x, high_y) - torch.minimum(low_x, low_y)).norm().cpu()[None]
        schedule = annealing_schedule(diameter, blur, scaling, dtype=dtype, device=x.device)
        updates = schedule.updates(0)
        value, gradients = _solve(*ours, updates, schedule.epsilon, divide_budget(memory_budget, x), want_x, want_y)
    return _ShardGradient.apply(x, y, value, gradients) if want_x or want_y else value


def _problem(x: torch.Tensor, y: torch.Tensor, blur: float, scaling: float) -> str | None:
    """What is wrong with this rank's points."""
    try:
        check_points(x, y)
        check_temperature(blur, None, scaling)
    except ValueError as error:
        return str(error)
    if x.dim() != 2:
        return f"x has shape {tuple(x.shape)}, expected (points of this rank, D)"
    for name, points in (("x", x), ("y", y)):
        if not bool(points.isfinite().all()):
            return f"{name} holds NaN or infinite coordinates"
        if not float(points.abs().max()) ** 2 * points.shape[1] < largest_square(torch.float32, blur):
            return f"{name} holds coordinates whose squared distances overflow float32: scale the points down"
    return None


class _Shard:
    """This rank's points of a cloud, and the whole cloud gathered from all ranks.

    Attributes:
        own, whole: clouds of this rank's and of all points, with their weights in the whole cloud.
        place: where this rank's points are in the whole.
    """

    def __init__(self, points: torch.Tensor, group: Any) -> None:
        self.group = group
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        counts = torch.zeros(ranks, dtype=torch.int64, device=points.device)
        counts[rank] = len(points)
        dist.all_reduce(counts, group=group)
        self.counts = counts.tolist()
        start = sum(self.counts[:rank])
        self.place = slice(start, start + len(points))
        everything = self.gather(points)
        weights = everything.new_full((len(everything),), 1.0 / len(everything))
        self.whole = Cloud(everything, weights)
        self.own = Cloud(points, weights[self.place])

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """All ranks' rows in order; shards are padded to the longest on the way."""
        longest = max(self.counts)
        padded = values.new_zeros(longest, *values.shape[1:])
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in self.counts]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(parts, self.counts, strict=True)])

    def extent(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(D,) float64 corners of the bounding box of the whole cloud."""
        return self.whole.points.amin(0).double(), self.whole.points.amax(0).double()


@dataclass(frozen=True)
class _Gradients:
    x: torch.Tensor | None
    y: torch.Tensor | None


def _solve(
    x: _Shard,
    y: _Shard,
    updates: list[tuple[float, float]],
    epsilon: float,
    budget: Budget,
    want_x: bool,
    want_y: bool,
) -> tuple[torch.Tensor, _Gradients]:
    costs = Costs(x.own, y.whole, budget, epsilon)
    f, g = torch.zeros_like(x.own.weights), torch.zeros_like(y.whole.weights)
    last_f, last_g = f, g
    for temperature, step in [*updates, (epsilon, 1.0)]:
        last_f, last_g = f, g
        new_f, partial_g = costs.softmin(f, g, temperature)
        new_g = _merge(partial_g, temperature, x.group)
        f, g = f.lerp(new_f, step), g.lerp(new_g, step)
    value = x.own.weights @ f + y.own.weights @ g[y.place]
    away_x = costs.barycentres(Potentials(f, last_g), epsilon) if want_x else None
    away_y = None
    if want_y:
        moved, sums = costs.transported(Potentials(g, last_f), epsilon, transposed=True)
        dist.all_reduce(moved, group=x.group)
        dist.all_reduce(sums, group=x.group)
        away_y = (moved / sums[:, None])[y.place]
    del costs
    gradients = []
    for shard, away in ((x, away_x), (y, away_y)):
        own_value, barycentre = _solve_self(shard, updates, epsilon, budget, away is not None)
        value = value - own_value
        gradients.append(
            None if away is None or barycentre is None else shard.own.weights[:, None] * (barycentre - away)
        )
    dist.all_reduce(value, group=x.group)
    return value, _Gradients(*gradients)


def _solve_self(
    shard: _Shard, updates: list[tuple[float, float]], epsilon: float, budget: Budget, want_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """This rank's part of OT of the whole cloud with itself, and the barycentres of its own points."""
    costs = Costs(shard.own, shard.whole, budget, epsilon)
    own = torch.zeros_like(shard.own.weights)
    everywhere = last = torch.zeros_like(shard.whole.weights)
    for temperature, step in [*updates, (epsilon, 1.0)]:
        last = everywhere
        own = own.lerp(costs.softmin(own, everywhere, temperature, on_y=False)[0], step)
        everywhere = shard.gather(own)
    barycentres = costs.barycentres(Potentials(own, last), epsilon) if want_gradient else None
    return shard.own.weights @ own, barycentres


def _merge(partial: torch.Tensor, epsilon: float, group: Any) -> torch.Tensor:
    """Softmin over all rows from every rank's softmin over its own rows."""
    logarithms = partial / (-epsilon * LOG_2)
    maxima = logarithms.clone()
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
    sums = (logarithms - maxima).exp2_()
    dist.all_reduce(sums, group=group)
    return (sums.log2_() + maxima).mul_(-epsilon * LOG_2)


class _ShardGradient(torch.autograd.Function):
    """Attaches this rank's gradients to the shared value."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, value: torch.Tensor, gradients: _Gradients) -> torch.Tensor:
        ctx.gradients = (gradients.x, gradients.y)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (*(None if gradient is None else gradient * upstream for gradient in ctx.gradients), None, None)
