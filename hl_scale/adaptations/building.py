"""Adaptations by kind, and their sizes from a budget of parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError

from hl_scale.adaptations.adaptation import Adaptation, AdaptationError
from hl_scale.adaptations.bottleneck import BottleneckAdaptation, count_bottleneck
from hl_scale.adaptations.hyper_adapter import HyperAdapterAdaptation, count_hyper_adapter
from hl_scale.adaptations.lora import LoraAdaptation, count_lora, largest_rank
from hl_scale.adaptations.prefix import PrefixAdaptation, count_prefix
from hl_scale.adaptations.settings import (
    AdaptationSettings,
    BottleneckSettings,
    HyperAdapterSettings,
    LoraSettings,
    PrefixSettings,
)
from hl_scale.base import AdaptedModel


@dataclass(frozen=True)
class Kind:
    """A kind of adaptation.

    Attributes:
        adaptation, settings: its classes.
        count: parameters for (base, settings, condition size), without building it.
        size: the setting that a budget decides.
    """

    adaptation: Callable[..., Adaptation]
    settings: type[AdaptationSettings]
    count: Callable[..., int]
    size: str


KINDS: dict[str, Kind] = {
    "lora": Kind(LoraAdaptation, LoraSettings, count_lora, "rank"),
    "prefix": Kind(PrefixAdaptation, PrefixSettings, count_prefix, "prefix_length"),
    "bottleneck": Kind(BottleneckAdaptation, BottleneckSettings, count_bottleneck, "width"),
    "hyper_adapter": Kind(HyperAdapterAdaptation, HyperAdapterSettings, count_hyper_adapter, "width"),
}

Settings = AdaptationSettings | Mapping[str, Any]


def build_adaptation(
    kind: str, base: AdaptedModel, settings: Settings | None = None, condition_size: int | None = None, *, seed: int = 0
) -> Adaptation:
    """A freshly initialised adaptation, in float32 on the device of the base.

    Args:
        kind: one of `KINDS`.
        base: the frozen base it is for.
        settings: sizes of that kind, as an object or by name; defaults unless given.
        condition_size: C, for kinds that take conditions.
        seed: of initial values; torch's global generator is left as it was.

    Raises:
        AdaptationError: an unknown kind, settings it has not, or a base it cannot attach to.
    """
    known = kind_of(kind)
    checked = settings_of(kind, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adaptation = known.adaptation(base, checked, condition_size)
    adaptation.to(next(base.parameters()).device)
    adaptation.initialize(base, seed)
    return adaptation


def parameter_count(
    kind: str, base: AdaptedModel, settings: Settings | None = None, condition_size: int | None = None
) -> int:
    """Parameters of an adaptation that is not built; the base may be without weights. Raises as `build_adaptation`."""
    return kind_of(kind).count(base, settings_of(kind, settings), condition_size)


def size_for_budget(
    kind: str,
    base: AdaptedModel,
    budget: int,
    settings: Settings | None = None,
    condition_size: int | None = None,
) -> int:
    """Largest rank, prefix length or width with which an adaptation has at most `budget` parameters.

    Args:
        kind, base, condition_size: as for `build_adaptation`.
        budget: parameters.
        settings: those that the budget does not decide.

    Returns:
        The value for the setting `KINDS[kind].size`.

    Raises:
        AdaptationError: the smallest size has more parameters than that.
    """
    known = kind_of(kind)
    rest = settings_of(kind, settings).model_dump() | {known.size: 1}
    # The number of parameters is a + b size, whatever the kind.
    smallest, second = (parameter_count(kind, base, rest | {known.size: n}, condition_size) for n in (1, 2))
    if smallest > budget:
        raise AdaptationError(
            f"a {kind} adaptation has at least {smallest:,} parameters ({known.size} = 1), the budget is {budget:,}\n"
            "  fix: raise the budget, or make the other settings smaller"
        )
    size = 1 + (budget - smallest) // (second - smallest)
    return min(size, largest_rank(base)) if kind == "lora" else size


def kind_of(kind: str) -> Kind:
    """The entry of `KINDS`; AdaptationError if there is none."""
    if kind not in KINDS:
        raise AdaptationError(f"unknown kind of adaptation {kind!r}\n  fix: use one of {', '.join(KINDS)}")
    return KINDS[kind]


def settings_of(kind: str, settings: Settings | None) -> AdaptationSettings:
    """Settings of a kind, checked; AdaptationError if they do not fit."""
    expected = kind_of(kind).settings
    if isinstance(settings, AdaptationSettings):
        if not isinstance(settings, expected):
            raise AdaptationError(f"a {kind} adaptation takes {expected.__name__}, got {type(settings).__name__}")
        return settings
    try:
        return expected.model_validate(dict(settings or {}))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise AdaptationError(
            f"settings of a {kind} adaptation: {name}: {first['msg']}\n"
            f"  fix: its settings are {', '.join(expected.model_fields)}"
        ) from None
