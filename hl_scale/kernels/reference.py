"""The definition of each kernel in plain torch: any dtype including float64, differentiable by autograd, slow."""

from __future__ import annotations

import torch
from torch import Tensor


def generated_lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias + s (x A_e^T) B_e^T with the adapter e of each segment.

    Args:
        x: (E, S, in), or (T, in) packed with `offsets`.
        weight: (out, in).
        a: (E, r, in).
        b: (E, out, r).
        scale: s.
        bias: (out,) or None.
        offsets: (E + 1,) segment starts and the total T; segments may be empty.

    Returns:
        y of shape (E, S, out) or (T, out).
    """
    if offsets is None:
        rows = [(x[e], e) for e in range(x.shape[0])]
    else:
        bounds = offsets.tolist()
        rows = [(x[bounds[e] : bounds[e + 1]], e) for e in range(len(bounds) - 1)]
    outputs = []
    for rows_of_e, e in rows:
        y = rows_of_e @ weight.T + scale * (rows_of_e @ a[e].T) @ b[e].T
        outputs.append(y if bias is None else y + bias)
    return torch.stack(outputs) if offsets is None else torch.cat(outputs)
