"""The labelled tasks of a suite: their sets, their task adapters, and predictions of any adapter on them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from hl_scale.adaptations import Adaptation
from hl_scale.base import AdaptedModel
from hl_scale.conditions import typology
from hl_scale.config import BaseModelConfig, LabelledConfig, LoraConfig
from hl_scale.data.labelled import LabelledExample, LabelledSet
from hl_scale.data.labelled_preparation import prepare_labelled
from hl_scale.evaluation.dialect_tasks.cells import Cell, CellStore
from hl_scale.evaluation.labelled import (
    Measurement,
    TaskAdapter,
    fit_task_adapter,
    load_measurement,
    load_task_adapter,
    measure,
)
from hl_scale.evaluation.labelled.fitting import training_identity
from hl_scale.evaluation.measurement import EvaluationError
from hl_scale.evaluation.provenance import content_hash
from hl_scale.lora import LoraFactors, sum_factors

ADAPTER = "adapter"
MEASUREMENT = "measurement.json"


@dataclass(frozen=True)
class Adapter:
    """What a method adds in one dialect.

    Attributes:
        origin: directory of what was trained, or None.
        identity: of its weights.
        carried: parameters of the adapter as the dialect carries it.
        trained: parameters that were trained for it.
        pairs: distinct sentences that it was trained on.
        seen: whether it was trained on text of the dialect.
        condition: (1, 235) vector that it was generated from, or None.
        factors: LoRA factors (E = 1) to add to the task's, or None.
        adaptation: what to attach beside them instead, under that condition.
    """

    origin: Path | None = None
    identity: str = ""
    carried: int = 0
    trained: int = 0
    pairs: int = 0
    seen: bool = False
    factors: LoraFactors | None = None
    adaptation: Adaptation | None = None
    condition: Tensor | None = None


@dataclass(frozen=True)
class SuiteTask:
    """A labelled set, apart from what adapters are aligned on.

    Attributes:
        settings: its recipe.
        data: the set.
    """

    settings: LabelledConfig
    data: LabelledSet

    @property
    def name(self) -> str:
        return self.data.task.name

    @cached_property
    def fingerprint(self) -> str:
        """Of the set and of what was left out of it."""
        return content_hash([self.data.manifest["fingerprint"], sorted(self.data.removed)])

    def annotated(self, variety: str, count: int | None) -> list[LabelledExample]:
        """The first `count` training examples that exist in a variety, or all of them."""
        found = self.data.examples("train", variety) if count is None else self.data.annotated(variety, count)
        if not found:
            raise EvaluationError(
                f"{self.data.directory} has no annotated sentences in {variety}\n"
                "  fix: raise labelled.annotated_sentences"
            )
        return found


@dataclass(frozen=True)
class FittedTask:
    """A task with the adapter and head that were trained for it on Standard English; `identity` is of their bytes."""

    task: SuiteTask
    adapter: TaskAdapter
    identity: str
    directory: Path


def open_task(settings: LabelledConfig, corpus: Path) -> SuiteTask:
    """Prepare a labelled set, or find it prepared, and take what a corpus trains on out of its test examples.

    Raises:
        LabelledError: it cannot be prepared.
    """
    prepared = prepare_labelled(settings.labelled).labelled
    return SuiteTask(settings, prepared.apart_from(corpus))


def fit(
    task: SuiteTask,
    base: AdaptedModel,
    base_config: BaseModelConfig,
    lora: LoraConfig,
    seed: int,
    store: CellStore,
    say: Callable[[str], None],
) -> FittedTask:
    """The task adapter of a seed, trained on Standard English or read; `say` is told how far it is."""
    config = task.settings.task_adapter.model_copy(update={"seed": seed})
    train, validation = task.data.examples("train"), task.data.examples("validation")
    identity = training_identity(base, task.data.task, train, validation, config, lora)

    def build(directory: Path) -> dict[str, Any]:
        place = directory / ADAPTER
        fitted = fit_task_adapter(
            base, task.data.task, train, validation, place, config=config, lora=lora, base_config=base_config, say=say,
        )  # fmt: skip
        return {
            "validation": fitted.facts["validation"],
            "best_step": fitted.facts["best_step"],
            "trained_on": len(train),
        }

    key = {"kind": "task adapter", "identity": identity}
    cell = store.get(f"task-{task.name}-seed{seed}", key, build)
    adapter = load_task_adapter(cell.directory / ADAPTER, base)
    return FittedTask(task, adapter, content_hash(adapter.facts["files"]), cell.directory)


def predict(
    fitted: FittedTask, base: AdaptedModel, added: Adapter, name: str, variety: str, store: CellStore
) -> tuple[Measurement, Cell]:
    """Predictions on the test examples of a variety, of the task adapter and what a method adds to it.

    Args:
        fitted: the task.
        base: the frozen base.
        added: of a method.
        name: of the cell, for people.
        variety: full name.
        store: where the measurement is kept.
    """
    examples = fitted.task.data.examples("test", variety)
    settings = fitted.task.settings.task_adapter
    condition = None if added.condition is None else content_hash(added.condition.tolist())
    key = {
        "kind": "measurement",
        "base": base.fingerprint,
        "task_adapter": fitted.identity,
        "added": added.identity,
        "condition": condition,
        "variety": typology.resolve(variety),
        "maximum_tokens": settings.maximum_tokens,
        "examples": content_hash([[e.example_id, e.texts, e.label] for e in examples]),
    }

    def build(directory: Path) -> dict[str, Any]:
        factors = fitted.adapter.factors
        if added.factors is not None:
            factors = sum_factors(added.factors, factors)
        context = nullcontext() if added.adaptation is None else added.adaptation.attached(base, added.condition)
        found = measure(
            base, fitted.adapter.head, examples, factors, context=context,
            batch_size=settings.evaluation_batch_size, maximum_tokens=settings.maximum_tokens,
        )  # fmt: skip
        origin = store.name_of(added.origin)
        found.save(directory / MEASUREMENT, variety=variety, adapter=origin, task_adapter=fitted.directory.name)
        return {**found.metrics, "adapter": origin, "task_adapter": fitted.directory.name}

    cell = store.get(name, key, build)
    return load_measurement(cell.directory / MEASUREMENT), cell
