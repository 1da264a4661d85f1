"""Comparing two methods on the same sentences: paired differences, their intervals and tests, and correlations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from hl_scale.evaluation.labelled.measuring import pearson, ranks
from hl_scale.evaluation.statistics import Estimate, SentenceBootstrap, defined_ratio

Array = npt.NDArray[np.float64]
Kind = Literal["classes", "scores", "divergences"]


@dataclass(frozen=True)
class Predictions:
    """What one method predicted in one dialect, and what is right.

    Attributes:
        rows: (m,) numbers of the sentences among all test sentences of the task, ascending; some may be missing in a
            dialect.
        labels: (m,) classes, scores, or divergences without an adapter.
        predicted: (seeds, m) the same as predicted, or divergences with an adapter.
        kind: which of the three.
    """

    rows: npt.NDArray[np.intp]
    labels: Array
    predicted: Array
    kind: Kind = "classes"

    @property
    def correct(self) -> Array:
        """(seeds, m) 1 where the class is right, else 0."""
        return (self.predicted == self.labels).astype(np.float64)

    def at(self, rows: npt.NDArray[np.intp]) -> Predictions:
        """The same on some of its sentences.

        Raises:
            ValueError: it lacks one of them.
        """
        place = np.searchsorted(self.rows, rows)
        if (place >= len(self.rows)).any() or (self.rows[place] != rows).any():
            raise ValueError("a sentence was not measured under every method")
        return Predictions(rows, self.labels[place], self.predicted[:, place], self.kind)

    def qualities(self) -> Array:
        """(seeds,) accuracy, Pearson's correlation with the scores, or the share of the divergence that is removed."""
        if self.kind == "divergences":
            return np.asarray(1 - self.predicted.sum(1) / self.labels.sum())
        if self.kind == "scores":
            return np.array([pearson(self.labels, each) for each in self.predicted])
        return np.asarray(self.correct.mean(1))


def resampled(bootstrap: SentenceBootstrap, parts: Sequence[Predictions]) -> tuple[float, Array]:
    """Mean over dialects and seeds of the quality, and that of every resample of sentences (S,).

    A resample's quality is NaN in a dialect of which it holds no sentence.
    """
    value = float(np.mean([part.qualities().mean() for part in parts]))
    return value, np.mean([_resampled_quality(bootstrap, part) for part in parts], axis=0)


def _resampled_quality(bootstrap: SentenceBootstrap, part: Predictions) -> Array:
    ones = np.ones(len(part.rows))
    if part.kind == "divergences":
        return 1 - defined_ratio(*bootstrap.sums(np.stack([part.predicted.mean(0), part.labels], 1), part.rows).T)
    if part.kind == "classes":
        return defined_ratio(*bootstrap.sums(np.stack([part.correct.mean(0), ones], axis=1), part.rows).T)
    # Moments about the means of all sentences, so that little is lost to rounding.
    x = part.labels - part.labels.mean()
    total = np.zeros(bootstrap.samples)
    for predicted in part.predicted:
        y = predicted - predicted.mean()
        count, sx, sy, sxx, syy, sxy = bootstrap.sums(np.stack([ones, x, y, x * x, y * y, x * y], 1), part.rows).T
        # As `pearson`: 0 where one of them is constant.
        norm = np.sqrt(np.maximum(count * sxx - sx**2, 0) * np.maximum(count * syy - sy**2, 0))
        total += np.where(norm > 0, (count * sxy - sx * sy) / np.where(norm > 0, norm, 1), 0)
        total[count == 0] = np.nan
    return total / len(part.predicted)


def quality(bootstrap: SentenceBootstrap, parts: Sequence[Predictions]) -> Estimate:
    """Mean over dialects and seeds of the quality; the interval is over sentences alone."""
    return bootstrap.estimate(*resampled(bootstrap, parts))


def difference(bootstrap: SentenceBootstrap, first: Sequence[Predictions], second: Sequence[Predictions]) -> Estimate:
    """Mean over dialects of quality(first) - quality(second) on the sentences that the first has of each."""
    ours, theirs = _paired(bootstrap, first, second)
    return bootstrap.estimate(ours[0] - theirs[0], ours[1] - theirs[1])


def share(
    bootstrap: SentenceBootstrap,
    ours: Sequence[Predictions],
    bare: Sequence[Predictions],
    original: Sequence[Predictions],
) -> Estimate:
    """(ours - bare) / (original - bare); resamples in which nothing is lost are left out."""
    gained, before = _paired(bootstrap, ours, bare)
    whole, also_before = _paired(bootstrap, original, bare)
    lost = whole[1] - also_before[1]
    value = (gained[0] - before[0]) / (whole[0] - also_before[0])
    return bootstrap.estimate(value, defined_ratio(gained[1] - before[1], lost))


def _paired(
    bootstrap: SentenceBootstrap, first: Sequence[Predictions], second: Sequence[Predictions]
) -> tuple[tuple[float, Array], tuple[float, Array]]:
    others = [theirs.at(ours.rows) for ours, theirs in zip(first, second, strict=True)]
    return resampled(bootstrap, first), resampled(bootstrap, others)


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
