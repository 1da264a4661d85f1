"""Sizes of each kind of adaptation; the docstring under a field is its help text."""

from __future__ import annotations

from pydantic import Field

from hl_scale.config.section import Section


class AdaptationSettings(Section):
    """Base of the settings of a kind."""


class LoraSettings(AdaptationSettings):
    rank: int = Field(default=8, ge=1)
    """Rank r."""
    scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """s of y = W x + s B (A x)."""


class PrefixSettings(AdaptationSettings):
    prefix_length: int = Field(default=16, ge=1)
    """Keys and values that every token of every layer attends to beside those of the text."""


class BottleneckSettings(AdaptationSettings):
    width: int = Field(default=16, ge=1)
    """Width m of the bottleneck."""


class HyperAdapterSettings(AdaptationSettings):
    width: int = Field(default=16, ge=1)
    """Width m of the generated bottlenecks."""
    condition_width: int = Field(default=128, ge=1)
    """Width of the encoded condition."""
    embedding_width: int = Field(default=64, ge=1)
    """Width of the learned embeddings of layer and position."""
    hidden_width: int = Field(default=256, ge=1)
    """Width of the hypernetwork."""
