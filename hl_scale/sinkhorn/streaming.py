"""The streaming solver: the dense solver's updates tile by tile, without any N x M tensor.

Each pair of clouds is cut out of its padding and solved alone, its problems xy, xx, yy one after the other. One pass
over the tiles of the costs (costs.py) gives both potentials; self terms have one potential, and half the tiles. The
gradient takes one more pass while the tiles are there.
"""

from __future__ import annotations

import torch

from hl_scale.sinkhorn.clouds import Clouds, Solution, SolverOptions
from hl_scale.sinkhorn.costs import Budget, Cloud, Costs, Potentials, divide_budget
from hl_scale.sinkhorn.schedule import AnnealingSchedule, Refinement


def solve_streaming(
    clouds: Clouds, schedule: AnnealingSchedule, options: SolverOptions, memory_budget: int | None
) -> Solution:
    """Solve pair after pair within `memory_budget` bytes of intermediate results (None: keep every tile).

    Raises:
        ValueError: the budget does not hold one cost.
    """
    budget = divide_budget(memory_budget, clouds.a)
    a, b = clouds.a, clouds.b
    solution = Solution(
        value=a.new_zeros(len(a)),
        f=torch.zeros_like(a),
        g=torch.zeros_like(b),
        f_self=torch.zeros_like(a) if options.debias else None,
        g_self=torch.zeros_like(b) if options.debias and options.y_self is None else None,
        gradient_x=clouds.a.new_zeros(clouds.x.shape) if options.want_gradient_x else None,
        gradient_y=clouds.a.new_zeros(clouds.y.shape) if options.want_gradient_y else None,
        marginal_error=a.new_zeros(len(a)) if options.want_error else None,
        iterations=schedule.iterations.clone(),
        converged=torch.ones(len(a), dtype=torch.bool),
    )
    for sample in range(len(a)):
        _solve_pair(clouds, schedule, sample, solution, budget, options)
    return solution


_Start = tuple[torch.Tensor | None, torch.Tensor | None]


def _anneal(
    costs: Costs, updates: list[tuple[float, float]], epsilon: float, options: SolverOptions, start: _Start
) -> tuple[Potentials, Potentials, Refinement | None]:
    """Potentials of x and y after annealing by `updates` (temperature, step), refining and a last full update.

    Also how refining went, where a tolerance was given.
    """
    f = torch.zeros_like(costs.x.weights) if start[0] is None else start[0]
    g = f if costs.symmetric else torch.zeros_like(costs.y.weights) if start[1] is None else start[1]
    for temperature, step in updates:
        new_f, new_g = costs.softmin(f, g, temperature)
        f = f.lerp(new_f, step)
        g = f if costs.symmetric else g.lerp(new_g, step)
    refined = None
    if options.tolerance is not None:
        f, g, refined = _refine(costs, f, g, epsilon, options)
    last_f, last_g = costs.softmin(f, g, epsilon)
    return Potentials(last_f, g), Potentials(last_g, f), refined


def _refine(
    costs: Costs, f: torch.Tensor, g: torch.Tensor, epsilon: float, options: SolverOptions
) -> tuple[torch.Tensor, torch.Tensor, Refinement]:
    """Iterate at the target temperature until the marginals are within tolerance."""
    assert options.tolerance is not None
    state = Refinement(1, options.relaxation, options.tolerance, like=f)
    while state.updates < options.maximum_iterations and state.any_active():
        new_f = costs.softmin(f, g, epsilon, on_y=costs.symmetric)[0]
        error = costs.x.drift(f - new_f, epsilon)
        if costs.symmetric:
            f = g = f.lerp(new_f, float(state.half_step()))
        else:
            f = f.lerp(new_f, float(state.step()))
            new_g = costs.softmin(f, g, epsilon, on_x=False)[1]
            error = error + costs.y.drift(g - new_g, epsilon)
            g = g.lerp(new_g, float(state.step()))
        state.record(error[None])
    return f, g, state


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
    epsilon, updates = schedule.epsilon, schedule.updates(sample)
    given = options.initial or (None, None, None, None)
    starts = [
        None if potential is None else potential[sample, cloud.inside]
        for potential, cloud in zip(given, (x, y, x, y), strict=True)
    ]

    costs = Costs(x, y, budget, epsilon)
    final_f, final_g, state = _anneal(costs, updates, epsilon, options, (starts[0], starts[1]))
    states = [state]
    solution.f[sample, x.inside], solution.g[sample, y.inside] = final_f.own, final_g.own
    value = x.weights @ final_f.own + y.weights @ final_g.own
    if solution.marginal_error is not None:
        new_f, new_g = costs.softmin(final_f.own, final_g.own, epsilon)
        drifts = x.drift(final_f.own - new_f, epsilon) + y.drift(final_g.own - new_g, epsilon)
        solution.marginal_error[sample] = drifts
    away_x = away_y = None
    if solution.gradient_x is not None:
        away_x = costs.barycentres(final_f, epsilon, solution.gradient_x[sample] if x.whole else None)
    if solution.gradient_y is not None:
        away_y = costs.barycentres(final_g, epsilon, solution.gradient_y[sample] if y.whole else None, transposed=True)
    del costs  # its tiles make room for those of the self terms
    for cloud, own, gradient, away, start in (
        (x, solution.f_self, solution.gradient_x, away_x, starts[2]),
        (y, solution.g_self, solution.gradient_y, away_y, starts[3]),
    ):
        barycentre = None
        if own is not None:
            self_costs = Costs(cloud, cloud, budget, epsilon)
            final, _, again = _anneal(self_costs, updates, epsilon, options, (start, start))
            own[sample, cloud.inside] = final.own
            value = value - cloud.weights @ final.own
            states.append(again)
            if gradient is not None:
                barycentre = self_costs.barycentres(final, epsilon)
            del self_costs
        if gradient is not None and away is not None:
            away.neg_().add_(cloud.points if barycentre is None else barycentre).mul_(cloud.weights[:, None])
            del barycentre
            if not cloud.whole:  # otherwise it is there already
                gradient[sample, cloud.inside] = away
    if options.y_self is not None:
        value = value - options.y_self[sample]
    solution.value[sample] = value
    refined = [state for state in states if state is not None]
    solution.iterations[sample] += max((state.updates for state in refined), default=0)
    solution.converged[sample] = all(bool(state.finished()) for state in refined)
