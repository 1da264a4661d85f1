"""The Triton dequantisation: the definition's weights bit for bit, interpreted here and compiled for GPUs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hl_scale.kernels import dequantize_nf4, quantize_nf4
from hl_scale.kernels.available import has_triton
from hl_scale.kernels.nf4 import _code, dynamic_map

SHAPES = [(1, 2), (3, 22), (64, 64), (129, 190), (5, 6554)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INTERPRETED = DTYPES[:2]  # the interpreter cuts float32 off to bfloat16 where GPUs round


def weight(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[1])) * 0.02


@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
def test_interpreted_weights_equal_those_of_the_definition_bit_for_bit(interpreted) -> None:
    different = interpreted(__file__)
    assert len(different) == len(SHAPES) * 2 * len(INTERPRETED)
    assert not any(different.values()), different


@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("nested", [True, False])
def test_the_kernel_compiles_without_spills(
    capability: int, nested: bool, tmp_path: Path, assert_no_spills: Callable[..., None]
) -> None:
    from hl_scale.kernels import nf4_triton as module

    signature = {
        "packed": "*u8",
        "absmax": "*u8" if nested else "*fp32",
        **dict.fromkeys(("nested_absmax", "offset", "code", "dynamic"), "*fp32"),
        "out": "*bf16",
        "num_bytes": "i32",
    }
    constants = {"NESTED": nested, "BLOCK_BYTES": module.BLOCK_BYTES}
    assert_no_spills(module.dequantize_kernel, signature, constants, capability, module.WARPS, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_on_a_gpu_equal_those_of_the_definition_bit_for_bit(
    shape: tuple[int, int], nested: bool, dtype: torch.dtype
) -> None:
    packed, constants = quantize_nf4(weight(shape), nested)
    found = dequantize_nf4(packed.cuda(), constants.to("cuda"), dtype)
    assert found.cpu().equal(dequantize_nf4(packed, constants, dtype))


def _interpret() -> dict[str, float]:
    from hl_scale.kernels.nf4_triton import dequantize_triton

    different = {}
    for shape in SHAPES:
        for nested in (True, False):
            packed, constants = quantize_nf4(weight(shape), nested)
            tables = _code(packed.device), dynamic_map(packed.device)
            for dtype in INTERPRETED:
                out = torch.full(shape, torch.nan, dtype=dtype)
                dequantize_triton(packed, constants.absmax, constants.nested_absmax, constants.offset, *tables, out)
                expected = dequantize_nf4(packed, constants, dtype)
                different[f"{shape} {nested} {dtype}"] = float((out != expected).sum())
    return different


if __name__ == "__main__":
    print(json.dumps(_interpret()))
