"""Initial values of generated adapters."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def adapter_a_values(rank: int, in_features: int) -> Tensor:
    """A (r, in) as PEFT draws it: uniform within 1/sqrt(in), Kaiming uniform with a = sqrt(5)."""
    bound = 1.0 / math.sqrt(in_features)
    return torch.empty(rank, in_features).uniform_(-bound, bound)


def published_initialization(network: nn.Module) -> None:
    """Weights N(0, 1e-7) (standard deviation), biases 0, as in the code published with HyperLoRA.

    Gradients of both nets are then near zero at first; with a large learning rate every trunk unit can die, which
    leaves the adapters unconditioned while the loss falls. `dead_unit_share` in the metrics shows it.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1e-7)
            nn.init.zeros_(module.bias)
