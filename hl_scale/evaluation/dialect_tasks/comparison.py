"""From measured rows to what is said of them: qualities, paired differences, points lost and regained.

Quality is accuracy, Pearson's correlation where labels are scores, or the share of the divergence that is removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from hl_scale.conditions import typology
from hl_scale.evaluation.controls import OWN
from hl_scale.evaluation.dialect_tasks.methods import NONE, TRAINED
from hl_scale.evaluation.dialect_tasks.statistics import (
    Kind,
    Predictions,
    difference,
    mcnemar,
    quality,
    resampled,
    share,
)
from hl_scale.evaluation.dialect_tasks.workbench import Row
from hl_scale.evaluation.labelled import Measurement
from hl_scale.evaluation.statistics import SentenceBootstrap

Key = tuple[str, str]
METRICS: dict[Kind, str] = {
    "classes": "accuracy", "scores": "Pearson's correlation", "divergences": "divergence removed",
}  # fmt: skip


class TaskTable:
    """The rows of one task and one variant, by (method, variety); a method with a count is "aligned 25".

    Args:
        rows: measured, of one task; every seed of a method has the same sentences of a variety.
        samples, seed: of the bootstrap.
    """

    def __init__(self, rows: Iterable[Row], samples: int, seed: int) -> None:
        self.rows: dict[Key, list[Row]] = {}
        for row in rows:
            self.rows.setdefault((heading(row), row.variety), []).append(row)
        ids = sorted({i for group in self.rows.values() for i in group[0].measurement.example_ids})
        number = {example: row for row, example in enumerate(ids)}
        self.found = {key: _predictions(group, number) for key, group in self.rows.items()}
        self.metric = METRICS[next(iter(self.found.values())).kind]
        self.bootstrap = SentenceBootstrap(len(ids), samples=samples, seed=seed)

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(method for method, _ in self.rows))

    def varieties(self, method: str) -> list[str]:
        """Where a method was measured, Standard English left out."""
        return [variety for name, variety in self.rows if name == method and variety != typology.STANDARD]

    def seen(self, method: str, variety: str) -> bool:
        return self.rows[method, variety][0].seen

    def of(self, method: str, varieties: Sequence[str]) -> list[Predictions]:
        return [self.found[method, variety] for variety in varieties]

    def method_facts(self, method: str) -> dict[str, Any]:
        """Quality in every variety, their mean, Standard English, and the spread over seeds."""
        names = self.varieties(method)
        row = self.rows[method, names[0]][0]
        by_seed = np.mean([part.qualities() for part in self.of(method, names)], axis=0)
        facts: dict[str, Any] = {
            "method": method,
            "carried": row.carried,
            "trained": row.trained,
            "pairs": row.pairs,
            "seeds": len(by_seed),
            "by_seed": by_seed.tolist(),
            "spread": float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None,
            "mean": quality(self.bootstrap, self.of(method, names)).to_dict(),
            "dialects": {
                name: {
                    **quality(self.bootstrap, self.of(method, [name])).to_dict(),
                    "seen": self.seen(method, name),
                    "cells": [each.cell for each in self.rows[method, name]],
                }
                for name in names
            },
            "standard": None,
        }
        if (method, typology.STANDARD) in self.rows:
            facts["standard"] = quality(self.bootstrap, self.of(method, [typology.STANDARD])).to_dict()
        return facts

    def difference(self, first: str, second: str, varieties: Sequence[str]) -> dict[str, Any]:
        """first - second on the same sentences: their mean over varieties, and each with McNemar's p for every seed;
        None of scores."""
        return {
            "first": first,
            "second": second,
            "mean": difference(self.bootstrap, self.of(first, varieties), self.of(second, varieties)).to_dict(),
            "dialects": {
                name: {
                    **difference(self.bootstrap, self.of(first, [name]), self.of(second, [name])).to_dict(),
                    "p": self._p(first, second, name),
                }
                for name in varieties
            },
        }

    def _p(self, first: str, second: str, variety: str) -> list[float] | None:
        if self.metric != METRICS["classes"]:
            return None
        ours = self.found[first, variety]
        theirs = self.found[second, variety].at(ours.rows)
        return [mcnemar(a, b) for a, b in zip(ours.correct, theirs.correct, strict=True)]

    def best_baseline(self, varieties: Sequence[str]) -> str | None:
        """The one trained method with the highest mean; None where there is none."""
        rivals = [name for name in self.methods if name in TRAINED]
        return max(rivals, key=lambda name: resampled(self.bootstrap, self.of(name, varieties))[0], default=None)

    def headline(self, own: str = OWN) -> dict[str, Any] | None:
        """Points lost to dialect, points that the own adapters regain, and the same against the best baseline.

        In varieties that no training has seen. Lost: quality on the Standard English originals less that on the
        dialect, under the task adapter alone; the share that is regained is None unless that is clear of 0. The best
        baseline is the one with the highest mean on these very sentences, which favours it.
        """
        names = [name for name in self.varieties(own) if not self.seen(own, name)]
        if not names or (NONE, typology.STANDARD) not in self.rows:
            return None
        bare, ours = self.of(NONE, names), self.of(own, names)
        original = [self.found[NONE, typology.STANDARD].at(part.rows) for part in bare]
        lost = difference(self.bootstrap, original, bare)
        regained = difference(self.bootstrap, ours, bare)
        best = self.best_baseline(names)
        return {
            "varieties": names,
            "lost": lost.to_dict(),
            "regained": regained.to_dict(),
            "share": share(self.bootstrap, ours, bare, original).to_dict() if lost.low > 0 else None,
            "best_baseline": best,
            "over_best": None if best is None else difference(self.bootstrap, ours, self.of(best, names)).to_dict(),
        }


def heading(row: Row) -> str:
    """What a method is called in tables."""
    name = row.method if row.count is None else f"{row.method} {row.count}"
    return f"{name} ({row.variant})" if row.variant else name


def _predictions(group: Sequence[Row], number: dict[int, int]) -> Predictions:
    """Rows of several seeds, sentences in the order of their numbers."""
    first = group[0].measurement
    if any(row.measurement.example_ids != first.example_ids for row in group):
        raise ValueError(f"{group[0].method} was measured on other sentences under another seed")
    rows = np.array([number[example] for example in first.example_ids], dtype=np.intp)
    order = np.argsort(rows, kind="stable")
    predicted = np.stack([row.measurement.predictions[order] for row in group])
    if isinstance(first, Measurement):
        kind: Kind = "classes" if first.task.kind == "classification" else "scores"
    else:
        kind = "divergences"
    return Predictions(rows[order], first.labels[order], predicted, kind)
