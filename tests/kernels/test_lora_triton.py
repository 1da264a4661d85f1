"""The Triton products with one adapter per segment, and merging into NF4: interpreted here and compiled for GPUs."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hl_scale.kernels import dequantize_nf4, quantize_nf4
from hl_scale.kernels.available import has_triton
from hl_scale.kernels.nf4 import _code, dynamic_map
from hl_scale.kernels.segments import Segments

SCALE = 0.7
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
INTERPRETED = (torch.float32, torch.float16)  # the interpreter has no products of bfloat16
SUPER_TOKENS = 32  # while interpreted
LENGTHS = [(3, 0, 37, 1, 66, 0), (0, 5, 0, 32)]  # with a segment longer than a super-block, and without
FEATURES_AND_RANKS = [*product((40,), (1, 5, 16, 24, 70)), (300, 5), (300, 24)]  # the latter in several blocks
SHAPES = [(3, 22), (2, 77), (64, 64), (65, 258)]
OPERATIONS = ("shrink", "expand", "gradients", "products", "gradients alone")
EXACT = ("empty segments", "a second call in another layout")

COMPILED = [
    *product(("shrink", "expand", "gradients"), (16, 64)),
    ("gradients_and_products", 16),
    ("add_blocks", 16),
    ("merge", 16),
]

needs_triton = pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
_found: dict[str, float] = {}


@pytest.fixture
def found(interpreted: Callable[[str], dict[str, float]]) -> dict[str, float]:
    """What `_interpret` prints; it runs once."""
    if not _found:
        _found.update(interpreted(__file__))
    return _found


def chosen(found: dict[str, float], *prefixes: str) -> dict[str, float]:
    return {name: value for name, value in found.items() if name.startswith(tuple(f"{p}:" for p in prefixes))}


@needs_triton
@pytest.mark.parametrize("dtype", INTERPRETED)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_interpreted_results_are_those_of_float64(operation: str, dtype: torch.dtype, found: dict[str, float]) -> None:
    errors = {name: error for name, error in chosen(found, operation).items() if name.endswith(str(dtype))}
    assert len(errors) == len(LENGTHS) * len(FEATURES_AND_RANKS)
    assert all(error <= TOLERANCE[dtype] for error in errors.values()), errors


@needs_triton
@pytest.mark.parametrize("claim", EXACT)
def test_gradients_of_empty_segments_are_zero_and_a_second_call_in_another_layout_gives_equal_bits(
    claim: str, found: dict[str, float]
) -> None:
    different = chosen(found, claim)
    assert len(different) == len(LENGTHS) * len(FEATURES_AND_RANKS) * len(INTERPRETED)
    assert not any(different.values()), different


@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bounds", [(0, 0), (0, 0, 0, 0)])
def test_without_tokens_gradients_are_zero_and_nothing_is_launched(bounds: tuple[int, ...], dtype: torch.dtype) -> None:
    from hl_scale.kernels import lora_triton as module

    segments = Segments(bounds)
    x, s, m = torch.empty(0, 7, dtype=dtype), torch.empty(0, 3, dtype=dtype), torch.ones(segments.count, 7, 3).to(dtype)
    assert module.shrink(x, m.transpose(1, 2), segments).shape == (0, 3)
    assert module.expand_(x, s, m, SCALE, segments) is x
    gradients, products = module.segment_gradients(x, s, segments, m, SCALE)
    assert gradients.equal(torch.zeros_like(m))
    assert products is not None and products.equal(s)
    assert module.segment_gradients(x, s, segments)[1] is None


@needs_triton
def test_a_result_that_is_not_contiguous_is_refused() -> None:
    from hl_scale.kernels.lora_triton import expand_

    y, s, m = torch.ones(5, 2).t(), torch.ones(2, 1), torch.ones(1, 5, 1)
    with pytest.raises(ValueError, match="y must be contiguous"):
        expand_(y, s, m, SCALE, Segments((0, 2)))


@needs_triton
def test_interpreted_merging_adds_the_product_of_the_factors_to_the_weight(found: dict[str, float]) -> None:
    errors = chosen(found, "merge")
    assert len(errors) == len(SHAPES) * 2 * 2 * len(INTERPRETED) * len(INTERPRETED)
    wrong = {name: error for name, error in errors.items() if error > (1e-6 if name.endswith("float32") else 1e-3)}
    assert not wrong


@needs_triton
def test_merging_zero_factors_gives_the_weights_of_the_definition_bit_for_bit(found: dict[str, float]) -> None:
    different = chosen(found, "merge of zeros")
    assert len(different) == len(SHAPES) * 2 * 2 * len(INTERPRETED) * len(INTERPRETED)
    assert not any(different.values()), different


@needs_triton
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("name", "rank"), COMPILED)
def test_kernels_compile_without_spills(
    name: str,
    rank: int,
    capability: int,
    aligned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    assert_no_spills: Callable[..., None],
) -> None:
    import triton.compiler

    kernel, signature, constants, warps = _compilation(name, rank)
    if aligned:  # what a launch finds where pointers and sizes are multiples of 16: wide and asynchronous loads
        places = [i for i, argument in enumerate(kernel.arg_names) if signature.get(argument, "")[:1] in ("*", "i")]
        attributes = {(place,): [["tt.divisibility", 16]] for place in places}
        source = functools.partial(triton.compiler.ASTSource, attrs=attributes)
        monkeypatch.setattr(triton.compiler, "ASTSource", source)
    assert_no_spills(kernel, signature, constants, capability, warps, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("features", "rank"), [*FEATURES_AND_RANKS, *product((300, 1024), (1, 16, 32, 64, 128))])
@pytest.mark.parametrize("lengths", [*LENGTHS, (700, 0, 1, 1400), (512, 512)])
def test_results_on_a_gpu_are_those_of_float64_and_repeat_bit_for_bit(
    lengths: tuple[int, ...], features: int, rank: int, dtype: torch.dtype
) -> None:
    found = _measure("cuda", lengths, features, rank, dtype)
    assert all(found[operation] <= TOLERANCE[dtype] for operation in OPERATIONS), found
    assert not any(found[claim] for claim in EXACT), found


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31_elements_are_reached_on_a_gpu() -> None:
    from hl_scale.kernels import lora_triton as module

    tokens, features, last = 2**18 + 5, 2**13, 5
    segments = Segments((0, tokens - last, tokens))
    x = torch.zeros(tokens, features, dtype=torch.bfloat16, device="cuda")
    x[-last:] = _draw(last, features, seed=1).to(x)
    a, s = _draw(2, 3, features, seed=2).to(x), _draw(tokens, 3, seed=3).to(x)
    expected = x[-last:].double()
    shrunk = module.shrink(x, a, segments)
    assert _error(shrunk[-last:], expected @ a[1].double().T) < TOLERANCE[x.dtype] and not shrunk[:-last].any()
    gradients, products = module.segment_gradients(x, s, segments, a.transpose(1, 2))
    assert products is not None and _error(products[-last:], expected @ a[1].double().T) < TOLERANCE[x.dtype]
    assert _error(gradients[1], expected.T @ s[-last:].double()) < TOLERANCE[x.dtype] and not gradients[0].any()
    module.expand_(x, s, a.transpose(1, 2), SCALE, segments)
    expected += SCALE * s[-last:].double() @ a[1].double()
    assert _error(x[-last:], expected) < TOLERANCE[x.dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("rank", [5, 40])
@pytest.mark.parametrize("shape", [*SHAPES, (1024, 4096)])
def test_merging_on_a_gpu_adds_the_product_of_the_factors_to_the_weight(
    shape: tuple[int, int], rank: int, nested: bool, dtype: torch.dtype
) -> None:
    error, different = _measure_merge("cuda", shape, rank, nested, dtype, dtype)
    assert error <= TOLERANCE[dtype] and not different


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _error(result: Tensor, reference: Tensor) -> float:
    """Largest difference, relative to the largest entry of the reference."""
    return float((result.double() - reference).abs().max() / reference.abs().max())


def _measure(device: str, lengths: tuple[int, ...], features: int, rank: int, dtype: torch.dtype) -> dict[str, float]:
    """Errors of OPERATIONS, and for EXACT how many entries are not as claimed; M is strided where the rank is even."""
    from hl_scale.kernels import lora_triton as module

    segments = Segments((0, *accumulate(lengths)))
    tokens, count = segments.tokens, segments.count
    x, buffer, s = (
        _draw(*shape, seed=seed).to(device, dtype)
        for seed, shape in enumerate([(tokens, features), (tokens + 2, features), (tokens, rank)])
    )
    a, m = (_draw(count, *shape, seed=3).to(device, dtype) for shape in [(rank, features), (features, rank)])
    if rank % 2 == 0:
        m = a.transpose(1, 2)
    rows = segments.slices()
    expanded = buffer.double()  # its last two rows are not y's
    for e, part in enumerate(rows):
        expanded[part] += SCALE * s[part].double() @ m[e].double().T
    gradients = torch.stack([SCALE * x[part].double().T @ s[part].double() for part in rows])
    products = torch.cat([SCALE * x[part].double() @ m[e].double() for e, part in enumerate(rows)])
    shrunk = torch.cat([x[part].double() @ a[e].double().T for e, part in enumerate(rows)])

    def call(x: Tensor, s: Tensor, a: Tensor, m: Tensor) -> list[Tensor]:
        y = buffer.clone()
        module.expand_(y[:tokens], s, m, SCALE, segments)
        both = module.segment_gradients(x, s, segments, m, SCALE)
        alone, nothing = module.segment_gradients(x, s, segments, scale=SCALE)
        assert both[1] is not None and nothing is None
        return [module.shrink(x, a, segments), y, *both, alone]

    def transposed(tensor: Tensor) -> Tensor:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)

    results = call(x, s, a, m)
    assert all(result.dtype == dtype for result in results)
    references = [shrunk, expanded, gradients, products, gradients]
    found = {name: _error(*pair) for name, *pair in zip(OPERATIONS, results, references, strict=True)}
    empty = torch.tensor(lengths, device=device) == 0
    found["empty segments"] = float((results[2][empty] != 0).sum() + (results[4][empty] != 0).sum())
    again = call(*map(transposed, (x, s, a, m)))
    different = [(result != other).sum() for result, other in zip(results, again, strict=True)]
    found["a second call in another layout"] = float(sum(different))
    return found


def _measure_merge(
    device: str, shape: tuple[int, int], rank: int, nested: bool, factors: torch.dtype, dtype: torch.dtype
) -> tuple[float, float]:
    """Error of the merged weight, and how many entries zero factors change."""
    from hl_scale.kernels.nf4_triton import merge_triton

    packed, constants = quantize_nf4(_draw(*shape, seed=shape[1]) * 0.02, nested)
    packed, constants = packed.to(device), constants.to(device)
    a = _draw(rank, shape[1], seed=1).to(device, factors)
    b = (_draw(shape[0], rank, seed=2) * 0.02).to(device, factors)
    quantised = packed, constants.absmax, constants.nested_absmax, constants.offset
    tables = _code(packed.device), dynamic_map(packed.device)
    out = torch.full(shape, torch.nan, dtype=dtype, device=device)
    merge_triton(*quantised, *tables, a, b, SCALE, out)
    weight = dequantize_nf4(packed, constants)
    error = _error(out, weight.double() + SCALE * b.double() @ a.double())
    merge_triton(*quantised, *tables, a, b.zero_(), SCALE, out.fill_(torch.nan))
    return error, float((out != weight.to(dtype)).sum())


def _compilation(name: str, rank: int) -> tuple[Any, dict[str, str], dict[str, Any], int]:
    """Kernel, signature, constants and warps of a bfloat16 launch."""
    from hl_scale.kernels import lora_triton as lora
    from hl_scale.kernels import nf4_triton as nf4

    half = torch.empty(0, dtype=torch.bfloat16)
    numbers = dict.fromkeys(("features", "columns", "rows", "rank", "tokens", "size", "num_blocks"), "i32")
    strides = {"stride_segment": "i32", "stride_rank": "i32", "stride_column": "i32"}
    tensors = dict.fromkeys(("x", "a", "b", "s", "y", "m", "v", "out"), "*bf16")
    sums = dict.fromkeys(("gradients", "products", "parts", "nested_absmax", "offset", "code", "dynamic"), "*fp32")
    types = {**numbers, **strides, **tensors, **sums, "blocks": "*i32", "scale": "fp32", "packed": "*u8"}
    types["absmax"] = "*u8"
    gradient = {
        "COLUMNS": lora._columns(half, rank, lora.GRADIENT_ROW, lora.GRADIENT_TILE),
        "RANK": rank,
        "STAGES": lora.GRADIENT_STAGES,
        "WHOLE": False,
    }
    launches: dict[str, tuple[Any, dict[str, Any], int]] = {
        "shrink": (
            lora.shrink_kernel,
            {
                "TOKENS": lora.SHRINK_TOKENS,
                "COLUMNS": lora._columns(half, rank, lora.SHRINK_ROW, lora.SHRINK_TILE),
                "RANK": rank,
                "STAGES": lora.SHRINK_STAGES,
                "stride_feature": 1,
            },
            lora.SHRINK_WARPS,
        ),
        "expand": (
            lora.expand_kernel,
            {
                "TOKENS": lora.EXPAND_TOKENS,
                "COLUMNS": lora._columns(half, rank, lora.EXPAND_ROW, lora.EXPAND_TILE),
                "RANK": rank,
                "SLICE": rank,
                "stride_rank": 1,
            },
            lora.EXPAND_WARPS,
        ),
        "gradients": (lora.gradients_kernel, {**gradient, "TOKENS": lora.GRADIENT_TOKENS}, lora.GRADIENT_WARPS),
        "gradients_and_products": (
            lora.gradients_and_products_kernel,
            {**gradient, "TOKENS": lora.GRADIENT_TOKENS, "stride_rank": 1},
            lora.GRADIENT_WARPS,
        ),
        "add_blocks": (
            lora.add_blocks_kernel,
            {"COLUMNS": lora.ADD_COLUMNS, "BLOCKS": lora.ADD_BLOCKS},
            lora.ADD_WARPS,
        ),
        "merge": (
            nf4.merge_kernel,
            {"NESTED": True, "ROWS": nf4.MERGE_ROWS, "COLUMNS": nf4.MERGE_COLUMNS, "RANKS": nf4.MERGE_RANKS},
            nf4.MERGE_WARPS,
        ),
    }
    kernel, constants, warps = launches[name]
    signature = {argument: types[argument] for argument in kernel.arg_names if argument not in constants}
    return kernel, signature, constants, warps


def _interpret() -> dict[str, float]:
    from hl_scale.kernels import lora_triton as module

    module.SUPER_TOKENS, module.ADD_BLOCKS = SUPER_TOKENS, 4
    found = {}
    for lengths, (features, rank), dtype in product(LENGTHS, FEATURES_AND_RANKS, INTERPRETED):
        for name, value in _measure("cpu", lengths, features, rank, dtype).items():
            found[f"{name}: {lengths} {features} {rank} {dtype}"] = value
    for shape, rank, nested, factors, dtype in product(SHAPES, (5, 40), (True, False), INTERPRETED, INTERPRETED):
        error, different = _measure_merge("cpu", shape, rank, nested, factors, dtype)
        case = f"{shape} {rank} {nested} {factors} {dtype}"
        found[f"merge: {case}"], found[f"merge of zeros: {case}"] = error, different
    return found


if __name__ == "__main__":
    print(json.dumps(_interpret()))
