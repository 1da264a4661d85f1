"""Conditions of the dialect evaluation: the dialect's own vector, and controls that could explain its effect away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hl_scale.conditions import typology

if TYPE_CHECKING:
    from hl_scale.data.corpus import Pair

Vector = npt.NDArray[np.float32]

OWN = "own"
PLAIN = "plain_lora"
CONTROLS = {
    "zero": "the zero vector, which stands for Standard English",
    "mean_named": "the mean of the vectors of all eWAVE varieties",
    "mean_training": "the mean vector of the training pairs, identity pairs left out",
    "shuffled": "the dialect's own values permuted over the features, by seed",
    "wrong": "the vector of the evaluated variety that is farthest from this one (Euclidean distance)",
    PLAIN: "one plain LoRA trained on the same pairs with the same budget, without a condition",
}
"""What each control puts in the place of the dialect's own vector."""


@dataclass(frozen=True)
class TrainingConditions:
    """What training saw: names of the varieties, distinct vectors (K, 235) and the mean vector over pairs (235,)."""

    varieties: frozenset[str]
    vectors: Vector
    mean: Vector

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> TrainingConditions:
        """Collect the conditions of the training pairs; identity pairs (Standard English) are left out."""
        dialect = [pair for pair in pairs if pair.variety != "standard"]
        if not dialect:
            raise ValueError("the corpus has no dialect pairs to train on; prepare it again")
        vectors = np.stack([pair.vector for pair in dialect])
        mean = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
        return cls(frozenset(pair.variety for pair in dialect), np.unique(vectors, axis=0), mean)

    def coverage(self, vector: Vector) -> dict[str, float]:
        """Share of a dialect's features that training saw, by the three weightings of `typology.coverage`."""
        return {
            weighting: float(typology.coverage(vector, self.vectors, weighting=weighting))
            for weighting in ("binary", "attestation", "implementable")
        }


def condition_vectors(
    variety: str, evaluated: Sequence[str], training: TrainingConditions, seed: int
) -> dict[str, Vector]:
    """The vector (235,) fed under every condition that needs one (all but the plain LoRA).

    Args:
        variety: the dialect.
        evaluated: the evaluated varieties, among which the wrong one is found.
        training: what training saw.
        seed: seed of the permutation; every dialect is permuted alike.
    """
    own = typology.vector(variety)
    permutation = np.random.default_rng(seed).permutation(len(own))
    return {
        OWN: own,
        "zero": np.zeros_like(own),
        "mean_named": mean_named_vector(),
        "mean_training": training.mean,
        "shuffled": own[permutation],
        "wrong": typology.vector(wrong_variety(variety, evaluated)),
    }


def mean_named_vector() -> Vector:
    """Mean of the vectors of all eWAVE varieties, (235,)."""
    named = np.stack([typology.vector(name) for name in typology.varieties()])
    return named.mean(axis=0, dtype=np.float64).astype(np.float32)


def wrong_variety(variety: str, evaluated: Sequence[str]) -> str:
    """The variety other than ``variety`` whose vector is farthest from its own, the first by name among equals.

    Looked for among the evaluated varieties, or among all of eWAVE where ``variety`` is the only one.
    """
    candidates = [name for name in evaluated if name != variety]
    candidates = candidates or [name for name in typology.varieties() if name != variety]
    own = typology.vector(variety)
    return min(candidates, key=lambda name: (-float(np.square(typology.vector(name) - own).sum()), name))
