"""What the engine trains: a hypernetwork, with the base it adapts."""

from __future__ import annotations

from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from hl_scale.base import AdaptedModel, TaskAdapter
from hl_scale.hypernetwork import Hypernetwork
from hl_scale.lora import LoraFactors


class Batch(Protocol):
    """A micro-batch: conditions (E, C) float32, and what the module of its kind makes of them."""

    conditions: Tensor

    @property
    def tokens(self) -> int:
        """Text tokens that the base reads, padding left out."""

    def to(self, device: torch.device) -> Self: ...


class TrainingModule(nn.Module):
    """Base of the modules that map a micro-batch to its mean loss.

    With `partition_base` the base is a submodule, so ZeRO-3 partitions its packed bytes; otherwise each rank keeps it
    whole and outside the engine. The hypernetwork is registered first: the engine takes its type from the first
    parameter, which must be a floating one.
    """

    def __init__(self, hypernetwork: Hypernetwork, base: AdaptedModel, partition_base: bool) -> None:
        super().__init__()
        self.hypernetwork = hypernetwork
        if partition_base:
            base.gather_shared_inputs()
            self.partitioned_base = base
        self._base = (base,)  # a tuple keeps the module unregistered

    @property
    def base(self) -> AdaptedModel:
        return self._base[0]

    def forward(self, batch: Any) -> Tensor:
        """Mean loss of the micro-batch, ().

        What is not finite gives NaN with NaN gradients: the engine then skips the step on all ranks.
        """
        raise NotImplementedError


def fixed_factors(base: AdaptedModel, task_adapter: TaskAdapter | None, scale: float) -> LoraFactors | None:
    """Factors of a frozen adapter (E = 1) under the scale of generated ones, on the device of the base's layers.

    They are rescaled in float32, then rounded once to the type that layers compute in.
    """
    if task_adapter is None:
        return None
    parameter = next(p for p in base.model.parameters() if p.is_floating_point())
    return task_adapter.factors.rescaled(scale).to(parameter.device, parameter.dtype)


def is_finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())


def is_identity(index: Tensor, conditions: int) -> bool:
    """Whether `index` is 0, 1, ..., conditions - 1."""
    return len(index) == conditions and bool((index == torch.arange(conditions, device=index.device)).all())
