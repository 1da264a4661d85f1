"""Triton kernels of nf4.py: packed bytes to weights in one pass, a low-rank update added or not.

This module imports triton, so it is itself imported where CUDA tensors are met.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hl_scale.kernels.available import device_of

BLOCK_BYTES, WARPS = 1024, 4
MERGE_ROWS, MERGE_COLUMNS, MERGE_RANKS, MERGE_WARPS = 32, 128, 16, 8


@triton.jit
def block_constants(absmax, nested_absmax, offset, dynamic, block, inside, NESTED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Float32 constants of the blocks with these numbers; 256 of them share a nested one."""
    constant = tl.load(absmax + block, mask=inside, other=0)
    if NESTED:
        scale = tl.load(nested_absmax + block // 256, mask=inside, other=0.0)
        constant = tl.load(dynamic + constant.to(tl.int32)) * scale + tl.load(offset)
    return constant


@triton.jit
def dequantize_kernel(  # type: ignore[no-untyped-def]
    packed,
    absmax,
    nested_absmax,
    offset,
    code,
    dynamic,
    out,
    num_bytes,
    NESTED: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """BLOCK_BYTES bytes, twice as many weights; 32 bytes share a block constant."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_BYTES
    position = start + tl.arange(0, BLOCK_BYTES)
    inside = position < num_bytes
    byte = tl.load(packed + position, mask=inside, other=0).to(tl.int32)
    constant = block_constants(absmax, nested_absmax, offset, dynamic, position // 32, inside, NESTED)
    high = tl.load(code + (byte >> 4)) * constant
    low = tl.load(code + (byte & 15)) * constant
    weights = tl.interleave(high, low)
    place = start * 2 + tl.arange(0, 2 * BLOCK_BYTES)
    tl.store(out + place, weights.to(out.dtype.element_ty), mask=place < 2 * num_bytes)


@triton.jit
def merge_kernel(  # type: ignore[no-untyped-def]
    packed,
    absmax,
    nested_absmax,
    offset,
    code,
    dynamic,
    a,
    b,
    out,
    rows,
    columns,
    rank,
    scale,
    NESTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """A tile of out (out, in): its weights, and scale * b a with b (out, r), a (r, in), RANKS ranks at a time.

    A weight's place in the flattened matrix tells its byte, its half of the byte and its block.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside_row, inside_column = row < rows, column < columns
    update = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rank, RANKS):
        lane = start + tl.arange(0, RANKS)
        kept = lane < rank
        b_tile = b + row.to(tl.int64)[:, None] * rank + lane[None, :]
        b_tile = tl.load(b_tile, mask=inside_row[:, None] & kept[None, :], other=0.0)
        a_tile = a + lane.to(tl.int64)[:, None] * columns + column[None, :]
        a_tile = tl.load(a_tile, mask=kept[:, None] & inside_column[None, :], other=0.0)
        update = tl.dot(b_tile, a_tile, update, input_precision="ieee")
    inside = inside_row[:, None] & inside_column[None, :]
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    byte = tl.load(packed + place // 2, mask=inside, other=0).to(tl.int32)
    half = tl.where(place % 2 == 0, byte >> 4, byte & 15)
    constant = block_constants(absmax, nested_absmax, offset, dynamic, place // 64, inside, NESTED)
    merged = tl.load(code + half) * constant + scale * update
    tl.store(out + place, merged.to(out.dtype.element_ty), mask=inside)


def dequantize_triton(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    code: Tensor,
    dynamic: Tensor,
    out: Tensor,
) -> Tensor:
    """Write the weights of `packed` into `out` (twice as many, contiguous, float32 or 16 bits), rounded once.

    Products and sums are not contracted, so float32 weights equal those of the definition bit for bit.
    """
    grid = (triton.cdiv(packed.numel(), BLOCK_BYTES),)
    with device_of(packed):
        dequantize_kernel[grid](
            packed,
            absmax,
            absmax if nested_absmax is None else nested_absmax,
            absmax if offset is None else offset,
            code,
            dynamic,
            out,
            packed.numel(),
            NESTED=nested_absmax is not None,
            BLOCK_BYTES=BLOCK_BYTES,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return out


def merge_triton(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    code: Tensor,
    dynamic: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    out: Tensor,
) -> Tensor:
    """Write the weights of `packed` plus scale * b a into `out`, computed in float32 and rounded once.

    Args:
        packed: (out * in / 2,) uint8; the constants and tables are those of `dequantize_triton`.
        a: (r, in) float32 or 16 bits.
        b: (out, r) in a's dtype.
        out: (out, in) contiguous, float32 or 16 bits.

    Products and sums are not contracted: where b a is zero, the result equals `dequantize_triton`'s bit for bit.

    Raises:
        ValueError: `out` is not contiguous.
    """
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got shape {tuple(out.shape)} with strides {out.stride()}")
    rows, columns = out.shape
    with device_of(packed):
        merge_kernel[(triton.cdiv(rows, MERGE_ROWS), triton.cdiv(columns, MERGE_COLUMNS))](
            packed,
            absmax,
            absmax if nested_absmax is None else nested_absmax,
            absmax if offset is None else offset,
            code,
            dynamic,
            a.contiguous(),
            b.contiguous(),
            out,
            rows,
            columns,
            a.shape[0],
            scale,
            NESTED=nested_absmax is not None,
            ROWS=MERGE_ROWS,
            COLUMNS=MERGE_COLUMNS,
            RANKS=MERGE_RANKS,
            num_warps=MERGE_WARPS,
            enable_fp_fusion=False,
        )
    return out
