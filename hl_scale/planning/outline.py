"""What is trained and what it is trained on, without weights."""

from __future__ import annotations

import torch

from hl_scale.base import AdaptedModel
from hl_scale.base.loading import outline_base
from hl_scale.conditions import typology
from hl_scale.conditions.descriptions import encoder_width
from hl_scale.config import Config
from hl_scale.data.tasks import open_tasks
from hl_scale.hypernetwork import Hypernetwork, build_hypernetwork


def outline(config: Config) -> tuple[AdaptedModel, Hypernetwork]:
    """Base and hypernetwork on the meta device, in the type they compute in.

    States that wait in host memory are left where they are: there is none to move them to.

    Raises:
        ValueError: see `condition_size` and `outline_base`.
    """
    base = outline_base(config.base.model_copy(update={"offload_activations": False}), config.lora)
    size = condition_size(config, base)
    with torch.device("meta"):
        hypernetwork = build_hypernetwork(config.hypernetwork, config.lora, base.slots, size)
    # As the engine has it: master weights in float32 are kept apart.
    return base, hypernetwork.to(getattr(torch, config.base.compute_dtype))


def condition_size(config: Config, base: AdaptedModel) -> int:
    """C, entries of a condition, without an encoder's weights.

    Raises:
        ValueError: an encoder whose configuration cannot be read; for one-hot conditions, tasks that are not prepared.
    """
    if config.data.kind == "dialects":
        return typology.NUM_FEATURES
    if config.conditions.kind == "one_hot":
        return len(open_tasks(config.tasks).seen)
    width = base.hidden_size if config.conditions.encoder == "base" else encoder_width(config.conditions)
    return width + (typology.NUM_FEATURES if config.conditions.with_typology else 0)
