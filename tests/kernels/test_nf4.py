"""NF4 against bitsandbytes, against its own definition, and against bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hl_scale.kernels import BlockConstants, dequantize_nf4, quantize_nf4
from hl_scale.kernels.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, NF4_CODE, block_absmax, dynamic_map

# Whole blocks, odd rests in the last block, and more than 256 and 512 blocks for the nested constants.
SHAPES = [(64, 64), (3, 50), (7, 130), (3, 26), (130, 128), (257, 130)]


def weight(shape: tuple[int, int], spread: float = 0.05) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0])) * spread


def bitsandbytes_quantization(matrix: Tensor, double: bool) -> tuple[Tensor, BlockConstants, Tensor]:
    """Packed bytes, constants and dequantised weights as bitsandbytes makes them."""
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(
        matrix, quant_type="nf4", compress_statistics=double, blocksize=BLOCK_SIZE, quant_storage=torch.uint8
    )
    shape = (matrix.shape[0], matrix.shape[1])
    nested = BlockConstants(shape, state.absmax, state.state2.absmax, state.offset) if double else None
    constants = nested or BlockConstants(shape, state.absmax)
    return packed.reshape(-1), constants, functional.dequantize_4bit(packed, state)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_bytes_are_those_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype, double: bool) -> None:
    matrix = weight(shape).to(dtype)
    expected, _, _ = bitsandbytes_quantization(matrix, double)
    assert torch.equal(quantize_nf4(matrix, double)[0], expected)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_from_the_bytes_and_constants_of_bitsandbytes_are_bit_identical(
    shape: tuple[int, int], double: bool
) -> None:
    packed, constants, expected = bitsandbytes_quantization(weight(shape), double)
    assert torch.equal(dequantize_nf4(packed, constants), expected)


def test_the_map_of_the_nested_codes_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_map(torch.device("cpu")), functional.create_dynamic_map())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_of_a_weight_is_at_most_half_a_step_of_its_block(shape: tuple[int, int]) -> None:
    matrix = weight(shape)
    packed, constants = quantize_nf4(matrix, double_quantization=False)
    code = torch.tensor(NF4_CODE, dtype=torch.float64)
    absmax = block_absmax(constants).double().repeat_interleave(BLOCK_SIZE)[: matrix.numel()]
    position = (matrix.flatten().double() / absmax).clamp(-1, 1)
    upper = torch.bucketize(position, code).clamp(1, 15)
    half_step = (code[upper] - code[upper - 1]) / 2 * absmax
    error = (dequantize_nf4(packed, constants).flatten().double() - matrix.flatten().double()).abs()
    assert (error <= half_step * (1 + 1e-6)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_nested_codes_are_the_nearest_entries_of_the_map(shape: tuple[int, int]) -> None:
    _, single = quantize_nf4(weight(shape), double_quantization=False)
    _, double = quantize_nf4(weight(shape), double_quantization=True)
    assert double.nested_absmax is not None and double.offset is not None
    assert torch.equal(double.offset, single.absmax.mean())
    scale = double.nested_absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: single.absmax.numel()].double()
    position = (single.absmax - double.offset).double() / scale
    distance = (position[:, None] - dynamic_map(torch.device("cpu")).double()[None]).abs()
    chosen = distance.gather(1, double.absmax.long()[:, None])[:, 0]
    assert double.absmax.dtype == torch.uint8
    assert (chosen <= distance.amin(dim=1) + 1e-7).all()


def test_double_quantisation_stores_a_block_constant_in_about_8_bits() -> None:
    matrix = weight((512, 512))
    single, double = (quantize_nf4(matrix, flag)[1].num_bytes for flag in (False, True))
    blocks = matrix.numel() // BLOCK_SIZE
    assert single == 4 * blocks
    assert double == blocks + 4 * blocks // NESTED_BLOCK_SIZE + 4


def test_entries_of_the_code_survive_unchanged() -> None:
    matrix = torch.tensor(NF4_CODE * 8).view(2, 64)
    packed, constants = quantize_nf4(matrix, double_quantization=False)
    assert torch.equal(dequantize_nf4(packed, constants), matrix)
    assert packed[0] == 0x01  # the first weight sits in the high half


@pytest.mark.parametrize("double", [False, True])
def test_blocks_of_zeros_come_back_as_zeros_beside_others(double: bool) -> None:
    matrix = weight((4, 64))
    matrix[1] = 0
    matrix[3] = 0
    packed, constants = quantize_nf4(matrix, double)
    restored = dequantize_nf4(packed, constants)
    assert torch.isfinite(restored).all()
    assert (restored[[1, 3]] == 0).all() and restored[0].abs().sum() > 0


def test_a_matrix_of_zeros_comes_back_as_zeros() -> None:
    assert (dequantize_nf4(*quantize_nf4(torch.zeros(4, 33))) == 0).all()


def test_flushing_denormals_does_not_change_the_codes_of_zero_blocks() -> None:
    torch.set_flush_denormal(True)
    try:
        packed, _ = quantize_nf4(torch.zeros(2, 64))
    finally:
        torch.set_flush_denormal(False)
    assert (packed == 0x77).all(), "code 7 is zero"


def test_other_dtypes_are_the_float32_weights_rounded_once() -> None:
    packed, constants = quantize_nf4(weight((7, 130)))
    exact = dequantize_nf4(packed, constants)
    assert torch.equal(dequantize_nf4(packed, constants, torch.bfloat16), exact.bfloat16())
    assert torch.equal(dequantize_nf4(packed, constants, torch.float64), exact.double())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    matrix = weight((4, 64))
    matrix[2, 5] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_nf4(matrix)


@pytest.mark.parametrize("shape", [(3, 5), (64,), (2, 2, 2), (0, 4)])
def test_anything_but_a_matrix_with_an_even_number_of_elements_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"even number of elements, got shape"):
        quantize_nf4(torch.ones(shape))


def test_partitioned_or_wrongly_typed_bytes_are_refused() -> None:
    packed, constants = quantize_nf4(weight((4, 64)))
    with pytest.raises(ValueError, match="needs 128 uint8 values, got 0"):
        dequantize_nf4(packed[:0], constants)
    with pytest.raises(ValueError, match=r"got 128 of torch\.int64"):
        dequantize_nf4(packed.long(), constants)
