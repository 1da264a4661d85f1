"""`hl-scale evaluate --suite dialect-tasks`: an experiment of a recipe, from data to report."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hl_scale.config.suites import SuiteRecipe
from hl_scale.engine.alignment import corpus_fingerprint
from hl_scale.engine.run import environment
from hl_scale.evaluation.dialect_tasks.cells import CellStore
from hl_scale.evaluation.dialect_tasks.experiments import EXPERIMENTS, Experiment, Laboratory
from hl_scale.evaluation.dialect_tasks.methods import MEANINGS
from hl_scale.evaluation.dialect_tasks.report import write_suite_report
from hl_scale.evaluation.measurement import EvaluationError

CAVEATS = (
    "Dialect text is made by rules (Multi-VALUE) from eWAVE features, not by speakers.",
    "Intervals are over test sentences; the variance of training is not in them: see the spread over seeds.",
    "Learning rates of baselines are those of the recipe; they were not tuned for each of them.",
    "The best baseline is chosen on the sentences it is compared on, which favours it.",
    "A method is seen in a dialect if its adapter was trained on text of that dialect.",
)


@dataclass(frozen=True)
class SuiteResult:
    """What was written, and how many cells were made and read for it."""

    result: dict[str, Any]
    directory: Path
    report: Path
    made: int
    read: int


def run_suite(recipe: SuiteRecipe, out: Path, experiment: str, device: str, *, shown: bool = True) -> SuiteResult:
    """Carry an experiment out: train and measure the cells that are missing, and write tables and report.

    Args:
        recipe: the suite.
        out: folder of all its experiments: cells/, and a folder with results of each.
        experiment: one of `EXPERIMENTS`.
        device: where models run.
        shown: whether progress is.

    Raises:
        EvaluationError: an experiment that does not exist, or that the recipe does not allow.
        ConfigError, LabelledError, CorpusError: see what is read and prepared.
    """
    if experiment not in EXPERIMENTS:
        raise EvaluationError(f"there is no experiment {experiment!r}\n  fix: use one of {', '.join(EXPERIMENTS)}")
    started = time.perf_counter()
    store = CellStore(out / "cells")
    lab = Laboratory(recipe, store, device, shown)
    found = EXPERIMENTS[experiment](lab)
    result = {
        "suite": "dialect-tasks",
        "format": 1,
        "experiment": experiment,
        "methods": {name: text for name, text in MEANINGS.items() if any(row.method == name for row in found.rows)},
        "tasks": found.tasks,
        "cells": [row.facts() for row in found.rows],
        "caveats": list(CAVEATS),
        "provenance": {**_provenance(lab, found), "wall_seconds": round(time.perf_counter() - started, 1)},
    }
    settings = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    report = write_suite_report(result, out / experiment, settings)
    return SuiteResult(result, out / experiment, report, len(set(store.made)), len(set(store.read) - set(store.made)))


def _provenance(lab: Laboratory, found: Experiment) -> dict[str, Any]:
    bench = lab.main
    config = bench.configs[bench.suite.seeds[0]]
    return {
        "base_model": config.base.model,
        "base_fingerprint": bench.base.fingerprint,
        "corpus": corpus_fingerprint(bench.corpus),
        "labelled": {task.name: task.data.manifest["fingerprint"] for task in bench.tasks},
        "left_out_of_labelled": {task.name: list(task.data.apart) for task in bench.tasks},
        "budget": bench.methods.budget,
        "steps": config.training.steps,
        "batch_size": config.training.global_batch_size,
        "seeds": list(bench.suite.seeds),
        "hypernetworks": sorted({row.adapter for row in found.rows if row.method == "own" and row.adapter}),
        "environment": environment(),
    }
