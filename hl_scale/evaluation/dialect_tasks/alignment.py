"""Alignment itself under every method of the suite: divergence from the states of the Standard English originals.

On the held-out sentences of the corpus, which nothing is trained on. Every method has the same budget, pairs and steps,
and every seed is measured, which the evaluation of a single run (`hl_scale.evaluation.dialects`) does not do.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from hl_scale.conditions import typology
from hl_scale.data.corpus import Pair
from hl_scale.data.durable import write_text
from hl_scale.evaluation.dialect_tasks.labelled_tasks import Adapter
from hl_scale.evaluation.dialect_tasks.methods import NONE
from hl_scale.evaluation.dialect_tasks.workbench import Row, Workbench
from hl_scale.evaluation.measurement import EvaluationError, Measurer
from hl_scale.evaluation.provenance import content_hash
from hl_scale.objectives.alignment import AlignmentObjective

Array = npt.NDArray[np.float64]
TASK = "alignment"
_FILE = "divergences.json"


@dataclass(frozen=True)
class AlignmentMeasurement:
    """Divergences of sentences to their originals, one by one.

    Attributes:
        example_ids: (N,) of the sentences.
        labels: (N,) without an adapter.
        predictions: (N,) with it.
    """

    example_ids: tuple[int, ...]
    labels: Array
    predictions: Array

    @property
    def metrics(self) -> dict[str, float | None]:
        """Mean divergence, and the share of the divergence that the adapter removes; None of Standard English."""
        base = float(self.labels.sum())
        removed = None if base <= 0 else 1 - float(self.predictions.sum()) / base
        return {"divergence": float(self.predictions.mean()), "divergence_removed": removed}


class Aligner:
    """Measures the methods of a bench on held-out sentences.

    Args:
        bench: with its corpus and base.
        varieties: full names; Standard English has identity pairs.

    Raises:
        EvaluationError: a variety has no held-out sentences, or there are none.
    """

    def __init__(self, bench: Workbench, varieties: list[str]) -> None:
        config = bench.configs[bench.suite.seeds[0]]
        missing = [name for name in varieties if name not in bench.corpus.heldout_varieties]
        if missing or not varieties:
            raise EvaluationError(
                f"{bench.corpus.directory} has no held-out sentences in {', '.join(missing) or 'any variety'}\n"
                "  fix: add it to data.evaluation_varieties of the recipe, or leave it out of suite.dialects"
            )
        self.bench, self.varieties = bench, varieties
        self.objective = config.objective.model_dump(mode="json")
        self._measurer = Measurer(bench.base, AlignmentObjective(config.alignment), config.evaluation.batch_size)
        self._targets: dict[int, Tensor] = {}
        self._base: dict[str, Array] = {}

    def measure(self, method: str, variety: str, seed: int) -> Row:
        """Train what is missing, and measure."""
        pairs = self.bench.corpus.heldout("standard" if variety == typology.STANDARD else variety)
        if variety not in self._base:
            bare, _, _ = self._divergences(NONE, Adapter(), variety, pairs)
            self._base[variety] = bare
        added = self.bench.methods.adapter(method, variety, seed, self.varieties)
        name = NONE if method == NONE else f"{method}-seed{seed}"  # the bare base is the same under every seed
        values, cell, ids = self._divergences(name, added, variety, pairs)
        return Row(
            TASK, method, variety, seed, None, "", added.seen, added.carried, added.trained, added.pairs, cell,
            self.bench.store.name_of(added.origin), "", AlignmentMeasurement(ids, self._base[variety], values),
        )  # fmt: skip

    def _divergences(
        self, name: str, added: Adapter, variety: str, pairs: list[Pair]
    ) -> tuple[Array, str, tuple[int, ...]]:
        ids = tuple(pair.sentence_id for pair in pairs)
        key = {
            "kind": TASK,
            "base": self.bench.base.fingerprint,
            "added": added.identity,
            "condition": None if added.condition is None else content_hash(added.condition.tolist()),
            "variety": variety,
            "objective": self.objective,
            "sentences": content_hash([[pair.sentence_id, pair.standard, pair.dialect] for pair in pairs]),
        }

        def build(directory: Path) -> dict[str, Any]:
            targets = self._originals(pairs)
            tokens = self._measurer.tokenize([pair.dialect for pair in pairs])
            adaptation = added.adaptation
            with nullcontext() if adaptation is None else adaptation.attached(self.bench.base, added.condition):
                values, _ = self._measurer.divergences(tokens, targets, added.factors)
            if not np.isfinite(values).all():
                raise EvaluationError("a divergence is not finite: the adapter holds NaN or infinity")
            tree = {"variety": variety, "sentence_ids": list(ids), "divergences": values.tolist()}
            write_text(directory / _FILE, json.dumps(tree) + "\n")
            return {"divergence": float(values.mean()), "adapter": self.bench.store.name_of(added.origin)}

        cell = self.bench.store.get(f"{TASK}-{name}-{variety}", key, build)
        tree = json.loads((cell.directory / _FILE).read_text(encoding="utf-8"))
        return np.asarray(tree["divergences"], np.float64), cell.directory.name, ids

    def _originals(self, pairs: list[Pair]) -> list[Tensor]:
        """States of the originals under the bare base, each computed once."""
        missing = [pair for pair in pairs if pair.sentence_id not in self._targets]
        if missing:
            clouds = self._measurer.frozen_clouds(self._measurer.tokenize([pair.standard for pair in missing]))
            self._targets |= {pair.sentence_id: cloud for pair, cloud in zip(missing, clouds, strict=True)}
        return [self._targets[pair.sentence_id] for pair in pairs]
