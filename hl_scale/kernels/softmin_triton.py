"""The Triton kernel of softmin.py; this module imports triton, so it is itself imported where CUDA tensors are met."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hl_scale.kernels.available import device_of

BLOCK_ROWS, BLOCK_COLUMNS, WARPS = 64, 128, 8


@triton.jit
def plan_sums_kernel(  # type: ignore[no-untyped-def]
    costs,
    row_logits,
    column_logits,
    row_parts,
    column_parts,
    rows,
    columns,
    stride,
    scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One block of P: its row sums go to row_parts (blocks of columns, R), its column sums to column_parts."""
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    j = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside_i, inside_j = i < rows, j < columns
    inside = inside_i[:, None] & inside_j[None, :]
    tile = tl.load(costs + i.to(tl.int64)[:, None] * stride + j[None, :], mask=inside, other=0)
    r = tl.load(row_logits + i, mask=inside_i, other=0.0)
    c = tl.load(column_logits + j, mask=inside_j, other=0.0)
    plan = tl.where(inside, tl.exp2(r[:, None] + (c[None, :] - scale * tile.to(tl.float32))), 0.0)
    tl.store(row_parts + tl.program_id(1).to(tl.int64) * rows + i, tl.sum(plan, 1), mask=inside_i)
    tl.store(column_parts + tl.program_id(0).to(tl.int64) * columns + j, tl.sum(plan, 0), mask=inside_j)


def plan_sums_triton(costs: Tensor, row_logits: Tensor, column_logits: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`plan_sums` of float32 or int16 costs (R, C) with unit stride along columns, in float32."""
    rows, columns = costs.shape
    grid = (triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(columns, BLOCK_COLUMNS))
    row_parts = row_logits.new_empty(grid[1], rows)
    column_parts = row_logits.new_empty(grid[0], columns)
    with device_of(costs):
        plan_sums_kernel[grid](
            costs,
            row_logits,
            column_logits,
            row_parts,
            column_parts,
            rows,
            columns,
            costs.stride(0),
            scale,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_COLUMNS=BLOCK_COLUMNS,
            num_warps=WARPS,
        )
    return row_parts.sum(0), column_parts.sum(0)
