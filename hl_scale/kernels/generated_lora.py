"""A frozen linear layer with one generated LoRA adapter per example: y = x W^T + s (x A_e^T) B_e^T.

The weight comes from a callable that is asked again in backward, so nothing dequantised (and, under ZeRO-3, nothing
gathered) is kept between the passes. Gradients go to x, A and B; the frozen weight and bias get none. The adapter is
never copied per token: the low-rank part is two batched products with the intermediate S = x A^T (E, S, r).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

WeightSource = Callable[[torch.dtype], Tensor]


def generated_lora_linear(
    x: Tensor,
    weight: Tensor | WeightSource,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scale: float = 1.0,
    *,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Apply a frozen linear layer and, where given, one low-rank update per example.

    Args:
        x: (E, S, in) with example e using adapter e, (T, in) packed with `offsets`, or any (..., in) when A and B are
            None or hold a single adapter (E = 1).
        weight: (out, in) tensor, or a function of a dtype that returns it (called in forward and again in backward).
        a: (E, r, in) in x's dtype, or None.
        b: (E, out, r) in x's dtype, or None.
        scale: s of the LoRA convention in use.
        bias: (out,) frozen, or None.
        offsets: (E + 1,) int64, packed segment starts and the total; segments may be empty.

    Returns:
        y with x's leading shape and `out` features, in x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; says what was received and what is expected.
    """
    source: WeightSource = _constant(weight) if isinstance(weight, Tensor) else weight
    if a is None or b is None:
        if a is not b:
            raise ValueError("A and B must be given together")
        return _FrozenLinear.apply(x, source, bias)
    _check(x, a, b, offsets)
    if offsets is not None:
        segments = [slice(start, stop) for start, stop in pairwise(offsets.tolist())]
        return _PackedLoraLinear.apply(x, a, b, source, scale, bias, segments)
    if a.shape[0] == 1 and (x.ndim != 3 or x.shape[0] != 1):
        y = _GeneratedLoraLinear.apply(x.reshape(1, -1, x.shape[-1]), a, b, source, scale, bias)
        return y.view(*x.shape[:-1], y.shape[-1])
    return _GeneratedLoraLinear.apply(x, a, b, source, scale, bias)


class _FrozenLinear(torch.autograd.Function):
    """x W^T + bias with a re-read frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: WeightSource, bias: Tensor | None) -> Tensor:
        ctx.source = source
        return torch.nn.functional.linear(x, source(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        return (grad_y @ ctx.source(grad_y.dtype) if ctx.needs_input_grad[0] else None), None, None


class _GeneratedLoraLinear(torch.autograd.Function):
    """Equal-length batch; x (E, S, in), A (E, r, in), B (E, out, r)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, source: WeightSource, scale: float, bias: Tensor | None
    ) -> Tensor:
        y = torch.nn.functional.linear(x, source(x.dtype), bias)
        s = torch.bmm(x, a.transpose(1, 2))  # (E, S, r)
        y.baddbmm_(s, b.transpose(1, 2), alpha=scale)
        ctx.save_for_backward(x, a, b, s)
        ctx.source, ctx.scale = source, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, s = ctx.saved_tensors
        grad_s = torch.bmm(grad_y, b).mul_(ctx.scale)  # (E, S, r)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_y @ ctx.source(grad_y.dtype)).baddbmm_(grad_s, a)
        grad_a = torch.bmm(grad_s.transpose(1, 2), x) if ctx.needs_input_grad[1] else None
        grad_b = torch.bmm(grad_y.transpose(1, 2), s).mul_(ctx.scale) if ctx.needs_input_grad[2] else None
        return grad_x, grad_a, grad_b, None, None, None


class _PackedLoraLinear(torch.autograd.Function):
    """Ragged segments of x (T, in): one base product for all tokens, low-rank products segment by segment, in place."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        source: WeightSource,
        scale: float,
        bias: Tensor | None,
        segments: list[slice],
    ) -> Tensor:
        y = torch.nn.functional.linear(x, source(x.dtype), bias)
        s = x.new_empty(x.shape[0], a.shape[1])
        for e, rows in enumerate(segments):
            torch.mm(x[rows], a[e].T, out=s[rows])
            y[rows].addmm_(s[rows], b[e].T, alpha=scale)
        ctx.save_for_backward(x, a, b, s)
        ctx.source, ctx.scale, ctx.segments = source, scale, segments
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, s = ctx.saved_tensors
        want_x, want_a, want_b = ctx.needs_input_grad[:3]
        grad_x = grad_y @ ctx.source(grad_y.dtype) if want_x else None
        grad_a = torch.zeros_like(a) if want_a else None
        grad_b = torch.zeros_like(b) if want_b else None
        for e, rows in enumerate(ctx.segments):
            grad_s = (grad_y[rows] @ b[e]).mul_(ctx.scale)
            if grad_x is not None:
                grad_x[rows].addmm_(grad_s, a[e])
            if grad_a is not None:
                grad_a[e].addmm_(grad_s.T, x[rows])
            if grad_b is not None:
                grad_b[e].addmm_(grad_y[rows].T, s[rows], alpha=ctx.scale)
        return grad_x, grad_a, grad_b, None, None, None, None


def _constant(weight: Tensor) -> WeightSource:
    return lambda dtype: weight.detach().to(dtype)


def _check(x: Tensor, a: Tensor, b: Tensor, offsets: Tensor | None) -> None:
    shapes = f"x {tuple(x.shape)}, A {tuple(a.shape)}, B {tuple(b.shape)}"
    if a.ndim != 3 or b.ndim != 3 or a.shape[0] != b.shape[0] or a.shape[1] != b.shape[2]:
        raise ValueError(f"expected A (E, r, in) and B (E, out, r) with equal E and r, got {shapes}")
    if x.shape[-1] != a.shape[2]:
        raise ValueError(f"x has {x.shape[-1]} features but A was generated for {a.shape[2]}: {shapes}")
    if not x.dtype == a.dtype == b.dtype or not x.device == a.device == b.device:
        raise ValueError(f"x, A and B must share dtype and device, got {x.dtype}/{a.dtype}/{b.dtype} on "
                         f"{x.device}/{a.device}/{b.device}")  # fmt: skip
    if offsets is not None:
        bounds = offsets.tolist() if offsets.ndim == 1 else []
        covers = (
            bool(bounds) and bounds[0] == 0 and bounds[-1] == x.shape[0] and all(i <= j for i, j in pairwise(bounds))
        )
        if x.ndim != 2 or len(bounds) != a.shape[0] + 1 or not covers:
            raise ValueError(f"offsets {bounds[:8]} must rise from 0 to T={x.shape[0]} with E + 1 entries; {shapes}")
    elif a.shape[0] != 1 and (x.ndim != 3 or x.shape[0] != a.shape[0]):
        raise ValueError(f"{a.shape[0]} adapters need x of shape ({a.shape[0]}, S, in) or offsets, got {shapes}")
