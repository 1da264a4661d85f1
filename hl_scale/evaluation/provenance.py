"""Where a result comes from: code and library versions, hardware, and the run that produced it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import hl_scale

if TYPE_CHECKING:
    from hl_scale.engine.run import LoadedRun

_LIBRARIES = ("torch", "transformers", "numpy", "deepspeed", "ray", "peft", "geomloss", "value-nlp")


def describe_run(run: LoadedRun) -> dict[str, Any]:
    """Name, step, seed, base and training budget of a run; no absolute path."""
    config = run.config
    return {
        "run": Path(run.directory).resolve().name,
        "step": run.step,
        "seed": config.run.seed,
        "base_model": config.base.model,
        "base_fingerprint": run.base.fingerprint,
        "quantization": config.base.quantization,
        "compute_dtype": config.base.compute_dtype,
        "hypernetwork": config.hypernetwork.kind,
        "hypernetwork_parameters": sum(parameter.numel() for parameter in run.hypernetwork.parameters()),
        "rank": config.lora.rank,
        "target_modules": list(config.lora.target_modules),
        "training_pairs": run.step * config.training.global_batch_size,
        "learning_rate": config.training.learning_rate,
        "data_mode": config.data.mode,
    }


def versions() -> dict[str, str]:
    """Versions of hl_scale, Python and the libraries that decide numbers; those not installed are left out."""
    found = {"hl_scale": hl_scale.__version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device) -> dict[str, Any]:
    """Processor, logical cores and the device that ran the model."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"processor": _processor(), "logical_cores": os.cpu_count(), "device": name}


def content_hash(tree: Any) -> str:
    """sha256 of a JSON-like tree, independent of key order."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
