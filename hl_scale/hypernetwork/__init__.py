"""Hypernetworks: a condition in, the LoRA factors of every slot out."""

from __future__ import annotations

from collections.abc import Sequence

from hl_scale.config import GatedLoraConfig, HypernetworkConfig, LoraConfig, TextToLoraConfig
from hl_scale.hypernetwork.gated_lora import GatedLora
from hl_scale.hypernetwork.hyperlora import HyperLora, Hypernetwork, PaperHyperLora, PlainLora
from hl_scale.hypernetwork.text_to_lora import SIZES, TextToLora
from hl_scale.lora import Slot


def build_hypernetwork(
    config: HypernetworkConfig | TextToLoraConfig | GatedLoraConfig,
    lora: LoraConfig,
    slots: Sequence[Slot],
    condition_size: int,
) -> Hypernetwork:
    """The hypernetwork of a configuration, freshly initialised from torch's global generator.

    Args:
        config: kind and widths.
        lora: rank and scale convention of the generated adapters.
        slots: slots of the base model.
        condition_size: C, entries of a condition vector.
    """
    if isinstance(config, TextToLoraConfig):
        return SIZES[config.size](config, lora, slots, condition_size)
    if isinstance(config, GatedLoraConfig):
        return GatedLora(config, lora, slots, condition_size)
    if config.kind == "hyperlora":
        return HyperLora(config, lora, slots, condition_size)
    if config.kind == "hyperlora.paper":
        return PaperHyperLora(config, lora, slots, condition_size)
    return PlainLora(lora, slots, condition_size)


__all__ = ["GatedLora", "HyperLora", "Hypernetwork", "PaperHyperLora", "PlainLora", "TextToLora", "build_hypernetwork"]
