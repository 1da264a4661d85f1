"""The low-rank part of an adapted layer on packed tokens: thin products with one pair of factors per segment.

Three ways to compute the same: batched products for segments of equal length, a loop over ragged ones, Triton kernels
on CUDA. What lies between the two factors, S = x A^T of T tokens, is kept as each way likes it; others only split it
and join it along the rank.

On CPUs the low-rank term is written first and the large product added to it: BLAS reads what it adds to while it is
busy multiplying, where adding a thin product afterwards would be one more pass over y.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from hl_scale.kernels.available import has_triton
from hl_scale.kernels.segments import Segments

LARGEST_RANK = 128
"""That a Triton kernel takes at once."""

Term = tuple[Tensor, Tensor]
"""x (T, n) and w (n, N), to be multiplied."""


class LowRank(Protocol):
    """Products along segments; m is (E, N, r) with any strides."""

    rank_dim: int
    """Dimension of s along the rank."""

    def shrink(self, x: Tensor, a: Tensor) -> Tensor:
        """s: x_e A_e^T, from x (T, n) and A (E, r, n)."""

    def combine(self, terms: Iterable[Term], s: Tensor, m: Tensor, scale: float) -> Tensor:
        """(T, N): the sum of x w over `terms` (read one by one), plus scale * s_e m_e^T."""

    def gradients(self, v: Tensor, s: Tensor, m: Tensor | None, scale: float) -> tuple[Tensor, Tensor | None]:
        """scale * v_e^T s_e as (E, N, r), and like s, where m is given, scale * v_e m_e."""


def low_rank(segments: Segments, x: Tensor) -> LowRank:
    """The way to compute on x's device and dtype."""
    if x.is_cuda and x.dtype != torch.float64 and has_triton():
        return _TritonSegments(segments)
    lengths = {rows.stop - rows.start for rows in segments.slices()}
    return _EqualLengths(segments.count) if len(lengths) == 1 else _Ragged(segments)


class _EqualLengths:
    """Batched products; s is (E, r, S), the layout in which BLAS computes and reads it fastest."""

    rank_dim = 1

    def __init__(self, count: int) -> None:
        self.count = count

    def _blocks(self, x: Tensor) -> Tensor:
        return x.view(self.count, -1 if x.shape[0] else 0, x.shape[1])

    def shrink(self, x: Tensor, a: Tensor) -> Tensor:
        return torch.bmm(a, self._blocks(x).mT)

    def combine(self, terms: Iterable[Term], s: Tensor, m: Tensor, scale: float) -> Tensor:
        y = s.new_empty(self.count, s.shape[2], m.shape[1])
        torch.baddbmm(y, s.mT, m.mT, beta=0, alpha=scale, out=y)
        flat = y.view(-1, m.shape[1])
        for x, w in terms:
            flat.addmm_(x, w)
        return flat

    def gradients(self, v: Tensor, s: Tensor, m: Tensor | None, scale: float) -> tuple[Tensor, Tensor | None]:
        blocks = self._blocks(v)
        grad_s = None if m is None else torch.bmm(m.mT, blocks.mT).mul_(scale)
        return torch.bmm(s, blocks).mul_(scale).mT, grad_s


class _Ragged:
    """Segment by segment; s is (r, T)."""

    rank_dim = 0

    def __init__(self, segments: Segments) -> None:
        self.rows = segments.slices()

    def shrink(self, x: Tensor, a: Tensor) -> Tensor:
        s = x.new_empty(a.shape[1], x.shape[0])
        for e, rows in enumerate(self.rows):
            torch.mm(a[e], x[rows].T, out=s[:, rows])
        return s

    def combine(self, terms: Iterable[Term], s: Tensor, m: Tensor, scale: float) -> Tensor:
        y = s.new_empty(s.shape[1], m.shape[1])
        for e, rows in enumerate(self.rows):
            torch.addmm(y[rows], s[:, rows].T, m[e].T, beta=0, alpha=scale, out=y[rows])
        for x, w in terms:
            y.addmm_(x, w)
        return y

    def gradients(self, v: Tensor, s: Tensor, m: Tensor | None, scale: float) -> tuple[Tensor, Tensor | None]:
        products = v.new_empty(len(self.rows), s.shape[0], v.shape[1])
        grad_s = None if m is None else torch.empty_like(s)
        for e, rows in enumerate(self.rows):
            torch.mm(s[:, rows], v[rows], out=products[e])
            if m is not None and grad_s is not None:
                torch.mm(m[e].T, v[rows].T, out=grad_s[:, rows])
        return products.mul_(scale).mT, None if grad_s is None else grad_s.mul_(scale)


class _TritonSegments:
    """Kernels of lora_triton.py; s is (T, r). The large product comes first, by the vendor's library.

    The kernels hold all of a rank in registers; larger ranks, and those of layers that share an input, go in parts.
    """

    rank_dim = 1

    def __init__(self, segments: Segments) -> None:
        self.segments = segments

    def shrink(self, x: Tensor, a: Tensor) -> Tensor:
        from hl_scale.kernels.lora_triton import shrink

        return _joined([shrink(x, part, self.segments) for part in a.split(LARGEST_RANK, dim=1)])

    def combine(self, terms: Iterable[Term], s: Tensor, m: Tensor, scale: float) -> Tensor:
        from hl_scale.kernels.lora_triton import expand_

        y = None
        for x, w in terms:
            y = x @ w if y is None else y.addmm_(x, w)
        if y is None:
            y = s.new_zeros(s.shape[0], m.shape[1])
        for part, factor in zip(s.split(LARGEST_RANK, dim=1), m.split(LARGEST_RANK, dim=2), strict=True):
            expand_(y, part, factor, scale, self.segments)
        return y

    def gradients(self, v: Tensor, s: Tensor, m: Tensor | None, scale: float) -> tuple[Tensor, Tensor | None]:
        from hl_scale.kernels.lora_triton import segment_gradients

        parts = s.split(LARGEST_RANK, dim=1)
        factors = [None] * len(parts) if m is None else m.split(LARGEST_RANK, dim=2)
        pairs = [
            segment_gradients(v, part, self.segments, factor, scale)
            for part, factor in zip(parts, factors, strict=True)
        ]
        grad_s = [products for _, products in pairs if products is not None]
        return _joined([gradient for gradient, _ in pairs]), None if m is None else _joined(grad_s)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
