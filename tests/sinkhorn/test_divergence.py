"""The Sinkhorn divergence against GeomLoss in float64, closed forms and identities, on both solvers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from geomloss import SamplesLoss
from hypothesis import given, settings
from hypothesis import strategies as st

from hl_scale.sinkhorn import divergence as divergence_module
from hl_scale.sinkhorn import sinkhorn_divergence

SIZES = [(1, 1, 3), (1, 7, 2), (5, 5, 1), (13, 8, 4), (30, 24, 640)]
# Three rows of costs at a time for clouds of 8 points; None is the dense solver.
BUDGETS = [None, 3 * 3 * 8 * 8]


@pytest.fixture(autouse=True)
def _grad_mode() -> Iterator[None]:
    """GeomLoss leaves autograd switched on."""
    with torch.enable_grad():
        yield


def cloud(count: int, dimension: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64) * scale


def weights(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(count, generator=generator, dtype=torch.float64) + 0.1
    return drawn / drawn.sum()


def budget_for(n: int, m: int) -> int:
    """Two rows of float64 costs at a time."""
    return 2 * 3 * 8 * max(n, m)


@pytest.mark.parametrize(("n", "m", "dimension"), SIZES)
@pytest.mark.parametrize(("blur", "scaling"), [(0.05, 0.5), (0.5, 0.8)])
@pytest.mark.parametrize("streamed", [False, True])
def test_value_and_gradients_are_those_of_geomloss(
    n: int, m: int, dimension: int, blur: float, scaling: float, streamed: bool
) -> None:
    x, y = cloud(n, dimension, 0).requires_grad_(), cloud(m, dimension, 1).requires_grad_()
    expected = SamplesLoss("sinkhorn", p=2, blur=blur, scaling=scaling, backend="tensorized")(x, y)
    expected_gradients = torch.autograd.grad(expected, [x, y])
    budget = budget_for(n, m) if streamed and n + m > 4 else None
    value, info = sinkhorn_divergence(x, y, blur=blur, scaling=scaling, memory_budget=budget, return_info=True)
    assert info.solver == ("dense" if budget is None else "streaming")
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(value, [x, y]), expected_gradients, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("budget", BUDGETS)
def test_weighted_clouds_agree_with_geomloss(debias: bool, budget: int | None) -> None:
    x, y, a, b = cloud(8, 3, 0).requires_grad_(), cloud(6, 3, 1).requires_grad_(), weights(8, 2), weights(6, 3)
    expected = SamplesLoss("sinkhorn", p=2, blur=0.05, debias=debias)(a, x, b, y)
    value = sinkhorn_divergence(x, y, x_weights=a, y_weights=b, debias=debias, memory_budget=budget)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(value, [x, y]), torch.autograd.grad(expected, [x, y]), rtol=1e-8, atol=1e-10
    )


@pytest.mark.parametrize("budget", BUDGETS)
def test_epsilon_is_the_square_of_blur_and_overrides_it(budget: int | None) -> None:
    x, y = cloud(8, 3, 0), cloud(8, 3, 1)
    by_blur = sinkhorn_divergence(x, y, blur=0.5, memory_budget=budget)
    by_epsilon = sinkhorn_divergence(x, y, blur=7.0, epsilon=0.25, memory_budget=budget)
    torch.testing.assert_close(by_epsilon, by_blur, rtol=1e-12, atol=0)


@pytest.mark.parametrize("blur", [0.01, 0.05, 10.0])
def test_two_diracs_are_half_their_squared_distance_apart(blur: float) -> None:
    x, y = cloud(1, 5, 0).requires_grad_(), cloud(1, 5, 1).requires_grad_()
    value = sinkhorn_divergence(x, y, blur=blur)
    torch.testing.assert_close(value, (x - y).square().sum() / 2)
    gradient_x, gradient_y = torch.autograd.grad(value, [x, y])
    torch.testing.assert_close(gradient_x, x - y)
    torch.testing.assert_close(gradient_y, y - x)


def test_a_translated_cloud_is_half_the_squared_shift_away_and_pulled_back_along_it() -> None:
    x, shift = cloud(9, 3, 0).requires_grad_(), torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    value = sinkhorn_divergence(x, x.detach() + shift, blur=1.0, scaling=0.99)
    torch.testing.assert_close(value, shift.square().sum() / 2, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(gradient, (-shift / 9).expand(9, 3), rtol=1e-3, atol=1e-5)


def test_sorted_points_on_a_line_are_matched_in_order_at_a_small_blur() -> None:
    x, y = torch.arange(6.0).double()[:, None], torch.arange(6.0).double()[:, None] * 1.1 + 0.3
    value = sinkhorn_divergence(x.flip(0), y, blur=1e-3, scaling=0.9)
    torch.testing.assert_close(value, (x - y).square().mean() / 2, rtol=1e-3, atol=0)


def converged_divergence(
    x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor, blur: float
) -> torch.Tensor:
    """The definition, from primal plans of 300 plain Sinkhorn iterations that autograd follows."""

    def transport_cost(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        cost = (x[:, None] - y).square().sum(-1) / 2
        kernel, v = torch.exp(-cost / blur**2), torch.ones_like(b)
        for _ in range(300):
            u = 1 / (kernel @ (b * v))
            v = 1 / (kernel.T @ (a * u))
        density = u[:, None] * kernel * v
        plan = density * a[:, None] * b
        return (plan * cost).sum() + blur**2 * (plan * density.log()).sum()

    return transport_cost(x, y, a, b) - transport_cost(x, x, a, a) / 2 - transport_cost(y, y, b, b) / 2


def test_value_and_gradient_tend_to_those_of_the_definition_as_annealing_slows() -> None:
    x, y, a, b = cloud(4, 2, 0).requires_grad_(), cloud(5, 2, 1).requires_grad_(), weights(4, 2), weights(5, 3)
    expected = converged_divergence(x, y, a, b, 1.0)
    expected_gradients = torch.cat(torch.autograd.grad(expected, [x, y]))
    errors = []
    for scaling in (0.9, 0.99, 0.999):
        value = sinkhorn_divergence(x, y, x_weights=a, y_weights=b, blur=1.0, scaling=scaling)
        gradients = torch.cat(torch.autograd.grad(value, [x, y]))
        errors.append(((value - expected).abs().item(), (gradients - expected_gradients).abs().max().item()))
    for (value_before, gradient_before), (value_after, gradient_after) in itertools.pairwise(errors):
        assert value_after < value_before / 4 and gradient_after < gradient_before / 4
    assert errors[-1][0] < 1e-6 and errors[-1][1] < 5e-4


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_cloud_is_at_0_from_itself_with_gradient_0(budget: int | None, count: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        x = cloud(count, 40, 0).to(dtype).requires_grad_()
        value = sinkhorn_divergence(x, x.detach().clone(), memory_budget=budget)
        assert abs(value.item()) <= tolerance
        assert torch.autograd.grad(value, x)[0].abs().max() <= tolerance


def test_clouds_in_one_and_the_same_point_are_at_0() -> None:
    x = torch.full((3, 4), 1e3, dtype=torch.float32, requires_grad=True)
    value = sinkhorn_divergence(x, x.detach()[:2].clone())
    assert value.item() == 0
    assert torch.autograd.grad(value, x)[0].abs().max() <= 1e-3


def test_order_of_points_does_not_matter() -> None:
    x, y = cloud(11, 3, 0), cloud(7, 3, 1)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sinkhorn_divergence(x[order], y), sinkhorn_divergence(x, y), rtol=1e-12, atol=0)
    assert abs(sinkhorn_divergence(x[order], x).item()) < 1e-12


def test_a_weight_of_two_thirds_is_a_point_given_twice() -> None:
    x, y = cloud(2, 3, 0), cloud(5, 3, 1)
    twice = torch.stack([x[0], x[0], x[1]])
    weighted = sinkhorn_divergence(x, y, x_weights=torch.tensor([2.0, 1.0]) / 3)
    torch.testing.assert_close(weighted, sinkhorn_divergence(twice, y), rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 9), m=st.integers(1, 9), dimension=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_divergence_is_symmetric_and_not_negative_and_streaming_agrees(
    n: int, m: int, dimension: int, seed: int
) -> None:
    x, y = cloud(n, dimension, seed).requires_grad_(), cloud(m, dimension, seed + 1)
    value = sinkhorn_divergence(x, y, blur=0.5, scaling=0.9)
    assert value > -1e-6
    torch.testing.assert_close(sinkhorn_divergence(y, x, blur=0.5, scaling=0.9), value, rtol=1e-9, atol=1e-12)
    streamed = sinkhorn_divergence(x, y, blur=0.5, scaling=0.9, memory_budget=budget_for(n, m))
    torch.testing.assert_close(streamed, value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(streamed, x), torch.autograd.grad(value, x), rtol=1e-7, atol=1e-10)


def padded_batch(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Clouds of very different extent and size, with NaN in the padding."""
    sizes, scales = [(3, 5), (1, 1), (7, 2), (4, 4)], [1.0, 100.0, 0.01, 5.0]
    x, y = torch.full((4, 9, 6), torch.nan, dtype=dtype), torch.full((4, 8, 6), torch.nan, dtype=dtype)
    x_mask, y_mask = torch.zeros(4, 9, dtype=torch.bool), torch.zeros(4, 8, dtype=torch.bool)
    for row, ((n, m), scale) in enumerate(zip(sizes, scales, strict=True)):
        x_mask[row, row % 2 : n + row % 2], y_mask[row, 8 - m :] = True, True
        x[row][x_mask[row]], y[row][y_mask[row]] = (
            cloud(n, 6, row, scale).to(dtype),
            cloud(m, 6, 10 + row, scale).to(dtype),
        )
    return x.requires_grad_(), y.requires_grad_(), x_mask, y_mask


@pytest.mark.parametrize("budget", [None, 3 * 9 * 8])
def test_a_padded_batch_gives_what_each_pair_gives_alone(budget: int | None) -> None:
    x, y, x_mask, y_mask = padded_batch()
    values = sinkhorn_divergence(x, y, x_mask=x_mask, y_mask=y_mask, memory_budget=budget)
    upstream = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    gradients = torch.autograd.grad(values, [x, y], upstream)
    for row in range(4):
        ours = x[row][x_mask[row]].detach().requires_grad_()
        theirs = y[row][y_mask[row]].detach().requires_grad_()
        value = sinkhorn_divergence(ours, theirs)
        torch.testing.assert_close(values[row], value, rtol=1e-10, atol=1e-14)
        expected = torch.autograd.grad(value, [ours, theirs], upstream[row])
        for gradient, alone, mask in zip(gradients, expected, (x_mask, y_mask), strict=True):
            torch.testing.assert_close(gradient[row][mask[row]], alone, rtol=1e-8, atol=1e-12)
            assert (gradient[row][~mask[row]] == 0).all()


def test_more_padding_and_other_batch_mates_change_a_float32_value_by_rounding_only() -> None:
    x, y, x_mask, y_mask = padded_batch(torch.float32)
    together = sinkhorn_divergence(x, y, x_mask=x_mask, y_mask=y_mask)
    wider = torch.nn.functional.pad(x, (0, 0, 0, 30), value=1e4)
    wider_mask = torch.nn.functional.pad(x_mask, (0, 30))
    apart = [
        sinkhorn_divergence(wider[r : r + 1], y[r : r + 1], x_mask=wider_mask[r : r + 1], y_mask=y_mask[r : r + 1])
        for r in range(4)
    ]
    torch.testing.assert_close(torch.cat(apart), together, rtol=1e-5, atol=1e-7)


def test_a_point_of_weight_0_is_not_part_of_the_cloud() -> None:
    x, y = cloud(4, 3, 0), cloud(5, 3, 1)
    x[2] = 1e6
    value = sinkhorn_divergence(x, y, x_weights=torch.tensor([0.25, 0.25, 0.0, 0.5]))
    expected = sinkhorn_divergence(x[[0, 1, 3]], y, x_weights=torch.tensor([0.25, 0.25, 0.5]))
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_weights_that_sum_to_1_up_to_rounding_are_divided_by_their_sum() -> None:
    x, y, a = cloud(4, 3, 0), cloud(5, 3, 1), weights(4, 2)
    value = sinkhorn_divergence(x, y, x_weights=a * (1 + 5e-5))
    torch.testing.assert_close(value, sinkhorn_divergence(x, y, x_weights=a), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_clouds_give_exactly_the_float32_result_of_their_values(dtype: torch.dtype) -> None:
    x, y = cloud(9, 16, 0).to(dtype).requires_grad_(), cloud(7, 16, 1).to(dtype)
    wide = x.detach().float().requires_grad_()
    value, expected = sinkhorn_divergence(x, y), sinkhorn_divergence(wide, y.float())
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    gradient = torch.autograd.grad(value, x)[0]
    assert torch.equal(gradient, torch.autograd.grad(expected, wide)[0].to(dtype))


def test_autocast_does_not_lower_the_precision() -> None:
    x, y = cloud(9, 16, 0).float().requires_grad_(), cloud(7, 16, 1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = sinkhorn_divergence(x, y)
        (gradient,) = torch.autograd.grad(value, x)
    expected = sinkhorn_divergence(x, y)
    assert torch.equal(value, expected)
    assert torch.equal(gradient, torch.autograd.grad(expected, x)[0])


def test_float32_values_are_close_to_float64_ones() -> None:
    x, y = cloud(24, 640, 0), cloud(20, 640, 1)
    single = sinkhorn_divergence(x.float(), y.float())
    torch.testing.assert_close(
        single.double(), sinkhorn_divergence(x.float().double(), y.float().double()), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("enabled", [True, False])
def test_autograd_mode_is_restored_when_a_solver_fails(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        assert not torch.is_grad_enabled()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(divergence_module, "solve_dense", fail)
    x = cloud(3, 2, 0).requires_grad_()
    with torch.set_grad_enabled(enabled):
        with pytest.raises(RuntimeError, match="out of memory"):
            sinkhorn_divergence(x, x)
        assert torch.is_grad_enabled() is enabled


def test_nothing_is_recorded_without_autograd_and_nothing_for_constant_targets() -> None:
    x, y = cloud(3, 2, 0).requires_grad_(), cloud(4, 2, 1)
    with torch.no_grad():
        assert not sinkhorn_divergence(x, y).requires_grad
    assert not sinkhorn_divergence(x.detach(), y).requires_grad
    sinkhorn_divergence(x, y).backward()
    assert x.grad is not None and y.grad is None


def test_points_changed_in_place_afterwards_leave_the_gradient_alone() -> None:
    leaf = cloud(3, 2, 0).requires_grad_()
    x = leaf * 1
    value = sinkhorn_divergence(x, cloud(4, 2, 1))
    x.mul_(2)
    value.backward()
    untouched = leaf.detach().requires_grad_()
    sinkhorn_divergence(untouched, cloud(4, 2, 1)).backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, untouched.grad)


@pytest.mark.parametrize("budget", BUDGETS)
def test_information_describes_the_solution(budget: int | None) -> None:
    x, y, b = cloud(8, 3, 0), cloud(6, 3, 1), weights(6, 2)
    coarse, little = sinkhorn_divergence(x, y, y_weights=b, memory_budget=budget, return_info=True)
    fine, much = sinkhorn_divergence(x, y, y_weights=b, memory_budget=budget, scaling=0.99, return_info=True)
    assert (little.solver, little.f.shape, little.g.shape) == ("dense" if budget is None else "streaming", (8,), (6,))
    assert little.f_self is not None and little.g_self is not None
    rebuilt = (little.f - little.f_self).mean() + b @ (little.g - little.g_self)
    torch.testing.assert_close(rebuilt, coarse)
    assert much.iterations > 10 * little.iterations
    assert much.marginal_error < little.marginal_error / 3
    assert little.epsilon == 0.05**2
    plan = torch.exp((much.f[:, None] + much.g - torch.cdist(x, y).square() / 2) / much.epsilon) * b / 8
    error = (plan.sum(1) - 1 / 8).abs().sum() + (plan.sum(0) - b).abs().sum()
    torch.testing.assert_close(much.marginal_error, error, rtol=1e-4, atol=1e-8)
    assert fine > 0


def test_batched_information_has_a_batch_dimension() -> None:
    x, y, x_mask, y_mask = padded_batch()
    _, info = sinkhorn_divergence(x, y, x_mask=x_mask, y_mask=y_mask, debias=False, return_info=True)
    assert info.f.shape == (4, 9) and info.g.shape == (4, 8) and info.f_self is None
    assert info.iterations.shape == info.epsilon_start.shape == info.marginal_error.shape == (4,)
    assert info.iterations[1] > info.iterations[0] > info.iterations[2]


X, Y = cloud(4, 3, 0), cloud(5, 3, 1)
MASK = torch.ones(4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=X.index_fill(0, torch.tensor(1), torch.nan)), "x .sample 0.: NaN or infinite"),
        (dict(y=Y.index_fill(0, torch.tensor(1), torch.inf)), "y .sample 0.: NaN or infinite"),
        (dict(x=X * 1e200), "squared norms"),
        (dict(y=Y[:, :2]), "differ in D .* x has 3, y has 2"),
        (dict(y=Y.float()), "differ in dtype"),
        (dict(y=Y.to("meta")), "differ in device"),
        (dict(x=X.long()), "x has dtype torch.int64"),
        (dict(x=X[0]), "x has shape .3,."),
        (dict(x=X[:0]), "at least one point"),
        (dict(x=X[None]), "same batch size"),
        (dict(x_mask=~MASK), "x .sample 0. is an empty cloud"),
        (dict(x_mask=MASK[:3]), "x_mask has shape"),
        (dict(x_mask=MASK.float()), "expected bool"),
        (dict(y_weights=torch.full((5,), 0.25)), "y_weights of sample 0 sum to 1.25"),
        (dict(x_weights=torch.tensor([1.5, -0.5, 0, 0])), "negative"),
        (dict(x_weights=torch.zeros(4)), "empty cloud"),
        (dict(y_self=torch.zeros(())), "y_self needs debias=True, the diameter"),
        (dict(y_self=torch.zeros(2), diameter=9.0), "y_self has shape .2,., expected 1 finite values"),
        (dict(diameter=0.0), "diameter is 0.0"),
        (dict(diameter=1e8), "not beyond 1000 times the largest"),
        (dict(memory_budget=-1), "memory_budget is -1 bytes"),
        (dict(x_weights=torch.tensor([1, 0, 0, 0])), "x_weights has dtype"),
        (dict(blur=0.0), "blur is 0.0"),
        (dict(blur=float("nan")), "blur is nan"),
        (dict(epsilon=-1.0), "epsilon is -1.0"),
        (dict(scaling=1.0), "scaling is 1.0"),
        (dict(memory_budget=10), "memory_budget is 10 bytes"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sinkhorn_divergence(**{"x": X, "y": Y, **arguments})  # type: ignore[call-overload]


def test_a_bad_row_of_a_batch_is_named() -> None:
    x, y, x_mask, y_mask = (tensor.detach().clone() for tensor in padded_batch())
    x_mask[2] = False
    with pytest.raises(ValueError, match=r"x \(sample 2\) is an empty cloud"):
        sinkhorn_divergence(x, y, x_mask=x_mask, y_mask=y_mask)
