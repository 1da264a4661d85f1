"""The adapted linear layer against its definition in float64, and what it keeps between the passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hl_scale.kernels import dequantize_nf4, generated_lora_linear, generated_lora_linear_reference, quantize_nf4

IN, OUT, SCALE = 7, 5, 0.7


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed), dtype=dtype)


def operands(adapters: int, rank: int, *tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x (*tokens, in), W, A, B, bias in float64."""
    x, a, b = draw(*tokens, IN), draw(adapters, rank, IN, seed=1), draw(adapters, OUT, rank, seed=2)
    return x.requires_grad_(), draw(OUT, IN, seed=3), a.requires_grad_(), b.requires_grad_(), draw(OUT, seed=4)


def assert_same_values_and_gradients(y: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    cotangent = draw(*y.shape, seed=9)
    gradients = torch.autograd.grad(y, inputs, cotangent)
    references = torch.autograd.grad(expected, inputs, cotangent)
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("adapters", "length", "rank"), [(1, 1, 1), (1, 6, 2), (3, 1, 2), (3, 5, 4), (5, 2, 1)])
def test_a_batch_equals_the_definition_in_values_and_gradients(
    adapters: int, length: int, rank: int, with_bias: bool
) -> None:
    x, weight, a, b, bias = operands(adapters, rank, adapters, length)
    chosen = bias if with_bias else None
    expected = generated_lora_linear_reference(x, weight, a, b, SCALE, chosen)
    y = generated_lora_linear(x, weight, a, b, SCALE, bias=chosen)
    assert_same_values_and_gradients(y, expected, [x, a, b])


@pytest.mark.parametrize("leading", [(4, 3), (2, 3, 2), (6,), ()])
def test_a_single_adapter_is_shared_by_every_row_of_any_leading_shape(leading: tuple[int, ...]) -> None:
    x, weight, a, b, bias = operands(1, 2, *leading)
    expected = generated_lora_linear_reference(x.reshape(1, -1, IN), weight, a, b, SCALE, bias).view(*leading, OUT)
    assert_same_values_and_gradients(generated_lora_linear(x, weight, a, b, SCALE, bias=bias), expected, [x, a, b])


@pytest.mark.parametrize("lengths", [(3, 2, 4), (1, 1, 1), (0, 5, 0), (4, 0, 1), (9,), (0, 0, 0)])
def test_packed_segments_equal_the_definition_empty_ones_and_single_tokens_included(lengths: tuple[int, ...]) -> None:
    x, weight, a, b, bias = operands(len(lengths), 2, sum(lengths))
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    expected = generated_lora_linear_reference(x, weight, a, b, SCALE, bias, offsets)
    y = generated_lora_linear(x, weight, a, b, SCALE, bias=bias, offsets=offsets)
    assert_same_values_and_gradients(y, expected, [x, a, b])


def test_without_factors_it_is_a_frozen_linear_layer() -> None:
    x, weight, _, _, bias = operands(1, 1, 3, 4)
    expected = torch.nn.functional.linear(x, weight, bias)
    assert_same_values_and_gradients(generated_lora_linear(x, weight, bias=bias), expected, [x])


def test_analytic_gradients_equal_finite_differences() -> None:
    x, weight, a, b, bias = operands(2, 2, 2, 3)
    assert torch.autograd.gradcheck(
        lambda x, a, b: generated_lora_linear(x, weight, a, b, SCALE, bias=bias), (x, a, b), eps=1e-6, atol=1e-8
    )


def test_only_the_gradients_that_are_wanted_are_made_and_the_weight_gets_none() -> None:
    x, weight, a, b, bias = operands(2, 2, 2, 3)
    weight.requires_grad_()
    bias.requires_grad_()
    y = generated_lora_linear(x.detach(), weight, a, b.detach(), SCALE, bias=bias)
    y.sum().backward()
    assert a.grad is not None
    assert x.grad is None and b.grad is None and weight.grad is None and bias.grad is None


class CountingSource:
    """An NF4 weight that counts how often it is dequantised."""

    def __init__(self, out_features: int, in_features: int) -> None:
        self.packed, self.constants = quantize_nf4(draw(out_features, in_features, dtype=torch.float32))
        self.reads = 0

    def __call__(self, dtype: torch.dtype) -> Tensor:
        self.reads += 1
        return dequantize_nf4(self.packed, self.constants, dtype)


@pytest.mark.parametrize("adapted", [False, True])
def test_the_weight_is_asked_for_once_in_forward_and_once_more_in_backward(adapted: bool) -> None:
    source = CountingSource(64, 32)
    x = draw(2, 3, 32, dtype=torch.float32).requires_grad_()
    a, b = draw(2, 4, 32, dtype=torch.float32), draw(2, 64, 4, dtype=torch.float32)
    y = generated_lora_linear(x, source, a, b) if adapted else generated_lora_linear(x, source)
    assert source.reads == 1
    y.sum().backward()
    assert source.reads == 2


def test_a_layer_whose_input_needs_no_gradient_does_not_read_its_weight_in_backward() -> None:
    source = CountingSource(64, 32)
    a, b = draw(2, 4, 32, dtype=torch.float32).requires_grad_(), draw(2, 64, 4, dtype=torch.float32)
    generated_lora_linear(draw(2, 3, 32, dtype=torch.float32), source, a, b).sum().backward()
    assert source.reads == 1


@pytest.mark.parametrize("packed", [False, True])
def test_nothing_of_the_size_of_the_weight_is_kept_for_backward(packed: bool) -> None:
    source, saved = CountingSource(64, 32), []
    rank, x = 2, draw(2, 3, 32, dtype=torch.float32).requires_grad_()
    a = draw(2, rank, 32, dtype=torch.float32).requires_grad_()
    b = draw(2, 64, rank, dtype=torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        if packed:
            generated_lora_linear(x.reshape(6, 32), source, a, b, offsets=torch.tensor([0, 2, 6]))
        else:
            generated_lora_linear(x, source, a, b)
    assert saved and max(saved) <= max(x.numel(), a.numel(), b.numel()) < 64 * 32


def test_checkpointing_gives_identical_gradients_and_reads_the_weight_once_more() -> None:
    inputs = [draw(2, 3, 32, dtype=torch.float32), draw(2, 4, 32, seed=1, dtype=torch.float32)]
    inputs.append(draw(2, 64, 4, seed=2, dtype=torch.float32))
    results = []
    for recompute in (False, True):
        source = CountingSource(64, 32)
        x, a, b = (value.clone().requires_grad_() for value in inputs)

        def layer(x: Tensor, a: Tensor, b: Tensor, source: CountingSource = source) -> Tensor:
            return torch.tanh(generated_lora_linear(x, source, a, b, SCALE))

        y = checkpoint(layer, x, a, b, use_reentrant=False) if recompute else layer(x, a, b)
        assert isinstance(y, Tensor)
        y.square().sum().backward()
        results.append((y, x.grad, a.grad, b.grad))
        assert source.reads == 2 + recompute
    for plain, recomputed in zip(*results, strict=True):
        assert plain is not None and torch.equal(plain, recomputed)


@pytest.mark.parametrize(
    ("shapes", "offsets", "message"),
    [
        (((3, 4, 7), (2, 2, 7), (2, 5, 2)), None, r"2 adapters need x of shape \(2, S, in\)"),
        (((4, 7), (2, 2, 7), (2, 5, 2)), None, r"2 adapters need x"),
        (((2, 4, 6), (2, 2, 7), (2, 5, 2)), None, "x has 6 features but A was generated for 7"),
        (((2, 4, 7), (2, 2, 7), (2, 5, 3)), None, "equal E and r"),
        (((2, 4, 7), (2, 2, 7), (3, 5, 2)), None, "equal E and r"),
        (((2, 4, 7), (2, 7), (5, 2)), None, "equal E and r"),
        (((6, 7), (2, 2, 7), (2, 5, 2)), [0, 6], "must rise from 0 to T=6"),
        (((6, 7), (2, 2, 7), (2, 5, 2)), [0, 4, 5], "must rise from 0 to T=6"),
        (((6, 7), (2, 2, 7), (2, 5, 2)), [1, 4, 6], "must rise from 0 to T=6"),
        (((6, 7), (3, 2, 7), (3, 5, 2)), [0, 4, 3, 6], "must rise from 0 to T=6"),
        (((6, 7), (2, 2, 7), (2, 5, 2)), [], "must rise from 0 to T=6"),
        (((2, 3, 7), (2, 2, 7), (2, 5, 2)), [0, 1, 2], "must rise from 0"),
    ],
)
def test_operands_that_do_not_fit_are_refused_before_the_weight_is_read(
    shapes: tuple[tuple[int, ...], ...], offsets: list[int] | None, message: str
) -> None:
    x, a, b = (torch.zeros(shape) for shape in shapes)
    source = CountingSource(6, 8)
    bounds = None if offsets is None else torch.tensor(offsets, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        generated_lora_linear(x, source, a, b, offsets=bounds)
    assert source.reads == 0


def test_mixed_dtypes_and_half_an_adapter_are_refused() -> None:
    x, a, b = torch.zeros(2, 4, 7), torch.zeros(2, 2, 7), torch.zeros(2, 5, 2)
    with pytest.raises(ValueError, match="must share dtype and device"):
        generated_lora_linear(x.bfloat16(), torch.zeros(5, 7), a, b)
    with pytest.raises(ValueError, match="given together"):
        generated_lora_linear(x, torch.zeros(5, 7), a)
