"""Which run, budget and corpus a result comes from."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hl_scale.engine.run import LoadedRun


def describe_run(run: LoadedRun) -> dict[str, Any]:
    """Name, step, seed, base and training budget of a run; no path."""
    config = run.config
    return {
        "run": run.directory.resolve().name,
        "step": run.step,
        "seed": config.run.seed,
        "base_model": config.base.model,
        "base_revision": config.base.revision,
        "base_fingerprint": run.base.fingerprint,
        "quantization": config.base.quantization,
        "compute_dtype": config.base.compute_dtype,
        "hypernetwork": config.hypernetwork.kind,
        "hypernetwork_parameters": sum(parameter.numel() for parameter in run.hypernetwork.parameters()),
        "rank": config.lora.rank,
        "target_modules": list(config.lora.target_modules),
        "training_pairs": run.step * config.training.global_batch_size,
        "learning_rate": config.training.learning_rate,
        "data_mode": config.data.mode if config.data.kind == "dialects" else "tasks",
        **({} if run.task_adapter is None else run.task_adapter.provenance),
    }


def content_hash(tree: Any) -> str:
    """sha256 of a JSON-like tree, independent of key order."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()
