"""What a suite works with: base, corpus, labelled tasks and methods of one recipe, and measured rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hl_scale.base import AdaptedModel, load_base
from hl_scale.conditions import typology
from hl_scale.config import Config, LabelledConfig, LoraConfig, RunConfig, load_config, load_labelled_config
from hl_scale.config.suites import SuiteConfig
from hl_scale.data.corpus import Corpus, load_corpus, prepare_corpus
from hl_scale.data.one_hot import one_hot_corpus, one_hot_vector
from hl_scale.evaluation.dialect_tasks.cells import CellStore
from hl_scale.evaluation.dialect_tasks.labelled_tasks import FittedTask, SuiteTask, fit, open_task, predict
from hl_scale.evaluation.dialect_tasks.methods import GENERATED, NONE, PER_DIALECT, Methods
from hl_scale.evaluation.measurement import EvaluationError
from hl_scale.progress import counting_bar


class Measured(Protocol):
    """What a measurement says, sentence by sentence."""

    @property
    def example_ids(self) -> tuple[int, ...]: ...
    @property
    def labels(self) -> npt.NDArray[np.float64]: ...
    @property
    def predictions(self) -> npt.NDArray[np.float64]: ...
    @property
    def metrics(self) -> Mapping[str, float | None]: ...


@dataclass(frozen=True)
class Row:
    """One measurement and where it comes from; `cell`, `adapter` and `task_adapter` are names of directories."""

    task: str
    method: str
    variety: str
    seed: int
    count: int | None
    variant: str
    seen: bool
    carried: int
    trained: int
    pairs: int
    cell: str
    adapter: str | None
    task_adapter: str
    measurement: Measured

    def facts(self) -> dict[str, Any]:
        """Everything but the predictions, ready for JSON and CSV."""
        names = [name for name in self.__dataclass_fields__ if name != "measurement"]
        values = {name: getattr(self, name) for name in names}
        return {**values, "sentences": len(self.measurement.labels), **self.measurement.metrics}


@dataclass(frozen=True)
class Request:
    """A row that is wanted. `count` sentences of the dialect, for methods that are trained on them."""

    bench: Workbench
    task: SuiteTask
    method: str
    variety: str
    seed: int
    count: int | None = None
    variant: str = ""


class Workbench:
    """A recipe with its base, corpus, tasks and methods.

    Args:
        suite: which recipe, tasks, seeds.
        store: the cells.
        device: where the base is.
        overrides, labelled_overrides: changes beyond those of the suite.
        like: another bench of the suite: its task adapters are used, and its base where that is the same.
        every_variety: labelled sets in all varieties of eWAVE, in directories of their own.
        one_hot: unit vectors instead of features, in a corpus of its own.
    """

    def __init__(
        self,
        suite: SuiteConfig,
        store: CellStore,
        device: str,
        overrides: Sequence[str] = (),
        labelled_overrides: Sequence[str] = (),
        like: Workbench | None = None,
        every_variety: bool = False,
        one_hot: bool = False,
    ) -> None:
        self.suite, self.store, self.device = suite, store, device
        self.configs = _configs(suite, overrides)
        first = self.configs[suite.seeds[0]]
        if first.lora.task_adapter is not None:
            raise EvaluationError(
                "these hypernetworks were trained on top of a task adapter, which the suite's own would replace\n"
                "  fix: train them without lora.task_adapter"
            )
        self.corpus = self._corpus(first)
        if one_hot:
            self.corpus = one_hot_corpus(self.corpus, f"{self.corpus.directory}-one-hot")
            self.configs = {seed: _on(self.corpus, config) for seed, config in self.configs.items()}
        self.base = _base(first, device, like)
        self.task_lora: LoraConfig = first.lora if like is None else like.task_lora
        changes = [*suite.labelled_overrides, *labelled_overrides]
        labelled = [load_labelled_config(path, changes) for path in suite.labelled]
        if every_variety:
            labelled = [_in_every_variety(settings) for settings in labelled]
        self.tasks = [open_task(settings, self.corpus.directory) for settings in labelled]
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise EvaluationError(f"suite.labelled names a task twice: {', '.join(names)}\n  fix: keep one of them")
        self.methods = Methods(
            self.configs, self.base, self.corpus, store,
            runs={seed: Path(run) for seed, run in zip(suite.seeds, suite.runs, strict=False)},
            budget=suite.budget, learning_rates=suite.learning_rates,
            dialect_steps=suite.dialect_steps, control_seed=suite.seed,
            vector=one_hot_vector if one_hot else typology.vector,
        )  # fmt: skip
        self._fitted: dict[tuple[str, int], FittedTask] = {}

    def _corpus(self, config: Config) -> Corpus:
        if self.suite.runs:
            return load_corpus(config.data.directory)
        return load_corpus(prepare_corpus(config.dialects).directory)

    def train(self) -> None:
        """Train the hypernetworks of all seeds, or find them trained; with the training's own progress bar."""
        for seed in self.suite.seeds:
            self.methods.run(seed)

    def varieties(self, chosen: Sequence[str] = ()) -> list[str]:
        """Full names of the varieties to measure: of those chosen, the suite's, or all that every task has."""
        asked = [typology.resolve(name) for name in (chosen or self.suite.dialects)]
        there = [name for name in self.tasks[0].data.varieties if all(name in t.data.varieties for t in self.tasks)]
        missing = [name for name in asked if name not in there]
        if missing:
            raise EvaluationError(
                f"the labelled sets are not transformed into {', '.join(missing)}\n  fix: add it to labelled.varieties"
            )
        return asked or there

    def fitted(self, task: SuiteTask, seed: int) -> FittedTask:
        """The task adapter of a seed."""
        place = (task.name, seed)
        if place not in self._fitted:
            config = self.configs[seed].base
            self._fitted[place] = fit(task, self.base, config, self.task_lora, seed, self.store, self.methods.say)
        return self._fitted[place]

    def measure(self, request: Request, evaluated: Sequence[str]) -> Row:
        """Train whatever is missing, and predict; `evaluated` are the varieties that a wrong one is chosen from."""
        fitted = self.fitted(request.task, request.seed)
        added = self.methods.adapter(
            request.method, request.variety, request.seed, evaluated, fitted, request.count
        )  # fmt: skip
        count = "" if request.count is None else f"-{request.count}"
        name = f"{request.task.name}-{request.method}{count}-{request.variety}-seed{request.seed}"
        measured, cell = predict(fitted, self.base, added, name, request.variety, self.store)
        return Row(
            request.task.name, request.method, request.variety, request.seed, request.count, request.variant,
            added.seen, added.carried, added.trained, added.pairs, cell.directory.name,
            self.store.name_of(added.origin), fitted.directory.name, measured,
        )  # fmt: skip


def carry_out(requests: Sequence[Request], evaluated: Sequence[str], shown: bool) -> list[Row]:
    """All rows, with a progress bar over them."""
    rows = []
    with (
        counting_bar("measuring", len(requests), shown, unit="cells") as bar,
        told((request.bench for request in requests), bar.say),
    ):
        for request in requests:
            bar.say(f"{request.method}, {request.variety}, seed {request.seed}")
            rows.append(request.bench.measure(request, evaluated))
            bar(1)
    return rows


@contextmanager
def told(benches: Iterable[Workbench], say: Callable[[str], None]) -> Iterator[None]:
    """Let trainings say how far they are."""
    methods = {id(bench.methods): bench.methods for bench in benches}.values()
    for each in methods:
        each.say = say
    try:
        yield
    finally:
        for each in methods:
            each.say = lambda text: None


def wanted(bench: Workbench, methods: Sequence[str], varieties: Sequence[str]) -> list[Request]:
    """Every method in every variety and in Standard English, where it means something, on every task and seed."""
    found = []
    for task in bench.tasks:
        for seed in bench.suite.seeds:
            for method in methods:
                found += [Request(bench, task, method, variety, seed) for variety in places(method, varieties)]
    return found


def places(method: str, varieties: Sequence[str]) -> list[str]:
    """Where a method is measured: in Standard English too, unless it is of one dialect or has another's vector."""
    of_dialects = method in PER_DIALECT or (method in GENERATED and method != "own")
    return list(varieties) if of_dialects else [*varieties, typology.STANDARD]


def ordered_methods(suite: SuiteConfig) -> list[str]:
    """`none` and `own`, then the others as the recipe names them."""
    return list(dict.fromkeys((NONE, "own", *suite.methods)))


def labelled_as(requests: Sequence[Request], variant: str) -> list[Request]:
    """The same requests under the name of a variant."""
    return [replace(request, variant=variant) for request in requests]


def _configs(suite: SuiteConfig, overrides: Sequence[str]) -> dict[int, Config]:
    """The run's configuration for each seed."""
    if suite.runs:
        if overrides:
            raise EvaluationError(
                "this experiment trains hypernetworks of its own, and suite.runs names trained ones\n"
                "  fix: give suite.recipe"
            )
        return {
            seed: load_config(Path(run) / "config.yaml", environment={})
            for seed, run in zip(suite.seeds, suite.runs, strict=True)
        }
    assert suite.recipe is not None
    config = load_config(suite.recipe, [*suite.overrides, *overrides], environment={})
    return {
        seed: config.model_copy(update={"run": RunConfig(directory=config.run.directory, seed=seed)})
        for seed in suite.seeds
    }


def _on(corpus: Corpus, config: Config) -> Config:
    data = config.data.model_copy(update={"directory": str(corpus.directory)})
    return config.model_copy(update={"data": data})


def _in_every_variety(settings: LabelledConfig) -> LabelledConfig:
    data = settings.labelled
    changes = {"directory": f"{data.directory}-all-varieties", "varieties": typology.varieties()}
    return settings.model_copy(update={"labelled": data.model_copy(update=changes)})


def _base(config: Config, device: str, like: Workbench | None) -> AdaptedModel:
    if like is not None:
        first = like.configs[like.suite.seeds[0]]
        if (first.base, first.lora) == (config.base, config.lora):
            return like.base
    return load_base(config.base, config.lora, device)
