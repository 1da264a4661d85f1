"""Bases that the updates of one layer share over many adapters.

n updates D_i = B_i A_i of one layer (out x in) are replaced by U C_i V^T with one U (out x K) and one V (in x K), both
with orthonormal columns, and a core C_i (K x K) each: "JD-Full" of "Compress then Serve" (arXiv 2407.00066, section 3).
For given U and V the best cores are C_i = U^T D_i V, and

    sum_i |D_i - U C_i V^T|^2 = sum_i |D_i|^2 - sum_i |U^T D_i V|^2,

so U and V have to capture as much as they can. For fixed V the best U spans the leading eigenvectors of
S = sum_i D_i V V^T D_i^T, and likewise for fixed U; in turns, each step never loses. As in the paper's eigenvalue
iteration, a step is one orthogonal iteration U <- qr(S U) rather than an eigendecomposition. Neither D_i nor S is
formed: with G_i = (A_i V)(A_i V)^T, S U = sum_i B_i G_i (B_i^T U). The start is about where each side alone captures
most, which misses no more than the best U alone and the best V alone do together; no choice misses less than either of
them. Alternation improves on it and ends in a stationary point, which need not be the best one.

A core has the rank of its adapter, r: it is kept as its factors U^T B_i (K x r) and A_i V (r x K), which are smaller
than C_i wherever 2 r < K. The adapters that come back then have their old rank and scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

START_STEPS = 4
"""Steps for which the other side is not yet restricted to a subspace."""
ROWS = 512
"""Rows of an update that are formed at a time."""


@dataclass(frozen=True)
class JointBasis:
    """Of n adapters of rank r in one layer, float64.

    Attributes:
        u: (out, K), orthonormal columns.
        v: (in, K), orthonormal columns.
        left: (n, K, r) U^T B_i.
        right: (n, r, K) A_i V; C_i = left_i right_i.
        square_error: (n,) |D_i - U C_i V^T|^2.
        square_norm: (n,) |D_i|^2.
        square_spread: () sum_i |D_i - D|^2 around their mean D: what tells the adapters apart.
        iterations: how often both bases were improved.
        converged: whether the last iteration captured nothing more, up to the tolerance.
    """

    u: Tensor
    v: Tensor
    left: Tensor
    right: Tensor
    square_error: Tensor
    square_norm: Tensor
    square_spread: Tensor
    iterations: int
    converged: bool


def joint_basis(
    a: Tensor, b: Tensor, rank: int, *, tolerance: float = 1e-7, maximum_iterations: int = 200, seed: int = 0
) -> JointBasis:
    """The shared bases of the updates B_i A_i.

    Args:
        a: (n, r, in).
        b: (n, out, r).
        rank: K; at most min(in, out, n r) columns are used.
        tolerance: of the share of sum_i |D_i|^2 that an iteration captures in addition, below which to stop.
        maximum_iterations: at which to stop in any case.
        seed: of the starting basis.

    Returns:
        The bases and what they miss.

    Raises:
        ValueError: ``rank`` is not positive.
    """
    if rank < 1:
        raise ValueError(f"the rank of the shared bases must be positive, got {rank}")
    a_rows, b_rows = a.double(), b.double().mT.contiguous()
    columns = min(rank, a.shape[2], b.shape[1], a.shape[0] * a.shape[1])
    total = _captured(b_rows @ b_rows.mT, a_rows @ a_rows.mT).sum()
    u, v = (_start(x, y, columns, seed) for x, y in ((b_rows, a_rows), (a_rows, b_rows)))
    captured = torch.zeros_like(total)
    iterations, converged = 0, False
    while not converged and iterations < maximum_iterations:
        av = a_rows @ v
        u = _step(b_rows, av @ av.mT, u)
        bu = b_rows @ u
        v = _step(a_rows, bu @ bu.mT, v)
        before, captured = captured, _captured(bu @ bu.mT, (av := a_rows @ v) @ av.mT).sum()
        iterations += 1
        converged = bool(captured - before <= tolerance * total)
    return _result(a_rows, b_rows, u, v, iterations, converged)


def _start(rows: Tensor, others: Tensor, columns: int, seed: int) -> Tensor:
    """(d, columns): where the updates have most of their norm on one side, the other being free."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(rows.shape[-1], columns, generator=generator, dtype=rows.dtype).to(rows.device)
    weights = others @ others.mT
    for _ in range(START_STEPS):
        basis = _step(rows, weights, basis)
    return basis


def _step(rows: Tensor, weights: Tensor, basis: Tensor) -> Tensor:
    """qr(sum_i R_i^T G_i R_i basis) with rows R (n, r, d), weights G (n, r, r) and a basis (d, K)."""
    weighted = weights @ (rows @ basis)
    return torch.linalg.qr(rows.flatten(0, 1).mT @ weighted.flatten(0, 1)).Q


def _captured(left: Tensor, right: Tensor) -> Tensor:
    """(n,) |X_i^T Y_i|^2 from X_i X_i^T and Y_i Y_i^T, both (n, r, r)."""
    return (left * right).sum((-2, -1))


def _result(a_rows: Tensor, b_rows: Tensor, u: Tensor, v: Tensor, iterations: int, converged: bool) -> JointBasis:
    """Cores, and the error as the sum of two orthogonal parts; no difference of large numbers is taken."""
    av, bu = a_rows @ v, b_rows @ u
    missed_b = b_rows - bu @ u.mT
    missed_a = a_rows - av @ v.mT
    error = _captured(missed_b @ missed_b.mT, a_rows @ a_rows.mT) + _captured(bu @ bu.mT, missed_a @ missed_a.mT)
    norm = _captured(b_rows @ b_rows.mT, a_rows @ a_rows.mT)
    spread = (norm.sum() - _square_norm_of_sum(a_rows, b_rows) / len(a_rows)).clamp(min=0)
    return JointBasis(u, v, bu.mT.contiguous(), av, error.clamp(min=0), norm, spread, iterations, converged)


def _square_norm_of_sum(a_rows: Tensor, b_rows: Tensor) -> Tensor:
    """() |sum_i D_i|^2, some rows at a time: the whole sum may be larger than all factors together."""
    a, b = a_rows.flatten(0, 1), b_rows.flatten(0, 1)
    return torch.stack([(part.mT @ a).square().sum() for part in b.split(ROWS, dim=1)]).sum()
