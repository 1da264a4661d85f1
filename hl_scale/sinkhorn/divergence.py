"""The debiased entropic optimal transport divergence between weighted clouds: public function and dense solver.

    S(a, b) = OT(a, b) - OT(a, a)/2 - OT(b, b)/2
    OT(a, b) = min over plans P with marginals a, b of  sum_ij P_ij C_ij + epsilon KL(P | a b^T),
    C_ij = |x_i - y_j|^2 / 2

For every problem (xy, yx, xx, yy) the potential on the rows obeys F_i = softmin_j(C_ij - F'_j), with F' the potential
of the partner problem (yx for xy, the problem itself for xx) and

    softmin_j(C_ij - F'_j) = -epsilon log sum_j w_j exp((F'_j - C_ij) / epsilon).

All problems are updated together, F <- (F + softmin)/2, down the schedule of schedule.py; a last full update gives the
potentials, S = <a, f - f_self> + <b, g - g_self>, and the plan whose rows give the gradient (envelope theorem):

    dS/dx_i = a_i (sum_j Pxx_ij x_j - sum_j Pxy_ij y_j),    rows of P sum to 1.

Source: J. Feydy, "Geometric data analysis, beyond convolutions", 2020, algorithm 3.5 and equation 3.209; same updates
as GeomLoss's `SamplesLoss("sinkhorn", p=2)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, overload

import torch

from hl_scale.sinkhorn.clouds import Clouds, Solution, check_points, make_clouds
from hl_scale.sinkhorn.schedule import AnnealingSchedule, annealing_schedule
from hl_scale.sinkhorn.softmin import LOG_2, exponentiate_
from hl_scale.sinkhorn.streaming import solve_streaming


@dataclass(frozen=True)
class SinkhornInfo:
    """How a divergence was found; without the batch dimension for unbatched clouds.

    Attributes:
        f, g: (B, N) and (B, M) potentials of OT(x, y) on the points of x and y; without meaning outside the masks.
        f_self, g_self: potentials of OT(x, x) and OT(y, y); None if not debiased.
        iterations: (B,) int64 on the CPU, updates before the final extrapolation.
        epsilon_start: (B,) first temperature: the squared diameter of the pair's bounding box.
        epsilon: the target temperature.
        marginal_error: (B,) L1 distance of the marginals of the plan of OT(x, y) from a and from b, summed (0 to 4).
        solver: "dense" or "streaming".
    """

    f: torch.Tensor
    g: torch.Tensor
    f_self: torch.Tensor | None
    g_self: torch.Tensor | None
    iterations: torch.Tensor
    epsilon_start: torch.Tensor
    epsilon: float
    marginal_error: torch.Tensor
    solver: str


@overload
def sinkhorn_divergence(
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    x_mask: torch.Tensor | None = None,
    y_mask: torch.Tensor | None = None,
    x_weights: torch.Tensor | None = None,
    y_weights: torch.Tensor | None = None,
    blur: float = 0.05,
    epsilon: float | None = None,
    scaling: float = 0.5,
    debias: bool = True,
    memory_budget: int | None = None,
    return_info: Literal[False] = False,
) -> torch.Tensor: ...


@overload
def sinkhorn_divergence(
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    x_mask: torch.Tensor | None = None,
    y_mask: torch.Tensor | None = None,
    x_weights: torch.Tensor | None = None,
    y_weights: torch.Tensor | None = None,
    blur: float = 0.05,
    epsilon: float | None = None,
    scaling: float = 0.5,
    debias: bool = True,
    memory_budget: int | None = None,
    return_info: Literal[True],
) -> tuple[torch.Tensor, SinkhornInfo]: ...


def sinkhorn_divergence(
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    x_mask: torch.Tensor | None = None,
    y_mask: torch.Tensor | None = None,
    x_weights: torch.Tensor | None = None,
    y_weights: torch.Tensor | None = None,
    blur: float = 0.05,
    epsilon: float | None = None,
    scaling: float = 0.5,
    debias: bool = True,
    memory_budget: int | None = None,
    return_info: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, SinkhornInfo]:
    """Sinkhorn divergence between clouds on the cost 0.5*|x-y|^2, differentiable once in x and y.

    Defaults give the value and the gradient of GeomLoss's ``SamplesLoss("sinkhorn", p=2, blur=0.05)`` for a single
    pair. Each sample of a batch has the schedule of its own points, so its value does not depend on batch mates or
    padding. The number of updates is fixed by the schedule, not by convergence: an under-converged value may be
    slightly negative; raise `scaling` towards 1 for more updates.

    Args:
        x: (N, D) or (B, N, D). float64 is computed in float64, float32 in float32 (on CUDA torch's own setting says
            whether its products may use TF32; by default not), bfloat16 and float16 in float32 from their exact values.
        y: (M, D) or (B, M, D), same dtype and device.
        x_mask: (N,) or (B, N) bool, True for points of the cloud; coordinates elsewhere are never used.
        y_mask: (M,) or (B, M) bool.
        x_weights: (N,) or (B, N), non-negative, summing to 1 within 1e-4 over the unmasked points (then divided by
            their sum); uniform unless given. No gradient is available. A point of weight 0 is not part of the cloud.
        y_weights: (M,) or (B, M).
        blur: square root of the regularisation, in units of distance.
        epsilon: regularisation in units of the cost, overrides `blur`; epsilon = blur^2.
        scaling: ratio of successive blurs of the annealing, in (0, 1).
        debias: subtract the self terms; otherwise the value is OT(x, y) with its entropy.
        memory_budget: bytes that intermediate results may take beside tensors as large as x and y. Costs that do not
            fit are streamed in blocks of rows, sample by sample, and no N x M tensor exists. None: always dense.
        return_info: also return a `SinkhornInfo`; costs one more update.

    Returns:
        The divergence, () or (B,), float32 or float64; with `return_info`, a pair of it and the information.

    Raises:
        ValueError: inputs that do not fit together, are not finite, or an empty cloud; the message names the argument.

    Memory: dense, 8 max(N, M)^2 numbers a sample, and the plans until backward; streaming, within `memory_budget`,
    and only potentials until backward.
    """
    check_points(x, y)
    blur = _check_temperature(blur, epsilon, scaling)
    for name, weights in (("x_weights", x_weights), ("y_weights", y_weights)):
        if weights is not None and weights.requires_grad:
            raise ValueError(f"{name} requires a gradient, which is not available: pass {name}.detach()")
    batched = x.dim() == 3
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, y = x.to(dtype), y.to(dtype)
    companions = [x_mask, y_mask, x_weights, y_weights]
    if not batched:
        x, y = x[None], y[None]
        companions = [None if companion is None else companion[None] for companion in companions]
    wanted = [torch.is_grad_enabled() and points.requires_grad for points in (x, y)]
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        clouds = make_clouds(x, y, *companions, blur=blur)
        schedule = annealing_schedule(clouds.diameters, blur, scaling, dtype=dtype, device=x.device)
        arguments = (clouds, schedule, debias, wanted[0], wanted[1], return_info)
        streamed = memory_budget is not None and dense_bytes(clouds, debias) > memory_budget
        if streamed:
            assert memory_budget is not None
            solution = solve_streaming(*arguments, memory_budget)
        else:
            solution = solve_dense(*arguments)
    value = solution.value
    if any(wanted):
        value = _EnvelopeGradient.apply(x, y, solution)
    if not batched:
        value = value[0]
    if not return_info:
        return value
    return value, _information(solution, schedule, batched, "streaming" if streamed else "dense")


def dense_bytes(clouds: Clouds, debias: bool) -> int:
    """Bytes that the dense solver takes for costs and their exponents."""
    size = max(clouds.x.shape[1], clouds.y.shape[1])
    return (8 if debias else 4) * clouds.x.shape[0] * size * size * clouds.x.element_size()


def solve_dense(
    clouds: Clouds,
    schedule: AnnealingSchedule,
    debias: bool,
    want_gradient_x: bool,
    want_gradient_y: bool,
    want_error: bool,
) -> Solution:
    """Solve all pairs with their cost matrices in memory.

    The problems xy, yx and, when debiasing, xx, yy are stacked in this order along the first dimension of every tensor,
    padded to L = max(N, M) rows and columns, so that an update is one operation over (problems, B, L, L).
    """
    n, m = clouds.x.shape[1], clouds.y.shape[1]
    costs = _costs(clouds, debias)
    weights = clouds.a.new_zeros(costs.shape[0], costs.shape[1], costs.shape[3])
    for problem, columns in enumerate((clouds.b, clouds.a, clouds.a, clouds.b)[: costs.shape[0]]):
        weights[problem, :, : columns.shape[1]] = columns
    log_weights = weights.log2()
    partner = torch.tensor([1, 0, 2, 3][: costs.shape[0]], device=costs.device)
    kernel = torch.empty_like(costs)

    def softmin(potentials: torch.Tensor, epsilon: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """New potentials, and the row sums that turn `kernel`, overwritten here, into plans."""
        inverse = 1 / (epsilon * LOG_2)
        logits = torch.addcmul(log_weights, potentials[partner], inverse[:, None])
        torch.addcmul(logits[:, :, None, :], costs, -inverse[:, None, None], out=kernel)
        logarithms, sums = exponentiate_(kernel)
        return logarithms.div_(-inverse[:, None]), sums

    potentials = torch.zeros_like(weights)
    for epsilon, step in zip(schedule.epsilons, schedule.steps, strict=True):
        potentials.lerp_(softmin(potentials, epsilon)[0], step[:, None].expand_as(potentials[0]))
    final = torch.full_like(schedule.epsilons[0], schedule.epsilon)
    potentials, sums = softmin(potentials, final)

    f, g = potentials[0, :, :n], potentials[1, :, :m]
    f_self, g_self = (potentials[2, :, :n], potentials[3, :, :m]) if debias else (None, None)
    value = _pairing(clouds.a, f, f_self) + _pairing(clouds.b, g, g_self)

    def plan(problem: int, rows: int, columns: int) -> torch.Tensor:
        return kernel[problem, :, :rows, :columns] / sums[problem, :, :rows, None]

    gradient_x = gradient_y = None
    if want_gradient_x:
        own = plan(2, n, n) if debias else None
        gradient_x = partial(_gradient, clouds.a, clouds.x, clouds.y, own, plan(0, n, m))
    if want_gradient_y:
        own = plan(3, m, m) if debias else None
        gradient_y = partial(_gradient, clouds.b, clouds.y, clouds.x, own, plan(1, m, n))
    error = None
    if want_error:
        drift = ((potentials - softmin(potentials, final)[0]) / schedule.epsilon).expm1().abs()
        error = (clouds.a * drift[0, :, :n]).sum(-1) + (clouds.b * drift[1, :, :m]).sum(-1)
    return Solution(value, f, g, f_self, g_self, gradient_x, gradient_y, error)


def _costs(clouds: Clouds, debias: bool) -> torch.Tensor:
    """(problems, B, L, L) of 0.5*|p - q|^2; norms are the diagonals of the Gram matrices, so C_ii = 0 in self terms."""
    x, y = clouds.x, clouds.y
    n, m = x.shape[1], y.shape[1]
    size = max(n, m)
    costs = x.new_zeros(4 if debias else 2, x.shape[0], size, size)
    if debias:
        gram_x, gram_y = x @ x.mT, y @ y.mT
        half_x = gram_x.diagonal(dim1=1, dim2=2) / 2
        half_y = gram_y.diagonal(dim1=1, dim2=2) / 2
        costs[2, :, :n, :n] = (half_x[:, :, None] + half_x[:, None, :]).sub_(gram_x)
        costs[3, :, :m, :m] = (half_y[:, :, None] + half_y[:, None, :]).sub_(gram_y)
    else:
        half_x, half_y = x.square().sum(-1) / 2, y.square().sum(-1) / 2
    cross = (half_x[:, :, None] + half_y[:, None, :]).sub_(x @ y.mT)
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
    upstream: torch.Tensor,
) -> torch.Tensor:
    """upstream * weights * (own @ points - cross @ others); without a self plan, the points themselves come first."""
    scale = (weights * upstream[:, None])[:, :, None]
    gradient = points * scale if own is None else torch.bmm(own * scale, points)
    return gradient.baddbmm_(cross * scale, others, alpha=-1)


class _EnvelopeGradient(torch.autograd.Function):
    """Attaches a solver's gradient to its value; not differentiable a second time.

    The points are saved only for autograd's check that nobody has changed them in place since.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, solution: Solution) -> torch.Tensor:
        ctx.save_for_backward(x, y)
        ctx.gradients = (solution.gradient_x, solution.gradient_y)
        return solution.value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        assert len(ctx.saved_tensors) == 2
        with torch.autocast(upstream.device.type, enabled=False):
            return (*(None if gradient is None else gradient(upstream) for gradient in ctx.gradients), None)


def _check_temperature(blur: float, epsilon: float | None, scaling: float) -> float:
    """The blur to use.

    Raises:
        ValueError: a value out of range.
    """
    name, value = ("blur", blur) if epsilon is None else ("epsilon", epsilon)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value}, expected a finite number > 0 (epsilon = blur^2, on the cost 0.5*|x-y|^2)")
    if not 0 < scaling < 1:
        raise ValueError(f"scaling is {scaling}, expected a number strictly between 0 and 1, for example 0.5")
    return blur if epsilon is None else math.sqrt(epsilon)


def _information(solution: Solution, schedule: AnnealingSchedule, batched: bool, solver: str) -> SinkhornInfo:
    assert solution.marginal_error is not None

    def row(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if batched else tensor[0]

    return SinkhornInfo(
        f=row(solution.f),
        g=row(solution.g),
        f_self=None if solution.f_self is None else row(solution.f_self),
        g_self=None if solution.g_self is None else row(solution.g_self),
        iterations=row(schedule.iterations),
        epsilon_start=row(schedule.epsilons[0]),
        epsilon=schedule.epsilon,
        marginal_error=row(solution.marginal_error),
        solver=solver,
    )
