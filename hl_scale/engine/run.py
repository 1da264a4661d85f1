"""Run directories: what a run is made of, and how one is opened again.

config.yaml  environment.json  metrics.jsonl  checkpoints/step-000100/  evaluation.json  report.html
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hl_scale.base import AdaptedModel, TaskAdapter, load_base, read_task_adapter
from hl_scale.base.loading import outline_base
from hl_scale.config import Config, ConfigError, dump_config, load_config
from hl_scale.data.durable import write_text
from hl_scale.engine import checkpoint
from hl_scale.engine.conditions import Conditions, open_conditions
from hl_scale.hypernetwork import Hypernetwork, build_hypernetwork
from hl_scale.lora import LoraFactors, sum_factors

_PACKAGES = ("torch", "deepspeed", "ray", "transformers", "bitsandbytes", "geomloss", "peft", "value-nlp", "numpy")
# Sections and keys that may change when a run is continued: they do not change what is computed, or, of the corpus, the
# base and the task adapter, fingerprints in the checkpoint tell whether they are the same.
_MAY_CHANGE = {
    "run.directory", "cluster", "evaluation", "zero3", "data.directory", "data.num_workers", "base.model",
    "base.cache_directory", "base.placement", "base.gradient_checkpointing", "base.offload_activations",
    "base.mlp_tile_tokens", "lora.task_adapter", "objective.logit_tokens", "hypernetwork.generate_per_block",
    "training.micro_batch_size", "training.save_every", "training.save_in_background", "training.keep_checkpoints",
    "training.keep_every", "training.commit", "training.hang_timeout_seconds", "training.maximum_consecutive_skips",
    "training.log_every", "training.loggers",
}  # fmt: skip
_TASK_PREPARATION = {
    "data.sources", "data.tasks", "data.excluded_tasks", "data.heldout_tasks", "data.training_examples",
    "data.test_examples", "data.heldout_descriptions", "data.seed", "data.rows_per_shard",
}  # fmt: skip


@dataclass(frozen=True)
class LoadedRun:
    """A trained run, ready to generate adapters."""

    directory: Path
    config: Config
    base: AdaptedModel
    hypernetwork: Hypernetwork
    conditions: Conditions
    step: int
    data_fingerprint: str | None = None
    """Of the corpus it was trained on."""
    task_adapter: TaskAdapter | None = None
    """What it was trained on top of (`lora.task_adapter`); `load_generator` does not read it."""
    task_adapter_fingerprint: str | None = None
    """Of the same, from the checkpoint."""


def load_run(
    directory: str | os.PathLike[str],
    step: int | None = None,
    base: AdaptedModel | None = None,
    device: torch.device | str = "cpu",
) -> LoadedRun:
    """Open a run directory.

    Args:
        directory: run directory.
        step: checkpoint to use; the newest that verifies unless given.
        base: an already loaded base with the same fingerprint, to save memory.
        device: where to put the model.

    Raises:
        ConfigError: not a run directory, or it has no checkpoint yet.
        CheckpointError: damaged, or trained on another base or task adapter.
    """
    config, found = _open_run(Path(directory), step)
    base = load_base(config.base, config.lora, device) if base is None else base
    if found.manifest.base_fingerprint != base.fingerprint:
        raise checkpoint.CheckpointError(
            f"{found.directory} was trained on base {found.manifest.base_fingerprint[:12]}, but base.model "
            f"now gives {base.fingerprint[:12]}\n"
            "  fix: restore the model revision or the quantisation settings of that run"
        )
    run = _loaded_run(Path(directory), config, found, base, device)
    task_adapter = load_task_adapter(config, base)
    if fingerprint_of(task_adapter) != run.task_adapter_fingerprint:
        raise checkpoint.CheckpointError(
            f"{found.directory} was trained on task adapter {str(run.task_adapter_fingerprint)[:12]}, but "
            f"lora.task_adapter = {config.lora.task_adapter} is {str(fingerprint_of(task_adapter))[:12]}\n"
            "  fix: restore that adapter"
        )
    return replace(run, task_adapter=task_adapter)


def load_task_adapter(config: Config, base: AdaptedModel) -> TaskAdapter | None:
    """What `lora.task_adapter` names; AdapterError if it cannot be used with this base, see `read_task_adapter`."""
    return None if config.lora.task_adapter is None else read_task_adapter(config.lora.task_adapter, base, config.base)


def fingerprint_of(task_adapter: TaskAdapter | None) -> str | None:
    """Of a task adapter, if there is one."""
    return None if task_adapter is None else task_adapter.fingerprint


@torch.no_grad()
def composed_factors(run: LoadedRun, vectors: Tensor, task_adapter: TaskAdapter | None = None) -> LoraFactors:
    """Adapters of conditions, each added to a task adapter if one is given.

    Args:
        run: whose hypernetwork generates.
        vectors: (E, C) conditions, or (C,) of one.
        task_adapter: of the same base (`read_task_adapter`); it need not be the one that the run was trained on top of,
            which is not added by itself.

    Returns:
        Factors of E conditions on the hypernetwork's device, without gradients (E = 1 from a plain LoRA); with a task
        adapter as `sum_factors` gives them.
    """
    device = next(run.hypernetwork.parameters()).device
    factors: LoraFactors = run.hypernetwork(torch.atleast_2d(vectors).float().to(device))
    return factors if task_adapter is None else sum_factors(factors, task_adapter.factors.to(device))


def load_generator(
    directory: str | os.PathLike[str],
    step: int | None = None,
    model: str | None = None,
    device: torch.device | str = "cpu",
) -> LoadedRun:
    """Open a run directory to generate adapters alone: the base is an outline, without weights and tokenizer.

    Slots come from the base's config.json and the fingerprint from the checkpoint: nobody looks whether the base's
    weights are still those. Only where the base itself encodes descriptions is it loaded whole.

    Args:
        directory: run directory.
        step: checkpoint to use; the newest that verifies unless given.
        model: directory or hub id whose config.json tells the slots; the run's own `base.model` unless given.
        device: where to put the hypernetwork.

    Raises:
        ConfigError: not a run directory, or it has no checkpoint yet.
        CheckpointError: damaged, or for slots of other shapes than the model's.
        BaseModelError: no configuration of the base can be had, or it lacks a target module.
    """
    config, found = _open_run(Path(directory), step)
    if config.data.kind == "tasks" and config.conditions.base_encodes:
        return load_run(directory, found.step, device=device)
    named = config.base if model is None else config.base.model_copy(update={"model": model})
    base = outline_base(named, config.lora)
    base.fingerprint = found.manifest.base_fingerprint
    return _loaded_run(Path(directory), config, found, base, device)


def _open_run(directory: Path, step: int | None) -> tuple[Config, checkpoint.Checkpoint]:
    if not (directory / "config.yaml").is_file():
        raise ConfigError(
            f"{directory} is not a run directory (no config.yaml)\n  fix: pass the run.directory of a training"
        )
    config = load_config(directory / "config.yaml", environment={})
    found, problems = checkpoint.newest(directory / "checkpoints", step)
    if found is None:
        raise ConfigError(f"{directory} has no usable checkpoint. {' '.join(problems)}\n  fix: train it first")
    for problem in problems:
        logging.getLogger(__name__).warning("checkpoint passed over, step %d is used: %s", found.step, problem)
    return config, found


def _loaded_run(
    directory: Path, config: Config, found: checkpoint.Checkpoint, base: AdaptedModel, device: torch.device | str
) -> LoadedRun:
    whole = config.hypernetwork.model_copy(update={"generate_per_block": False})
    conditions = open_conditions(config, base)
    hypernetwork = build_hypernetwork(whole, config.lora, base.slots, conditions.size)
    checkpoint.load_weights(hypernetwork, found, prefix="hypernetwork.")
    hypernetwork.requires_grad_(False).eval().to(device)
    return LoadedRun(
        directory, config, base, hypernetwork, conditions, found.step, found.manifest.data_fingerprint,
        task_adapter_fingerprint=found.manifest.task_adapter_fingerprint,
    )  # fmt: skip


def check_run_directory(config: Config) -> None:
    """Refuse a directory with checkpoints of a run with other settings; writes nothing.

    Raises:
        ConfigError: lists the settings that differ.
    """
    directory = Path(config.run.directory)
    path = directory / "config.yaml"
    if path.is_file() and checkpoint.find(directory / "checkpoints"):
        differences = _differences(load_config(path, environment={}), config)
        if differences:
            listed = "\n".join(f"  {name}: {old!r} there, {new!r} now" for name, old, new in differences)
            raise ConfigError(
                f"{directory} holds a run with other settings:\n{listed}\n"
                "  fix: choose another run.directory, or remove that one to start over"
            )


def open_run_directory(config: Config) -> None:
    """Create the directory and write config.yaml and environment.json."""
    directory = Path(config.run.directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / "config.yaml", dump_config(config))
    write_text(directory / "environment.json", json.dumps(environment(), indent=1))


def environment() -> dict[str, Any]:
    """Versions and hardware, for environment.json and reports."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "accelerator": accelerator,
        "versions": versions,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def settings_fingerprint(config: Config) -> str:
    """SHA-256 of the settings that decide what is computed. Defaults are left out, so that a key that a later version
    adds changes nothing."""
    tree = config.model_dump(mode="json", exclude_defaults=True)
    settings = {
        f"{section}.{key}": value
        for section, keys in tree.items()
        for key, value in keys.items()
        if not _may_change(config, section, key)
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    found = []
    old_tree, new_tree = old.model_dump(), new.model_dump()
    for section in new_tree:
        for key in new_tree[section]:
            if _may_change(new, section, key):
                continue
            old_value = old_tree[section].get(key)  # another kind of section has other keys
            if old_value != new_tree[section][key]:
                found.append((f"{section}.{key}", old_value, new_tree[section][key]))
    return found


def _may_change(config: Config, section: str, key: str) -> bool:
    name = f"{section}.{key}"
    if config.data.kind == "tasks" and name in _TASK_PREPARATION:
        return True
    return section in _MAY_CHANGE or name in _MAY_CHANGE
