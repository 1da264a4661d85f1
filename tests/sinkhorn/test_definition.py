"""The naive definition is GeomLoss's value, and every solver is the naive definition."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from geomloss import SamplesLoss
from hypothesis import given, settings
from hypothesis import strategies as st

from hl_scale.benchmark.measure import measured
from hl_scale.sinkhorn import naive_sinkhorn_divergence, sinkhorn_divergence

SETTINGS = dict(rtol=1e-9, atol=1e-11)


def clouds(n: int, m: int, dimension: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dimension, generator=generator, dtype=torch.float64)
    y = torch.randn(m, dimension, generator=generator, dtype=torch.float64) * 0.7 + 0.3
    a, b = (torch.rand(size, generator=generator, dtype=torch.float64) + 0.1 for size in (n, m))
    return [tensor.requires_grad_() for tensor in (x, y, a / a.sum(), b / b.sum())]


def weighted(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **options: object) -> torch.Tensor:
    return sinkhorn_divergence(x, y, x_weights=a, y_weights=b, **options)  # type: ignore[call-overload]


def centred(gradients: tuple[torch.Tensor, ...], weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients by weights, less the constant that weights which sum to 1 cannot see."""
    return [g - w @ g for g, w in zip(gradients, weights, strict=True)]


def test_the_definition_has_the_value_of_geomloss_to_1e_5() -> None:
    for seed, (n, m, dimension) in enumerate(((5, 5, 3), (17, 11, 40), (1, 7, 2))):
        x, y, a, b = clouds(n, m, dimension, seed)
        expected = SamplesLoss("sinkhorn", p=2, blur=0.05, backend="tensorized")(a, x, b, y)
        torch.testing.assert_close(naive_sinkhorn_divergence(x, y, a, b), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("budget", [None, 2 * 5 * 5 * 8])
@pytest.mark.parametrize("debias", [True, False])
def test_solvers_give_the_value_and_all_gradients_of_the_definition(budget: int | None, debias: bool) -> None:
    leaves = clouds(13, 9, 6)
    options = dict(debias=debias, blur=0.3)
    value = weighted(*leaves, memory_budget=budget, **options)
    expected = naive_sinkhorn_divergence(*leaves, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(value, expected, **SETTINGS)
    ours, theirs = (torch.autograd.grad(v, leaves) for v in (value, expected))
    torch.testing.assert_close(ours[:2], theirs[:2], **SETTINGS)
    torch.testing.assert_close(list(ours[2:]), centred(theirs[2:], leaves[2:]), **SETTINGS)


@given(n=st.integers(1, 12), m=st.integers(1, 12), dimension=st.integers(1, 5), blur=st.floats(0.05, 1.0))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_solvers_agree_with_the_definition_at_any_size(n: int, m: int, dimension: int, blur: float) -> None:
    leaves = [leaf.detach() for leaf in clouds(n, m, dimension)]
    expected = naive_sinkhorn_divergence(*leaves, blur=blur)
    for budget in (None, 2 * 3 * 3 * 8, 2 * 4 * 4 * 8 + 200):
        torch.testing.assert_close(weighted(*leaves, blur=blur, memory_budget=budget), expected, **SETTINGS)


def test_at_convergence_the_envelope_gradient_is_the_unrolled_one_and_that_of_finite_differences() -> None:
    leaves = clouds(6, 5, 3)
    options = dict(blur=0.7, scaling=0.995)
    unrolled = naive_sinkhorn_divergence(*leaves, unrolled=True, **options)  # type: ignore[arg-type]
    envelope = weighted(*leaves, tolerance=1e-12, **options)
    torch.testing.assert_close(envelope, unrolled, rtol=3e-6, atol=0)
    exact, ours = (torch.autograd.grad(v, leaves) for v in (unrolled, envelope))
    torch.testing.assert_close(ours[:2], exact[:2], rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(centred(ours[2:], leaves[2:]), centred(exact[2:], leaves[2:]), rtol=1e-2, atol=1e-4)
    assert torch.autograd.gradcheck(
        lambda *points: naive_sinkhorn_divergence(*points, unrolled=True, **options), leaves[:2]
    )

    x, y, a, b = (leaf.detach() for leaf in leaves)
    assert torch.autograd.gradcheck(
        lambda weights: weighted(x, y, weights / weights.sum(), b, tolerance=1e-12, blur=0.7), [a.requires_grad_()]
    )


@pytest.mark.parametrize("budget", [None, 2 * 5 * 5 * 8])
def test_a_target_self_term_that_is_known_changes_neither_value_nor_gradient(budget: int | None) -> None:
    x, y, _, _ = clouds(13, 9, 6)
    y = y.detach()
    options = dict(diameter=9.0, memory_budget=budget)
    known = 0.5 * sinkhorn_divergence(y, y, debias=False, **options)  # type: ignore[call-overload]
    expected = sinkhorn_divergence(x, y, **options)  # type: ignore[call-overload]
    value = sinkhorn_divergence(x, y, y_self=known, **options)  # type: ignore[call-overload]
    torch.testing.assert_close(value, expected, **SETTINGS)
    torch.testing.assert_close(torch.autograd.grad(value, x), torch.autograd.grad(expected, x), **SETTINGS)
    with pytest.raises(ValueError, match="a y without gradients"):
        sinkhorn_divergence(y, x, y_self=known, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_costs_kept_in_16_bits_stay_within_a_tenth_of_epsilon(share: float) -> None:
    from hl_scale.sinkhorn.costs import Budget, Cloud, Costs

    generator = torch.Generator().manual_seed(0)
    points = torch.randn(60, 32, generator=generator) / 32**0.5
    cloud = Cloud(points, torch.full((60,), 1 / 60))
    budget = Budget(16, 2256 * 2 * share)  # costs in the tiles on and above the diagonal
    exact = (points.double()[:, None] - points.double()).square().sum(-1) / 2
    for epsilon, compact in ((0.0025, True), (1e-6, False)):
        costs = Costs(cloud, cloud, budget, epsilon)
        for _ in range(2):
            for tile in costs:
                found = tile.costs.double() * tile.step + tile.offset
                assert (found - exact[tile.rows, tile.columns]).abs().max() < max(0.1 * epsilon, 1e-6)
        kept = [tile.costs.dtype for tile in costs.kept.values()]
        assert set(kept) == ({torch.int16 if compact else torch.float32} if share > 0 else set())
        assert (len(kept) == 10) == (compact and share == 1.0)


def test_a_plan_out_of_range_is_solved_from_maxima() -> None:
    """Clouds far apart for their blur, and a warm start from elsewhere: no potential becomes infinite."""
    x, y, _, _ = (leaf.detach().float() for leaf in clouds(20, 15, 4))
    far = y + 300.0
    expected = naive_sinkhorn_divergence(x.double(), far.double())
    value = sinkhorn_divergence(x, far, memory_budget=2 * 4 * 4 * 4)
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=0)
    _, info = sinkhorn_divergence(x, far, tolerance=1e-2, return_info=True, memory_budget=2 * 8 * 8 * 4)
    cold = sinkhorn_divergence(x, y, blur=0.5, tolerance=1e-3, memory_budget=2 * 8 * 8 * 4)
    warm = sinkhorn_divergence(x, y, blur=0.5, tolerance=1e-3, initial=info, memory_budget=2 * 8 * 8 * 4)
    torch.testing.assert_close(warm, cold, rtol=1e-2, atol=1e-3)


def test_gaussians_have_their_closed_form() -> None:
    """Janati et al., "Entropic optimal transport between unbalanced Gaussian measures", arXiv 2006.02572, theorem 1."""
    blur = 0.6
    grid = torch.linspace(-9, 9, 400, dtype=torch.float64)[:, None]
    (mean, variance), (other_mean, other_variance) = (-0.5, 0.8), (0.7, 1.9)

    def density(mean: float, variance: float) -> torch.Tensor:
        weights = torch.exp(-((grid[:, 0] - mean) ** 2) / (2 * variance))
        return weights / weights.sum()

    def entropic(a: float, b: float) -> float:
        """Twice OT of centred Gaussians, up to a constant that debiasing cancels; sigma^2 = epsilon."""
        d = math.sqrt(4 * a * b + blur**4)
        return a + b - d + blur**2 * math.log(d + blur**2)

    debiased = entropic(variance, other_variance) - entropic(variance, variance) / 2
    debiased -= entropic(other_variance, other_variance) / 2
    expected = ((mean - other_mean) ** 2 + debiased) / 2
    weights = {"x_weights": density(mean, variance), "y_weights": density(other_mean, other_variance)}
    for budget in (None, 8 * 4 * 2 * 64**2):
        value = sinkhorn_divergence(grid, grid, blur=blur, tolerance=1e-9, memory_budget=budget, **weights)
        assert float(value) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("smallest", [1e-30, 1e-34, 1e-36, 1e-38])
def test_tiny_weights_have_the_potentials_of_float64(smallest: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(count, 3, generator=generator) for count in (40, 900))
    a = torch.full((40,), 1 / 39)
    a[0] = smallest
    infos = [
        sinkhorn_divergence(
            x.to(dtype), y.to(dtype), x_weights=a.to(dtype), blur=0.3, memory_budget=60_000, return_info=True
        )[1]
        for dtype in (torch.float32, torch.float64)
    ]
    torch.testing.assert_close(infos[0].f.double(), infos[1].f, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_clouds_kept_in_16_bits_stay_close_to_float64(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(count, 64, generator=generator).div(8).to(dtype) for count in (70, 90))
    found = []
    for kind, budget in ((dtype, 20_000), (torch.float64, None)):
        points = x.to(kind).requires_grad_()
        value, info = sinkhorn_divergence(points, y.to(kind), memory_budget=budget, return_info=True)
        (gradient,) = torch.autograd.grad(value, points)
        assert gradient.dtype == kind
        found.append((value.double(), gradient.double(), info.solver))
    assert [solver for _, _, solver in found] == ["streaming", "dense"]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=0)
    scale = float(found[1][1].abs().max())
    torch.testing.assert_close(
        found[0][1], found[1][1], rtol=0, atol=scale * 2 ** -(7 if dtype == torch.bfloat16 else 10)
    )


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("budget", [12_000_000, 40_000_000])
def test_peak_memory_stays_within_the_budget_and_the_gradient(budget: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4096, 16, generator=generator) / 4 for _ in range(2))

    def run() -> list[torch.Tensor]:
        value = sinkhorn_divergence(x.requires_grad_(), y, memory_budget=budget, blur=0.2)
        return [value.detach(), *torch.autograd.grad(value, x)]

    run()
    _, _, extra = measured(run, "cpu")
    assert extra < budget + 8 * x.numel() * 4 + 4_000_000


def test_a_pair_that_converges_on_its_last_update_is_not_called_unfinished(recwarn: pytest.WarningsRecorder) -> None:
    x, y, _, _ = (leaf.detach() for leaf in clouds(20, 15, 4))
    options = dict(tolerance=1e-6, blur=0.5, return_info=True)
    plain = sinkhorn_divergence(x, y, blur=0.5, return_info=True)[1]  # type: ignore[call-overload]
    for budget in (None, 8 * 4 * 2 * 25):
        info = sinkhorn_divergence(x, y, memory_budget=budget, **options)[1]  # type: ignore[call-overload]
        needed = int(info.iterations - plain.iterations)
        recwarn.clear()
        sinkhorn_divergence(x, y, memory_budget=budget, maximum_iterations=needed, **options)  # type: ignore[call-overload]
        assert not recwarn.list
        with pytest.warns(UserWarning, match="1 of 1 pairs did not reach"):
            sinkhorn_divergence(x, y, memory_budget=budget, maximum_iterations=needed - 1, **options)  # type: ignore[call-overload]
