"""Row and column sums of an unnormalised transport plan, in one pass over a tile of costs.

    P_ij = 2^(r_i + c_j - s C_ij)        row sums sum_j P_ij, column sums sum_i P_ij

With r = log2 a + f / (epsilon log 2), c likewise and s = step / (epsilon log 2), the sums are the marginals of the plan
that the potentials f, g stand for, and both of Sinkhorn's updates follow from one exponential per cost:
f_i - epsilon log(row sum_i / a_i). On CPUs the operations run on a tile that stays in cache; on CUDA one Triton kernel
reads every cost once and writes sums of blocks, which are added in a fixed order, so results are repeatable.

Sums are exact up to rounding as long as no P_ij that matters leaves the range of float32: callers check the sums.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hl_scale.kernels.available import has_triton

# Exponents below this are cut off: exp2 of them would be slow (subnormal) and could not change a sum.
_SMALLEST = {dtype: math.log2(torch.finfo(dtype).tiny) for dtype in (torch.float32, torch.float64)}


def plan_(costs: Tensor, row_logits: Tensor, column_logits: Tensor, scale: float, out: Tensor) -> Tensor:
    """Write P (R, C) of the module's formula into `out`.

    Args:
        costs: (R, C) float32, float64 or int16.
        row_logits: (R,); column_logits: (C,), in the dtype of `out`.
        scale: s.
        out: (R, C) float32 or float64.
    """
    if costs.dtype == out.dtype:
        torch.add(column_logits, costs, alpha=-scale, out=out)
    else:
        out.copy_(costs).mul_(-scale).add_(column_logits)  # an addition of two types would make a tensor on the way
    return out.add_(row_logits[:, None]).clamp_(min=_SMALLEST[out.dtype]).exp2_()


def plan_sums(
    costs: Tensor, row_logits: Tensor, column_logits: Tensor, scale: float, work: Tensor
) -> tuple[Tensor, Tensor]:
    """Row sums (R,) and column sums (C,) of P; arguments as for `plan_`, `work` is scratch of the shape of `costs`."""
    if costs.is_cuda and work.dtype == torch.float32 and has_triton():
        from hl_scale.kernels.softmin_triton import plan_sums_triton

        return plan_sums_triton(costs, row_logits, column_logits, scale)
    plan = plan_(costs, row_logits, column_logits, scale, work)
    return plan.sum(1), plan.sum(0)
