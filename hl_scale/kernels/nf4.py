"""NF4: 4-bit NormalFloat quantisation with double quantisation, in the format of bitsandbytes.

Weights are cut into blocks of 64; each is divided by its largest magnitude and rounded to one of 16 quantiles of the
normal distribution (QLoRA, arXiv 2305.14314, section 3). Double quantisation stores the block constants in 8 bits:
their mean is taken off and the rest is rounded, in blocks of 256, to the signed dynamic map of arXiv 1511.04561.
Two codes share a byte, the first in the high half. The definition is in plain torch and runs on every device.

Compatibility: packed bytes equal bitsandbytes' bit for bit, and so do weights dequantised from its constants. The 8-bit
codes of the constants are the nearest ones here; bitsandbytes' CPU build misses the nearest by one step for about 0.2%.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hl_scale.kernels.available import has_triton

BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256
PIECE_BYTES = 1 << 18
"""Packed bytes that are dequantised at a time on CPUs; a multiple of a block."""

# Quantiles of N(0, 1) scaled to [-1, 1], asymmetric so that 0 is exact: QLoRA, appendix E.
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class BlockConstants:
    """Constants that turn packed bytes back into weights.

    Attributes:
        shape: (out, in) of the weight.
        absmax: (blocks,) float32 largest magnitudes, or uint8 codes of them when `nested_absmax` is given.
        nested_absmax: (ceil(blocks / 256),) float32, or None without double quantisation.
        offset: () float32, mean of the block constants, or None.
    """

    shape: tuple[int, int]
    absmax: Tensor
    nested_absmax: Tensor | None = None
    offset: Tensor | None = None

    def to(self, device: torch.device | str) -> BlockConstants:
        return replace(
            self,
            absmax=self.absmax.to(device),
            nested_absmax=None if self.nested_absmax is None else self.nested_absmax.to(device),
            offset=None if self.offset is None else self.offset.to(device),
        )

    @property
    def num_bytes(self) -> int:
        tensors = (self.absmax, self.nested_absmax, self.offset)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def quantize_nf4(weight: Tensor, double_quantization: bool = True) -> tuple[Tensor, BlockConstants]:
    """Quantise a weight matrix.

    Args:
        weight: (out, in) float tensor with finite values; out * in must be even.
        double_quantization: store block constants in 8 bits.

    Returns:
        packed (ceil(out * in / 2),) uint8 and the constants that `dequantize_nf4` needs.

    Raises:
        ValueError: not a matrix, an odd number of elements, or non-finite values.
    """
    if weight.ndim != 2 or weight.numel() == 0 or weight.numel() % 2:
        raise ValueError(
            f"NF4 needs a non-empty matrix with an even number of elements, got shape {tuple(weight.shape)}"
        )
    flat = weight.detach().reshape(-1).float()
    if not torch.isfinite(flat).all():
        raise ValueError("weight holds NaN or infinite values; the checkpoint it came from is damaged")
    scaled, absmax = _scale_blocks(flat, BLOCK_SIZE)
    code = _code(weight.device)
    index = torch.bucketize(scaled, (code[1:] + code[:-1]) / 2, out_int32=True).to(torch.uint8)
    packed = (index[::2] << 4) | index[1::2]
    shape = (weight.shape[0], weight.shape[1])
    return packed, double_quantize(shape, absmax) if double_quantization else BlockConstants(shape, absmax)


def double_quantize(shape: tuple[int, int], absmax: Tensor) -> BlockConstants:
    """Constants of a weight (out, in) from its (blocks,) float32 largest magnitudes, stored in 8 bits."""
    offset = absmax.mean()
    scaled, nested_absmax = _scale_blocks(absmax - offset, NESTED_BLOCK_SIZE)
    dynamic = dynamic_map(absmax.device)
    codes = torch.bucketize(scaled, (dynamic[1:] + dynamic[:-1]) / 2, out_int32=True).to(torch.uint8)
    return BlockConstants(shape, codes, nested_absmax, offset)


def dequantize_nf4(
    packed: Tensor,
    constants: BlockConstants,
    dtype: torch.dtype = torch.float32,
    *,
    update: tuple[Tensor, Tensor, float] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Weights from packed bytes: (out * in / 2,) uint8 -> (out, in) of `dtype`, rounded once from float32.

    Args:
        packed: (out * in / 2,) uint8.
        constants: of the weight.
        dtype: of the result.
        update: A (r, in), B (out, r) and s of an adapter, to return W + s B A.
        out: (out, in) contiguous tensor of `dtype` to write into.

    Raises:
        ValueError: `packed` is not uint8 or does not have out * in / 2 elements (for example because the parameter is
            partitioned and was not gathered), or it and its constants are on different devices.
    """
    out_features, in_features = constants.shape
    if packed.dtype != torch.uint8 or 2 * packed.numel() != out_features * in_features:
        raise ValueError(
            f"packed NF4 weight of shape {constants.shape} needs {out_features * in_features // 2} uint8 values, "
            f"got {packed.numel()} of {packed.dtype}; under ZeRO-3 the parameter must be gathered first"
        )
    if packed.device != constants.absmax.device:
        raise ValueError(f"packed bytes are on {packed.device}, their constants on {constants.absmax.device}")
    flat = packed.reshape(-1)
    if packed.is_cuda and dtype != torch.float64 and has_triton():
        from hl_scale.kernels.nf4_triton import dequantize_triton, merge_triton

        out = torch.empty(constants.shape, dtype=dtype, device=packed.device) if out is None else out
        stored = flat, constants.absmax, constants.nested_absmax, constants.offset
        tables = _code(packed.device), dynamic_map(packed.device)
        if update is None:
            return dequantize_triton(*stored, *tables, out)
        a, b, scale = update
        return merge_triton(*stored, *tables, a, b, scale, out)
    if update is not None:
        wide = torch.empty(constants.shape, device=packed.device)
        a, b, scale = update
        _dequantize_pieces(flat, block_absmax(constants), wide)
        wide.addmm_(b.float(), a.float(), alpha=scale)
        return wide.to(dtype) if out is None else out.copy_(wide)
    out = torch.empty(constants.shape, dtype=dtype, device=packed.device) if out is None else out
    return _dequantize_pieces(flat, block_absmax(constants), out)


def _dequantize_pieces(packed: Tensor, absmax: Tensor, out: Tensor) -> Tensor:
    """Write weights into `out`, a piece that stays in cache at a time; one lookup per byte.

    A byte's two 4-byte floats are looked up as one 8-byte element.
    """
    table, flat = _pair_table(packed.device), out.view(-1)
    piece = PIECE_BYTES if packed.device.type == "cpu" else max(packed.numel(), 1)
    scratch = torch.empty(0 if out.dtype == torch.float32 else min(2 * piece, flat.numel()), device=packed.device)
    for start in range(0, packed.numel(), piece):
        index = packed[start : start + piece].int()
        target = flat[2 * start : 2 * (start + len(index))]
        codes = target if out.dtype == torch.float32 else scratch[: len(target)]
        torch.index_select(table, 0, index, out=codes.view(torch.float64))
        constants = absmax[2 * start // BLOCK_SIZE :]
        full = len(codes) // BLOCK_SIZE * BLOCK_SIZE
        scale = constants[: full // BLOCK_SIZE, None]
        torch.mul(codes[:full].view(-1, BLOCK_SIZE), scale, out=target[:full].view(-1, BLOCK_SIZE))
        if full < len(codes):
            torch.mul(codes[full:], constants[full // BLOCK_SIZE], out=target[full:])
    return out


def workspace(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """A tensor to dequantise into that each thread uses again and again on CPUs, where fresh memory costs more than the
    dequantisation itself; None on other devices, whose allocator keeps freed memory. Its content lasts until the next
    call with the same dtype in the same thread.
    """
    if device.type != "cpu":
        return None
    held: dict[Any, Tensor] = _workspaces.__dict__
    numel = shape[0] * shape[1]
    if dtype not in held or held[dtype].numel() < numel:
        with torch.inference_mode(False):  # or only inference could write to it later
            held[dtype] = torch.empty(numel, dtype=dtype)
    return held[dtype][:numel].view(shape)


_workspaces = threading.local()


def block_absmax(constants: BlockConstants) -> Tensor:
    """(blocks,) float32 block constants, undoing double quantisation."""
    if constants.nested_absmax is None or constants.offset is None:
        return constants.absmax
    values = torch.index_select(dynamic_map(constants.absmax.device), 0, constants.absmax.int())
    full = len(values) // NESTED_BLOCK_SIZE * NESTED_BLOCK_SIZE
    values[:full].view(-1, NESTED_BLOCK_SIZE).mul_(constants.nested_absmax[: full // NESTED_BLOCK_SIZE, None])
    values[full:].mul_(constants.nested_absmax[-1])
    return values.add_(constants.offset)


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """(256,) float32 signed dynamic map: 7 decades, the number of fraction bits growing with the decade."""
    values = [0.0, 1.0]
    for exponent in range(7):
        boundaries = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (boundaries[:-1] + boundaries[1:]) / 2.0
        magnitudes = (10 ** (-6 + exponent)) * means
        values += magnitudes.tolist() + (-magnitudes).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def _scale_blocks(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Divide each block by its largest magnitude; returns scaled (n,) in [-1, 1] and absmax (blocks,)."""
    padding = -flat.numel() % block_size
    blocks = torch.nn.functional.pad(flat, (0, padding)).view(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=torch.finfo(torch.float32).tiny))[:, None]).clamp_(-1, 1)
    return scaled.view(-1)[: flat.numel()], absmax


@cache
def _code(device: torch.device) -> Tensor:
    return torch.tensor(NF4_CODE, dtype=torch.float32, device=device)


@cache
def _pair_table(device: torch.device) -> Tensor:
    """(256,) float64 whose 8 bytes are the two float32 weights of each packed byte."""
    code = _code(device)
    byte = torch.arange(256, device=device)
    return torch.stack((code[byte >> 4], code[byte & 15]), dim=1).contiguous().view(torch.float64).view(-1)
