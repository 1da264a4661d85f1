"""Cross-entropy of answers: torch's in float64 as the oracle, memory, means over examples, penalty and noise."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hl_scale.config import SupervisedConfig
from hl_scale.lora import LoraFactors, Slot
from hl_scale.objectives import EmptyAnswerError, ResponseLoss, neftune_noise, unfamiliar_penalty, weight_penalty
from hl_scale.objectives.supervised import chunked_cross_entropy

WIDTH, VOCABULARY = 13, 2053  # more than one tile of the vocabulary, the last one short


@pytest.fixture(autouse=True)
def _grad_mode() -> Iterator[None]:
    with torch.enable_grad():
        yield


def layer(tokens: int, dtype: torch.dtype = torch.float64, size: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden (N, D), weight (V, D), targets (N,), bias (V,)."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = (torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64) * size).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, weight, torch.randint(VOCABULARY, (tokens,), generator=generator), bias


def oracle(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, smoothing: float, softcap: float | None
):
    logits = nn.functional.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)


@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_losses_and_gradients_are_those_of_torch(
    tokens: int, with_bias: bool, smoothing: float, softcap: float | None
) -> None:
    hidden, weight, targets, bias = layer(tokens)
    chosen = bias if with_bias else None
    losses = chunked_cross_entropy(
        hidden, weight, targets, bias=chosen, label_smoothing=smoothing, softcap=softcap, rows=5
    )
    expected = oracle(hidden, weight, targets, chosen, smoothing, softcap)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.linspace(-2, 3, tokens, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(losses, hidden, upstream),
        torch.autograd.grad(expected, hidden, upstream),
        rtol=1e-10,
        atol=1e-12,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_16_bit_states_are_not_rounded_to_16_bits(dtype: torch.dtype) -> None:
    hidden, weight, targets, _ = layer(11, dtype)
    losses = chunked_cross_entropy(hidden, weight, targets, rows=4)
    expected = oracle(hidden, weight, targets, None, 0.0, None)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-5)
    upstream = torch.linspace(-2, 3, 11)
    (gradient,) = torch.autograd.grad(losses, hidden, upstream)
    (reference,) = torch.autograd.grad(expected, hidden, upstream.double())
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, reference)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_on_a_gpu_are_those_of_float64(dtype: torch.dtype) -> None:
    hidden, weight, targets, bias = (tensor.detach().cuda() for tensor in layer(70, dtype))
    options = {"label_smoothing": 0.1, "softcap": 30.0}
    losses = chunked_cross_entropy(hidden.requires_grad_(), weight, targets, bias=bias, rows=32, **options)
    expected = oracle(hidden, weight, targets, bias, 0.1, 30.0)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(losses.sum(), hidden)
    (reference,) = torch.autograd.grad(expected.sum(), hidden)
    torch.testing.assert_close(gradient, reference, rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("rows", [1, 3, 10, 1000])
def test_rows_at_a_time_never_move_the_result(rows: int) -> None:
    hidden, weight, targets, bias = layer(10)
    options = {"bias": bias, "label_smoothing": 0.2, "softcap": 3.0}
    losses = chunked_cross_entropy(hidden, weight, targets, rows=rows, **options)
    expected = chunked_cross_entropy(hidden, weight, targets, rows=10, **options)
    torch.testing.assert_close(losses, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(losses.sum(), hidden), torch.autograd.grad(expected.sum(), hidden), rtol=1e-12, atol=1e-14
    )


def test_scores_far_beyond_the_range_of_exp_give_finite_losses_and_gradients() -> None:
    hidden, weight, targets, _ = layer(4, torch.float32, size=1e4)
    losses = chunked_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(losses.double(), oracle(hidden, weight, targets, None, 0.0, None), rtol=1e-5, atol=1e-2)
    assert torch.autograd.grad(losses.sum(), hidden)[0].isfinite().all()


def test_no_token_gives_no_loss() -> None:
    hidden, weight, targets, _ = layer(0)
    losses = chunked_cross_entropy(hidden, weight, targets)
    assert losses.shape == (0,)
    losses.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, WIDTH)


class Operations(TorchDispatchMode):
    """The largest new tensor in bytes, and the number of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self.products += "mm" in str(func)
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.untyped_storage().nbytes())
        return result


def test_logits_of_all_tokens_never_exist_and_each_chunk_takes_two_products() -> None:
    tokens, vocabulary, rows = 512, 50_000, 16
    hidden = torch.randn(tokens, 4, requires_grad=True)
    weight, targets = torch.randn(vocabulary, 4), torch.randint(vocabulary, (tokens,))
    for softcap in (None, 30.0):
        with Operations() as seen:
            chunked_cross_entropy(
                hidden, weight, targets, label_smoothing=0.1, softcap=softcap, rows=rows
            ).sum().backward()
        assert seen.largest <= rows * vocabulary * 4
        assert seen.products == 2 * tokens // rows
    with Operations() as seen:
        nn.functional.cross_entropy(hidden @ weight.T, targets).backward()
    assert seen.largest >= tokens * vocabulary * 4


@pytest.mark.parametrize("how", ["no_grad", "detached"])
def test_without_a_gradient_to_compute_each_chunk_takes_one_product(how: str) -> None:
    hidden, weight, targets, _ = layer(10)
    with torch.set_grad_enabled(how != "no_grad"), Operations() as seen:
        losses = chunked_cross_entropy(hidden if how == "no_grad" else hidden.detach(), weight, targets, rows=5)
    assert seen.products == 2
    assert not losses.requires_grad
    torch.testing.assert_close(losses, oracle(hidden, weight, targets, None, 0.0, None).detach())


def test_what_does_not_fit_is_refused() -> None:
    hidden, weight, targets, bias = layer(3)
    with pytest.raises(ValueError, match=r"hidden \(3, 13\), weight \(2053, 12\)"):
        chunked_cross_entropy(hidden, weight[:, :-1], targets)
    with pytest.raises(ValueError, match="do not fit"):
        chunked_cross_entropy(hidden, weight, targets, bias=bias[:-1])
    with pytest.raises(ValueError, match=r"targets lie in \[-100, .* 2053 tokens\n  fix: .*no ignored index"):
        chunked_cross_entropy(hidden, weight, torch.tensor([1, -100, 2]))
    with pytest.raises(ValueError, match=r"frozen.*\n  fix"):
        chunked_cross_entropy(hidden, weight.requires_grad_(), targets)


def frozen_head(bias: bool) -> nn.Linear:
    return nn.Linear(WIDTH, VOCABULARY, bias=bias).double().requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True])
def test_the_loss_of_an_example_is_the_mean_over_its_own_tokens(bias: bool) -> None:
    hidden, _, targets, _ = layer(9)
    head = frozen_head(bias)
    loss = ResponseLoss(head, SupervisedConfig(kind="supervised", label_smoothing=0.1, logit_tokens=4), softcap=20.0)
    example = torch.tensor([2, 0, 0, 2, 1, 2, 2, 0, 2])  # in any order
    values = loss(hidden, targets, example, 3)
    each = oracle(hidden, head.weight, targets, head.bias, 0.1, 20.0)
    expected = torch.stack([each[example == number].mean() for number in range(3)])
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(torch.autograd.grad(values.mean(), hidden), torch.autograd.grad(expected.mean(), hidden))


def test_the_output_layers_own_parameter_is_shared_not_copied() -> None:
    head = frozen_head(bias=True)
    loss = ResponseLoss(head, SupervisedConfig(kind="supervised"))
    assert dict(loss.named_parameters())["weight"] is head.weight
    assert dict(loss.named_parameters())["bias"] is head.bias


def test_an_example_without_an_answer_is_refused_by_number() -> None:
    hidden, _, targets, _ = layer(3)
    loss = ResponseLoss(frozen_head(False), SupervisedConfig(kind="supervised"))
    with pytest.raises(EmptyAnswerError, match=r"example 1, 3 of 4\n  fix"):
        loss(hidden, targets, torch.tensor([0, 0, 2]), 4)


SLOTS = (
    Slot(0, "q_proj", "layers.0.q_proj", 7, 5),
    Slot(0, "v_proj", "layers.0.v_proj", 7, 3),
    Slot(1, "q_proj", "layers.1.q_proj", 7, 5),
)


def factors(conditions: int, dtype: torch.dtype = torch.float32) -> LoraFactors:
    generator = torch.Generator().manual_seed(1)
    a = {s.path: torch.randn(conditions, 2, s.in_features, generator=generator).to(dtype) for s in SLOTS}
    b = {s.path: torch.randn(conditions, s.out_features, 2, generator=generator).to(dtype) for s in SLOTS}
    return LoraFactors(SLOTS, a, b, 1.0)


def test_the_weight_penalty_sums_mean_squares_over_module_names_and_weighs_conditions_by_examples() -> None:
    generated = factors(2)
    counts = torch.tensor([3, 1])

    def penalty(row: int) -> Tensor:
        def mean_square(side: dict[str, Tensor], module: str) -> Tensor:
            return torch.cat([side[s.path][row].flatten() for s in SLOTS if s.module == module]).square().mean()

        return sum(mean_square(side, name) for name in ("q_proj", "v_proj") for side in (generated.a, generated.b))

    torch.testing.assert_close(weight_penalty(generated, counts), (3 * penalty(0) + penalty(1)) / 4)
    torch.testing.assert_close(weight_penalty(generated), (penalty(0) + penalty(1)) / 2)
    repeated = generated.select(torch.tensor([0, 1, 0, 0]))
    torch.testing.assert_close(weight_penalty(repeated), weight_penalty(generated, counts))


def test_the_weight_penalty_is_float32_and_differentiable_in_both_factors() -> None:
    generated = factors(2, torch.bfloat16)
    leaves = [tensor.requires_grad_() for side in (generated.a, generated.b) for tensor in side.values()]
    penalty = weight_penalty(generated, torch.tensor([0, 2]))
    assert penalty.dtype == torch.float32
    penalty.backward()
    a = generated.a[SLOTS[1].path]
    assert all(leaf.grad is not None and (leaf.grad[0] == 0).all() for leaf in leaves)
    assert a.grad is not None
    torch.testing.assert_close(a.grad[1].float(), 2 * a[1].detach().float() / a[1].numel(), rtol=1e-2, atol=1e-4)


def test_neftune_noise_is_uniform_within_its_bound_and_fills_it() -> None:
    tokens, width, alpha = 40, 50, 5.0
    noise = neftune_noise((tokens, width), alpha, seed=3)
    bound = alpha / math.sqrt(tokens * width)
    assert noise.shape == (tokens, width) and noise.dtype == torch.float32
    assert noise.abs().max() <= bound
    assert noise.min() < -0.98 * bound and noise.max() > 0.98 * bound
    assert noise.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_neftune_noise_depends_on_its_seed_alone() -> None:
    torch.manual_seed(1)
    first = neftune_noise((4, 6), 5.0, seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(neftune_noise((4, 6), 5.0, seed=3), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(neftune_noise((4, 6), 5.0, seed=4), first)


def test_the_unfamiliar_penalty_is_the_ratio_of_squared_norms_and_lowers_the_unfamiliar_updates_alone() -> None:
    generated = factors(4)
    leaves = [tensor.requires_grad_() for side in (generated.a, generated.b) for tensor in side.values()]

    def square(row: int) -> Tensor:
        return sum((generated.b[s.path][row] @ generated.a[s.path][row]).square().sum() for s in SLOTS)

    penalty = unfamiliar_penalty(generated, torch.tensor([3, 1]))
    torch.testing.assert_close(penalty, (3 * square(2) / square(0) + square(3) / square(1)) / 4)
    penalty.backward()
    for leaf in leaves:
        assert leaf.grad is not None and (leaf.grad[:2] == 0).all() and leaf.grad[2:].all()


def test_no_update_at_all_has_no_unfamiliar_penalty_and_no_gradient() -> None:
    generated = factors(4)
    for side in generated.b.values():
        side.zero_().requires_grad_()
    penalty = unfamiliar_penalty(generated, torch.ones(2))
    penalty.backward()
    assert penalty == 0 and not any(side.grad.any() for side in generated.b.values() if side.grad is not None)
    assert unfamiliar_penalty(factors(1), torch.ones(2)) == 0
