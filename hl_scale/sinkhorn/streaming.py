"""The streaming solver: the dense solver's updates tile by tile, without any N x M tensor.

Each pair of clouds is cut out of its padding and solved alone, its problems xy, xx, yy one after the other. One pass
over the tiles of the costs gives the row log-sum-exp, hence f, and the running column log-sum-exp, hence g. Self terms
have one potential and symmetric costs: tiles on and above the diagonal are enough, read along rows and along columns.
As many tiles as the memory budget holds are kept from pass to pass; the others are computed again. The gradient takes
one more pass while the tiles are there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hl_scale.sinkhorn.clouds import Clouds, Solution, SolverOptions
from hl_scale.sinkhorn.schedule import AnnealingSchedule, Refinement
from hl_scale.sinkhorn.softmin import LOG_2, exponentiate_

# Edge of a tile: on CPUs it should stay in the second-level cache, on GPUs fill the device.
_CPU_EDGE, _CUDA_EDGE = 512, 8192
# Tensors of the size of a tile that are alive at once: costs and exponents.
_TILE_TENSORS = 2


@dataclass(frozen=True)
class Budget:
    """Edge of a tile, and bytes left for tiles that are kept."""

    edge: int
    cache_bytes: float


def solve_streaming(
    clouds: Clouds, schedule: AnnealingSchedule, options: SolverOptions, memory_budget: int | None
) -> Solution:
    """Solve pair after pair within `memory_budget` bytes of intermediate results (None: keep every tile).

    Raises:
        ValueError: the budget does not hold one cost.
    """
    budget = divide_budget(memory_budget, clouds.x)
    a, b = clouds.a, clouds.b
    solution = Solution(
        value=a.new_zeros(len(a)),
        f=torch.zeros_like(a),
        g=torch.zeros_like(b),
        f_self=torch.zeros_like(a) if options.debias else None,
        g_self=torch.zeros_like(b) if options.debias else None,
        gradient_x=torch.zeros_like(clouds.x) if options.want_gradient_x else None,
        gradient_y=torch.zeros_like(clouds.y) if options.want_gradient_y else None,
        marginal_error=a.new_zeros(len(a)) if options.want_error else None,
        iterations=schedule.iterations.clone(),
    )
    for sample in range(len(a)):
        _solve_pair(clouds, schedule, sample, solution, budget, options)
    return solution


def divide_budget(memory_budget: int | None, like: torch.Tensor) -> Budget:
    edge = _CUDA_EDGE if like.is_cuda else _CPU_EDGE
    if memory_budget is None:
        return Budget(edge, math.inf)
    numbers = memory_budget // like.element_size()
    edge = min(edge, math.isqrt(numbers // _TILE_TENSORS))
    if edge < 1:
        raise ValueError(
            f"memory_budget is {memory_budget} bytes, but one cost takes {_TILE_TENSORS * like.element_size()}: "
            "raise it, or pass None"
        )
    return Budget(edge, memory_budget - _TILE_TENSORS * edge * edge * like.element_size())


_Start = tuple[torch.Tensor | None, torch.Tensor | None]


class Cloud:
    """One cloud of a pair without padding.

    Attributes:
        inside: mask of the cloud in its padded row.
        points, weights: (N, D), (N,); log_weights (base 2), half_norms: (N,).
    """

    def __init__(self, points: torch.Tensor, weights: torch.Tensor) -> None:
        self.inside = weights > 0
        whole = bool(self.inside.all())
        self.points, self.weights = (points, weights) if whole else (points[self.inside], weights[self.inside])
        self.log_weights = self.weights.log2()
        self.half_norms = self.points.square().sum(-1).div_(2)

    def logits(self, potential: torch.Tensor, inverse: float) -> torch.Tensor:
        """(N,) logarithms of weights * exp(potential / epsilon) to base 2; `inverse` is 1 / (epsilon log 2)."""
        return torch.add(self.log_weights, potential, alpha=inverse)

    def drift(self, change: torch.Tensor, epsilon: float) -> torch.Tensor:
        """() L1 distance of this cloud's marginal from its weights, for potentials `change` above a full update."""
        return self.weights @ (change / epsilon).expm1().abs()


class Costs:
    """Costs 0.5*|x_i - y_j|^2 between two clouds, or within one, in tiles.

    Within one cloud only tiles on and above the diagonal exist; those above stand for their mirror images too.
    """

    def __init__(self, x: Cloud, y: Cloud, budget: Budget) -> None:
        self.x, self.y, self.symmetric = x, y, x is y
        self.edge = min(budget.edge, max(len(x.weights), len(y.weights)))
        self.work = x.points.new_empty(_TILE_TENSORS, self.edge * self.edge)
        self.room = budget.cache_bytes
        self.kept: dict[tuple[int, int], torch.Tensor] = {}

    def __iter__(self) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """Rows, columns and costs of every tile; the costs hold until the next tile and must not be changed."""
        for start in range(0, len(self.x.weights), self.edge):
            rows = slice(start, min(start + self.edge, len(self.x.weights)))
            for left in range(start if self.symmetric else 0, len(self.y.weights), self.edge):
                columns = slice(left, min(left + self.edge, len(self.y.weights)))
                yield rows, columns, self._tile(rows, columns)

    def _tile(self, rows: slice, columns: slice) -> torch.Tensor:
        key = (rows.start, columns.start)
        if key in self.kept:
            return self.kept[key]
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        size = self.work.element_size() * shape[0] * shape[1]
        keep = size <= self.room
        tile = self.work.new_empty(shape) if keep else self._scratch(0, shape)
        torch.add(self.x.half_norms[rows, None], self.y.half_norms[columns], out=tile)
        tile.addmm_(self.x.points[rows], self.y.points[columns].T, alpha=-1)
        if keep:
            self.room -= size
            self.kept[key] = tile
        return tile

    def _scratch(self, number: int, shape: tuple[int, ...]) -> torch.Tensor:
        return self.work[number, : math.prod(shape)].view(shape)

    def exponents(self, tile: torch.Tensor, logits: torch.Tensor, inverse: float) -> torch.Tensor:
        """logits - tile / (epsilon log 2) in a buffer that the next call overwrites."""
        return torch.add(logits, tile, alpha=-inverse, out=self._scratch(1, tile.shape))

    def softmin(
        self, f: torch.Tensor, g: torch.Tensor, epsilon: float, on_x: bool = True, on_y: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Softmin over columns (on x, given g) and over rows (on y, given f); within one cloud both are one result.

        A side that is not asked for comes back as -inf.
        """
        inverse = 1 / (epsilon * LOG_2)
        row_logits, column_logits = self.y.logits(g, inverse), self.x.logits(f, inverse)
        new_f = torch.full_like(f, -torch.inf)
        new_g = new_f if self.symmetric else torch.full_like(g, -torch.inf)
        for rows, columns, tile in self:
            if on_x:
                along = exponentiate_(self.exponents(tile, row_logits[columns], inverse))[0]
                new_f[rows] = torch.logaddexp2(new_f[rows], along)
            if on_y and not (self.symmetric and rows == columns):
                down = exponentiate_(self.exponents(tile, column_logits[rows, None], inverse), 0)[0]
                new_g[columns] = torch.logaddexp2(new_g[columns], down)
        new_f.div_(-inverse)
        return new_f, new_f if self.symmetric else new_g.div_(-inverse)

    def solve(
        self, updates: list[tuple[float, float]], epsilon: float, options: SolverOptions, start: _Start
    ) -> tuple[Potentials, Potentials, int]:
        """Potentials of x and y after annealing by `updates` (temperature, step), refining and a last full update.

        Also the number of refining updates.
        """
        f = torch.zeros_like(self.x.weights) if start[0] is None else start[0]
        g = f if self.symmetric else torch.zeros_like(self.y.weights) if start[1] is None else start[1]
        for temperature, step in updates:
            new_f, new_g = self.softmin(f, g, temperature)
            f = f.lerp(new_f, step)
            g = f if self.symmetric else g.lerp(new_g, step)
        refined = 0
        if options.tolerance is not None:
            f, g, refined = self.refine(f, g, epsilon, options)
        last_f, last_g = self.softmin(f, g, epsilon)
        return Potentials(last_f, g), Potentials(last_g, f), refined

    def refine(
        self, f: torch.Tensor, g: torch.Tensor, epsilon: float, options: SolverOptions
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Iterate at the target temperature until the marginals are within tolerance."""
        assert options.tolerance is not None
        state = Refinement(1, options.relaxation, options.tolerance, like=f)
        while state.updates < options.maximum_iterations and state.any_active():
            new_f = self.softmin(f, g, epsilon, on_y=self.symmetric)[0]
            error = self.x.drift(f - new_f, epsilon)
            if self.symmetric:
                f = g = f.lerp(new_f, float(state.half_step()))
            else:
                f = f.lerp(new_f, float(state.step()))
                new_g = self.softmin(f, g, epsilon, on_x=False)[1]
                error = error + self.y.drift(g - new_g, epsilon)
                g = g.lerp(new_g, float(state.step()))
            state.record(error[None])
        return f, g, state.updates

    def barycentres(self, final: Potentials, epsilon: float, transposed: bool = False) -> torch.Tensor:
        """sum_j P_ij y_j (N, D), for P whose rows sum to 1; transposed, sum_i P_ji x_i (M, D)."""
        moved, sums = self.transported(final, epsilon, transposed)
        return moved.div_(sums[:, None])  # 1 up to rounding

    def transported(self, final: Potentials, epsilon: float, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """sum_j P_ij y_j (N, D) and sum_j P_ij (N,) with P_ij = b_j exp((f_i + g_j - C_ij) / epsilon).

        Transposed: sum_i P_ji x_i (M, D) and sum_i P_ji (M,), for the potentials of y.
        """
        inverse = 1 / (epsilon * LOG_2)
        ours, others = (self.y, self.x) if transposed else (self.x, self.y)
        own_logits, logits = final.own * inverse, others.logits(final.previous_of_other, inverse)
        moved, sums = torch.zeros_like(ours.points), torch.zeros_like(ours.weights)
        smallest = math.log2(torch.finfo(moved.dtype).tiny)
        for rows, columns, tile in self:
            if not transposed:
                plan = self.exponents(tile, logits[columns], inverse).add_(own_logits[rows, None])
                plan = plan.clamp_(min=smallest).exp2_()
                moved[rows].addmm_(plan, self.y.points[columns])
                sums[rows] += plan.sum(1)
            if transposed or (self.symmetric and rows != columns):
                plan = self.exponents(tile, logits[rows, None], inverse).add_(own_logits[columns])
                plan = plan.clamp_(min=smallest).exp2_()
                moved[columns].addmm_(plan.T, self.x.points[rows])
                sums[columns] += plan.sum(0)
        return moved, sums


@dataclass(frozen=True)
class Potentials:
    """Final potential of a cloud, and its partner's before the last update: together they make the plan."""

    own: torch.Tensor
    previous_of_other: torch.Tensor


def _solve_pair(
    clouds: Clouds,
    schedule: AnnealingSchedule,
    sample: int,
    solution: Solution,
    budget: Budget,
    options: SolverOptions,
) -> None:
    """Anneal one pair of the batch and write its row of `solution`."""
    x, y = Cloud(clouds.x[sample], clouds.a[sample]), Cloud(clouds.y[sample], clouds.b[sample])
    epsilon, count = schedule.epsilon, int(schedule.iterations[sample])
    updates = list(
        zip(schedule.epsilons[:count, sample].tolist(), schedule.steps[:count, sample].tolist(), strict=True)
    )
    given = options.initial or (None, None, None, None)
    starts = [
        None if potential is None else potential[sample, cloud.inside]
        for potential, cloud in zip(given, (x, y, x, y), strict=True)
    ]

    costs = Costs(x, y, budget)
    final_f, final_g, refined = costs.solve(updates, epsilon, options, (starts[0], starts[1]))
    solution.f[sample, x.inside], solution.g[sample, y.inside] = final_f.own, final_g.own
    value = x.weights @ final_f.own + y.weights @ final_g.own
    if solution.marginal_error is not None:
        new_f, new_g = costs.softmin(final_f.own, final_g.own, epsilon)
        drifts = x.drift(final_f.own - new_f, epsilon) + y.drift(final_g.own - new_g, epsilon)
        solution.marginal_error[sample] = drifts
    away_x = costs.barycentres(final_f, epsilon) if options.want_gradient_x else None
    away_y = costs.barycentres(final_g, epsilon, transposed=True) if options.want_gradient_y else None
    del costs  # its tiles make room for those of the self terms
    for cloud, own, gradient, away, start in (
        (x, solution.f_self, solution.gradient_x, away_x, starts[2]),
        (y, solution.g_self, solution.gradient_y, away_y, starts[3]),
    ):
        barycentre = cloud.points
        if own is not None:
            self_costs = Costs(cloud, cloud, budget)
            final, _, again = self_costs.solve(updates, epsilon, options, (start, start))
            own[sample, cloud.inside] = final.own
            value = value - cloud.weights @ final.own
            refined = max(refined, again)
            if gradient is not None:
                barycentre = self_costs.barycentres(final, epsilon)
        if gradient is not None and away is not None:
            gradient[sample, cloud.inside] = cloud.weights[:, None] * (barycentre - away)
    solution.value[sample] = value
    solution.iterations[sample] += refined
