"""Triton kernel of nf4.py: packed bytes to weights in one pass; imported where CUDA tensors are met."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hl_scale.kernels.available import device_of

BLOCK_BYTES, WARPS = 1024, 4


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
    """BLOCK_BYTES bytes, twice as many weights; 32 bytes share a block constant, 256 constants a nested one."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_BYTES
    position = start + tl.arange(0, BLOCK_BYTES)
    inside = position < num_bytes
    byte = tl.load(packed + position, mask=inside, other=0).to(tl.int32)
    block = position // 32
    constant = tl.load(absmax + block, mask=inside, other=0)
    if NESTED:
        scale = tl.load(nested_absmax + block // 256, mask=inside, other=0.0)
        constant = tl.load(dynamic + constant.to(tl.int32)) * scale + tl.load(offset)
    high = tl.load(code + (byte >> 4)) * constant
    low = tl.load(code + (byte & 15)) * constant
    weights = tl.interleave(high, low)
    place = start * 2 + tl.arange(0, 2 * BLOCK_BYTES)
    tl.store(out + place, weights.to(out.dtype.element_ty), mask=place < 2 * num_bytes)


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
