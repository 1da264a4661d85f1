"""A trained LoRA that stays as it is, on the layers of a base: generated adapters are added to it."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hl_scale.base.adapted import AdaptedModel, slot_at
from hl_scale.base.loading import base_reference
from hl_scale.config import BaseModelConfig
from hl_scale.data.peft_directory import AdapterError, AdapterFacts
from hl_scale.data.validation import validate_adapter
from hl_scale.lora import LoraFactors


@dataclass(frozen=True)
class TaskAdapter:
    """A LoRA from a PEFT directory.

    Attributes:
        name: of the directory.
        factors: E = 1, float32 on the CPU, in the layers that it was trained for, whichever these are.
        fingerprint: sha256 of scale and factors, wherever they lie.
    """

    name: str
    factors: LoraFactors
    fingerprint: str

    @property
    def provenance(self) -> dict[str, Any]:
        """What is recorded of it where it became part of something."""
        return {
            "task_adapter": self.name,
            "task_adapter_fingerprint": self.fingerprint,
            "task_adapter_rank": self.factors.rank,
            "task_adapter_scale": self.factors.scale,
        }


def read_task_adapter(
    directory: str | os.PathLike[str], base: AdaptedModel, config: BaseModelConfig, names: Collection[str] = ()
) -> TaskAdapter:
    """Read a PEFT LoRA for layers of a base, with scale lora_alpha / r, or lora_alpha / sqrt(r) under use_rslora.

    Args:
        directory: of PEFT, from anywhere.
        base: whose linear layers it must fit; they need not be slots. Its weights are not read.
        config: what the base is called: an adapter without a fingerprint of its base must name it so.
        names: other names of the same base.

    Raises:
        AdapterError: of another base (by fingerprint; by name where it has none), damaged, no plain LoRA (DoRA, biases,
            whole modules, ranks by layer), or for layers that this base does not have in these sizes.
    """
    known = (base_reference(config), config.model, *names)
    facts = validate_adapter(directory, base_model_name_or_path=known, base_fingerprint=base.fingerprint)
    _check_layers(facts, base)
    slots = tuple(slot_at(path, layer) for path, layer in base.linears.items() if (path, "A") in facts.keys)
    tensors = facts.read()
    a, b = ({slot.path: tensors[slot.path, side].float()[None] for slot in slots} for side in "AB")
    name = Path(os.path.abspath(directory)).name
    return TaskAdapter(name, LoraFactors(slots, a, b, facts.scale), facts.fingerprint(tensors))


def _check_layers(facts: AdapterFacts, base: AdaptedModel) -> None:
    problems = []
    for slot in facts.slots:
        layer = base.linears.get(slot.path)
        if layer is None:
            problems.append(f"{slot.path} is none of them")
        elif (layer.in_features, layer.out_features) != (slot.in_features, slot.out_features):
            problems.append(
                f"{slot.path} is {layer.in_features} -> {layer.out_features} there and "
                f"{slot.in_features} -> {slot.out_features} in the adapter"
            )
        elif facts.rank > min(slot.in_features, slot.out_features):
            problems.append(f"rank {facts.rank} exceeds {slot.path} ({slot.in_features} -> {slot.out_features})")
    if problems:
        modules = sorted({path.rsplit(".", 1)[-1] for path in base.linears})
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise AdapterError(
            f"{facts.directory} does not fit the linear layers of {type(base.model).__name__}: {problems[0]}{more}\n"
            f"  fix: train it on this base, for layers called {', '.join(modules)}, as its own class has them"
        )
