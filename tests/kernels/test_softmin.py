"""Plan sums against float64; the Triton kernel interpreted here, and compiled for the GPUs it is meant for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hl_scale.kernels.available import has_triton
from hl_scale.kernels.softmin import plan_, plan_sums

SHAPES = [(1, 1), (64, 128), (65, 129), (1, 300), (200, 3), (127, 257)]


def problem(rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    costs = torch.rand(rows, columns, generator=generator) * 2
    if dtype == torch.int16:
        costs = (costs * 30000 - 30000).to(dtype)
    scale = 20.0 if dtype.is_floating_point else 20.0 / 30000
    logits = [torch.rand(size, generator=generator) * 8 for size in (rows, columns)]
    return costs.to(dtype), logits[0], logits[1], scale


def exact(costs: torch.Tensor, r: torch.Tensor, c: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    plan = torch.exp2(r.double()[:, None] + c.double() - scale * costs.double())
    return plan.sum(1), plan.sum(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_those_of_the_plan_in_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    costs, r, c, scale = problem(*shape, dtype)
    work = torch.full(shape, torch.nan)
    for found, expected in zip(plan_sums(costs, r, c, scale, work), exact(costs, r, c, scale), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_entries_that_underflow_are_cut_off_and_none_is_subnormal() -> None:
    plan = plan_(torch.full((2, 3), 1.0), torch.zeros(2), torch.zeros(3), 1e4, torch.empty(2, 3))
    assert plan.max() <= torch.finfo(torch.float32).tiny


@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
def test_the_interpreted_triton_kernel_gives_the_sums_of_the_plan_in_float64(interpreted) -> None:
    errors = interpreted(__file__)
    assert len(errors) == 2 * len(SHAPES)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("costs", ["*fp32", "*i16"])
def test_the_triton_kernel_compiles_without_spills(
    capability: int, costs: str, tmp_path: Path, assert_no_spills
) -> None:
    from hl_scale.kernels import softmin_triton as module

    signature = {
        "costs": costs,
        **dict.fromkeys(("row_logits", "column_logits", "row_parts", "column_parts"), "*fp32"),
        **dict.fromkeys(("rows", "columns", "stride"), "i32"),
        "scale": "fp32",
    }
    constants = {"BLOCK_ROWS": module.BLOCK_ROWS, "BLOCK_COLUMNS": module.BLOCK_COLUMNS}
    assert_no_spills(module.plan_sums_kernel, signature, constants, capability, module.WARPS, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_triton_kernel_gives_the_sums_of_the_plan_on_a_gpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    costs, r, c, scale = problem(*shape, dtype)
    found = plan_sums(costs.cuda(), r.cuda(), c.cuda(), scale, torch.full(shape, torch.nan, device="cuda"))
    for sums, expected in zip(found, exact(costs, r, c, scale), strict=True):
        torch.testing.assert_close(sums.cpu().double(), expected, rtol=1e-5, atol=0)


def _interpret() -> dict[str, float]:
    from hl_scale.kernels.softmin_triton import plan_sums_triton

    errors = {}
    for dtype in (torch.float32, torch.int16):
        for shape in SHAPES:
            costs, r, c, scale = problem(*shape, dtype)
            sums = zip(plan_sums_triton(costs, r, c, scale), exact(costs, r, c, scale), strict=True)
            errors[f"{shape} {dtype}"] = max(((s - e).abs() / e).max().item() for s, e in sums)
    return errors


if __name__ == "__main__":
    print(json.dumps(_interpret()))
