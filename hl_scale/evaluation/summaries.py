"""From per-sentence divergences to the numbers of a table row: ratios, paired differences, parts, averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hl_scale.evaluation.controls import OWN
from hl_scale.evaluation.measurement import Array, CloudStatistics
from hl_scale.evaluation.statistics import SentenceBootstrap

BASE = "base"


@dataclass(frozen=True)
class DialectValues:
    """Per-sentence divergences of one dialect.

    Attributes:
        variety: its name.
        rows: (m,) numbers of its sentences among all evaluated sentences.
        changed: (m,) whether the dialect's text differs from the Standard English text.
        values: condition -> (m,) divergences; "base" is the model without an adapter.
    """

    variety: str
    rows: npt.NDArray[np.intp]
    changed: npt.NDArray[np.bool_]
    values: Mapping[str, Array]

    def part(self, keep: npt.NDArray[np.bool_]) -> DialectValues:
        """The same dialect on some of its sentences."""
        kept = {condition: values[keep] for condition, values in self.values.items()}
        return DialectValues(self.variety, self.rows[keep], self.changed[keep], kept)

    @property
    def conditions(self) -> list[str]:
        """Every condition but the base."""
        return [condition for condition in self.values if condition != BASE]

    @property
    def has_ratio(self) -> bool:
        """Whether a ratio exists: there are sentences, and the base's divergence is not 0 on all of them."""
        return len(self.rows) > 0 and float(self.values[BASE].mean()) > 0


def ratios(dialect: DialectValues, bootstrap: SentenceBootstrap) -> dict[str, Any]:
    """Condition -> ratio of mean divergences to the base's; empty where no ratio exists."""
    if not dialect.has_ratio:
        return {}
    base = dialect.values[BASE]
    return {
        condition: bootstrap.ratio(dialect.values[condition], base, dialect.rows).to_dict()
        for condition in dialect.conditions
    }


def differences(dialect: DialectValues, bootstrap: SentenceBootstrap) -> dict[str, Any]:
    """Control -> paired difference of its ratio to the own vector's; positive where the control is worse."""
    if not dialect.has_ratio:
        return {}
    own, base = dialect.values[OWN], dialect.values[BASE]
    return {
        condition: bootstrap.difference(dialect.values[condition], own, base, dialect.rows).to_dict()
        for condition in dialect.conditions
        if condition != OWN
    }


def comparison(dialect: DialectValues, bootstrap: SentenceBootstrap) -> dict[str, Any]:
    """Number of sentences, ratios and differences."""
    return {
        "sentences": len(dialect.rows),
        "ratio": ratios(dialect, bootstrap),
        "difference": differences(dialect, bootstrap),
    }


def added_divergence(dialect: DialectValues, bootstrap: SentenceBootstrap) -> dict[str, Any]:
    """Condition -> mean divergence beyond the base's, for sentences where that is 0 and no ratio exists."""
    added = {}
    if len(dialect.rows):
        base = dialect.values[BASE]
        for condition in dialect.conditions:
            added[condition] = bootstrap.mean(dialect.values[condition] - base, dialect.rows).to_dict()
    return {"sentences": len(dialect.rows), "added_divergence": added}


def averages(dialects: Sequence[DialectValues], bootstrap: SentenceBootstrap) -> dict[str, Any] | None:
    """Unweighted averages of ratios and differences over dialects, resampled jointly; None without any ratio."""
    usable = [dialect for dialect in dialects if dialect.has_ratio]
    if not usable:
        return None
    ratio, difference = {}, {}
    for condition in usable[0].conditions:
        parts = [(d.values[condition], d.values[BASE], d.rows) for d in usable]
        ratio[condition] = bootstrap.average(parts).to_dict()
        if condition != OWN:
            paired = [(d.values[condition] - d.values[OWN], d.values[BASE], d.rows) for d in usable]
            difference[condition] = bootstrap.average(paired).to_dict()
    return {"dialects": [dialect.variety for dialect in usable], "ratio": ratio, "difference": difference}


def relative_variances(clouds: Mapping[str, CloudStatistics], standard: CloudStatistics) -> dict[str, Any]:
    """Condition -> token variance within sentences and variance between sentence means, relative to ``standard``.

    A divergence can be lowered by shrinking all states together; a ratio well below the base's own shows it.
    """
    within, between = standard.within.mean(), standard.between
    return {
        condition: {
            "within": float(cloud.within.mean() / within) if within > 0 else None,
            "between": float(cloud.between / between) if between > 0 else None,
        }
        for condition, cloud in clouds.items()
    }


def retrieved(clouds: CloudStatistics, standard: CloudStatistics) -> Array:
    """Whether the original nearest to each sentence is its own: (n,) of 0 and 1, by the distance of mean states.

    The retrieval of parallel sentences (Artetxe and Schwenk 2019, arXiv 1812.10464) by another distance. Pulling every
    sentence to the middle of the originals lowers the divergence too; here it gains nothing.
    """
    ours, originals = clouds.mean, standard.mean
    distances = np.square(originals).sum(axis=1)[None] - 2 * ours @ originals.T  # and what is the same in a row
    return (distances.argmin(axis=1) == np.arange(len(ours))).astype(np.float64)
