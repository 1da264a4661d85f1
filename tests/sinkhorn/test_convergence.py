"""Iterating to a tolerance: the marginals get there, in either solver, faster when relaxed or warm."""

from __future__ import annotations

import pytest
import torch

from hl_scale.sinkhorn import sinkhorn_divergence

BUDGETS = [None, 1_000]


def clouds(batch: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 9, 2, generator=generator, dtype=torch.float64)
    y = torch.randn(batch, 7, 2, generator=generator, dtype=torch.float64) + 0.3
    return x, y


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("relaxation", [1.0, 1.5])
def test_marginals_are_within_the_tolerance_and_the_gradient_is_that_of_the_value(
    budget: int | None, relaxation: float
) -> None:
    x, y = clouds()
    settings = {"blur": 0.5, "tolerance": 1e-9, "memory_budget": budget, "relaxation": relaxation}
    _, info = sinkhorn_divergence(x, y, return_info=True, **settings)
    assert info.solver == ("dense" if budget is None else "streaming")
    assert (info.marginal_error <= 1e-9).all()
    assert torch.autograd.gradcheck(
        lambda a, b: sinkhorn_divergence(a, b, **settings), (x[:1].requires_grad_(), y[:1].requires_grad_()), atol=1e-6
    )


def test_a_long_annealing_has_the_same_limit() -> None:
    x, y = clouds()
    value = sinkhorn_divergence(x, y, blur=0.3, tolerance=1e-12)
    torch.testing.assert_close(value, sinkhorn_divergence(x, y, blur=0.3, scaling=0.99), rtol=1e-3, atol=0)


def test_both_solvers_take_the_same_updates() -> None:
    x, y = clouds()
    settings = {"blur": 0.2, "tolerance": 1e-8, "return_info": True}
    value, info = sinkhorn_divergence(x, y, relaxation=1.6, **settings)
    streamed, streamed_info = sinkhorn_divergence(x, y, relaxation=1.6, memory_budget=1_000, **settings)
    torch.testing.assert_close(value, streamed, rtol=1e-9, atol=0)
    torch.testing.assert_close((info.f, info.g), (streamed_info.f, streamed_info.g), rtol=1e-7, atol=1e-9)


def test_a_sample_does_not_depend_on_its_batch_mates() -> None:
    x, y = clouds()
    settings = {"blur": 0.2, "tolerance": 1e-6, "return_info": True}
    together, info = sinkhorn_divergence(x, y, **settings)
    for sample in range(3):
        alone, own = sinkhorn_divergence(x[sample], y[sample], **settings)
        assert own.iterations == info.iterations[sample]
        torch.testing.assert_close(alone, together[sample], rtol=1e-12, atol=0)


@pytest.mark.parametrize("budget", BUDGETS)
def test_over_relaxation_and_a_warm_start_save_updates_and_change_nothing_else(budget: int | None) -> None:
    x, y = clouds()
    settings = {"blur": 0.3, "tolerance": 1e-8, "memory_budget": budget}
    plain, info = sinkhorn_divergence(x, y, return_info=True, **settings)
    relaxed, relaxed_info = sinkhorn_divergence(x, y, return_info=True, relaxation=1.5, **settings)
    warm, warm_info = sinkhorn_divergence(x, y, return_info=True, initial=info, **settings)
    torch.testing.assert_close(relaxed, plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(warm, plain, rtol=1e-6, atol=0)
    assert relaxed_info.iterations.sum() < info.iterations.sum()
    assert (warm_info.iterations <= 2).all() and (info.iterations > 20).all()


def test_giving_up_is_said() -> None:
    x, y = clouds()
    with pytest.warns(UserWarning, match="3 of 3 pairs did not reach the tolerance 1e-09 in 2 updates"):
        sinkhorn_divergence(x, y, blur=0.1, tolerance=1e-9, maximum_iterations=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tolerance": 0.0}, "tolerance is 0.0"),
        ({"tolerance": 1e-3, "relaxation": 2.0}, "relaxation is 2.0"),
        ({"relaxation": 1.5}, "pass tolerance too"),
        ({"tolerance": 1e-3, "maximum_iterations": 0}, "maximum_iterations is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sinkhorn_divergence(*clouds(), **settings)


def test_potentials_of_other_clouds_are_refused() -> None:
    x, y = clouds()
    _, info = sinkhorn_divergence(x, y, return_info=True)
    with pytest.raises(ValueError, match=r"initial.f has shape \(3, 9\), the clouds need \(3, 8\)"):
        sinkhorn_divergence(x[:, 1:], y, tolerance=1e-3, initial=info)
