"""Separate clipping and learning rate for the heads of a hypernetwork.

A spike in the heads, which hold most parameters, lets a global bound scale the rest down with them; reconstruction then
falls back to the mean of its targets and stays there. With a bound of their own the heads alone pay for their spikes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hl_scale.config import TrainingConfig

_HEADS = ("heads", "heads_a", "heads_b")


def parameter_groups(module: nn.Module, training: TrainingConfig) -> list[dict[str, Any]]:
    """Groups for the optimizer: all trainable parameters, or the heads apart from the rest if settings differ."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    if training.head_gradient_clipping is None and training.head_learning_rate_ratio == 1.0:
        return [{"params": [parameter for _, parameter in named], "rate_ratio": 1.0}]
    heads = [parameter for name, parameter in named if _is_head(name)]
    rest = [parameter for name, parameter in named if not _is_head(name)]
    if not heads or not rest:
        raise ValueError(
            "training.head_gradient_clipping and head_learning_rate_ratio are for hypernetworks with heads\n"
            "  fix: leave them out for this hypernetwork.kind"
        )
    return [
        {"params": rest, "rate_ratio": 1.0},
        {"params": heads, "rate_ratio": training.head_learning_rate_ratio},
    ]


def clip_by_group(engine: Any, training: TrainingConfig) -> None:
    """Have the engine clip the heads to `training.head_gradient_clipping` and the rest to `gradient_clipping`.

    DeepSpeed bounds the norm over all groups; its norms per sub-group are kept here, and those of a parameter group
    combined, when each sub-group is scaled. The norm that it reports stays the global one.
    """
    if training.head_gradient_clipping is None:
        return
    optimizer = engine.optimizer
    bounds = (training.gradient_clipping, training.head_gradient_clipping)
    norms: list[Tensor] = []
    measure = optimizer._get_norm_groups

    def measured() -> list[Tensor]:
        norms[:] = measure()
        return list(norms)

    def clip(sub_group: int, _: Tensor) -> None:
        group = optimizer.sub_group_to_group_id[sub_group]
        own = [norm for index, norm in enumerate(norms) if optimizer.sub_group_to_group_id[index] == group]
        scale = clip_factor(own, bounds[group], optimizer.loss_scale)
        optimizer.fp32_partitioned_groups_flat[sub_group].grad.mul_(scale)

    optimizer._get_norm_groups, optimizer.unscale_and_clip_grads = measured, clip


def clip_factor(norms: Iterable[Tensor], bound: float, loss_scale: float) -> float:
    """What gradients with these partial norms are multiplied by, so that their norm is at most `bound` (0: none)."""
    total = float(torch.stack([torch.as_tensor(norm, dtype=torch.float64) for norm in norms]).norm()) / loss_scale
    return (min(1.0, bound / (total + 1e-6)) if bound else 1.0) / loss_scale


def _is_head(name: str) -> bool:
    return any(part in _HEADS for part in name.split("."))
