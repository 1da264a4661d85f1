"""The weights that a 4-bit base was made of, and how much their quantisation matters beside an adapter.

An adapter is trained on the dequantised base W4. Merged into the original W16 instead, each layer also changes by
q = W16 - W4, which the adapter has never seen. For most models that is harmless, as W16 is the better model; where q is
many times larger than the update s B A, what the adapter learned on W4 may be lost.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor

from hl_scale.base import AdaptedModel, load_base
from hl_scale.base.loading import empty_model, model_config, resolve_model
from hl_scale.base.weight_files import locate_tensors
from hl_scale.config import BaseModelConfig, Config
from hl_scale.lora_algebra import delta_inner

LARGE_RATIO = 10.0
"""|q| / |s B A| from which a warning is given."""

Read = Callable[[], Tensor]


@dataclass(frozen=True)
class LayerDifference:
    """Frobenius norms of one slot: of q = W16 - W4, and of the update s B A."""

    path: str
    quantization: float
    update: float

    @property
    def ratio(self) -> float:
        return self.quantization / self.update if self.update else float("inf")


def original_tensors(base: BaseModelConfig) -> dict[str, Read]:
    """Name in the transformers model -> function that reads the tensor from the checkpoint that `base` was loaded from.

    Raises:
        BaseModelError: the checkpoint is not there any more, or is damaged.
    """
    return dict(locate_tensors(resolve_model(base), empty_model(base, model_config(base))))


def load_original(config: Config, device: torch.device) -> AdaptedModel:
    """The base of a run without its quantisation, with the same slots."""
    return load_base(config.base.model_copy(update={"quantization": "none"}), config.lora, device)


def layer_difference(path: str, original: Tensor, held: Tensor, a: Tensor, b: Tensor, scale: float) -> LayerDifference:
    """Of one slot.

    Args:
        path: of the layer.
        original, held: W16 and W4 (out, in), float32.
        a, b, scale: A (r, in), B (out, r) and s.
    """
    update = abs(scale) * float(delta_inner(a, b, a, b).clamp(min=0).sqrt())
    return LayerDifference(path, torch.linalg.vector_norm(original - held, dtype=torch.float64).item(), update)


def warn_of_differences(differences: Sequence[LayerDifference]) -> None:
    """Log a warning if quantisation changed layers much more than the adapter does."""
    large = [difference for difference in differences if difference.ratio > LARGE_RATIO]
    if large:
        worst = max(large, key=lambda difference: difference.ratio)
        logging.getLogger(__name__).warning(
            "in %d of %d layers quantisation changed the weights more than %g times as much as the adapter does (%.1f "
            "times in %s): on the original base it may not do what it was trained for; compare it with the dequantised",
            len(large), len(differences), LARGE_RATIO, worst.ratio, worst.path,
        )  # fmt: skip


def difference_table(differences: Sequence[LayerDifference]) -> Table:
    """|q| / |s B A| of every slot: a row for each layer, a column for each module."""
    cells = {_place(difference.path): difference.ratio for difference in differences}
    modules = list(dict.fromkeys(module for _, module in cells))
    table = Table(title="size of what quantisation changed, over that of the adapter's update")
    for name in ("layer", *modules):
        table.add_column(name, justify="right")
    for layer in dict.fromkeys(layer for layer, _ in cells):
        ratios = (cells.get((layer, module)) for module in modules)
        table.add_row(layer, *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios))
    return table


def _place(path: str) -> tuple[str, str]:
    """("model.layers.3", "q_proj") of model.layers.3.self_attn.q_proj: what precedes the last number, and the name."""
    parts = path.split(".")
    last = max((index for index, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[: last + 1]), parts[-1]
