"""Conditions of the dialect evaluation: the dialect's own vector, and controls that could explain its effect away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hl_scale.conditions import typology
from hl_scale.conditions.sources import Typology, mean_vector

if TYPE_CHECKING:
    from hl_scale.data.corpus import Pair

Vector = npt.NDArray[np.float32]

OWN = "own"
PLAIN = "plain_lora"
CONTROLS = {
    "zero": "the zero vector, which stands for Standard English",
    "mean_named": "the mean of the vectors of all varieties that have one",
    "mean_training": "the mean vector of the training pairs, identity pairs left out",
    "shuffled": "the dialect's own values permuted over the features, by seed",
    "wrong": "the vector of the evaluated variety that is farthest from this one",
    PLAIN: "one plain LoRA trained on the same pairs with the same budget, without a condition",
}
"""What each control puts in the place of the dialect's own vector."""


@dataclass(frozen=True)
class TrainingConditions:
    """What training saw: names of the varieties, distinct vectors (K, C) and the mean vector over pairs (C,); `source`
    knows the vectors of all varieties."""

    varieties: frozenset[str]
    vectors: Vector
    mean: Vector
    source: Typology = typology

    @classmethod
    def of(cls, pairs: Sequence[Pair], source: Typology = typology) -> TrainingConditions:
        """Collect the conditions of the training pairs; identity pairs (Standard English) are left out."""
        dialect = [pair for pair in pairs if pair.variety != "standard"]
        if not dialect:
            raise ValueError("the corpus has no dialect pairs to train on; prepare it again")
        vectors = np.stack([pair.vector for pair in dialect])
        mean = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
        return cls(frozenset(pair.variety for pair in dialect), np.unique(vectors, axis=0), mean, source)

    def coverage(self, vector: Vector) -> dict[str, float]:
        """Share of a dialect's features that training saw, by the weightings of the source's `coverage`."""
        return {
            weighting: float(self.source.coverage(vector, self.vectors, weighting))
            for weighting in self.source.WEIGHTINGS
        }

    def nearest(self, variety: str) -> dict[str, Any] | None:
        """The trained variety that is nearest to one, and its distance; None if only mixtures were trained on."""
        named = sorted(self.varieties - {"virtual"})
        found = min(((self.source.distance(variety, name), name) for name in named), default=None)
        return None if found is None else {"variety": found[1], "distance": found[0]}


def condition_vectors(
    variety: str, evaluated: Sequence[str], training: TrainingConditions, seed: int
) -> dict[str, Vector]:
    """The vector (C,) fed under every condition that needs one (all but the plain LoRA).

    Args:
        variety: the dialect.
        evaluated: the evaluated varieties, among which the wrong one is found.
        training: what training saw.
        seed: seed of the permutation; every dialect is permuted alike.
    """
    source = training.source
    own = source.vector(variety)
    permutation = np.random.default_rng(seed).permutation(len(own))
    return {
        OWN: own,
        "zero": np.zeros_like(own),
        "mean_named": mean_vector(source),
        "mean_training": training.mean,
        "shuffled": own[permutation],
        "wrong": source.vector(wrong_variety(variety, evaluated, source)),
    }


def wrong_variety(variety: str, evaluated: Sequence[str], source: Typology = typology) -> str:
    """The variety that is farthest from ``variety``, the first by name among equals.

    Looked for among the evaluated varieties, or among all that have a vector where ``variety`` is the only one.
    """
    candidates = [name for name in evaluated if name != variety]
    candidates = candidates or [name for name in source.varieties() if name != variety]
    return min(candidates, key=lambda name: (-source.distance(variety, name), name))
