"""One micro-batch: conditions -> factors -> adapted base -> objective."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hl_scale.base import AdaptedModel
from hl_scale.hypernetwork import Hypernetwork
from hl_scale.kernels import Segments
from hl_scale.lora import FactorSource
from hl_scale.objectives.alignment import AlignmentObjective


@dataclass
class AlignmentBatch:
    """A micro-batch of B pairs with E distinct conditions.

    Attributes:
        input_ids, attention_mask: (B, T) dialect sentences, padded on the right.
        conditions: (E, C) float32.
        condition_index: (B,) row of `conditions` for each pair.
        target: (B, M, D) normalised base states of the standard sentences, padded.
        target_mask: (B, M) bool.
        target_self: (B,) self terms of the targets where they are known beforehand.
    """

    input_ids: Tensor
    attention_mask: Tensor
    conditions: Tensor
    condition_index: Tensor
    target: Tensor
    target_mask: Tensor
    target_self: Tensor | None = None

    def to(self, device: torch.device) -> AlignmentBatch:
        moved: dict[str, Any] = {
            name: None if value is None else value.to(device) for name, value in vars(self).items()
        }
        return AlignmentBatch(**moved)


class TrainingModule(nn.Module):
    """What the engine trains.

    With `partition_base` the base is a submodule, so ZeRO-3 partitions its packed bytes; otherwise each rank keeps it
    whole and outside the engine. With `packed` the base sees sentences end to end, without padding. The hypernetwork is
    registered first: the engine takes its type from the first parameter, which must be a floating one.
    """

    def __init__(
        self,
        hypernetwork: Hypernetwork,
        base: AdaptedModel,
        objective: AlignmentObjective,
        partition_base: bool,
        packed: bool = False,
    ) -> None:
        super().__init__()
        self.hypernetwork = hypernetwork
        self.objective = objective
        self.packed = packed
        if partition_base:
            base.gather_shared_inputs()
            self.partitioned_base = base
        self._base = (base,)  # a tuple keeps the module unregistered

    @property
    def base(self) -> AdaptedModel:
        return self._base[0]

    def forward(self, batch: AlignmentBatch) -> Tensor:
        """Mean divergence of the micro-batch, ().

        States or targets that are not finite give NaN with NaN gradients: the engine then skips the step on all ranks.
        """
        factors = self.hypernetwork(batch.conditions)
        if factors.conditions != 1 and not _is_identity(batch.condition_index, factors.conditions):
            factors = factors.select(batch.condition_index)
        hidden = (
            self._packed_states(batch, factors)
            if self.packed
            else self.base.hidden_states(batch.input_ids, batch.attention_mask, factors)
        )
        if not (_is_finite(hidden) and _is_finite(batch.target)):
            return hidden.float().sum() * math.nan
        loss, _ = self.objective(hidden, batch.attention_mask, batch.target, batch.target_mask, batch.target_self)
        return loss if _is_finite(loss) else loss * math.nan

    def _packed_states(self, batch: AlignmentBatch, factors: FactorSource) -> Tensor:
        """(B, T, D) as from a padded batch, zero where there is padding, which the base never sees."""
        mask = batch.attention_mask.bool()
        ends = mask.sum(1).cumsum(0).tolist()
        states = self.base.packed_hidden_states(batch.input_ids[mask], Segments((0, *ends)), factors)
        return states.new_zeros(*mask.shape, states.shape[1]).masked_scatter(mask[..., None], states)


def _is_finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())


def _is_identity(index: Tensor, conditions: int) -> bool:
    return len(index) == conditions and bool((index == torch.arange(conditions, device=index.device)).all())
