"""One plain LoRA (arXiv 2106.09685) in the base's slots: y = W x + s B (A x), B = 0 at step 0."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor

from hl_scale.adaptations.adaptation import Adaptation, AdaptationError
from hl_scale.adaptations.settings import LoraSettings
from hl_scale.base import AdaptedModel
from hl_scale.base.recompute import attached
from hl_scale.config import LoraConfig
from hl_scale.hypernetwork import PlainLora
from hl_scale.lora import LoraFactors


class LoraAdaptation(Adaptation):
    """The plain LoRA of `hl_scale.hypernetwork`, trained without conditions.

    Raises:
        AdaptationError: the rank is larger than a slot allows.
    """

    kind = "lora"

    def __init__(self, base: AdaptedModel, settings: LoraSettings, condition_size: int | None = None) -> None:
        super().__init__(base, settings, None)
        if settings.rank > largest_rank(base):
            raise AdaptationError(
                f"rank {settings.rank} is larger than the smallest slot allows\n"
                f"  fix: use a rank of at most {largest_rank(base)}"
            )
        config = LoraConfig(rank=settings.rank, alpha=settings.scale * settings.rank)
        self.tables = PlainLora(config, base.slots, condition_size=0)

    def factors(self) -> LoraFactors:
        """Factors with E = 1, for whatever takes `LoraFactors`."""
        device = next(self.parameters()).device
        return self.tables(torch.zeros(1, 0, device=device))

    def _attach(self, base: AdaptedModel, conditions: Tensor | None, stack: ExitStack) -> None:
        factors = self.factors()
        layers = [base.linears[slot.path] for slot in factors.slots]
        if any(layer.adapter is not None for layer in layers):
            raise AdaptationError(
                "the slots carry a LoRA already, and a second one would replace it\n"
                "  fix: attach one at a time, or give the base the sum of both as factors"
            )
        pairs = factors.build(factors.slots, factors.inputs(factors.slots))
        stack.enter_context(attached(layers, pairs, factors.scale, None))


def largest_rank(base: AdaptedModel) -> int:
    """Least number of inputs or outputs of a slot."""
    return min(min(slot.in_features, slot.out_features) for slot in base.slots)


def count_lora(base: AdaptedModel, settings: LoraSettings, condition_size: int | None = None) -> int:
    """r (in + out), summed over slots."""
    return settings.rank * sum(slot.in_features + slot.out_features for slot in base.slots)
