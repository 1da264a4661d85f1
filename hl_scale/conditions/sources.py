"""Where vectors of varieties come from: eWAVE for English, URIEL for other languages."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from hl_scale.conditions import languages, typology
from hl_scale.conditions.typology import Condition, Vector

SourceName = Literal["ewave", "lang2vec"]


class Typology(Protocol):
    """What the modules `typology` and `languages` have in common."""

    NUM_FEATURES: int
    """C, entries of a vector."""
    STANDARD: str
    """The variety that is the zero vector."""
    WEIGHTINGS: tuple[str, ...]
    """What `coverage` can weigh features by."""

    def varieties(self) -> tuple[str, ...]:
        """Names of all varieties but the standard one."""

    def resolve(self, name: str) -> str:
        """The full name of a variety; an UnknownVarietyError lists the closest."""

    def vector(self, name: str) -> Vector:
        """(C,) float32, read-only."""

    def distance(self, first: str, second: str) -> float:
        """How far two varieties are from each other."""

    def coverage(self, target_vector: npt.NDArray[Any], training_vectors: npt.NDArray[Any], weighting: Any) -> float:
        """Share of what distinguishes a variety that training has seen."""

    def parse_condition(self, text: str) -> Condition:
        """A condition as users write it."""


def source(name: SourceName) -> Typology:
    """The source of this name in a configuration, `data.vectors`."""
    return languages if name == "lang2vec" else typology


def mean_vector(of: Typology) -> Vector:
    """Mean of the vectors of all varieties, (C,)."""
    named = np.stack([of.vector(name) for name in of.varieties()])
    return named.mean(axis=0, dtype=np.float64).astype(np.float32)
