"""The debiased entropic optimal transport divergence between weighted clouds: the public function.

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
import warnings
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch

from hl_scale.sinkhorn.clouds import Clouds, Solution, SolverOptions, check_points, make_clouds
from hl_scale.sinkhorn.dense import dense_bytes, solve_dense
from hl_scale.sinkhorn.schedule import AnnealingSchedule, annealing_schedule
from hl_scale.sinkhorn.streaming import solve_streaming

DENSE_POINTS = 512
"""Clouds with more points are solved one pair at a time, tile by tile."""
# Annealing from further away loses digits.
_LARGEST_DIAMETER = 1000.0


@dataclass(frozen=True)
class SinkhornInfo:
    """How a divergence was found; without the batch dimension for unbatched clouds.

    Attributes:
        f, g: (B, N) and (B, M) potentials of OT(x, y) on the points of x and y; without meaning outside the masks.
        f_self, g_self: potentials of OT(x, x) and OT(y, y); None if not debiased.
        iterations: (B,) int64 on the CPU, updates before the final extrapolation.
        epsilon_start: (B,) first temperature: the squared diameter of the pair's bounding box, or the given one.
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
    tolerance: float | None = None,
    maximum_iterations: int = 1000,
    relaxation: float = 1.0,
    initial: SinkhornInfo | None = None,
    diameter: float | None = None,
    y_self: torch.Tensor | None = None,
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
    tolerance: float | None = None,
    maximum_iterations: int = 1000,
    relaxation: float = 1.0,
    initial: SinkhornInfo | None = None,
    diameter: float | None = None,
    y_self: torch.Tensor | None = None,
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
    tolerance: float | None = None,
    maximum_iterations: int = 1000,
    relaxation: float = 1.0,
    initial: SinkhornInfo | None = None,
    diameter: float | None = None,
    y_self: torch.Tensor | None = None,
    return_info: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, SinkhornInfo]:
    """Sinkhorn divergence between clouds on the cost 0.5*|x-y|^2, differentiable once in points and weights.

    Defaults give the value and the gradient of GeomLoss's ``SamplesLoss("sinkhorn", p=2, blur=0.05)`` for a single
    pair. Each sample of a batch has the schedule of its own points, so its value does not depend on batch mates or
    padding. The number of updates is fixed by the schedule, not by convergence: an under-converged value may be
    slightly negative; raise `scaling` towards 1 for more updates.

    Args:
        x: (N, D) or (B, N, D). float64 is computed in float64, float32 in float32 (on CUDA torch's own setting says
            whether its products may use TF32; by default not), bfloat16 and float16 in float32 from their exact values,
            whose products are exact in float32.
        y: (M, D) or (B, M, D), same dtype and device.
        x_mask: (N,) or (B, N) bool, True for points of the cloud; coordinates elsewhere are never used.
        y_mask: (M,) or (B, M) bool.
        x_weights: (N,) or (B, N), non-negative, summing to 1 within 1e-4 over the unmasked points (then divided by
            their sum); uniform unless given. A point of weight 0 is not part of the cloud and has gradient 0.
        y_weights: (M,) or (B, M).
        blur: square root of the regularisation, in units of distance.
        epsilon: regularisation in units of the cost, overrides `blur`; epsilon = blur^2.
        scaling: ratio of successive blurs of the annealing, in (0, 1).
        debias: subtract the self terms; otherwise the value is OT(x, y) with its entropy.
        memory_budget: bytes that intermediate results may take beside tensors as large as x and y. Long clouds, and
            short ones that do not fit, are solved sample by sample in tiles of the costs; tiles that fit are kept from
            update to update, in float32 or, where that does not fit, rounded to 16 bits (moving no cost by more than
            epsilon / 10); others are computed again, and no N x M tensor exists. None: all are kept, in full.
        tolerance: instead of a fixed number of updates, go on at the target temperature until the marginals of the plan
            are off by no more than this (L1 distances, summed over both, in 0 to 4), also those of the self terms.
        maximum_iterations: updates at the target temperature after which to give up, with a warning.
        relaxation: 1 for plain alternating updates, up to below 2 for over-relaxed ones; needs `tolerance`.
        initial: potentials to begin with instead of annealing, of an earlier call with clouds of these shapes; needs
            `tolerance`.
        diameter: bound on distances to begin annealing from, instead of each pair's own bounding box; with it, a self
            term depends on its own cloud alone.
        y_self: (B,) or (), the self terms OT(y, y) / 2 of targets that do not change, found once as
            ``0.5 * sinkhorn_divergence(y, y, debias=False, diameter=...)`` with the same settings; needs `diameter`.
        return_info: also return a `SinkhornInfo`; costs one more update.

    Returns:
        The divergence, () or (B,), float32 or float64; with `return_info`, a pair of it and the information.

    Raises:
        ValueError: inputs that do not fit together, are not finite, or an empty cloud; the message names the argument.

    Memory: up to 512 points, 11 max(N, M)^2 numbers a sample; beyond, the larger of N M, N^2 / 2 and M^2 / 2 numbers
    and two tiles of at most 1024^2 (4096^2 on CUDA), or what `memory_budget` says. Until backward, one gradient as
    large as each of x and y that needs one.
    """
    check_points(x, y)
    blur = check_temperature(blur, epsilon, scaling)
    _check_refinement(tolerance, maximum_iterations, relaxation, initial)
    batched = x.dim() == 3
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    companions = [x_mask, y_mask, x_weights, y_weights]
    if not batched:
        x, y = x[None], y[None]
        companions = [None if companion is None else companion[None] for companion in companions]
    inputs = (x, y, companions[2], companions[3])
    wanted = [torch.is_grad_enabled() and given is not None and given.requires_grad for given in inputs]
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        clouds = make_clouds(x, y, *companions, blur=blur, dtype=dtype)
        known = _known_self_terms(y_self, diameter, debias, wanted[1] or wanted[3], clouds)
        diameters = _annealed_from(diameter, clouds, blur)
        schedule = annealing_schedule(diameters, blur, scaling, dtype=dtype, device=x.device)
        options = SolverOptions(
            debias=debias,
            want_gradient_x=wanted[0],
            want_gradient_y=wanted[1],
            want_error=return_info,
            tolerance=tolerance,
            maximum_iterations=maximum_iterations,
            relaxation=relaxation,
            initial=_start(initial, clouds, debias),
            y_self=known,
        )
        if initial is not None:
            schedule = schedule.skipped()
        points = max(clouds.x.shape[1], clouds.y.shape[1])
        limit = math.inf if memory_budget is None else memory_budget
        streamed = points > DENSE_POINTS or dense_bytes(clouds, debias) > limit
        if streamed:
            solution = solve_streaming(clouds, schedule, options, memory_budget)
        else:
            solution = solve_dense(clouds, schedule, options)
        _warn_if_unfinished(solution.converged, options)
    value = solution.value
    if any(wanted):
        of_weights = [
            _weight_gradient(weights, potential, own) if want else None
            for want, weights, potential, own in (
                (wanted[2], clouds.a, solution.f, solution.f_self),
                (wanted[3], clouds.b, solution.g, solution.g_self),
            )
        ]
        value = _EnvelopeGradient.apply(value, (solution.gradient_x, solution.gradient_y, *of_weights), *inputs)
    if not batched:
        value = value[0]
    if not return_info:
        return value
    return value, _information(solution, schedule, batched, "streaming" if streamed else "dense")


class _EnvelopeGradient(torch.autograd.Function):
    """Attaches gradients of the values (B,) to them; not differentiable a second time."""

    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, gradients: tuple[torch.Tensor | None, ...], *inputs: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.gradients = gradients
        ctx.dtypes = [None if given is None else given.dtype for given in inputs]
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = (
            None if gradient is None else (gradient * upstream.view(-1, *(1,) * (gradient.dim() - 1))).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        )
        return (None, None, *scaled)


def _weight_gradient(weights: torch.Tensor, potential: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
    """(B, N) derivative by weights that are divided by their sum: the potential, less its mean over the cloud.

    OT(a, b) moves by <f, da>, OT(a, a)/2 by <f_self, da>; without debiasing there is no self term.
    """
    slope = potential if own is None else potential - own
    slope = torch.where(weights > 0, slope, 0)
    return torch.where(weights > 0, slope - (weights * slope).sum(-1, keepdim=True), 0)


def _annealed_from(diameter: float | None, clouds: Clouds, blur: float) -> torch.Tensor:
    """(B,) diameters to begin annealing from: the given one, or each pair's own.

    Raises:
        ValueError: the given one is out of range.
    """
    if diameter is None:
        return clouds.diameters
    largest = float(clouds.diameters.max())
    if not 0 < diameter <= _LARGEST_DIAMETER * max(largest, blur):
        raise ValueError(
            f"diameter is {diameter}, expected a distance > 0 and not beyond {_LARGEST_DIAMETER:.0f} times the largest "
            f"in the clouds ({largest:.3g})"
        )
    return torch.full_like(clouds.diameters, diameter)


def _known_self_terms(
    y_self: torch.Tensor | None, diameter: float | None, debias: bool, want_gradient: bool, clouds: Clouds
) -> torch.Tensor | None:
    """The (B,) self terms of y that were given.

    Raises:
        ValueError: they do not fit the call.
    """
    if y_self is None:
        return None
    if diameter is None or not debias or want_gradient:
        raise ValueError("y_self needs debias=True, the diameter that it was found with, and a y without gradients")
    given = y_self.detach().reshape(-1)
    if len(given) != len(clouds.b) or not bool(given.isfinite().all()):
        raise ValueError(f"y_self has shape {tuple(y_self.shape)}, expected {len(clouds.b)} finite values")
    return given.to(clouds.b)


def check_temperature(blur: float, epsilon: float | None, scaling: float) -> float:
    """The blur to use; `epsilon` overrides `blur`.

    Raises:
        ValueError: a value out of range.
    """
    name, value = ("blur", blur) if epsilon is None else ("epsilon", epsilon)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value}, expected a finite number > 0 (epsilon = blur^2, on the cost 0.5*|x-y|^2)")
    if not 0 < scaling < 1:
        raise ValueError(f"scaling is {scaling}, expected a number strictly between 0 and 1, for example 0.5")
    return blur if epsilon is None else math.sqrt(epsilon)


def _check_refinement(
    tolerance: float | None, maximum_iterations: int, relaxation: float, initial: SinkhornInfo | None
) -> None:
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance}, expected a positive marginal error, for example 1e-3")
    if maximum_iterations < 1:
        raise ValueError(f"maximum_iterations is {maximum_iterations}, expected at least 1")
    if not 1 <= relaxation < 2:
        raise ValueError(f"relaxation is {relaxation}, expected a number in [1, 2)")
    if tolerance is None and (relaxation != 1 or initial is not None):
        raise ValueError("relaxation and initial belong to iterating until convergence: pass tolerance too")


def _start(initial: SinkhornInfo | None, clouds: Clouds, debias: bool) -> tuple[torch.Tensor | None, ...] | None:
    """Given potentials as (B, N) and (B, M) tensors.

    Raises:
        ValueError: they belong to clouds of another shape.
    """
    if initial is None:
        return None
    given = (initial.f, initial.g, initial.f_self if debias else None, initial.g_self if debias else None)
    start = []
    for name, potential, weights in zip(("f", "g", "f_self", "g_self"), given, (clouds.a, clouds.b) * 2, strict=True):
        if potential is not None:
            potential = potential if potential.dim() == 2 else potential[None]
            if potential.shape != weights.shape:
                raise ValueError(
                    f"initial.{name} has shape {tuple(potential.shape)}, the clouds need {tuple(weights.shape)}: "
                    "it must come from a call with clouds of the same shapes"
                )
            potential = potential.to(weights)
        start.append(potential)
    return tuple(start)


def _warn_if_unfinished(converged: torch.Tensor, options: SolverOptions) -> None:
    if not bool(converged.all()):
        warnings.warn(
            f"sinkhorn_divergence: {int((~converged).sum())} of {len(converged)} pairs did "
            f"not reach the tolerance {options.tolerance} in {options.maximum_iterations} updates; raise "
            "maximum_iterations, relaxation or blur",
            stacklevel=3,
        )


def _information(solution: Solution, schedule: AnnealingSchedule, batched: bool, solver: str) -> SinkhornInfo:
    assert solution.marginal_error is not None

    def row(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if batched else tensor[0]

    return SinkhornInfo(
        f=row(solution.f),
        g=row(solution.g),
        f_self=None if solution.f_self is None else row(solution.f_self),
        g_self=None if solution.g_self is None else row(solution.g_self),
        iterations=row(solution.iterations),
        epsilon_start=row(schedule.epsilons[0]),
        epsilon=schedule.epsilon,
        marginal_error=row(solution.marginal_error),
        solver=solver,
    )
