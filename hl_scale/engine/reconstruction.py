"""Training on a library of LoRAs: from a description the adapter that was trained for its task; no base runs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hl_scale.base import AdaptedModel, TaskAdapter
from hl_scale.config import Config, ConfigError
from hl_scale.data.durable import hash_file
from hl_scale.data.library import Library
from hl_scale.data.sampling import TaskSampler
from hl_scale.data.tasks import TaskSet
from hl_scale.engine.conditions import TaskVectors
from hl_scale.engine.training_module import TrainingModule, is_finite
from hl_scale.engine.zero3 import World
from hl_scale.hypernetwork import Hypernetwork
from hl_scale.lora import LoraFactors
from hl_scale.objectives.reconstruction import ReconstructionObjective


@dataclass
class ReconstructionBatch:
    """A micro-batch of E descriptions and the adapters of their tasks.

    Attributes:
        conditions: (E, C) float32.
        targets: of E conditions.
    """

    conditions: Tensor
    targets: LoraFactors

    tokens = 0
    """The base reads nothing."""

    def to(self, device: torch.device) -> ReconstructionBatch:
        a, b = ({path: factor.to(device) for path, factor in side.items()} for side in (self.targets.a, self.targets.b))
        targets = LoraFactors(self.targets.slots, a, b, self.targets.scale)
        return ReconstructionBatch(self.conditions.to(device), targets)


class ReconstructionModule(TrainingModule):
    """See `TrainingModule`; the base stays outside the engine, for it is not run."""

    def __init__(self, hypernetwork: Hypernetwork, base: AdaptedModel, objective: ReconstructionObjective) -> None:
        super().__init__(hypernetwork, base, partition_base=False)
        self.objective = objective

    def forward(self, batch: ReconstructionBatch) -> Tensor:
        """Mean distance of the micro-batch, ()."""
        loss = self.objective(self.hypernetwork(batch.conditions), batch.targets).mean()
        return loss if is_finite(loss) else loss * math.nan


class ReconstructionWorkload:
    """The library job, see `hl_scale.engine.inputs.Workload`. An epoch goes once through the tasks.

    Raises:
        ValueError: a library that is missing or damaged, adapters of another base or of no seen task.
    """

    task_adapter: TaskAdapter | None = None

    def __init__(self, config: Config, base: AdaptedModel, tasks: TaskSet) -> None:
        self.config, self.base = config, base
        settings = config.reconstruction
        there = Library(settings.library, base.slots)
        self.tasks = tuple(task for task in tasks.seen if task.name in there.names)
        if not self.tasks:
            raise ConfigError(
                f"{settings.library} has no adapter for a seen task of {config.data.directory}: it has "
                f"{', '.join(there.names[:5])}\n  fix: name each directory as the task it was trained for"
            )
        if config.conditions.kind == "one_hot" and len(self.tasks) < len(tasks.seen):
            raise ConfigError(
                f"{settings.library} lacks adapters of {len(tasks.seen) - len(self.tasks)} seen tasks, and one_hot "
                "conditions number all of them\n  fix: train them, or use conditions.kind: descriptions"
            )
        self.library = Library(settings.library, base.slots, [task.name for task in self.tasks])
        if self.library.base_fingerprint not in (None, base.fingerprint):
            raise ConfigError(
                f"the adapters of {settings.library} were trained on base {self.library.base_fingerprint[:12]}, "
                f"base.model gives {base.fingerprint[:12]}\n  fix: use the base section they were trained with"
            )
        self.vectors = TaskVectors(config, self.tasks, base)
        self.condition_size = self.vectors.conditions.size
        digest = hashlib.sha256(self.vectors.conditions.fingerprint.encode())
        for name in self.library.names:
            digest.update(hash_file(self.library.directory / name / "adapter_model.safetensors").encode())
        self.data_fingerprint = f"{tasks.manifest['fingerprint']}:{digest.hexdigest()}"
        batch = config.training.global_batch_size
        self.sampler = TaskSampler([[1]] * len(self.tasks), self.vectors.counts(), batch, 1, config.run.seed)

    def prepare(self, world: World, report: Callable[[str], None]) -> None:
        """Embed descriptions, and go through the library once for its statistics; collective."""
        self.vectors.prepare_together(world, report)
        report(f"reading the library: {len(self.tasks)} adapters")
        names = [task.name for task in self.tasks]
        statistics = self.library.statistics(names, canonical=self.config.reconstruction.canonical)
        self.objective = ReconstructionObjective(self.config.reconstruction, statistics, world.device)

    def module(self, hypernetwork: Hypernetwork) -> ReconstructionModule:
        return ReconstructionModule(hypernetwork, self.base, self.objective)

    def names(self, samples: np.ndarray) -> list[str]:
        """Task and wording."""
        return [f"{self.tasks[task].name} wording {wording}" for task, wording, *_ in samples.tolist()]

    def collate(self, samples: np.ndarray) -> ReconstructionBatch:
        """Rows of task, wording, 0 and draw to conditions and targets."""
        rows = samples.tolist()
        conditions = np.stack([self.vectors.vector(task, wording, draw) for task, wording, _, draw in rows])
        names = [self.tasks[task].name for task, *_ in rows]
        targets = self.library.read_all(names, canonical=self.config.reconstruction.canonical)
        return ReconstructionBatch(torch.from_numpy(conditions), targets)
