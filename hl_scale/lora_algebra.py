"""Products of LoRA factors compared and normalised without forming them.

Inner products of updates B A follow from r x r matrices,

    <B A, C D> = tr((B A)^T C D) = sum_ij (B^T C)_ij (A D^T)_ij

and so do distances. Factors themselves are determined only up to (B M, M^-1 A) for any invertible M; the singular form
B = U sqrt(S), A = sqrt(S) V^T of the singular value decomposition B A = U S V^T is the same for all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def delta_inner(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """(...) float64 <B A, D C> of updates with A (..., r, in), B (..., out, r), C (..., k, in) and D (..., out, k)."""
    a, b, c, d = a.double(), b.double(), c.double(), d.double()
    return ((b.mT @ d) * (a @ c.mT)).sum((-2, -1))


def delta_distance(
    a: Tensor, b: Tensor, a_target: Tensor, b_target: Tensor, scale: float, scale_target: float
) -> Tensor:
    """Squared Frobenius norm |s B A - s* B* A*|^2 of each condition.

    Args:
        a, b: A (E, r, in) and B (E, out, r).
        a_target, b_target: A* (E, k, in) and B* (E, out, k); k may differ from r.
        scale, scale_target: s and s*.

    Returns:
        (E,) float64, exact to about 1e-15 of the two squared norms, differentiable.
    """
    own = scale**2 * delta_inner(a, b, a, b)
    target = scale_target**2 * delta_inner(a_target, b_target, a_target, b_target)
    return (own + target - 2 * scale * scale_target * delta_inner(a, b, a_target, b_target)).clamp(min=0)


def canonical(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Singular form of A (..., r, in) and B (..., out, r): the same product, the same for all (B M, M^-1 A).

    B = U sqrt(S) and A = sqrt(S) V^T with descending S; the entry of largest magnitude in each column of U is positive.
    Columns and rows of singular values that are zero up to rounding are zero. Where singular values coincide, which
    basis of their space is taken is left open.

    Returns:
        A and B in the shapes and the dtype of `a`, computed in float64; not meant to be differentiated.

    Raises:
        ValueError: r exceeds in or out.
    """
    rank = a.shape[-2]
    if rank > min(a.shape[-1], b.shape[-2]):
        raise ValueError(f"rank {rank} exceeds the layer's {a.shape[-1]} inputs or {b.shape[-2]} outputs")
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT)
    u, vh = q_b @ u, vh @ q_a.mT
    largest = u.gather(-2, u.abs().argmax(-2, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(u)
    s = torch.where(s > rank * torch.finfo(s.dtype).eps * s[..., :1], s, 0.0)
    root = s.sqrt()
    return (signs.mT * root[..., :, None] * vh).to(a.dtype), (signs * u * root[..., None, :]).to(a.dtype)
