"""Frozen linear layers with one generated LoRA adapter per segment of tokens: y = x W^T + s (x A_e^T) B_e^T.

Layers that share an input (query, key and value; gate and up) are computed together, so that x is read once for their
factors and its gradient is summed in place. Weights come from callables that are asked again in backward, so nothing
dequantised (and, under ZeRO-3, nothing gathered) is kept between the passes. Gradients go to x, A and B; frozen weights
and biases get none. No adapter is copied per token: between the factors lies S = x A^T, of T x r numbers.

For long segments an adapter can be merged while its weight is dequantised, W_e = W + s B_e A_e, which saves the thin
products over the tokens. W_e is rounded once to the dtype of x: in bfloat16 each weight is off by at most 2^-8 of
itself, which is what dequantising into bfloat16 costs in any case, but an update smaller than that is partly lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hl_scale.kernels.low_rank import low_rank
from hl_scale.kernels.segments import Segments

Update = tuple[Tensor, Tensor, float]
"""A_e (r, in), B_e (out, r) and s of one adapter."""
WeightSource = Callable[..., Tensor]
"""source(dtype) -> W (out, in), and source(dtype, update) -> W + s B_e A_e, rounded once; valid until the next call."""
Apply = Literal["auto", "lowrank", "merged"]
MERGE_TOKENS = 2048
"""Tokens per segment from which "auto" merges on CUDA. Low-rank products move 2 in + 4 out numbers a token more than
the bare layer, merging 2.5 in * out a segment: equal at about 1,700 tokens for 4096 x 4096."""


@dataclass(frozen=True)
class Projection:
    """One of the layers that share an input.

    Attributes:
        weight: (out, in), or where to get it.
        a: (E, r, in) in x's dtype, or None for the bare layer.
        b: (E, out, r) in x's dtype, or None.
        scale: s of the LoRA convention in use.
        bias: (out,) frozen, or None.
    """

    weight: Tensor | WeightSource
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    bias: Tensor | None = None


def generated_lora_linear(
    x: Tensor,
    weight: Tensor | WeightSource,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scale: float = 1.0,
    *,
    bias: Tensor | None = None,
    offsets: Tensor | Segments | None = None,
    apply: Apply = "auto",
) -> Tensor:
    """Apply a frozen linear layer and, where given, one low-rank update per example.

    Args:
        x: (E, S, in) with example e using adapter e, (T, in) or (1, T, in) packed with `offsets`, or any (..., in)
            when A and B are None or hold a single adapter (E = 1).
        weight: (out, in) tensor, or a function of a dtype that returns it (called in forward and again in backward).
        a: (E, r, in) in x's dtype, or None.
        b: (E, out, r) in x's dtype, or None.
        scale: s of the LoRA convention in use.
        bias: (out,) frozen, or None.
        offsets: (E + 1,) integers, packed segment starts and the total, or `Segments`; segments may be empty.
        apply: "lowrank", "merged" (see the module), or "auto": merged on CUDA for long segments.

    Returns:
        y with x's leading shape and `out` features, in x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; says what was received and what is expected.
    """
    return generated_lora_linears(x, [Projection(weight, a, b, scale, bias)], offsets=offsets, apply=apply)[0]


def generated_lora_linears(
    x: Tensor, projections: Sequence[Projection], *, offsets: Tensor | Segments | None = None, apply: Apply = "auto"
) -> tuple[Tensor, ...]:
    """Apply several layers to the same input; arguments, results and errors as for `generated_lora_linear`.

    Adapted projections have equal E; their ranks and scales may differ.
    """
    if apply not in ("auto", "lowrank", "merged"):
        raise ValueError(f'apply is "auto", "lowrank" or "merged", not {apply!r}')
    segments = _check(x, projections, offsets)
    merged = segments is not None and (apply == "merged" or (apply == "auto" and _merging_pays(x, segments)))
    factors = [factor for p in projections for factor in (p.a, p.b) if factor is not None]
    rows = x.reshape(-1, x.shape[-1])
    layers = [_Layer.of(p) for p in projections]
    outputs = _AdaptedLinears.apply(rows, _Call(layers, segments, merged), *factors)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


@dataclass(frozen=True)
class _Layer:
    """What of a projection is not a leaf of the graph."""

    source: WeightSource
    scale: float
    bias: Tensor | None
    adapted: bool

    @classmethod
    def of(cls, projection: Projection) -> _Layer:
        weight = projection.weight
        source = dense_source(weight) if isinstance(weight, Tensor) else weight
        return cls(source, projection.scale, projection.bias, projection.a is not None)


@dataclass(frozen=True)
class _Call:
    layers: list[_Layer]
    segments: Segments | None
    merged: bool

    def pairs(self, factors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor] | None]:
        """A and B of each layer, None for bare ones."""
        left = iter(factors)
        return [(next(left), next(left)) if layer.adapted else None for layer in self.layers]


class _AdaptedLinears(torch.autograd.Function):
    """x (T, in), then A and B of the adapted layers in turn -> y (T, out) of each layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call, *factors: Tensor) -> tuple[Tensor, ...]:
        pairs = call.pairs(factors)
        s = None
        if call.segments is not None:
            way = low_rank(call.segments, x)
            a, ranks = _stacked(pairs)
            s = way.shrink(x, a)
            parts = iter(s.split(ranks, dim=way.rank_dim))
        outputs = []
        for layer, pair in zip(call.layers, pairs, strict=True):
            if pair is None:
                y = torch.nn.functional.linear(x, layer.source(x.dtype), layer.bias)
            else:
                part = next(parts)
                if call.merged:
                    assert call.segments is not None
                    y = _merged_forward(x, layer, pair, call.segments)
                else:
                    y = way.combine([(x, layer.source(x.dtype).T)], part, pair[1], layer.scale)
                if layer.bias is not None:
                    y.add_(layer.bias)
            outputs.append(y)
        ctx.save_for_backward(x, s, *factors)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        x, s, *factors = ctx.saved_tensors
        call, want_x = ctx.call, ctx.needs_input_grad[0]
        pairs = call.pairs(factors)
        grads = tuple(None if grad is None else grad.contiguous() for grad in grads)
        if call.segments is None:
            grad_x = _sum_of_products(_terms(call, grads, x.dtype)) if want_x else None
            return grad_x, None
        way = low_rank(call.segments, x)
        a, ranks = _stacked(pairs)
        parts = iter(s.split(ranks, dim=way.rank_dim))
        grad_parts, grad_bs = [], []
        for layer, pair, grad in zip(call.layers, pairs, grads, strict=True):
            if pair is None:
                continue
            part = next(parts)
            if grad is None:
                grad_parts.append(torch.zeros_like(part))
                grad_bs.append(torch.zeros_like(pair[1]))
                continue
            grad_b, grad_part = way.gradients(grad, part, pair[1], layer.scale)
            assert grad_part is not None
            grad_parts.append(grad_part)
            grad_bs.append(grad_b)
        grad_s = grad_parts[0] if len(grad_parts) == 1 else torch.cat(grad_parts, dim=way.rank_dim)
        grad_a = way.gradients(x, grad_s, None, 1.0)[0].mT
        grad_x = None
        if want_x and call.merged:
            grad_x = _merged_backward(call, pairs, grads, x)
        elif want_x:
            grad_x = way.combine(_terms(call, grads, x.dtype), grad_s, a.mT, 1.0)
        grad_as = grad_a.split(ranks, dim=1)
        interleaved = [gradient for both in zip(grad_as, grad_bs, strict=True) for gradient in both]
        return grad_x, None, *interleaved


def _stacked(pairs: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, list[int]]:
    """A of all adapted layers along the rank, and the rank of each."""
    factors = [pair[0] for pair in pairs if pair is not None]
    return factors[0] if len(factors) == 1 else torch.cat(factors, dim=1), [a.shape[1] for a in factors]


def _terms(call: _Call, grads: Sequence[Tensor | None], dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """dy and W of each layer; one weight at a time, because the next one may take its place."""
    for layer, grad in zip(call.layers, grads, strict=True):
        if grad is not None:
            yield grad, layer.source(dtype)


def _sum_of_products(terms: Iterator[tuple[Tensor, Tensor]]) -> Tensor | None:
    total = None
    for x, w in terms:
        total = x @ w if total is None else total.addmm_(x, w)
    return total


def _merged_forward(x: Tensor, layer: _Layer, pair: tuple[Tensor, Tensor], segments: Segments) -> Tensor:
    a, b = pair
    y = x.new_empty(x.shape[0], b.shape[1])
    for e, rows in enumerate(segments.slices()):
        if rows.stop > rows.start:
            torch.mm(x[rows], layer.source(x.dtype, (a[e], b[e], layer.scale)).T, out=y[rows])
    return y


def _merged_backward(
    call: _Call, pairs: Sequence[tuple[Tensor, Tensor] | None], grads: Sequence[Tensor | None], x: Tensor
) -> Tensor:
    assert call.segments is not None
    grad_x = torch.zeros_like(x)
    for layer, pair, grad in zip(call.layers, pairs, grads, strict=True):
        if grad is None:
            continue
        if pair is None:
            grad_x.addmm_(grad, layer.source(x.dtype))
            continue
        for e, rows in enumerate(call.segments.slices()):
            if rows.stop > rows.start:
                grad_x[rows].addmm_(grad[rows], layer.source(x.dtype, (pair[0][e], pair[1][e], layer.scale)))
    return grad_x


def dense_source(weight: Tensor) -> WeightSource:
    """Where to get a weight (out, in) that is held as it is."""

    def source(dtype: torch.dtype, update: Update | None = None) -> Tensor:
        dense = weight.detach()
        if update is None:
            return dense.to(dtype)
        a, b, scale = update
        wide = torch.promote_types(torch.promote_types(dense.dtype, dtype), torch.float32)
        return torch.addmm(dense.to(wide), b.to(wide), a.to(wide), alpha=scale).to(dtype)

    return source


def _merging_pays(x: Tensor, segments: Segments) -> bool:
    lengths = [rows.stop - rows.start for rows in segments.slices() if rows.stop > rows.start]
    return x.is_cuda and bool(lengths) and min(lengths) >= MERGE_TOKENS


def _check(x: Tensor, projections: Sequence[Projection], offsets: Tensor | Segments | None) -> Segments | None:
    """The segments of x's rows, None where no projection is adapted; raises before anything is computed."""
    counts = set()
    for p in projections:
        _check_weight(x, p)
        if p.a is None or p.b is None:
            if p.a is not p.b:
                raise ValueError("A and B must be given together")
            continue
        _check_factors(x, p.a, p.b)
        counts.add(p.a.shape[0])
    if len(counts) > 1:
        raise ValueError(f"layers that share an input have factors for {sorted(counts)} conditions; E must be equal")
    if not counts:
        return None
    (count,) = counts
    tokens = x[..., 0].numel()
    if offsets is None:
        if count == 1:
            return Segments.equal(1, tokens)
        if x.ndim != 3 or x.shape[0] != count:
            raise ValueError(f"{count} adapters need x of shape ({count}, S, in) or offsets, got {tuple(x.shape)}")
        return Segments.equal(count, x.shape[1])
    segments = offsets if isinstance(offsets, Segments) else Segments.of(offsets)
    packed = x.ndim == 2 or (x.ndim == 3 and x.shape[0] == 1)
    if not packed or segments.count != count or segments.tokens != tokens:
        raise ValueError(
            f"offsets {segments.bounds[:8]} must rise from 0 to T = {tokens} with E + 1 = {count + 1} entries, and x "
            f"must be (T, in) or (1, T, in), got {tuple(x.shape)}"
        )
    return segments


def _check_weight(x: Tensor, p: Projection) -> None:
    if not isinstance(p.weight, Tensor):
        return
    shape = tuple(p.weight.shape)
    if len(shape) != 2 or shape[1] != x.shape[-1] or (p.b is not None and p.b.ndim == 3 and p.b.shape[1] != shape[0]):
        outputs = "" if p.b is None else f" and B {tuple(p.b.shape)}"
        raise ValueError(f"a weight (out, in) of shape {shape} does not fit x {tuple(x.shape)}{outputs}")
    if p.weight.device != x.device:
        raise ValueError(f"x is on {x.device}, the weight on {p.weight.device}")


def _check_factors(x: Tensor, a: Tensor, b: Tensor) -> None:
    shapes = f"x {tuple(x.shape)}, A {tuple(a.shape)}, B {tuple(b.shape)}"
    if a.ndim != 3 or b.ndim != 3 or a.shape[0] != b.shape[0] or a.shape[1] != b.shape[2]:
        raise ValueError(f"expected A (E, r, in) and B (E, out, r) with equal E and r, got {shapes}")
    if x.shape[-1] != a.shape[2]:
        raise ValueError(f"x has {x.shape[-1]} features but A was generated for {a.shape[2]}: {shapes}")
    if not x.dtype == a.dtype == b.dtype or not x.device == a.device == b.device:
        raise ValueError(f"x, A and B must share dtype and device, got {x.dtype}/{a.dtype}/{b.dtype} on "
                         f"{x.device}/{a.device}/{b.device}")  # fmt: skip
