"""The streaming solver: the dense solver's updates in blocks of rows, without any N x M tensor.

Each pair of clouds is cut out of its padding and solved alone. For a block of rows I one Gram block gives the row
log-sum-exp, hence f_I, and updates the running column log-sum-exp, hence g after the last block; self terms have one
potential and need rows only. The gradient takes one more pass over the blocks, in backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from hl_scale.sinkhorn.clouds import Clouds, Solution
from hl_scale.sinkhorn.schedule import AnnealingSchedule
from hl_scale.sinkhorn.softmin import LOG_2, exponentiate_

# Tensors of the size of a block that are alive at once: the product of the points, exponents, exponentials.
_BLOCK_TENSORS = 3


def solve_streaming(
    clouds: Clouds,
    schedule: AnnealingSchedule,
    debias: bool,
    want_gradient_x: bool,
    want_gradient_y: bool,
    want_error: bool,
    memory_budget: int,
) -> Solution:
    """Solve pair after pair within `memory_budget` bytes of intermediate results.

    Raises:
        ValueError: the budget does not hold one row of costs.
    """
    columns = max(clouds.x.shape[1], clouds.y.shape[1])
    row_bytes = _BLOCK_TENSORS * columns * clouds.x.element_size()
    rows = memory_budget // row_bytes
    if rows < 1:
        raise ValueError(
            f"memory_budget is {memory_budget} bytes, but one row of {columns} costs takes {row_bytes}: "
            "raise it, or pass None for the dense solver"
        )
    solutions = [_solve_pair(clouds, schedule, sample, debias, want_error, rows) for sample in range(clouds.x.shape[0])]
    f, g = torch.zeros_like(clouds.a), torch.zeros_like(clouds.b)
    f_self, g_self = (torch.zeros_like(f), torch.zeros_like(g)) if debias else (None, None)
    for sample, pair in enumerate(solutions):
        f[sample, pair.x.inside], g[sample, pair.y.inside] = pair.x.cross, pair.y.cross
        if f_self is not None and g_self is not None:
            f_self[sample, pair.x.inside], g_self[sample, pair.y.inside] = pair.x.own, pair.y.own
    epsilon = schedule.epsilon
    return Solution(
        torch.stack([pair.value for pair in solutions]),
        f,
        g,
        f_self,
        g_self,
        partial(_gradient, [(p.x, p.y) for p in solutions], clouds.x, epsilon, rows) if want_gradient_x else None,
        partial(_gradient, [(p.y, p.x) for p in solutions], clouds.y, epsilon, rows) if want_gradient_y else None,
        torch.stack([pair.error for pair in solutions]) if want_error else None,
    )


class _Cloud:
    """One cloud of a pair without padding, and its potentials once it is solved.

    Attributes:
        inside: mask of the cloud in its padded row.
        points, weights: (N, D), (N,); log_weights (base 2), half_norms: (N,).
        cross, own: (N,) final potentials of OT with the other cloud and with itself (`own` is empty without debiasing).
        last_cross, last_own: the ones that the final update started from.
    """

    def __init__(self, points: torch.Tensor, weights: torch.Tensor) -> None:
        self.inside = weights > 0
        self.points, self.weights = points[self.inside], weights[self.inside]
        self.log_weights = self.weights.log2()
        self.half_norms = self.points.square().sum(-1).div_(2)
        self.cross = self.last_cross = torch.zeros_like(self.weights)
        self.own = self.last_own = self.weights.new_zeros(0)

    def logits(self, potential: torch.Tensor, inverse: float) -> torch.Tensor:
        """(N,) logarithms of weights * exp(potential / epsilon) to base 2; `inverse` is 1 / (epsilon log 2)."""
        return torch.add(self.log_weights, potential, alpha=inverse)

    def costs(self, rows: slice, other: _Cloud) -> torch.Tensor:
        """(rows, M) block of 0.5*|x_i - y_j|^2."""
        norms = self.half_norms[rows, None] + other.half_norms
        return norms.addmm_(self.points[rows], other.points.T, alpha=-1)


@dataclass(frozen=True)
class _Pair:
    x: _Cloud
    y: _Cloud
    value: torch.Tensor
    error: torch.Tensor


def _solve_pair(
    clouds: Clouds, schedule: AnnealingSchedule, sample: int, debias: bool, want_error: bool, rows: int
) -> _Pair:
    """Anneal one pair of the batch, blocks of `rows` rows at a time."""
    x, y = (_Cloud(points[sample], w[sample]) for points, w in ((clouds.x, clouds.a), (clouds.y, clouds.b)))
    count = int(schedule.iterations[sample])
    epsilons = [*schedule.epsilons[:count, sample].tolist(), schedule.epsilon]
    updates = list(zip(epsilons, [*schedule.steps[:count, sample].tolist(), 1.0], strict=True))
    for epsilon, step in updates:
        x.last_cross, y.last_cross = x.cross, y.cross
        new_x, new_y = _pair_softmin(x, y, x.cross, y.cross, epsilon, rows)
        x.cross, y.cross = x.cross.lerp(new_x, step), y.cross.lerp(new_y, step)
    value = x.weights @ x.cross + y.weights @ y.cross
    for cloud in (x, y) if debias else ():
        cloud.own = torch.zeros_like(cloud.weights)
        for epsilon, step in updates:
            cloud.last_own = cloud.own
            cloud.own = cloud.own.lerp(_self_softmin(cloud, cloud.own, epsilon, rows), step)
        value = value - cloud.weights @ cloud.own
    error = torch.zeros_like(value)
    if want_error:
        again = _pair_softmin(x, y, x.cross, y.cross, schedule.epsilon, rows)
        for cloud, potential in zip((x, y), again, strict=True):
            error += cloud.weights @ ((cloud.cross - potential) / schedule.epsilon).expm1().abs()
    return _Pair(x, y, value, error)


def _blocks(count: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


def _pair_softmin(
    ours: _Cloud, theirs: _Cloud, f: torch.Tensor, g: torch.Tensor, epsilon: float, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmin over columns, on x, and over rows, on y, from one pass over the costs."""
    inverse = 1 / (epsilon * LOG_2)
    row_logits, column_logits = theirs.logits(g, inverse), ours.logits(f, inverse)
    new_f = torch.empty_like(f)
    column_sums = torch.full_like(g, -torch.inf)
    for block in _blocks(len(f), rows):
        exponents = ours.costs(block, theirs).mul_(-inverse)
        new_f[block] = exponentiate_(exponents + row_logits)[0]
        exponents += column_logits[block, None]
        column_sums = torch.logaddexp2(column_sums, exponentiate_(exponents, 0)[0])
    return new_f.div_(-inverse), column_sums.div_(-inverse)


def _self_softmin(cloud: _Cloud, potential: torch.Tensor, epsilon: float, rows: int) -> torch.Tensor:
    inverse = 1 / (epsilon * LOG_2)
    logits = cloud.logits(potential, inverse)
    new = torch.empty_like(potential)
    for block in _blocks(len(potential), rows):
        new[block] = exponentiate_(cloud.costs(block, cloud).mul_(-inverse).add_(logits))[0]
    return new.div_(-inverse)


def _gradient(
    pairs: list[tuple[_Cloud, _Cloud]], like: torch.Tensor, epsilon: float, rows: int, upstream: torch.Tensor
) -> torch.Tensor:
    """Gradient on the first cloud of each pair, in the padded shape of `like`."""
    gradient = torch.zeros_like(like)
    for sample, (cloud, other) in enumerate(pairs):
        barycentre = cloud.points
        if len(cloud.own):
            barycentre = _transport(cloud, cloud, cloud.own, cloud.last_own, epsilon, rows)
        pulled = _transport(cloud, other, cloud.cross, other.last_cross, epsilon, rows)
        gradient[sample, cloud.inside] = (cloud.weights * upstream[sample])[:, None] * (barycentre - pulled)
    return gradient


def _transport(
    cloud: _Cloud, other: _Cloud, potential: torch.Tensor, previous: torch.Tensor, epsilon: float, rows: int
) -> torch.Tensor:
    """(N, D) barycentres sum_j P_ij y_j, P_ij = b_j exp((f_i + g_j - C_ij) / epsilon); rows of P sum to 1."""
    inverse = 1 / (epsilon * LOG_2)
    logits = other.logits(previous, inverse)
    moved = torch.empty_like(cloud.points)
    for block in _blocks(len(potential), rows):
        plan = cloud.costs(block, other).sub_(potential[block, None]).mul_(-inverse).add_(logits).exp2_()
        torch.mm(plan, other.points, out=moved[block])
    return moved
