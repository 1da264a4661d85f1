"""The adapted linear layer against its definition in float64, and what it keeps between the passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hl_scale.kernels import (
    Projection,
    Segments,
    dequantize_nf4,
    generated_lora_linear,
    generated_lora_linear_reference,
    generated_lora_linears,
    quantize_nf4,
)

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


@pytest.mark.parametrize("lengths", [(3, 2, 4), (0, 5, 0), (9,), (0, 0, 0), (2, 2)])
@pytest.mark.parametrize("leading", [(), (1,)])
def test_merging_adapters_into_the_weight_changes_nothing_but_the_order_of_sums(
    lengths: tuple[int, ...], leading: tuple[int, ...]
) -> None:
    x, weight, a, b, bias = operands(len(lengths), 2, *leading, sum(lengths))
    segments = Segments.of(torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]))
    rows = x.reshape(-1, IN)
    offsets = torch.tensor(segments.bounds)
    expected = generated_lora_linear_reference(rows, weight, a, b, SCALE, bias, offsets).view(*x.shape[:-1], OUT)
    y = generated_lora_linear(x, weight, a, b, SCALE, bias=bias, offsets=segments, apply="merged")
    assert_same_values_and_gradients(y, expected, [x, a, b])


@pytest.mark.parametrize("apply", ["lowrank", "merged"])
@pytest.mark.parametrize("offsets", [None, (0, 2, 2, 7)])
def test_layers_that_share_an_input_equal_each_alone_whatever_their_ranks_and_whether_adapted(
    offsets: tuple[int, ...] | None, apply: Any
) -> None:
    bounds = None if offsets is None else torch.tensor(offsets)
    x = draw(3, 4, IN).requires_grad_() if offsets is None else draw(7, IN).requires_grad_()
    weights = [draw(outputs, IN, seed=outputs) for outputs in (5, 3, 8)]
    a, b = draw(3, 2, IN, seed=1).requires_grad_(), draw(3, 5, 2, seed=2).requires_grad_()
    wide_a, wide_b = draw(3, 4, IN, seed=3).requires_grad_(), draw(3, 8, 4, seed=4).requires_grad_()
    together = [
        Projection(weights[0], a, b, SCALE),
        Projection(weights[1], bias=draw(3)),
        Projection(weights[2], wide_a, wide_b, 2.0),
    ]
    found = generated_lora_linears(x, together, offsets=bounds, apply=apply)
    expected = [
        generated_lora_linear_reference(x, weights[0], a, b, SCALE, offsets=bounds),
        torch.nn.functional.linear(x, weights[1], draw(3)),
        generated_lora_linear_reference(x, weights[2], wide_a, wide_b, 2.0, offsets=bounds),
    ]
    leaves = [x, a, b, wide_a, wide_b]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for used in ((0, 1, 2), (1,), (0, 2), (2,)):  # outputs that nothing depends on get no gradient
        sums = [sum((ys[i] * draw(*ys[i].shape, seed=9)).sum() for i in used) for ys in (found, expected)]
        gradients = [torch.autograd.grad(s, leaves, retain_graph=True, allow_unused=True) for s in sums]
        for gradient, reference in zip(*gradients, strict=True):
            wanted = torch.zeros((), dtype=torch.float64) if reference is None else reference
            torch.testing.assert_close(gradient, wanted.expand_as(gradient), rtol=1e-12, atol=1e-12)


def test_merged_weights_are_rounded_once() -> None:
    source = CountingSource(64, 32)
    a, b = draw(1, 2, 32, dtype=torch.float32), draw(1, 64, 2, dtype=torch.float32)
    exact = source(torch.float32).double() + SCALE * b[0].double() @ a[0].double()
    merged = source(torch.bfloat16, (a[0].bfloat16(), b[0].bfloat16(), SCALE)).double()
    inputs = source(torch.float32).double() + SCALE * b[0].bfloat16().double() @ a[0].bfloat16().double()
    assert ((merged - inputs).abs() <= 2**-8 * inputs.abs() + 1e-7).all()
    assert ((source(torch.float32, (a[0], b[0], SCALE)).double() - exact).abs() < 1e-6).all()


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

    def __call__(self, dtype: torch.dtype, update: tuple[Tensor, Tensor, float] | None = None) -> Tensor:
        self.reads += 1
        return dequantize_nf4(self.packed, self.constants, dtype, update=update)


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


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("apply", ["lowrank", "merged"])
def test_checkpointing_gives_identical_gradients_and_reads_the_weight_once_more(reentrant: bool, apply: Any) -> None:
    each = 2 if apply == "merged" else 1  # a merged weight is read for every segment
    inputs = [draw(2, 3, 32, dtype=torch.float32), draw(2, 4, 32, seed=1, dtype=torch.float32)]
    inputs.append(draw(2, 64, 4, seed=2, dtype=torch.float32))
    results = []
    for recompute in (False, True):
        source = CountingSource(64, 32)
        x, a, b = (value.clone().requires_grad_() for value in inputs)

        def layer(x: Tensor, a: Tensor, b: Tensor, source: CountingSource = source) -> Tensor:
            return torch.tanh(generated_lora_linear(x, source, a, b, SCALE, apply=apply))

        y = checkpoint(layer, x, a, b, use_reentrant=reentrant) if recompute else layer(x, a, b)
        assert isinstance(y, Tensor)
        y.square().sum().backward()
        results.append((y, x.grad, a.grad, b.grad))
        assert source.reads == (2 + recompute) * each
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
        (((6, 7), (2, 2, 7), (2, 5, 2)), [0, 6], "must rise from 0"),
        (((6, 7), (2, 2, 7), (2, 5, 2)), [0, 4, 5], "must rise from 0"),
        (((6, 7), (2, 2, 7), (2, 5, 2)), [1, 4, 6], "must rise from 0"),
        (((6, 7), (3, 2, 7), (3, 5, 2)), [0, 4, 3, 6], "must rise from 0"),
        (((6, 7), (2, 2, 7), (2, 5, 2)), [], "must rise from 0"),
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


@pytest.mark.parametrize(
    ("projections", "offsets", "message"),
    [
        ([Projection(torch.zeros(5, 6))], None, r"weight \(out, in\) of shape \(5, 6\) does not fit x \(2, 4, 7\)"),
        ([Projection(torch.zeros(4, 7), torch.zeros(2, 2, 7), torch.zeros(2, 5, 2))], None, r"and B \(2, 5, 2\)"),
        ([Projection(torch.zeros(5, 7, device="meta"))], None, "x is on cpu, the weight on meta"),
        (
            [
                Projection(torch.zeros(5, 7), torch.zeros(2, 2, 7), torch.zeros(2, 5, 2)),
                Projection(torch.zeros(5, 7), torch.zeros(1, 2, 7), torch.zeros(1, 5, 2)),
            ],
            None,
            r"factors for \[1, 2\] conditions",
        ),
        (
            [Projection(torch.zeros(5, 7), torch.zeros(2, 2, 7), torch.zeros(2, 5, 2, device="meta"))],
            None,
            "on cpu/cpu/meta",
        ),
        ([Projection(torch.zeros(5, 7), torch.zeros(2, 2, 7), torch.zeros(2, 5, 2))], [0.0, 4.0, 8.0], "integers"),
    ],
)
def test_layers_that_do_not_fit_each_other_are_refused(
    projections: list[Projection], offsets: list[float] | None, message: str
) -> None:
    bounds = None if offsets is None else torch.tensor(offsets)
    with pytest.raises(ValueError, match=message):
        generated_lora_linears(torch.zeros(2, 4, 7), projections, offsets=bounds)


def test_an_unknown_way_to_apply_an_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="not 'fused'"):
        generated_lora_linear(torch.zeros(2, 7), torch.zeros(5, 7), apply="fused")  # type: ignore[arg-type]


def test_mixed_dtypes_and_half_an_adapter_are_refused() -> None:
    x, a, b = torch.zeros(2, 4, 7), torch.zeros(2, 2, 7), torch.zeros(2, 5, 2)
    with pytest.raises(ValueError, match="must share dtype and device"):
        generated_lora_linear(x.bfloat16(), torch.zeros(5, 7), a, b)
    with pytest.raises(ValueError, match="given together"):
        generated_lora_linear(x, torch.zeros(5, 7), a)
