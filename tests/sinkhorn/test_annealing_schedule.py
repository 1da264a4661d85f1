"""Annealing schedules of a batch against GeomLoss's list for each sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from geomloss._legacy.sinkhorn_divergence import epsilon_schedule

from hl_scale.sinkhorn.schedule import SMALLEST_DIAMETER, annealing_schedule


@pytest.mark.parametrize("scaling", [0.3, 0.5, 0.9])
def test_each_sample_has_the_temperatures_of_geomloss(scaling: float) -> None:
    diameters = torch.tensor([0.01, 0.05, 0.8, 1.0, 63.2], dtype=torch.float64)
    schedule = annealing_schedule(diameters, 0.05, scaling, dtype=torch.float64, device=torch.device("cpu"))
    assert schedule.epsilons.shape == schedule.steps.shape == (int(schedule.iterations.max()), 5)
    for sample, diameter in enumerate(diameters.tolist()):
        count = int(schedule.iterations[sample])
        expected = epsilon_schedule(2, diameter, 0.05, scaling)
        np.testing.assert_allclose(schedule.epsilons[1:count, sample], expected, rtol=1e-12)
        assert schedule.steps[:count, sample].tolist() == [1.0] + [0.5] * (count - 1)
        assert (schedule.steps[count:, sample] == 0).all()
        assert (schedule.epsilons[count:, sample] == 0.05**2).all()


def test_a_diameter_of_0_starts_from_a_positive_temperature() -> None:
    schedule = annealing_schedule(
        torch.zeros(1, dtype=torch.float64), 0.05, 0.5, dtype=torch.float32, device=torch.device("cpu")
    )
    assert schedule.iterations.tolist() == [3]
    assert schedule.epsilons[0].item() == pytest.approx((SMALLEST_DIAMETER * 0.05) ** 2)
    assert schedule.epsilons[-1].item() == pytest.approx(0.05**2)


def test_temperatures_never_fall_below_the_target_once_annealed() -> None:
    schedule = annealing_schedule(
        torch.tensor([7.0], dtype=torch.float64), 0.05, 0.5, dtype=torch.float64, device=torch.device("cpu")
    )
    assert (schedule.epsilons >= schedule.epsilon).all()
    assert (schedule.epsilons[1:] <= schedule.epsilons[:-1]).all()
