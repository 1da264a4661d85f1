"""Write generated adapters as PEFT directories, which PEFT and vLLM load unchanged.

PEFT multiplies B(Ax) by lora_alpha / r, or by lora_alpha / sqrt(r) with ``use_rslora``. Our three scale conventions:

    alpha_over_rank       lora_alpha = alpha
    alpha_over_sqrt_rank  lora_alpha = alpha, use_rslora
    one                   lora_alpha = r

so the factors are stored as generated and their numbers are never touched.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

import hl_scale
from hl_scale.base.loading import resolve_model
from hl_scale.conditions import typology
from hl_scale.config import BaseModelConfig, LoraConfig
from hl_scale.lora import LoraFactors, Slot, lora_scale
from hl_scale.serving.staging import PROVENANCE_FILE, check_replaceable, staged_directory

if TYPE_CHECKING:
    from hl_scale.engine.run import LoadedRun

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


class ExportError(ValueError):
    """An adapter or merged model that cannot be written as asked."""


def generate_adapter(
    run: LoadedRun,
    condition: str,
    directory: str | os.PathLike[str],
    *,
    base_model_name_or_path: str | None = None,
    facts: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Generate the adapter of one condition and write it as a PEFT directory.

    Args:
        run: the trained hypernetwork with its base.
        condition: "dialect:Nigerian English", "standard" or "features:FILE.json" for dialects, "task:NAME" or
            "description:WORDS" for tasks.
        directory: where to write; must not exist unless ``force``.
        base_model_name_or_path: what the adapter names as its base; the run's own base unless given.
        facts: JSON-serialisable additions to its provenance.
        force: replace a directory that hl_scale wrote earlier.

    Returns:
        The directory.

    Raises:
        ValueError: an unknown condition, a directory in the way, or factors that are not finite.
    """
    check_replaceable(directory, force=force)
    base = run.config.base
    if run.base.from_multimodal and base_model_name_or_path is None:
        raise ValueError(
            f"{base.model} is a multimodal checkpoint: its language model's layers have other paths there, and PEFT "
            "would apply nothing\n  fix: write a merged checkpoint instead (hl-scale export --merged)"
        )
    parsed, factors = generate_factors(run, condition)
    return write_peft_adapter(
        factors,
        directory,
        base_model_name_or_path=base_model_name_or_path or base_reference(base),
        lora=run.config.lora,
        task_type="CAUSAL_LM" if run.base.has_head else "FEATURE_EXTRACTION",
        provenance={**run_provenance(run, parsed), **(facts or {})},
        revision=base.revision,
        module_paths=[path for path, _ in run.base.model.named_modules()],
        force=force,
    )


def write_peft_adapter(
    factors: LoraFactors,
    directory: str | os.PathLike[str],
    *,
    base_model_name_or_path: str,
    lora: LoraConfig,
    task_type: str,
    provenance: Mapping[str, Any],
    revision: str | None = None,
    module_paths: Collection[str] | None = None,
    force: bool = False,
) -> Path:
    """Write the factors of one condition as a PEFT directory.

    Args:
        factors: E = 1; A (1, r, in) and B (1, out, r) of every slot.
        directory: where to write; must not exist unless ``force``. Appears whole or not at all.
        base_model_name_or_path: hub id or path of the base, as PEFT shall record it.
        lora: rank, alpha and scale convention; must agree with ``factors``.
        task_type: PEFT's name of the task, "CAUSAL_LM" or "FEATURE_EXTRACTION".
        provenance: JSON-serialisable facts for hl_provenance.json and the model card.
        revision: hub revision of the base.
        module_paths: all module paths of the base. With them ``target_modules`` is a short list of suffixes wherever
            these select the slots and nothing else; without them it lists full paths.
        force: replace a directory that hl_scale wrote earlier.

    Raises:
        ExportError: more than one condition, a rank or scale that disagrees with ``lora``, or non-finite factors.
        OutputError: the directory exists and may not be replaced.
    """
    _check(factors, lora)
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model_name_or_path,
        "revision": revision,
        "r": factors.rank,
        "target_modules": target_modules(factors.slots, module_paths),
        **_peft_scale(lora, factors.rank),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": False,
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with staged_directory(directory, force=force) as staging:
        tensors = peft_tensors(factors)
        save_file(tensors, staging / WEIGHTS_FILE, metadata={"format": "pt"})
        digest = hashlib.sha256((staging / WEIGHTS_FILE).read_bytes()).hexdigest()
        facts = {**provenance, "scale_convention": lora.scale_convention, "scale": factors.scale}
        facts = {**facts, "files": {WEIGHTS_FILE: {"sha256": digest}}}
        write_json(staging / CONFIG_FILE, config)
        write_json(staging / PROVENANCE_FILE, facts)
        (staging / "README.md").write_text(_adapter_card(config, facts), encoding="utf-8")
    return Path(directory)


def peft_tensors(factors: LoraFactors) -> dict[str, torch.Tensor]:
    """PEFT's names -> A (r, in) and B (out, r), contiguous on the CPU, in the dtype they were generated in."""
    tensors = {}
    for slot in factors.slots:
        prefix = f"base_model.model.{slot.path}"
        tensors[f"{prefix}.lora_A.weight"] = factors.a[slot.path][0].detach().cpu().clone().contiguous()
        tensors[f"{prefix}.lora_B.weight"] = factors.b[slot.path][0].detach().cpu().clone().contiguous()
    return tensors


def target_modules(slots: Collection[Slot], module_paths: Collection[str] | None) -> list[str]:
    """The shortest list by which PEFT selects exactly the slots: their last names, or else their full paths.

    PEFT gives an adapter to every module whose path equals an entry or ends with "." and the entry.
    """
    paths = {slot.path for slot in slots}
    names = sorted({slot.module for slot in slots})
    if module_paths is not None:
        selected = {path for path in module_paths if path.rsplit(".", 1)[-1] in names}
        if selected == paths:
            return names
    return [slot.path for slot in slots]


def generate_factors(run: LoadedRun, condition: str) -> tuple[typology.Condition, LoraFactors]:
    """Parse a condition and generate its factors (E = 1)."""
    parsed = run.conditions.parse(condition)
    device = next(run.hypernetwork.parameters()).device
    with torch.no_grad():
        factors = run.hypernetwork(torch.tensor(parsed.vector)[None].float().to(device))
    return parsed, factors


def base_reference(base: BaseModelConfig) -> str:
    """How an adapter names its base: the hub id, or the absolute path of a local or packaged model."""
    if base.model.startswith("package:") or Path(base.model).is_dir():
        return str(resolve_model(base).resolve())
    return base.model


def run_provenance(run: LoadedRun, condition: typology.Condition) -> dict[str, Any]:
    """What an exported directory says about where it comes from."""
    return {
        "condition": condition.name,
        "condition_sha256": hashlib.sha256(condition.vector.astype("<f4").tobytes()).hexdigest(),
        "run": Path(run.directory).resolve().name,
        "step": run.step,
        "seed": run.config.run.seed,
        "hypernetwork": run.config.hypernetwork.kind,
        "base_model": run.config.base.model,
        "base_revision": run.config.base.revision,
        "base_fingerprint": run.base.fingerprint,
        "base_quantization": run.config.base.quantization,
        "base_double_quantization": run.config.base.double_quantization,
        "hl_scale": hl_scale.__version__,
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Indented JSON with a final newline."""
    path.write_text(json.dumps(tree, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _check(factors: LoraFactors, lora: LoraConfig) -> None:
    if factors.conditions != 1:
        raise ExportError(
            f"a PEFT directory holds one adapter, got factors of {factors.conditions} conditions\n"
            "  fix: call select(i) and write one directory per condition"
        )
    if factors.rank != lora.rank:
        raise ExportError(f"the factors have rank {factors.rank}, the configuration says lora.rank = {lora.rank}")
    expected = lora_scale(lora.scale_convention, lora.alpha, lora.rank)
    if not math.isclose(factors.scale, expected, rel_tol=1e-6):
        raise ExportError(
            f"the factors have scale {factors.scale}, but lora.scale_convention {lora.scale_convention!r} with "
            f"alpha {lora.alpha} and rank {lora.rank} gives {expected}"
        )
    broken = [
        slot.path
        for slot in factors.slots
        if not (torch.isfinite(factors.a[slot.path]).all() and torch.isfinite(factors.b[slot.path]).all())
    ]
    if broken:
        raise ExportError(
            f"the generated factors hold NaN or infinity in {len(broken)} of {len(factors.slots)} slots, first "
            f"{broken[0]}; nothing was written\n  fix: use an earlier checkpoint, or train with a lower learning rate"
        )


def _peft_scale(lora: LoraConfig, rank: int) -> dict[str, Any]:
    alpha = float(rank) if lora.scale_convention == "one" else lora.alpha
    return {
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "use_rslora": lora.scale_convention == "alpha_over_sqrt_rank",
    }


def _adapter_card(config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    base = config["base_model_name_or_path"]
    quantization = facts.get("base_quantization", "none")
    held = "" if quantization == "none" else f" with its linear layers held in {quantization}"
    auto = "AutoModelForCausalLM" if config["task_type"] == "CAUSAL_LM" else "AutoModel"
    origin = (
        "that an hl_scale hypernetwork generated from a condition, in one forward pass.\nThe hypernetwork was trained"
    )
    if facts.get("hypernetwork") == "plain_lora":
        origin = "for all conditions alike, trained by hl_scale"
    if "task" in facts:
        origin = f"for the task {facts['task']} alone, trained by hl_scale"
    return f"""---
library_name: peft
base_model: {json.dumps(base)}
tags: [lora, hypernetwork, hl_scale]
---

# Adapter for {facts.get("condition", "one condition")}

A LoRA adapter (rank {config["r"]}, scale {facts["scale"]:g}) {origin}
on the base below{held}; on weights in another precision the adapter's effect differs a
little.

```python
from peft import PeftModel
from transformers import {auto}

model = {auto}.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, "THIS DIRECTORY")
```

{facts_table(facts)}
"""


def facts_table(facts: Mapping[str, Any]) -> str:
    """The scalar facts of a provenance record as a Markdown table."""
    rows = [f"| {key} | {value} |" for key, value in facts.items() if not isinstance(value, dict | list)]
    return "\n".join(["| fact | value |", "| --- | --- |", *rows])
