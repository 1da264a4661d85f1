"""Epsilon annealing, one schedule per sample.

Sinkhorn's iteration converges slowly at a small temperature. Epsilon scaling starts at the squared diameter d^2 of the
pair and shrinks it by scaling^2 an update until the target epsilon is reached (J. Feydy, "Geometric data analysis,
beyond convolutions", 2020, section 3.3.3):

    d^2,  d^2, d^2 s^2, d^2 s^4, ... (while above epsilon),  epsilon

with the first value used twice, as GeomLoss does. GeomLoss takes one diameter for a whole batch, padding included, so
a value there depends on its batch mates. Here every sample has the diameter of its own points and its own number of
updates; a sample that has finished is frozen while the others go on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# In units of blur: a pair of clouds in one point starts from here instead of at a temperature of 0.
SMALLEST_DIAMETER = 1e-6


@dataclass(frozen=True)
class AnnealingSchedule:
    """Temperatures and step sizes of T updates of B samples.

    Update t moves potentials f to f + step[t] * (softmin_epsilon[t](f) - f), from f = 0.

    Attributes:
        epsilons: (T, B), on the clouds' device and in their dtype; the target epsilon once a sample has finished.
        steps: (T, B); 1 for the first update (initialisation), 0.5 (averaged symmetric update) while the sample is
            being annealed, 0 (frozen) after that.
        iterations: (B,) int64 on the CPU: number of updates of each sample, with the first and without the final
            extrapolation.
        epsilon: the target temperature.
    """

    epsilons: torch.Tensor
    steps: torch.Tensor
    iterations: torch.Tensor
    epsilon: float

    def updates(self, sample: int) -> list[tuple[float, float]]:
        """Temperature and step of each update of one sample, until it has finished."""
        count = int(self.iterations[sample])
        columns = self.epsilons[:count, sample].tolist(), self.steps[:count, sample].tolist()
        return list(zip(*columns, strict=True))

    def target(self) -> torch.Tensor:
        """(B,) the target temperature."""
        return torch.full_like(self.epsilons[0], self.epsilon)

    def skipped(self) -> AnnealingSchedule:
        """No updates at all."""
        return AnnealingSchedule(
            self.target()[None], torch.zeros_like(self.steps[:1]), torch.zeros_like(self.iterations), self.epsilon
        )


class Refinement:
    """Which samples of a batch still iterate, and by which steps, when marginals are to reach a tolerance.

    After annealing, potentials alternate: f <- f + w (softmin - f), then g likewise from the new f; w = 1 is Sinkhorn's
    algorithm, 1 < w < 2 over-relaxation (A. Thibault et al., "Overrelaxed Sinkhorn-Knopp algorithm for regularized
    optimal transport", arXiv 1711.01851), which helps where convergence is slow and can diverge far from the solution:
    a sample whose error grows to `_PATIENCE` times its best goes on with w = 1. Self terms have one potential and keep
    averaged updates.

    Attributes:
        updates: of the batch so far; iterations: (B,) int64 on the CPU, of each sample.
        best: (B,) smallest marginal error of each sample.
    """

    _PATIENCE = 4.0

    def __init__(self, batch: int, relaxation: float, tolerance: float, like: torch.Tensor) -> None:
        self.updates, self.tolerance = 0, tolerance
        self.iterations = torch.zeros(batch, dtype=torch.int64)
        self.best = like.new_full((batch,), torch.inf)
        self._relaxation = like.new_full((batch,), relaxation)
        self._active = like.new_ones(batch)

    def any_active(self) -> bool:
        return bool(self._active.any())

    def finished(self) -> torch.Tensor:
        """(B,) bool on the CPU: samples whose marginals are within tolerance."""
        return self._active.cpu() == 0

    def step(self) -> torch.Tensor:
        """(B,) step of the alternating updates, 0 for samples that are done."""
        return self._relaxation * self._active

    def half_step(self) -> torch.Tensor:
        """(B,) step of the averaged updates of self terms."""
        return 0.5 * self._active

    def record(self, error: torch.Tensor) -> None:
        """Take note of the marginal errors (B,) that the last update started from."""
        self.updates += 1
        self.iterations += self._active.cpu().long()
        self._relaxation = torch.where(error > self._PATIENCE * self.best, 1.0, self._relaxation)
        self.best = torch.minimum(self.best, error)
        self._active = self._active * (error > self.tolerance)


def annealing_schedule(
    diameters: torch.Tensor, blur: float, scaling: float, *, dtype: torch.dtype, device: torch.device
) -> AnnealingSchedule:
    """Build the schedules of a batch.

    Args:
        diameters: (B,) float64 on the CPU, upper bounds on the distances of each sample, 0 allowed.
        blur: square root of the target epsilon, in units of distance.
        scaling: ratio of successive blurs, in (0, 1).
        dtype: of the returned temperatures and step sizes.
        device: of the returned temperatures and step sizes.
    """
    epsilon = blur**2
    diameters = diameters.clamp(min=SMALLEST_DIAMETER * blur)
    start = diameters.square()
    logarithm = 2 * diameters.log()
    target = 2 * torch.tensor(blur, dtype=torch.float64).log()
    ratio = 2 * torch.tensor(scaling, dtype=torch.float64).log()
    annealed = ((target - logarithm) / ratio).ceil().clamp(min=0).long()
    # One initialisation and one update at the starting temperature, the annealed ones, one at the target.
    iterations = annealed + 3
    update = torch.arange(int(iterations.max()))[:, None]
    epsilons = torch.exp(logarithm + (update - 2).clamp(min=0) * ratio)
    epsilons = torch.where(update < 2, start, epsilons)
    epsilons = torch.where(update >= iterations - 1, torch.tensor(epsilon, dtype=torch.float64), epsilons)
    steps = torch.where(update < iterations, 0.5, 0.0)
    steps[0] = 1.0
    return AnnealingSchedule(
        epsilons.to(device=device, dtype=dtype), steps.to(device=device, dtype=dtype), iterations, epsilon
    )
