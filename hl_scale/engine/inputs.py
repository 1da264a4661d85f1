"""What training reads, checked before anything is written, and the same on every rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hl_scale.base import AdaptedModel, TaskAdapter, load_base
from hl_scale.config import Config, ConfigError
from hl_scale.data.corpus import load_corpus
from hl_scale.data.sampling import BatchPlan
from hl_scale.data.tasks import open_tasks
from hl_scale.engine import checkpoint, zero3
from hl_scale.engine.alignment import AlignmentWorkload
from hl_scale.engine.reconstruction import ReconstructionWorkload
from hl_scale.engine.run import check_run_directory, fingerprint_of, load_task_adapter, settings_fingerprint
from hl_scale.engine.supervised import SupervisedWorkload
from hl_scale.engine.training_module import Batch, TrainingModule
from hl_scale.engine.zero3 import World
from hl_scale.hypernetwork import Hypernetwork


class Sampler(Protocol):
    """Which samples make up each global batch; the same for any number of ranks."""

    def batch(self, step: int) -> np.ndarray:
        """(global_batch, ...) samples of an optimizer step, from 0."""

    def micro_batches(self, step: int, rank: int, plan: BatchPlan) -> list[np.ndarray]:
        """A rank's share, in passes."""


class Workload(Protocol):
    """What is trained on what: data, conditions and objective of a run.

    Attributes:
        base: the frozen base.
        data_fingerprint: identifies what is trained on; a checkpoint goes on with the same alone.
        condition_size: C.
        sampler: of global batches.
    """

    base: AdaptedModel
    data_fingerprint: str
    condition_size: int

    @property
    def sampler(self) -> Sampler: ...

    @property
    def task_adapter(self) -> TaskAdapter | None:
        """A frozen adapter that generated ones are added to."""

    def prepare(self, world: World, report: Callable[[str], None]) -> None:
        """Compute what is not on disk yet; collective. `report` is told what goes on."""

    def module(self, hypernetwork: Hypernetwork) -> TrainingModule:
        """What the engine trains."""

    def collate(self, samples: np.ndarray) -> Batch:
        """Samples as a micro-batch."""

    def names(self, samples: np.ndarray) -> list[Any]:
        """What to call samples in a diagnosis."""


def load_inputs(config: Config, world: World) -> Workload:
    """Read and check everything, writing nothing; raises ValueErrors that say what to mend."""
    check_run_directory(config)
    if config.objective.kind == "alignment":
        corpus = load_corpus(config.data.directory)  # before the base, which takes longer to load
        base = _load_base(config, world)
        return AlignmentWorkload(config, base, corpus, load_task_adapter(config, base))
    tasks = open_tasks(config.tasks)
    base = _load_base(config, world)
    if config.objective.kind == "supervised":
        return SupervisedWorkload(config, base, tasks, load_task_adapter(config, base))
    return ReconstructionWorkload(config, base, tasks)


def _load_base(config: Config, world: World) -> AdaptedModel:
    base = load_base(config.base, config.lora, world.device)
    if config.training.packed:
        base.check_packing()
    return base


def check_agreement(config: Config, inputs: Workload, world: World) -> None:
    """Ranks on several nodes read their own files and variables: all must have found the same; collective.

    Raises:
        ConfigError: on every rank, naming a rank that differs and in what.
    """
    # Where things are may differ between nodes.
    paths = {"data.directory", "base.model", "base.cache_directory", "lora.task_adapter"}
    settings = {
        f"{section}.{key}": value
        for section, keys in config.model_dump(mode="json").items()
        for key, value in keys.items()
        if section not in ("run", "cluster") and f"{section}.{key}" not in paths
    }
    facts = {
        "base model": inputs.base.fingerprint,
        "corpus": inputs.data_fingerprint,
        "task adapter": fingerprint_of(inputs.task_adapter),
    }
    everywhere = zero3.gather_objects((facts, {**settings, "run.seed": config.run.seed}), world)
    for rank, others in enumerate(everywhere):
        for own, first, kind in zip(others, everywhere[0], ("", "configuration"), strict=True):
            for name, value in first.items():
                if own[name] != value:
                    what, detail = (kind, f": {name} = {own[name]!r}") if kind else (name, f": {own[name]!r:.20}")
                    raise ConfigError(
                        f"rank {rank} has another {what} than rank 0{detail} instead of {value!r:.80}\n"
                        "  fix: give settings as section.key=value arguments (launchers do not pass variables to other "
                        "nodes), and put run.directory and data.directory on storage that every node shares"
                    )


def find_checkpoint(config: Config, inputs: Workload, world: World) -> checkpoint.Found:
    """The checkpoint to go on from, and what was wrong with newer ones; the same on every rank; collective.

    Raises:
        CheckpointError: there are checkpoints and none can be used, or the newest is of another base, corpus or
            settings.
    """
    found = checkpoint.newest_together(Path(config.run.directory) / "checkpoints", world)
    if found.checkpoint is None and found.damaged:
        listed = "\n  ".join(found.damaged.values())
        raise checkpoint.CheckpointError(
            f"no checkpoint of {config.run.directory} can be used:\n  {listed}\n"
            "  fix: restore one of them, or choose another run.directory to start over; nothing was changed"
        )
    if found.checkpoint is not None:
        _check_origin(found.checkpoint, config, inputs)
    return found


def _check_origin(found: checkpoint.Checkpoint, config: Config, inputs: Workload) -> None:
    manifest = found.manifest
    trained, given = manifest.task_adapter_fingerprint, fingerprint_of(inputs.task_adapter)
    if trained != given:
        raise checkpoint.CheckpointError(
            f"{found.directory} was trained on task adapter {str(trained)[:12]}, lora.task_adapter is now "
            f"{str(given)[:12]}\n  fix: restore that adapter, or choose another run.directory"
        )
    for name, saved, now in (
        ("base_fingerprint", manifest.base_fingerprint, inputs.base.fingerprint),
        ("data_fingerprint", manifest.data_fingerprint, inputs.data_fingerprint),
        ("settings_fingerprint", manifest.settings_fingerprint, settings_fingerprint(config)),
    ):
        if saved is not None and saved != now:
            raise checkpoint.CheckpointError(
                f"{found.directory} was trained with {name} {saved[:12]}, now it is {now[:12]}\n"
                "  fix: restore that model, corpus or configuration, or choose another run.directory"
            )
