"""What is trained and what it is trained on, without weights."""

from __future__ import annotations

import torch

from hl_scale.base import AdaptedModel
from hl_scale.base.loading import outline_base
from hl_scale.config import Config
from hl_scale.engine.conditions import condition_size
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
