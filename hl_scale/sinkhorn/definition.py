"""The Sinkhorn divergence as its definition reads, for one pair: the oracle that the solvers are checked against.

    C_ij = |x_i - y_j|^2 / 2,  epsilon = blur^2
    softmin(C - g)_i = -epsilon log sum_j b_j exp((g_j - C_ij) / epsilon)

From f = g = 0, both potentials are updated together, f <- (f + softmin(C - g)) / 2 (the first update is a full one), at
the temperatures of schedule.py; a last full update extrapolates; self terms have one potential, and

    S = <a, f - f_self> + <b, g - g_self>.

Source: J. Feydy, "Geometric data analysis, beyond convolutions", 2020, algorithm 3.5 and equation 3.209.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from hl_scale.sinkhorn.schedule import annealing_schedule


def naive_sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    blur: float = 0.05,
    scaling: float = 0.5,
    debias: bool = True,
    diameter: float | None = None,
    unrolled: bool = False,
) -> Tensor:
    """S of x (N, D) and y (M, D) with positive weights a (N,) and b (M,), in their dtype; keeps every N x M tensor.

    Args:
        x, y: points; differentiable.
        a, b: weights that sum to 1, uniform unless given; differentiable up to a constant, along which weights that
            sum to 1 cannot move.
        blur, scaling, debias, diameter: as in `sinkhorn_divergence`.
        unrolled: differentiate through all updates. Otherwise potentials are constants up to the last update (envelope
            theorem), which at convergence is the same.

    Returns:
        ().
    """
    a = x.new_full((len(x),), 1 / len(x)) if a is None else a
    b = y.new_full((len(y),), 1 / len(y)) if b is None else b
    both = torch.cat([x, y]).detach()
    extent = (both.amax(0) - both.amin(0)).norm() if diameter is None else torch.tensor(diameter, dtype=torch.float64)
    schedule = annealing_schedule(extent.double().cpu()[None], blur, scaling, dtype=x.dtype, device=x.device)
    still = (lambda points: points) if unrolled else Tensor.detach  # each potential moves its own points only
    problems = [(_cost(x, still(y)), still(b), 1), (_cost(y, still(x)), still(a), 0)]
    if debias:
        problems += [(_cost(x, still(x)), still(a), 2), (_cost(y, still(y)), still(b), 3)]
    potentials = [torch.zeros_like(cost[:, 0]) for cost, _, _ in problems]
    with contextlib.nullcontext() if unrolled else torch.no_grad():
        for epsilon, step in zip(schedule.epsilons[:, 0], schedule.steps[:, 0], strict=True):
            moved = [_softmin(cost, potentials[partner], w, epsilon) for cost, w, partner in problems]
            potentials = [old + step * (new - old) for old, new in zip(potentials, moved, strict=True)]
    final = schedule.target()[0]
    last = [_softmin(cost, potentials[partner], w, final) for cost, w, partner in problems]
    value = a @ last[0] + b @ last[1]
    return value - a @ last[2] - b @ last[3] if debias else value


def _cost(x: Tensor, y: Tensor) -> Tensor:
    return (x[:, None] - y).square().sum(-1) / 2


def _softmin(cost: Tensor, potential: Tensor, weights: Tensor, epsilon: Tensor) -> Tensor:
    return -epsilon * torch.logsumexp(weights.log() + (potential - cost) / epsilon, 1)
