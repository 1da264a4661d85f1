"""The dense solver: a padded batch of short clouds, costs in memory, every update one operation over the batch.

Two problems for OT(x, y), whose rows are the points of x and of y, and one for each self term that is needed.
"""

from __future__ import annotations

import torch

from hl_scale.sinkhorn.clouds import Clouds, Solution, SolverOptions
from hl_scale.sinkhorn.schedule import AnnealingSchedule, Refinement
from hl_scale.sinkhorn.softmin import LOG_2, exponentiate_


def dense_bytes(clouds: Clouds, debias: bool) -> int:
    """Bytes that the dense solver takes for costs, their exponents and the plans that gradients need."""
    size = max(clouds.x.shape[1], clouds.y.shape[1])
    return (11 if debias else 6) * clouds.a.shape[0] * size * size * clouds.a.element_size()


def solve_dense(clouds: Clouds, schedule: AnnealingSchedule, options: SolverOptions) -> Solution:
    """Solve all pairs of the batch together."""
    n, m = clouds.x.shape[1], clouds.y.shape[1]
    debias = options.debias
    count = 2 if not debias else 4 if options.y_self is None else 3
    problems = _Problems(clouds, count)
    potentials = problems.start(options.initial)
    for epsilon, step in zip(schedule.epsilons, schedule.steps, strict=True):
        potentials.lerp_(problems.softmin(potentials, epsilon)[0], step[:, None].expand_as(potentials[0]))
    final = schedule.target()
    iterations, converged = schedule.iterations.clone(), torch.ones(len(clouds.a), dtype=torch.bool)
    if options.tolerance is not None:
        state = _refine(problems, clouds, potentials, final, options)
        iterations += state.iterations
        converged = state.finished()
    potentials, sums = problems.softmin(potentials, final)

    f, g = potentials[0, :, :n], potentials[1, :, :m]
    f_self = potentials[2, :, :n] if debias else None
    g_self = potentials[3, :, :m] if count == 4 else None
    value = _pairing(clouds.a, f, f_self) + _pairing(clouds.b, g, g_self)
    if options.y_self is not None:
        value = value - options.y_self

    def plan(problem: int, rows: int, columns: int) -> torch.Tensor:
        return problems.kernel[problem, :, :rows, :columns] / sums[problem, :, :rows, None]

    gradient_x = gradient_y = None
    x, y = clouds.x.to(f.dtype), clouds.y.to(f.dtype)
    if options.want_gradient_x:
        own = plan(2, n, n) if debias else None
        gradient_x = _gradient(clouds.a, x, y, own, plan(0, n, m))
    if options.want_gradient_y:
        own = plan(3, m, m) if debias else None
        gradient_y = _gradient(clouds.b, y, x, own, plan(1, m, n))
    error = None
    if options.want_error:
        again = problems.softmin(potentials, final)[0]
        change = potentials - again
        error = problems.drift(0, change[0], schedule.epsilon) + problems.drift(1, change[1], schedule.epsilon)
    return Solution(value, f, g, f_self, g_self, gradient_x, gradient_y, error, iterations, converged)


class _Problems:
    """The first `count` of the problems xy, yx, xx, yy of every pair.

    They are stacked in this order along the first dimension of every tensor, padded to L = max(N, M) rows and columns.

    Attributes:
        costs, kernel: (problems, B, L, L); `kernel` holds the exponentials of the last `softmin`.
        weights, log_weights: (problems, B, L) of the columns, 0 (-inf) outside the cloud.
    """

    def __init__(self, clouds: Clouds, count: int) -> None:
        self.costs = _costs(clouds, count)
        self.weights = clouds.a.new_zeros(count, self.costs.shape[1], self.costs.shape[3])
        for problem, columns in enumerate((clouds.b, clouds.a, clouds.a, clouds.b)[:count]):
            self.weights[problem, :, : columns.shape[1]] = columns
        self.log_weights = self.weights.log2()
        self.partner = torch.tensor([1, 0, 2, 3][:count], device=self.costs.device)
        self.kernel = torch.empty_like(self.costs)

    def start(self, initial: tuple[torch.Tensor | None, ...] | None) -> torch.Tensor:
        """Potentials to begin with: zero, or given ones."""
        potentials = torch.zeros_like(self.weights)
        for problem, given in enumerate(initial or ()):
            if given is not None:
                potentials[problem, :, : given.shape[1]] = given
        return potentials

    def softmin(
        self, potentials: torch.Tensor, epsilon: torch.Tensor, which: slice = slice(None)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """New potentials of the problems `which`, and the row sums that turn their part of `kernel` into plans."""
        inverse = 1 / (epsilon * LOG_2)
        columns = potentials[self.partner[which]]
        logits = torch.addcmul(self.log_weights[which], columns, inverse[:, None])
        kernel = self.kernel[which]
        torch.addcmul(logits[:, :, None, :], self.costs[which], -inverse[:, None, None], out=kernel)
        logarithms, sums = exponentiate_(kernel)
        return logarithms.div_(-inverse[:, None]), sums

    def drift(self, problem: int, change: torch.Tensor, epsilon: float) -> torch.Tensor:
        """(B,) L1 distance of the row marginal from its weights; the potentials are `change` above a full update."""
        weights = self.weights[self.partner[problem]]
        return torch.where(weights > 0, weights * (change / epsilon).expm1().abs(), 0).sum(-1)


def _refine(
    problems: _Problems, clouds: Clouds, potentials: torch.Tensor, epsilon: torch.Tensor, options: SolverOptions
) -> Refinement:
    """Alternate updates at the target temperature, in place, until every sample's marginals are within tolerance.

    A sample that is done does not move any more.
    """
    assert options.tolerance is not None
    target = float(epsilon[0])
    state = Refinement(len(clouds.a), options.relaxation, options.tolerance, like=clouds.a)
    while state.updates < options.maximum_iterations and state.any_active():
        error = torch.zeros_like(state.best)
        for problem in (0, 1):
            change = problems.softmin(potentials, epsilon, slice(problem, problem + 1))[0][0] - potentials[problem]
            error += problems.drift(problem, -change, target)
            potentials[problem].addcmul_(change, state.step()[:, None])
        if options.debias:
            change = problems.softmin(potentials, epsilon, slice(2, None))[0] - potentials[2:]
            for problem in range(2, len(potentials)):
                error = torch.maximum(error, problems.drift(problem, -change[problem - 2], target))
            potentials[2:].addcmul_(change, state.half_step()[:, None])
        state.record(error)
    return state


def _costs(clouds: Clouds, count: int) -> torch.Tensor:
    """(count, B, L, L) of 0.5*|p - q|^2; norms are the diagonals of the Gram matrices, so C_ii = 0 in self terms."""
    x, y = clouds.x.to(clouds.a.dtype), clouds.y.to(clouds.a.dtype)
    n, m = x.shape[1], y.shape[1]
    size = max(n, m)
    costs = x.new_zeros(count, x.shape[0], size, size)
    halves = []
    for problem, points in ((2, x), (3, y)):
        if problem < count:
            gram, length = points @ points.mT, points.shape[1]
            half = gram.diagonal(dim1=1, dim2=2) / 2
            costs[problem, :, :length, :length] = (half[:, :, None] + half[:, None, :]).sub_(gram)
        else:
            half = points.square().sum(-1) / 2
        halves.append(half)
    cross = (halves[0][:, :, None] + halves[1][:, None, :]).sub_(x @ y.mT)
    costs[0, :, :n, :m] = cross
    costs[1, :, :m, :n] = cross.mT
    return costs


def _pairing(weights: torch.Tensor, potential: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
    return (weights * (potential if own is None else potential - own)).sum(-1)


def _gradient(
    weights: torch.Tensor,
    points: torch.Tensor,
    others: torch.Tensor,
    own: torch.Tensor | None,
    cross: torch.Tensor,
) -> torch.Tensor:
    """weights * (own @ points - cross @ others); without a self plan, the points themselves come first."""
    scale = weights[:, :, None]
    gradient = points * scale if own is None else torch.bmm(own * scale, points)
    return gradient.baddbmm_(cross * scale, others, alpha=-1)
