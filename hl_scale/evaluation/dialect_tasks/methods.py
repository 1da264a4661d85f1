"""Methods: what each of them adds to a task adapter in a dialect, and how it is trained, within one budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hl_scale.adaptations import Adaptation, build_adaptation, load_adaptation, save_adaptation, size_for_budget
from hl_scale.adaptations.building import KINDS, parameter_count
from hl_scale.adaptations.lora import LoraAdaptation
from hl_scale.base import AdaptedModel
from hl_scale.conditions import typology
from hl_scale.config import Config, HypernetworkConfig, RunConfig
from hl_scale.data.corpus import Corpus
from hl_scale.engine.alignment import AlignmentWorkload, corpus_fingerprint
from hl_scale.engine.run import LoadedRun, composed_factors, load_run, settings_fingerprint
from hl_scale.evaluation.controls import CONTROLS, OWN, TrainingConditions, condition_vectors
from hl_scale.evaluation.dialect_tasks.cells import Cell, CellStore
from hl_scale.evaluation.dialect_tasks.fitting import (
    DialectPairs,
    fit_by_alignment,
    fit_by_labels,
    fit_by_tada,
    open_workload,
)
from hl_scale.evaluation.dialect_tasks.labelled_tasks import Adapter, FittedTask
from hl_scale.hypernetwork.fingerprint import weights_fingerprint
from hl_scale.lora import lora_scale

NONE = "none"
GENERATED = (OWN, "zero", "mean_named", "mean_training", "shuffled", "wrong")
TRAINED = ("lora", "prefix", "bottleneck", "tada", "hyper_adapter")
PER_DIALECT = ("lora_dialect", "aligned", "annotated")
MEANINGS = {
    NONE: "the task adapter alone",
    OWN: "the hypernetwork's adapter of the dialect's own feature vector",
    **{name: f"the hypernetwork's adapter of {text}" for name, text in CONTROLS.items() if name in GENERATED},
    "lora": "one plain LoRA for all dialects, aligned on the hypernetwork's pairs",
    "prefix": "one prefix of keys and values for all dialects, aligned on the same pairs",
    "bottleneck": "bottleneck adapters for all dialects, aligned on the same pairs",
    "tada": "bottleneck adapters for all dialects, trained by TADA on the same pairs",
    "hyper_adapter": "bottleneck adapters that a network generates from the feature vector, aligned on the same pairs",
    "lora_dialect": "a plain LoRA for each dialect, aligned on that dialect's own sentences",
    "aligned": "a plain LoRA aligned on so many sentences of the dialect beside their Standard English originals",
    "annotated": "a plain LoRA trained by the labels of so many sentences of the dialect",
}
"""What every method is, for reports."""
LEARNING_RATES = {
    "lora": 3e-3, "prefix": 1e-2, "bottleneck": 1e-3, "tada": 1e-3, "hyper_adapter": 1e-3,
    "lora_dialect": 3e-3, "aligned": 3e-3, "annotated": 1e-3,
}  # fmt: skip
"""Peak learning rates of baselines, unless a recipe says otherwise."""
_TRAINING_KEYS = (
    "steps", "global_batch_size", "schedule", "warmup_ratio", "minimum_learning_rate_ratio", "weight_decay", "betas",
    "adam_epsilon", "gradient_clipping", "length_bucket_batches",
)  # fmt: skip


class Methods:
    """Everything that is trained on one corpus for one base.

    Args:
        configs: the run's configuration for each seed.
        base: the frozen base.
        corpus: what all of it is aligned on.
        store: cells that are read or made.
        runs: directories of trained hypernetworks by seed; others are trained.
        budget: most parameters of an adapter as a dialect carries it; None for those of one generated LoRA.
        learning_rates: by method, instead of `LEARNING_RATES`.
        dialect_steps: of the LoRAs of one dialect, those of the configurations unless given.
        control_seed: of the shuffled vectors.
        vector: what stands for a variety as `own` vector, features unless given.
    """

    def __init__(
        self,
        configs: Mapping[int, Config],
        base: AdaptedModel,
        corpus: Corpus,
        store: CellStore,
        *,
        runs: Mapping[int, Path] | None = None,
        budget: int | None = None,
        learning_rates: Mapping[str, float] | None = None,
        dialect_steps: int | None = None,
        control_seed: int = 0,
        vector: Callable[[str], typology.Vector] = typology.vector,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.configs, self.base, self.corpus, self.store = configs, base, corpus, store
        self.external, self.say, self.control_seed, self.vector = dict(runs or {}), say, control_seed, vector
        self.learning_rates = {**LEARNING_RATES, **(learning_rates or {})}
        self.dialect_configs = {seed: _paced(config, dialect_steps) for seed, config in configs.items()}
        self.lora = next(iter(configs.values())).lora
        self.budget = generated_size(base, self.lora.rank) if budget is None else budget
        self.conditions = TrainingConditions.of(corpus.train)
        self._runs: dict[int, LoadedRun] = {}
        self._loaded: dict[Path, Adaptation] = {}
        self._workloads: dict[tuple[int, str], AlignmentWorkload] = {}

    def run(self, seed: int) -> LoadedRun:
        """The hypernetwork of a seed, trained by the ordinary loop unless it is there."""
        if seed not in self._runs:
            directory = self.external.get(seed)
            if directory is None:
                directory = self._trained_run(seed).directory
            device = next(self.base.model.parameters()).device
            self._runs[seed] = load_run(directory, base=self.base, device=device)
        return self._runs[seed]

    def _trained_run(self, seed: int) -> Cell:
        config = self.configs[seed]
        key = {
            "kind": "run", "settings": settings_fingerprint(config), "seed": seed,
            "base": self.base.fingerprint, "data": corpus_fingerprint(self.corpus),
        }  # fmt: skip

        def build(directory: Path) -> dict[str, Any]:
            from hl_scale.engine.loop import train

            placed = config.model_copy(update={"run": RunConfig(directory=str(directory), seed=seed)})
            result = train(placed)
            if result.interrupted:
                raise KeyboardInterrupt
            return {"steps": result.step, "loss": result.loss}

        return self.store.get(f"run-{config.hypernetwork.kind}-seed{seed}", key, build, resumable=True)

    def adapter(
        self, method: str, variety: str, seed: int, evaluated: Sequence[str], task: FittedTask | None = None,
        count: int | None = None,
    ) -> Adapter:  # fmt: skip
        """What a method adds in a variety.

        Args:
            method: a key of `MEANINGS`.
            variety: full name; Standard English has the zero vector.
            seed: of training.
            evaluated: varieties among which the wrong one is found.
            task: whose sentences, and for `annotated` labels, a method for one dialect is trained on; others need none.
            count: how many of them; all annotated ones unless given.
        """
        if method == NONE:
            return Adapter()
        if method in GENERATED:
            return self._generated(method, variety, seed, evaluated)
        if method in PER_DIALECT:
            assert task is not None
            cell = self._dialect_lora(method, variety, seed, task, count)
        else:
            cell = self._shared(method, seed)
        if cell.directory not in self._loaded:
            self._loaded[cell.directory] = load_adaptation(cell.directory, self.base)
        adaptation = self._loaded[cell.directory]
        seen = method in PER_DIALECT or variety in self.conditions.varieties
        facts = (cell.directory, weights_fingerprint(adaptation), cell.facts["carried"], adaptation.parameter_count)
        pairs = cell.facts["distinct_pairs"]
        if isinstance(adaptation, LoraAdaptation):
            with torch.no_grad():
                return Adapter(*facts, pairs, seen, factors=adaptation.factors())
        vector = torch.from_numpy(self.vector(variety).copy())[None] if adaptation.conditional else None
        return Adapter(*facts, pairs, seen, adaptation=adaptation, condition=vector)

    def _generated(self, method: str, variety: str, seed: int, evaluated: Sequence[str]) -> Adapter:
        run = self.run(seed)
        if method == OWN or variety == typology.STANDARD:
            vector = self.vector(variety)
        else:
            vector = condition_vectors(variety, evaluated, self.conditions, self.control_seed)[method]
        condition = torch.from_numpy(vector.copy())[None]
        factors = composed_factors(run, condition)
        trained = sum(parameter.numel() for parameter in run.hypernetwork.parameters())
        identity = weights_fingerprint(run.hypernetwork)
        carried = generated_size(run.base, run.config.lora.rank)
        seen = variety in self.conditions.varieties
        pairs = len(self.corpus.train)
        return Adapter(run.directory, identity, carried, trained, pairs, seen, factors=factors, condition=condition)

    def sized(self, method: str) -> tuple[str, dict[str, Any], int]:
        """Kind of adaptation, its settings within the budget, and the parameters that one dialect carries."""
        kind = {"tada": "bottleneck", **dict.fromkeys(PER_DIALECT, "lora")}.get(method, method)
        settings: dict[str, Any] = {}
        if kind == "lora":
            rank = size_for_budget("lora", self.base, self.budget)
            settings["scale"] = lora_scale(self.lora.scale_convention, self.lora.alpha, self.lora.rank)
            return kind, settings | {"rank": rank}, parameter_count("lora", self.base, {"rank": rank})
        if kind != "hyper_adapter":
            size = {KINDS[kind].size: size_for_budget(kind, self.base, self.budget)}
            return kind, size, parameter_count(kind, self.base, size)
        # What it generates fits the budget, as what the hypernetwork generates does; the networks have the same widths.
        width = size_for_budget("bottleneck", self.base, self.budget)
        network = next(iter(self.configs.values())).hypernetwork
        if isinstance(network, HypernetworkConfig):
            settings = {
                "condition_width": network.condition_width, "embedding_width": network.slot_width,
                "hidden_width": network.hidden_width,
            }  # fmt: skip
        carried = parameter_count("bottleneck", self.base, {"width": width})
        return kind, settings | {"width": width}, carried

    def _shared(self, method: str, seed: int) -> Cell:
        """One adaptation for all dialects, on the hypernetwork's pairs."""
        kind, settings, carried = self.sized(method)
        rate, config = self.learning_rates[method], self.configs[seed]

        def build(directory: Path) -> dict[str, Any]:
            workload = self._workload(seed, config, self.corpus)
            adaptation = build_adaptation(kind, self.base, settings, typology.NUM_FEATURES, seed=seed)
            if method == "tada":
                facts = fit_by_tada(adaptation, workload, rate, seed, self._advance(method, config))
            else:
                facts = fit_by_alignment(adaptation, workload, rate, self._advance(method, config))
            save_adaptation(adaptation, directory)
            return {**facts, "carried": carried}

        key = self._key(method, seed, config, settings, corpus_fingerprint(self.corpus))
        return self.store.get(f"{method}-seed{seed}", key, build)

    def _dialect_lora(self, method: str, variety: str, seed: int, task: FittedTask, count: int | None) -> Cell:
        """A LoRA of one dialect, on its annotated sentences."""
        kind, settings, carried = self.sized(method)
        rate, source = self.learning_rates[method], task.task
        examples, config = source.annotated(variety, count), self.dialect_configs[seed]

        def build(directory: Path) -> dict[str, Any]:
            adaptation = build_adaptation(kind, self.base, settings, seed=seed)
            assert isinstance(adaptation, LoraAdaptation)
            advance = self._advance(f"{method} {len(examples)} {variety}", config)
            if method == "annotated":
                bound = source.settings.task_adapter
                facts = fit_by_labels(adaptation, self.base, task.adapter, examples, config, bound, rate, advance)
            else:
                corpus = DialectPairs(variety, examples, source.fingerprint)
                facts = fit_by_alignment(adaptation, self._workload(seed, config, corpus), rate, advance)
            save_adaptation(adaptation, directory)
            return {**facts, "carried": carried}

        key = self._key(method, seed, config, settings, source.fingerprint) | {
            "variety": variety,
            "count": len(examples),
        }
        if method == "annotated":
            key["task_adapter"] = task.identity
        return self.store.get(f"{method}-{len(examples)}-{variety}-seed{seed}", key, build)

    def _key(self, method: str, seed: int, config: Config, settings: Mapping[str, Any], data: str) -> dict[str, Any]:
        training = config.training.model_dump(mode="json", include=set(_TRAINING_KEYS))
        return {
            "kind": "adapter", "method": method, "seed": seed, "base": self.base.fingerprint, "data": data,
            "settings": dict(settings), "slots": [slot.path for slot in self.base.slots],
            "learning_rate": self.learning_rates[method], "training": training,
            "objective": config.objective.model_dump(mode="json"),
        }  # fmt: skip

    def _workload(self, seed: int, config: Config, corpus: Corpus) -> AlignmentWorkload:
        if isinstance(corpus, DialectPairs):
            return open_workload(config, self.base, corpus, self.say)
        place = (seed, corpus_fingerprint(corpus))
        if place not in self._workloads:
            self._workloads[place] = open_workload(config, self.base, corpus, self.say)
        return self._workloads[place]

    def _advance(self, name: str, config: Config) -> Callable[[int, float], None]:
        steps = config.training.steps
        return lambda step, loss: self.say(f"{name}: step {step}/{steps}, loss {loss:.4f}")


def _paced(config: Config, steps: int | None) -> Config:
    if steps is None:
        return config
    return config.model_copy(update={"training": config.training.model_copy(update={"steps": steps})})


def generated_size(base: AdaptedModel, rank: int) -> int:
    """Parameters of one generated LoRA: r (in + out), summed over slots."""
    return parameter_count("lora", base, {"rank": rank})
