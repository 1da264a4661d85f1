"""Triton kernels of generated_lora.py: products with one adapter per segment; imported where CUDA tensors are met.

A program takes tokens of one segment, so it reads one adapter, and no adapter is copied per token. Operands of a call
share their device and dtype (float32, float16 or bfloat16), ranks go up to 128, and `segments` covers all T rows. Sums
are float32 and in a fixed order: equal calls give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hl_scale.kernels.available import device_of
from hl_scale.kernels.segments import Segments

# A tile of x, y or v is at most *_ROW bytes wide, and narrower where a tile of A, B or M would exceed *_TILE bytes.
SHRINK_TOKENS, SHRINK_ROW, SHRINK_TILE, SHRINK_STAGES, SHRINK_WARPS = 32, 256, 8192, 4, 4
EXPAND_TOKENS, EXPAND_ROW, EXPAND_TILE, EXPAND_WARPS = 32, 256, 16384, 4
GRADIENT_TOKENS, GRADIENT_ROW, GRADIENT_TILE, GRADIENT_STAGES, GRADIENT_WARPS = 32, 512, 16384, 3, 8
SUPER_TOKENS = 512
ADD_COLUMNS, ADD_BLOCKS, ADD_WARPS = 1024, 1024, 4
FUSED_RANK = 32
"""Up to this padded rank, the float32 parts of v m cost less memory traffic than a second read of v."""


@triton.jit
def block_of(blocks):  # type: ignore[no-untyped-def]
    """Segment (int64), first row and last row + 1 of this program."""
    block = blocks + 3 * tl.program_id(0)
    return tl.load(block).to(tl.int64), tl.load(block + 1), tl.load(block + 2)


@triton.jit
def shrink_kernel(  # type: ignore[no-untyped-def]
    x,
    a,
    s,
    blocks,
    features,
    rank,
    stride_segment,
    stride_rank,
    stride_feature,
    scale,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """TOKENS rows of s (T, r) = scale * x a_e^T, from the same rows of x (T, in)."""
    segment, first, stop = block_of(blocks)
    token, lane = first + tl.arange(0, TOKENS), tl.arange(0, RANK)
    here, kept = token < stop, lane < rank
    x_rows = x + token.to(tl.int64)[:, None] * features
    a_lanes = a + segment * stride_segment + lane.to(tl.int64)[None, :] * stride_rank
    total = tl.zeros((TOKENS, RANK), tl.float32)
    for start in tl.range(0, features, COLUMNS, num_stages=STAGES):
        column = start + tl.arange(0, COLUMNS)
        inside = column < features
        x_tile = tl.load(x_rows + column[None, :], mask=here[:, None] & inside[None, :], other=0.0)
        a_tile = a_lanes + column.to(tl.int64)[:, None] * stride_feature
        a_tile = tl.load(a_tile, mask=inside[:, None] & kept[None, :], other=0.0)
        total = tl.dot(x_tile, a_tile, total, input_precision="ieee")
    place = token.to(tl.int64)[:, None] * rank + lane[None, :]
    tl.store(s + place, (scale * total).to(s.dtype.element_ty), mask=here[:, None] & kept[None, :])


@triton.jit
def expand_kernel(  # type: ignore[no-untyped-def]
    y,
    s,
    m,
    blocks,
    columns,
    rank,
    stride_segment,
    stride_column,
    stride_rank,
    scale,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    SLICE: tl.constexpr,
):
    """Add scale * s m_e^T to a tile of y (T, N), SLICE ranks at a time."""
    segment, first, stop = block_of(blocks)
    token, column = first + tl.arange(0, TOKENS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here, inside = token < stop, column < columns
    row = token.to(tl.int64)[:, None]
    y_tile = y + row * columns + column[None, :]
    old = tl.load(y_tile, mask=here[:, None] & inside[None, :], other=0.0)
    m_columns = m + segment * stride_segment + column.to(tl.int64)[None, :] * stride_column
    update = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for start in range(0, RANK, SLICE):
        lane = start + tl.arange(0, SLICE)
        kept = lane < rank
        s_tile = tl.load(s + row * rank + lane[None, :], mask=here[:, None] & kept[None, :], other=0.0)
        m_tile = m_columns + lane.to(tl.int64)[:, None] * stride_rank
        m_tile = tl.load(m_tile, mask=kept[:, None] & inside[None, :], other=0.0)
        update = tl.dot(s_tile, m_tile, update, input_precision="ieee")
    new = old.to(tl.float32) + scale * update
    tl.store(y_tile, new.to(y.dtype.element_ty), mask=here[:, None] & inside[None, :])


@triton.jit
def gradients_kernel(  # type: ignore[no-untyped-def]
    v,
    s,
    gradients,
    blocks,
    columns,
    rank,
    scale,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """scale * v^T s over a super-block of tokens and COLUMNS columns of v (T, N), s (T, r).

    It goes to gradients (super-blocks, N, r), or (E, N, r) where every super-block is a WHOLE segment.
    """
    segment, first, stop = block_of(blocks)
    lane, column = tl.arange(0, RANK), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    kept, inside = lane < rank, column < columns
    total = tl.zeros((RANK, COLUMNS), tl.float32)
    for start in tl.range(first, stop, TOKENS, num_stages=STAGES):
        token = start + tl.arange(0, TOKENS)
        here, row = token < stop, token.to(tl.int64)
        v_tile = v + row[:, None] * columns + column[None, :]
        v_tile = tl.load(v_tile, mask=here[:, None] & inside[None, :], other=0.0)
        s_tile = tl.load(s + row[None, :] * rank + lane[:, None], mask=kept[:, None] & here[None, :], other=0.0)
        total = tl.dot(s_tile, v_tile, total, input_precision="ieee")
    owner = segment if WHOLE else tl.program_id(0).to(tl.int64)
    place = gradients + (owner * columns + column)[None, :] * rank + lane[:, None]
    tl.store(place, (scale * total).to(gradients.dtype.element_ty), mask=kept[:, None] & inside[None, :])


@triton.jit
def gradients_and_products_kernel(  # type: ignore[no-untyped-def]
    v,
    s,
    m,
    gradients,
    products,
    blocks,
    tokens,
    columns,
    rank,
    stride_segment,
    stride_column,
    stride_rank,
    scale,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """`gradients_kernel`, and scale * v m_e over COLUMNS columns to products (chunks of columns, T, r).

    The sum is (COLUMNS, RANK) here: with its transpose, warps would repeat the products, and registers would not do.
    """
    segment, first, stop = block_of(blocks)
    lane, column = tl.arange(0, RANK), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    kept, inside = lane < rank, column < columns
    m_tile = m + segment * stride_segment + column.to(tl.int64)[:, None] * stride_column
    m_tile += lane.to(tl.int64)[None, :] * stride_rank
    m_tile = tl.load(m_tile, mask=inside[:, None] & kept[None, :], other=0.0)
    total = tl.zeros((COLUMNS, RANK), tl.float32)
    for start in tl.range(first, stop, TOKENS, num_stages=STAGES):
        token = start + tl.arange(0, TOKENS)
        here, row = token < stop, token.to(tl.int64)[:, None]
        v_tile = tl.load(v + row * columns + column[None, :], mask=here[:, None] & inside[None, :], other=0.0)
        s_tile = tl.load(s + row * rank + lane[None, :], mask=here[:, None] & kept[None, :], other=0.0)
        total = tl.dot(tl.trans(v_tile), s_tile, total, input_precision="ieee")
        product = scale * tl.dot(v_tile, m_tile, input_precision="ieee")
        place = products + (tl.program_id(1).to(tl.int64) * tokens + row) * rank + lane[None, :]
        tl.store(place, product, mask=here[:, None] & kept[None, :])
    owner = segment if WHOLE else tl.program_id(0).to(tl.int64)
    place = gradients + (owner * columns + column)[:, None] * rank + lane[None, :]
    tl.store(place, (scale * total).to(gradients.dtype.element_ty), mask=inside[:, None] & kept[None, :])


@triton.jit
def add_blocks_kernel(  # type: ignore[no-untyped-def]
    parts,
    blocks,
    out,
    num_blocks,
    size,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Row e of out (E, size) is the sum of the rows of parts (blocks, size) that belong to segment e, in order."""
    segment = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    before = tl.zeros((BLOCKS,), tl.int32)
    own = tl.zeros((BLOCKS,), tl.int32)
    for start in range(0, num_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        owner = tl.load(blocks + 3 * block, mask=block < num_blocks, other=2147483647)
        before += (owner < segment).to(tl.int32)
        own += (owner == segment).to(tl.int32)
    part = parts + tl.sum(before, 0).to(tl.int64) * size + column
    total = tl.zeros((COLUMNS,), tl.float32)
    for _ in range(0, tl.sum(own, 0)):
        total += tl.load(part, mask=column < size, other=0.0)
        part += size
    tl.store(out + segment.to(tl.int64) * size + column, total.to(out.dtype.element_ty), mask=column < size)


def shrink(x: Tensor, a: Tensor, segments: Segments, scale: float = 1.0) -> Tensor:
    """scale * x a_e^T for the rows of each segment e: x (T, in), a (E, r, in) with any strides -> (T, r)."""
    x, rank = x.contiguous(), a.shape[1]
    s = x.new_empty(x.shape[0], rank)
    if x.numel() == 0:
        return s.zero_()
    width = _rank(rank)
    blocks = segments.blocks(SHRINK_TOKENS, x.device)
    with device_of(x):
        shrink_kernel[(len(blocks),)](
            x,
            a,
            s,
            blocks,
            x.shape[1],
            rank,
            *a.stride(),
            scale,
            TOKENS=SHRINK_TOKENS,
            COLUMNS=_columns(x, width, SHRINK_ROW, SHRINK_TILE),
            RANK=width,
            STAGES=SHRINK_STAGES,
            num_warps=SHRINK_WARPS,
        )
    return s


def expand_(y: Tensor, s: Tensor, m: Tensor, scale: float, segments: Segments) -> Tensor:
    """Add scale * s m_e^T to the rows of each segment e of y in place, rounded once; returns y.

    Args:
        y: (T, N) contiguous.
        s: (T, r).
        m: (E, N, r) with any strides.

    Raises:
        ValueError: y is not contiguous.
    """
    if not y.is_contiguous():
        raise ValueError(f"y must be contiguous, got shape {tuple(y.shape)} with strides {y.stride()}")
    if y.numel() == 0:
        return y
    s, width = s.contiguous(), _rank(s.shape[1])
    columns = _columns(y, width, EXPAND_ROW, EXPAND_TILE)
    blocks = segments.blocks(EXPAND_TOKENS, y.device)
    with device_of(y):
        expand_kernel[(len(blocks), triton.cdiv(y.shape[1], columns))](
            y,
            s,
            m,
            blocks,
            y.shape[1],
            s.shape[1],
            *m.stride(),
            scale,
            TOKENS=EXPAND_TOKENS,
            COLUMNS=columns,
            RANK=width,
            SLICE=width if y.element_size() == 2 else 16,
            num_warps=EXPAND_WARPS,
        )
    return y


def segment_gradients(
    v: Tensor, s: Tensor, segments: Segments, m: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """scale * v_e^T s_e for each segment e and, given m, scale * v_e m_e; 16-bit v is read once up to `FUSED_RANK`.

    Args:
        v: (T, N).
        s: (T, r).
        m: (E, N, r) with any strides.

    Returns:
        (E, N, r), zeros for empty segments, and (T, r) or None, in v's dtype.
    """
    v, s = v.contiguous(), s.contiguous()
    (tokens, features), rank = v.shape, s.shape[1]
    if v.numel() == 0:
        return v.new_zeros(segments.count, features, rank), None if m is None else v.new_zeros(tokens, rank)
    width, narrow = _rank(rank), v.element_size() == 2
    columns = _columns(v, width, GRADIENT_ROW, GRADIENT_TILE)
    blocks, segment_blocks = segments.blocks(SUPER_TOKENS, v.device), segments.blocks(tokens, v.device)
    grid = (len(blocks), triton.cdiv(features, columns))
    whole = len(blocks) == len(segment_blocks)
    gradients = v.new_empty(segments.count, features, rank)
    if whole and len(blocks) < segments.count:
        gradients.zero_()
    sums = gradients if whole else v.new_empty(len(blocks), features, rank, dtype=torch.float32)
    shape = {"COLUMNS": columns, "RANK": width, "STAGES": GRADIENT_STAGES, "WHOLE": whole, "num_warps": GRADIENT_WARPS}
    products = None
    with device_of(v):
        if m is not None and narrow and width <= FUSED_RANK:
            parts = v.new_empty(grid[1], tokens, rank, dtype=torch.float32)
            gradients_and_products_kernel[grid](
                v,
                s,
                m,
                sums,
                parts,
                blocks,
                tokens,
                features,
                rank,
                *m.stride(),
                scale,
                TOKENS=GRADIENT_TOKENS * 16 // width,
                **shape,
            )
            products = parts.sum(0).to(v.dtype)
        else:
            gradients_kernel[grid](
                v,
                s,
                sums,
                blocks,
                features,
                rank,
                scale,
                TOKENS=GRADIENT_TOKENS if narrow else GRADIENT_TOKENS // 2,
                **shape,
            )
            if m is not None:
                products = shrink(v, m.transpose(1, 2), segments, scale)
        if not whole:
            size = features * rank
            add_blocks_kernel[(segments.count, triton.cdiv(size, ADD_COLUMNS))](
                sums,
                blocks,
                gradients,
                len(blocks),
                size,
                COLUMNS=ADD_COLUMNS,
                BLOCKS=ADD_BLOCKS,
                num_warps=ADD_WARPS,
            )
    return gradients, products


def _rank(rank: int) -> int:
    """Padded to what a matrix instruction takes."""
    return max(16, triton.next_power_of_2(rank))


def _columns(tensor: Tensor, rank: int, row_bytes: int, tile_bytes: int) -> int:
    return min(row_bytes, tile_bytes // rank) // tensor.element_size()
