"""The experiments of the suite: which rows each of them wants, and what it makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hl_scale.conditions import typology
from hl_scale.config.suites import SuiteRecipe
from hl_scale.evaluation.controls import OWN
from hl_scale.evaluation.dialect_tasks.alignment import TASK, Aligner
from hl_scale.evaluation.dialect_tasks.cells import CellStore, slug
from hl_scale.evaluation.dialect_tasks.comparison import TaskTable
from hl_scale.evaluation.dialect_tasks.methods import NONE, PER_DIALECT
from hl_scale.evaluation.dialect_tasks.statistics import correlations, crossing
from hl_scale.evaluation.dialect_tasks.workbench import (
    Request,
    Row,
    Workbench,
    carry_out,
    labelled_as,
    ordered_methods,
    places,
    told,
    wanted,
)
from hl_scale.evaluation.measurement import EvaluationError
from hl_scale.evaluation.statistics import SentenceBootstrap
from hl_scale.progress import counting_bar


@dataclass(frozen=True)
class Experiment:
    """What an experiment found: rows, and for each task what is said of them."""

    rows: list[Row]
    tasks: dict[str, dict[str, Any]]


class Laboratory:
    """A suite's recipe and cells, and the benches that experiments work at."""

    def __init__(self, recipe: SuiteRecipe, store: CellStore, device: str, shown: bool) -> None:
        self.recipe, self.store, self.device, self.shown = recipe, store, device, shown
        self.main = Workbench(recipe.suite, store, device)

    def bench(
        self, overrides: Sequence[str], labelled_overrides: Sequence[str] = (), every_variety: bool = False,
        one_hot: bool = False,
    ) -> Workbench:  # fmt: skip
        """A bench of a changed recipe; the main one if nothing changes."""
        if not overrides and not labelled_overrides and not every_variety:
            return self.main
        suite, device = self.recipe.suite, self.device
        return Workbench(suite, self.store, device, overrides, labelled_overrides, self.main, every_variety, one_hot)

    def rows(self, requests: Sequence[Request], evaluated: Sequence[str]) -> list[Row]:
        return carry_out(requests, evaluated, self.shown)

    def tables(self, rows: Sequence[Row]) -> dict[str, TaskTable]:
        """A table for each task."""
        names = list(dict.fromkeys(row.task for row in rows))
        suite = self.recipe.suite
        return {
            name: TaskTable((row for row in rows if row.task == name), suite.bootstrap_samples, suite.seed)
            for name in names
        }


def main(lab: Laboratory) -> Experiment:
    """Every method in every dialect, and the own adapter against each of the others."""
    bench = lab.main
    bench.train()
    varieties = bench.varieties()
    rows = lab.rows(wanted(bench, ordered_methods(lab.recipe.suite), varieties), varieties)
    return Experiment(rows, {name: compared(table) for name, table in lab.tables(rows).items()})


def compared(table: TaskTable) -> dict[str, Any]:
    """Methods, differences of the own adapter to every other, and the headline."""
    others = [name for name in table.methods if name != OWN]
    return {
        "metric": table.metric,
        "methods": [table.method_facts(name) for name in table.methods],
        "differences": [table.difference(OWN, name, table.varieties(name)) for name in others],
        "headline": table.headline(),
    }


def alignment(lab: Laboratory) -> Experiment:
    """The share of the divergence that every method removes on held-out sentences, and what Standard English pays."""
    bench, suite = lab.main, lab.recipe.suite
    bench.train()
    varieties = [typology.resolve(name) for name in suite.dialects] or list(bench.corpus.heldout_varieties)
    aligner = Aligner(bench, varieties)
    methods = [name for name in ordered_methods(suite) if name not in PER_DIALECT]
    asked = [(name, place, seed) for seed in suite.seeds for name in methods for place in places(name, varieties)]
    rows = []
    with counting_bar("aligning", len(asked), lab.shown, unit="cells") as bar, told([bench], bar.say):
        for method, variety, seed in asked:
            bar.say(f"{method}, {variety}, seed {seed}")
            rows.append(aligner.measure(method, variety, seed))
            bar(1)
    dialects = [row for row in rows if row.variety != typology.STANDARD]
    table = lab.tables(dialects)[TASK]
    best = table.best_baseline(varieties)
    found = {
        **compared(table),
        "best_baseline": best,
        "over_best": None if best is None else table.difference(OWN, best, varieties)["mean"],
        "standard_damage": _standard_damage(lab, [row for row in rows if row.variety == typology.STANDARD]),
    }
    return Experiment(rows, {TASK: found})


def _standard_damage(lab: Laboratory, rows: Sequence[Row]) -> dict[str, Any]:
    """Mean divergence of Standard English sentences to themselves under each method, mean over seeds."""
    suite = lab.recipe.suite
    bootstrap = SentenceBootstrap(len(rows[0].measurement.labels), samples=suite.bootstrap_samples, seed=suite.seed)
    return {
        method: bootstrap.mean(
            np.mean([row.measurement.predictions for row in rows if row.method == method], axis=0)
        ).to_dict()
        for method in dict.fromkeys(row.method for row in rows if row.method != NONE)
    }


def annotation_curve(lab: Laboratory) -> Experiment:
    """LoRAs of a dialect by the number of its sentences they are trained on, against the generated adapter."""
    bench, settings = lab.main, lab.recipe.annotations
    bench.train()
    varieties = bench.varieties(settings.dialects)
    requests = [
        request for request in wanted(bench, [NONE, OWN], varieties) if request.variety != typology.STANDARD
    ] + [
        Request(bench, task, kind, variety, seed, count)
        for task in bench.tasks
        for kind in settings.kinds
        for count in settings.counts
        for variety in varieties
        for seed in lab.recipe.suite.seeds
    ]
    rows = lab.rows(requests, bench.varieties())
    found = {}
    for name, table in lab.tables(rows).items():
        own = table.method_facts(OWN)["mean"]
        curves = {}
        for kind in settings.kinds:
            names = [f"{kind} {count}" for count in settings.counts]
            points = [table.method_facts(each)["mean"] for each in names]
            curves[kind] = {
                "counts": list(settings.counts),
                "quality": points,
                "own_minus": [table.difference(OWN, each, varieties)["mean"] for each in names],
                "worth": crossing(settings.counts, [point["value"] for point in points], own["value"]),
            }
        found[name] = {**compared(table), "curves": curves}
    return Experiment(rows, found)


def coverage(lab: Laboratory) -> Experiment:
    """What a dialect gains, by the share of its features that training has seen."""
    settings = lab.recipe.coverage
    bench = lab.bench(settings.overrides, settings.labelled_overrides, settings.varieties == "all")
    bench.train()
    # suite.dialects are those of the other experiments; here all of a set's count.
    varieties = [name for name in bench.tasks[0].data.varieties]
    rows = lab.rows(wanted(bench, [NONE, OWN], varieties), varieties)
    shares = {name: bench.methods.conditions.coverage(typology.vector(name)) for name in varieties}
    found: dict[str, dict[str, Any]] = {}
    for name, table in lab.tables(rows).items():
        gains = {variety: table.difference(OWN, NONE, [variety])["mean"] for variety in varieties}
        unseen = [variety for variety in varieties if not table.seen(OWN, variety)]
        values = [gains[variety]["value"] for variety in unseen]
        found[name] = {
            **compared(table),
            "coverage": {
                variety: {"coverage": shares[variety], "gain": gains[variety], "seen": table.seen(OWN, variety)}
                for variety in varieties
            },
            "correlations": {
                weighting: _correlations(lab, [shares[v][weighting] for v in unseen], values)
                for weighting in ("binary", "attestation", "implementable")
            },
            "points": len(unseen),
        }
    return Experiment(rows, found)


def _correlations(lab: Laboratory, shares: Sequence[float], gains: Sequence[float]) -> dict[str, Any] | None:
    """None with fewer than three points, or where training covers all dialects alike."""
    if len(shares) < 3 or np.ptp(shares) < 1e-9:
        return None
    suite = lab.recipe.suite
    found = correlations(shares, gains, samples=suite.bootstrap_samples, seed=suite.seed)
    return {name: estimate.to_dict() for name, estimate in found.items()}


def leave_one_out(lab: Laboratory) -> Experiment:
    """Hypernetworks trained on the other dialects by name, each measured in the one it has not seen, against one
    that is trained on all of them."""
    settings = lab.recipe.leave_one_out
    varieties = lab.main.varieties(settings.dialects)
    if len(varieties) < 2:
        raise EvaluationError("leaving one dialect out needs at least two\n  fix: name more in leave_one_out.dialects")
    directory = lab.main.corpus.directory

    def requests(training: Sequence[str], name: str, methods: Sequence[str], measured: Sequence[str]) -> list[Request]:
        bench = lab.bench(
            [*settings.overrides, "data.mode=named", f"data.training_varieties={json.dumps(training)}",
             "data.evaluation_varieties=[]", f"data.directory={directory}-{name}"]
        )  # fmt: skip
        bench.train()
        return [r for r in wanted(bench, methods, measured) if r.variety != typology.STANDARD]

    methods = [NONE, OWN, *(["lora"] if "lora" in lab.recipe.suite.methods else [])]
    asked = []
    for left_out in varieties:
        others = [name for name in varieties if name != left_out]
        asked += requests(others, f"without-{slug(left_out)}", methods, [left_out])
    asked += labelled_as(requests(varieties, "all-named", [OWN], varieties), "seen")
    rows = lab.rows(asked, varieties)
    return Experiment(rows, {name: compared(table) for name, table in lab.tables(rows).items()})


def ablations(lab: Laboratory) -> Experiment:
    """The own adapter of changed hypernetworks, each against that of the recipe."""
    settings = lab.recipe.ablations
    if not settings.variants and not settings.one_hot:
        raise EvaluationError("the recipe names no ablations.variants\n  fix: give each a name and its changes")
    bench = lab.main
    bench.train()
    varieties = bench.varieties()
    requests = wanted(bench, [NONE, OWN], varieties)
    benches = {name: lab.bench(overrides) for name, overrides in settings.variants.items()}
    if settings.one_hot:
        benches["named"] = lab.bench(settings.one_hot)
        benches["one-hot"] = lab.bench(settings.one_hot, one_hot=True)
    for name, changed in benches.items():
        changed.train()
        requests += labelled_as(wanted(changed, [OWN], varieties), name)
    rows = lab.rows(requests, varieties)
    found = {
        name: {**compared(table), "over_one_hot": _over_one_hot(table) if settings.one_hot else None}
        for name, table in lab.tables(rows).items()
    }
    return Experiment(rows, found)


def _over_one_hot(table: TaskTable) -> dict[str, Any] | None:
    """Features against one-hot vectors, in dialects that neither network was trained on."""
    features, one_hot = "own (named)", "own (one-hot)"
    unseen = [name for name in table.varieties(features) if not table.seen(features, name)]
    return table.difference(features, one_hot, unseen) if unseen else None


EXPERIMENTS: dict[str, Callable[[Laboratory], Experiment]] = {
    "main": main,
    "alignment": alignment,
    "annotations": annotation_curve,
    "coverage": coverage,
    "leave_one_out": leave_one_out,
    "ablations": ablations,
}
