"""Ways to adapt a frozen base that are compared with generated LoRA: plain LoRA, prefixes, bottleneck adapters, and
bottleneck adapters generated from a condition."""

from hl_scale.adaptations.adaptation import Adaptation, AdaptationError
from hl_scale.adaptations.building import KINDS, build_adaptation, parameter_count, size_for_budget
from hl_scale.adaptations.settings import (
    AdaptationSettings,
    BottleneckSettings,
    HyperAdapterSettings,
    LoraSettings,
    PrefixSettings,
)
from hl_scale.adaptations.storage import load_adaptation, save_adaptation

__all__ = [
    "Adaptation",
    "AdaptationError",
    "AdaptationSettings",
    "BottleneckSettings",
    "HyperAdapterSettings",
    "KINDS",
    "LoraSettings",
    "PrefixSettings",
    "build_adaptation",
    "load_adaptation",
    "parameter_count",
    "save_adaptation",
    "size_for_budget",
]
