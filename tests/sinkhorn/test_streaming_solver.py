"""The streaming solver: block size never matters, and no cost matrix is made."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hl_scale.sinkhorn import sinkhorn_divergence


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that an operation returned in a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize(("tile_edge", "kept"), [(2, 0), (7, 0), (7, 300), (40, 0), (40, 300), (16, 5000)])
def test_tiles_and_what_is_kept_of_them_never_move_the_result(tile_edge: int, kept: int, debias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 31, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 37, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    budget = (2 * tile_edge**2 + kept) * 8
    value, info = sinkhorn_divergence(x, y, debias=debias, memory_budget=budget, return_info=True)
    expected, dense = sinkhorn_divergence(x, y, debias=debias, return_info=True)
    assert (info.solver, dense.solver) == ("streaming", "dense")
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=0)
    torch.testing.assert_close((info.f, info.g), (dense.f, dense.g), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close((info.f_self, info.g_self), (dense.f_self, dense.g_self), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(info.marginal_error, dense.marginal_error, rtol=1e-8, atol=1e-10)
    upstream = torch.tensor([1.0, -3.0], dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(value, [x, y], upstream),
        torch.autograd.grad(expected, [x, y], upstream),
        rtol=1e-8,
        atol=1e-10,
    )


def test_no_tensor_is_larger_than_the_points_or_the_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 8, generator=generator, requires_grad=True)
    y = torch.randn(280, 8, generator=generator)
    with LargestTensor() as seen:
        sinkhorn_divergence(x, y, memory_budget=30_000).backward()
    assert seen.elements <= 30_000 // 4
    with LargestTensor() as seen:
        sinkhorn_divergence(x, y)
    assert seen.elements >= 300 * 280


def test_a_budget_that_holds_the_costs_leaves_the_dense_solver() -> None:
    x, y = torch.randn(10, 3), torch.randn(12, 3)
    assert sinkhorn_divergence(x, y, memory_budget=11 * 12 * 12 * 4, return_info=True)[1].solver == "dense"
    assert sinkhorn_divergence(x, y, memory_budget=11 * 12 * 12 * 4 - 1, return_info=True)[1].solver == "streaming"
