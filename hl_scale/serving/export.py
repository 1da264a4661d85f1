"""Write generated adapters as PEFT directories, which PEFT and vLLM load unchanged.

PEFT multiplies B(Ax) by lora_alpha / r, or by lora_alpha / sqrt(r) with ``use_rslora``. Our three scale conventions:

    alpha_over_rank       lora_alpha = alpha
    alpha_over_sqrt_rank  lora_alpha = alpha, use_rslora
    one                   lora_alpha = r

so the factors are stored as generated and their numbers are never touched. The profile "portable" is for engines that
know less: ranks are padded with zeros to one that all of them accept, and the scale becomes a plain lora_alpha =
s * r', exactly, as r' is a power of two.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

import hl_scale
from hl_scale.base import TaskAdapter
from hl_scale.base.loading import base_reference
from hl_scale.conditions import typology
from hl_scale.config import LoraConfig
from hl_scale.data.durable import hash_file
from hl_scale.data.peft_directory import CONFIG_FILE, PROVENANCE_FILE, WEIGHTS_FILE
from hl_scale.hypernetwork.fingerprint import weights_fingerprint
from hl_scale.lora import LoraFactors, Slot, lora_scale
from hl_scale.serving.cards import adapter_card
from hl_scale.serving.engines import portable_rank
from hl_scale.serving.shards import TensorSource, write_safetensors
from hl_scale.serving.staging import check_replaceable, staged_directory

if TYPE_CHECKING:
    from hl_scale.engine.run import LoadedRun

Profile = Literal["plain", "portable"]

_IN_HEADER = (
    "condition", "condition_sha256", "hypernetwork_fingerprint", "base_model", "base_revision", "base_fingerprint",
    "data_fingerprint", "scale", "hl_scale", "task_adapter_fingerprint",
)  # fmt: skip
"""Facts that the tensor file carries in its header: what tells one adapter from another, and nothing of the moment, so
that the same adapter is the same bytes."""


class ExportError(ValueError):
    """An adapter or merged model that cannot be written as asked."""


def generate_adapter(
    run: LoadedRun,
    condition: str,
    directory: str | os.PathLike[str],
    *,
    base_model_name_or_path: str | None = None,
    facts: Mapping[str, Any] | None = None,
    profile: Profile = "plain",
    with_adapter: TaskAdapter | None = None,
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
        profile: see `write_peft_adapter`.
        with_adapter: a task adapter to add: one directory holds the sum of both, of summed rank.
        force: replace a directory that hl_scale wrote earlier.

    Returns:
        The directory.

    Raises:
        ValueError: an unknown condition, a directory in the way, or factors that are not finite.
    """
    check_replaceable(directory, force=force)
    base = base_arguments(run, base_model_name_or_path)
    parsed = run.conditions.parse(condition)
    factors, lora = factors_of(run, torch.tensor(parsed.vector), with_adapter)
    return write_peft_adapter(
        factors,
        directory,
        lora=lora,
        provenance={**run_provenance(run, parsed, with_adapter), **(facts or {})},
        profile=profile,
        force=force,
        **base,
    )


def base_arguments(run: LoadedRun, base_model_name_or_path: str | None = None) -> dict[str, Any]:
    """What `peft_config` is to be told of a run's base.

    Raises:
        ValueError: adapters of this base would not be applied, and no other base is named.
    """
    base = run.config.base
    if run.base.from_multimodal and base_model_name_or_path is None:
        raise ValueError(
            f"{base.model} is a multimodal checkpoint: its language model's layers have other paths there, and PEFT "
            "would apply nothing\n  fix: write a merged checkpoint instead (hl-scale export --merged)"
        )
    return {
        "base_model_name_or_path": base_model_name_or_path or base_reference(base),
        "task_type": "CAUSAL_LM" if run.base.has_head else "FEATURE_EXTRACTION",
        "revision": base.revision,
        "module_paths": [path for path, _ in run.base.model.named_modules()],
    }


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
    profile: Profile = "plain",
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
        profile: "plain" stores the factors as they are; "portable" pads them with zeros to the next rank of 8, 16, 32,
            64 and 128, and states the scale as lora_alpha / r. The update is the same.
        force: replace a directory that hl_scale wrote earlier.

    Raises:
        ExportError: more than one condition, a rank or scale that disagrees with ``lora``, or non-finite factors.
        OutputError: the directory exists and may not be replaced.
    """
    check_factors(factors, lora)
    config = peft_config(
        factors.slots,
        lora,
        base_model_name_or_path=base_model_name_or_path,
        task_type=task_type,
        revision=revision,
        module_paths=module_paths,
        profile=profile,
    )
    with staged_directory(directory, force=force) as staging:
        write_adapter_files(staging, factors, config, {**provenance, **scale_facts(lora, factors.scale, profile)})
    return Path(directory)


def peft_config(
    slots: Collection[Slot],
    lora: LoraConfig,
    *,
    base_model_name_or_path: str,
    task_type: str,
    revision: str | None = None,
    module_paths: Collection[str] | None = None,
    profile: Profile = "plain",
) -> dict[str, Any]:
    """adapter_config.json of adapters for these slots; arguments as of `write_peft_adapter`."""
    rank = portable_rank(lora.rank) if profile == "portable" else lora.rank
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model_name_or_path,
        "revision": revision,
        "r": rank,
        "target_modules": target_modules(slots, module_paths),
        **_peft_scale(lora, rank, profile),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": False,
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def write_adapter_files(
    directory: Path, factors: LoraFactors, config: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    """Write the files of a PEFT directory into an existing one, which the caller makes visible when they are complete.

    Args:
        directory: an empty directory.
        factors: E = 1; padded with zeros to the rank of ``config``.
        config: content of adapter_config.json.
        facts: provenance; the digest of the weights is added.
    """
    header = {name: str(facts[name]) for name in _IN_HEADER if facts.get(name) is not None}
    tensors = peft_tensors(factors if factors.rank == config["r"] else pad_rank(factors, config["r"]))
    sources = [TensorSource.of(name, tensor) for name, tensor in tensors.items()]
    write_safetensors(directory / WEIGHTS_FILE, sources, header)
    digest = hash_file(directory / WEIGHTS_FILE)
    facts = {**facts, "files": {WEIGHTS_FILE: {"sha256": digest}}}
    write_json(directory / CONFIG_FILE, config)
    write_json(directory / PROVENANCE_FILE, facts)
    (directory / "README.md").write_text(adapter_card(config, facts), encoding="utf-8")


def scale_facts(lora: LoraConfig, scale: float, profile: Profile = "plain") -> dict[str, Any]:
    """What provenance says about rank and scale."""
    return {"scale_convention": lora.scale_convention, "scale": scale, "rank": lora.rank, "profile": profile}


def peft_tensors(factors: LoraFactors) -> dict[str, torch.Tensor]:
    """PEFT's names -> A (r, in) and B (out, r), contiguous on the CPU, in the dtype they were generated in."""
    tensors = {}
    for slot in factors.slots:
        prefix = f"base_model.model.{slot.path}"
        tensors[f"{prefix}.lora_A.weight"] = factors.a[slot.path][0].detach().cpu().clone().contiguous()
        tensors[f"{prefix}.lora_B.weight"] = factors.b[slot.path][0].detach().cpu().clone().contiguous()
    return tensors


def pad_rank(factors: LoraFactors, rank: int) -> LoraFactors:
    """The same update with more rows in A and columns in B, all zero."""
    return dataclasses.replace(
        factors,
        a={path: pad(a, (0, 0, 0, rank - a.shape[1])) for path, a in factors.a.items()},
        b={path: pad(b, (0, rank - b.shape[2])) for path, b in factors.b.items()},
    )


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


def generate_factors(
    run: LoadedRun, condition: str, with_adapter: TaskAdapter | None = None
) -> tuple[typology.Condition, LoraFactors]:
    """Parse a condition and generate its factors (E = 1), added to a task adapter if one is given."""
    parsed = run.conditions.parse(condition)
    return parsed, factors_of(run, torch.tensor(parsed.vector), with_adapter)[0]


def factors_of(
    run: LoadedRun, vectors: Tensor, with_adapter: TaskAdapter | None = None
) -> tuple[LoraFactors, LoraConfig]:
    """Adapters of conditions (E, C) or (C,), each added to a task adapter if one is given, with their rank and scale.

    A sum has one rank in all slots, padded with zeros where only one of the two has factors; its parts may each have
    another convention of scale, so that its own is alpha / rank.
    """
    from hl_scale.engine.run import composed_factors

    factors = composed_factors(run, vectors, with_adapter)
    if with_adapter is None:
        return factors, run.config.lora
    factors = pad_rank(factors, factors.rank)
    return factors, LoraConfig(rank=factors.rank, alpha=factors.scale * factors.rank)


def run_provenance(
    run: LoadedRun, condition: typology.Condition, with_adapter: TaskAdapter | None = None
) -> dict[str, Any]:
    """What an exported directory says about where it comes from."""
    trained_on = run.task_adapter_fingerprint
    return {
        **condition_facts(condition),
        "run": Path(run.directory).resolve().name,
        "step": run.step,
        "seed": run.config.run.seed,
        "hypernetwork": run.config.hypernetwork.kind,
        "hypernetwork_fingerprint": weights_fingerprint(run.hypernetwork),
        "data_fingerprint": run.data_fingerprint,
        "base_model": run.config.base.model,
        "base_revision": run.config.base.revision,
        "base_fingerprint": run.base.fingerprint,
        "base_quantization": run.config.base.quantization,
        "base_double_quantization": run.config.base.double_quantization,
        "hl_scale": hl_scale.__version__,
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **({} if trained_on is None else {"trained_on_task_adapter": trained_on}),
        **({} if with_adapter is None else with_adapter.provenance),
    }


def condition_facts(condition: typology.Condition) -> dict[str, Any]:
    """The part of `run_provenance` that differs between the adapters of a run."""
    return {
        "condition": condition.name,
        "condition_sha256": hashlib.sha256(condition.vector.astype("<f4").tobytes()).hexdigest(),
    }


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Indented JSON with a final newline."""
    path.write_text(json.dumps(tree, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def check_factors(factors: LoraFactors, lora: LoraConfig) -> None:
    """Raise `ExportError` unless these are the finite factors of one adapter that `lora` describes."""
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
    check_finite(factors)


def check_finite(factors: LoraFactors) -> None:
    """Raise `ExportError` if factors hold NaN or infinity."""
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


def _peft_scale(lora: LoraConfig, rank: int, profile: Profile) -> dict[str, Any]:
    stabilised = lora.scale_convention == "alpha_over_sqrt_rank" and profile == "plain"
    plain = profile == "portable" or lora.scale_convention == "one"
    alpha = lora_scale(lora.scale_convention, lora.alpha, lora.rank) * rank if plain else lora.alpha
    return {"lora_alpha": int(alpha) if float(alpha).is_integer() else alpha, "use_rslora": stabilised}
