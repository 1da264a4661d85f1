"""A task adapter on disk: a PEFT directory with the classification head beside it.

adapter_config.json  adapter_model.safetensors  hl_provenance.json  README.md  head.json  head.safetensors
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import hl_scale
from hl_scale.base import AdaptedModel
from hl_scale.config import BaseModelConfig, LoraConfig
from hl_scale.data.durable import hash_file
from hl_scale.data.labelled import TaskFacts
from hl_scale.data.peft_directory import WEIGHTS_FILE, AdapterError, read_adapter, read_json
from hl_scale.evaluation.labelled.head import ClassifierHead
from hl_scale.lora import LoraFactors
from hl_scale.serving.export import base_reference, check_factors, peft_config, scale_facts, write_adapter_files
from hl_scale.serving.staging import staged_directory

HEAD_FILE = "head.safetensors"
HEAD_FACTS = "head.json"


class TaskAdapterError(ValueError):
    """A task adapter that is damaged, for another base or of another training; the message says how to mend it."""


@dataclass(frozen=True)
class TaskAdapter:
    """LoRA factors (E == 1) and the head that was trained with them; `facts` is the content of head.json."""

    factors: LoraFactors
    head: ClassifierHead
    facts: Mapping[str, Any]


def write_task_adapter(
    adapter: TaskAdapter, directory: Path, base: AdaptedModel, base_config: BaseModelConfig, lora: LoraConfig
) -> None:
    """Write a directory that appears whole or not at all.

    Raises:
        ExportError: factors that are not finite, or disagree with `lora`.
        OutputError: the directory exists.
    """
    check_factors(adapter.factors, lora)
    config = peft_config(
        adapter.factors.slots,
        lora,
        base_model_name_or_path=base_reference(base_config),
        task_type="CAUSAL_LM" if base.has_head else "FEATURE_EXTRACTION",
        revision=base_config.revision,
        module_paths=[path for path, _ in base.model.named_modules()],
    )
    provenance = {
        "condition": f"task:{adapter.head.task.name}",
        "task": adapter.head.task.name,
        "identity": adapter.facts["identity"],
        "base_model": base_config.model,
        "base_revision": base_config.revision,
        "base_fingerprint": base.fingerprint,
        "base_quantization": base_config.quantization,
        "hl_scale": hl_scale.__version__,
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
        **scale_facts(lora, adapter.factors.scale),
    }
    with staged_directory(directory) as staging:
        write_adapter_files(staging, adapter.factors, config, provenance)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.head.state_dict().items()}
        save_file(weights, staging / HEAD_FILE)
        files = {name: {"sha256": hash_file(staging / name)} for name in (HEAD_FILE, WEIGHTS_FILE)}
        facts = {**adapter.facts, "head": _head_facts(adapter.head), "files": files}
        (staging / HEAD_FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def load_task_adapter(directory: str | os.PathLike[str], base: AdaptedModel) -> TaskAdapter:
    """Read a task adapter for a base.

    Raises:
        TaskAdapterError: it is missing, damaged, or was trained on another base.
    """
    directory = Path(directory)
    device = next(base.model.parameters()).device
    try:
        facts = read_json(directory / HEAD_FACTS)
        adapter = read_adapter(directory)
        changed = [name for name, file in facts["files"].items() if hash_file(directory / name) != file["sha256"]]
        if changed:
            raise AdapterError(f"{', '.join(changed)} is not what {HEAD_FACTS} says")
        strangers = [slot.path for slot in adapter.slots if slot.path not in base.linears]
        if adapter.base_fingerprint != base.fingerprint or strangers:
            raise AdapterError(
                f"it was trained on base {str(adapter.base_fingerprint)[:12]}, this one is {base.fingerprint[:12]}"
            )
        tensors = adapter.read()
        sides = [
            {slot.path: tensors[slot.path, side][None].to(device) for slot in adapter.slots} for side in ("A", "B")
        ]
        told = facts["head"]
        task = TaskFacts(told["task"]["name"], told["task"]["kind"], tuple(told["task"]["labels"]))
        with torch.random.fork_rng(devices=[]):  # initial values, which are overwritten, are no draws of the caller's
            head = ClassifierHead(base.hidden_size, task, told["pooling"], told["center"], told["spread"])
        head.load_state_dict(load_file(directory / HEAD_FILE))
    except (AdapterError, OSError, KeyError, TypeError, SafetensorError, RuntimeError) as error:
        raise TaskAdapterError(
            f"{directory} is no usable task adapter: {error}\n  fix: remove it and train it again, on this base"
        ) from None
    factors = LoraFactors(adapter.slots, sides[0], sides[1], adapter.scale)
    return TaskAdapter(factors, head.to(device).eval().requires_grad_(False), facts)


def _head_facts(head: ClassifierHead) -> dict[str, Any]:
    task = {"name": head.task.name, "kind": head.task.kind, "labels": list(head.task.labels)}
    return {"task": task, "pooling": head.pooling, "center": head.center, "spread": head.spread}
