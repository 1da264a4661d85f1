"""Comparing two methods sentence by sentence: paired differences, their intervals and tests, and correlations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hl_scale.evaluation.labelled.measuring import pearson, ranks
from hl_scale.evaluation.statistics import Estimate, SentenceBootstrap

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """Whether each sentence is right, under one method in one dialect.

    Attributes:
        rows: (m,) numbers of the sentences among all test sentences of the task; some may be missing in a dialect.
        correct: (seeds, m) 0 or 1.
    """

    rows: npt.NDArray[np.intp]
    correct: Array

    @property
    def mean(self) -> Array:
        """(m,) share of the seeds under which a sentence is right."""
        return np.asarray(self.correct.mean(0))

    def at(self, rows: npt.NDArray[np.intp]) -> Scores:
        """The same on some of its sentences.

        Raises:
            ValueError: it lacks one of them.
        """
        place = np.searchsorted(self.rows, rows)
        if (place >= len(self.rows)).any() or (self.rows[place] != rows).any():
            raise ValueError("a sentence was not measured under every method")
        return Scores(rows, self.correct[:, place])


def accuracy(bootstrap: SentenceBootstrap, scores: Sequence[Scores]) -> Estimate:
    """Mean over dialects of the share of right sentences, over seeds; the interval is over sentences alone."""
    return bootstrap.average([(s.mean, np.ones(len(s.rows)), s.rows) for s in scores])


def difference(bootstrap: SentenceBootstrap, first: Sequence[Scores], second: Sequence[Scores]) -> Estimate:
    """Mean over dialects of accuracy(first) - accuracy(second) on the same sentences of each."""
    parts = []
    for ours, theirs in zip(first, second, strict=True):
        theirs = theirs.at(ours.rows)
        parts.append((ours.mean - theirs.mean, np.ones(len(ours.rows)), ours.rows))
    return bootstrap.average(parts)


def mcnemar(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Two-sided exact p of McNemar's test (1947) on paired 0/1 outcomes (n,) and (n,).

    Of the pairs that differ, is it by chance which of the two is right? 1 where none differs.
    """
    ours, theirs = np.asarray(first, bool), np.asarray(second, bool)
    if ours.shape != theirs.shape:
        raise ValueError(f"paired outcomes have shapes {ours.shape} and {theirs.shape}")
    wins, losses = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    total, fewer = wins + losses, min(wins, losses)
    if total == 0:
        return 1.0
    tail = sum(math.comb(total, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)


def correlations(x: npt.ArrayLike, y: npt.ArrayLike, *, samples: int = 4000, seed: int = 0) -> dict[str, Estimate]:
    """Pearson's and Spearman's correlation of (n,) and (n,), with 95% percentile intervals over resampled points."""
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    drawn = np.random.default_rng(seed).integers(len(a), size=(samples, len(a)))
    found = {}
    for name, one, other in (("pearson", a, b), ("spearman", ranks(a), ranks(b))):
        measure = pearson if name == "pearson" else _spearman
        resampled = [measure(a[rows], b[rows]) for rows in drawn]
        low, high = np.percentile(resampled, [2.5, 97.5])
        found[name] = Estimate(pearson(one, other), float(low), float(high), samples)
    return found


def _spearman(x: Array, y: Array) -> float:
    return pearson(ranks(x), ranks(y))


def crossing(counts: Sequence[int], values: Sequence[float], level: float) -> float | None:
    """Where a curve first reaches a level, between two counts by a straight line over log(count).

    Returns:
        A number of sentences; the first count if the curve begins at the level or above it, None if it stays below.
    """
    for i, (count, value) in enumerate(zip(counts, values, strict=True)):
        if value >= level:
            if i == 0:
                return float(count)
            share = (level - values[i - 1]) / (value - values[i - 1])
            return float(counts[i - 1] * (count / counts[i - 1]) ** share)
    return None
