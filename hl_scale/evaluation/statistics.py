"""Bootstrap over sentences for ratios of mean divergences, and over tasks and their examples for means.

The question is what another sample of sentences would have given, so sentences are the unit that is resampled (Efron
and Tibshirani 1993, percentile interval). One resample is a vector of counts c, multinomial over the n sentences; every
estimate below is a ratio of two sums that the counts weight:

    R(c) = sum_i c_i u_i / sum_i c_i v_i.

All conditions, all dialects and all subsets of sentences share the same counts: differences between conditions are
therefore paired, and an average over dialects respects that they are made of the same sentences. The seed of training
is not resampled: the intervals say nothing about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_BLOCK_ELEMENTS = 4_000_000


@dataclass(frozen=True)
class Estimate:
    """A value on the sentences at hand and the 95% percentile interval around it.

    ``resamples`` counts the resamples that the interval rests on: those whose denominator is 0 have no value.
    """

    value: float
    low: float
    high: float
    resamples: int

    def to_dict(self) -> dict[str, float | int]:
        """Plain numbers, ready for JSON."""
        return asdict(self)

    def excludes(self, value: float) -> bool:
        """Whether the whole interval lies on one side of ``value``."""
        return self.low > value or self.high < value


def defined_ratio(top: Array, bottom: Array) -> Array:
    """top / bottom (S,), NaN where the bottom is not positive."""
    return np.divide(top, bottom, out=np.full(len(top), np.nan), where=bottom > 0)


class SentenceBootstrap:
    """The resamples of one evaluation: ``samples`` count vectors over ``sentences`` sentences.

    Args:
        sentences: number of distinct sentences n.
        samples: number of resamples S.
        seed: seed of numpy's default generator; the same seed gives the same counts.

    Memory: S * n counts of 2 bytes.
    """

    def __init__(self, sentences: int, *, samples: int = 4000, seed: int = 0) -> None:
        if sentences < 2:
            raise ValueError(
                f"a bootstrap over sentences needs at least 2 of them, got {sentences}; evaluate on more sentences"
            )
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        self.sentences = sentences
        self.samples = samples
        generator = np.random.default_rng(seed)
        self._counts = np.empty((samples, sentences), dtype=np.uint16)
        share = np.full(sentences, 1.0 / sentences)
        block = max(1, _BLOCK_ELEMENTS // sentences)
        for start in range(0, samples, block):
            stop = min(start + block, samples)
            self._counts[start:stop] = generator.multinomial(sentences, share, size=stop - start)

    def mean(self, values: npt.ArrayLike, rows: npt.ArrayLike | None = None) -> Estimate:
        """Mean of ``values`` (m,), which belong to the sentences ``rows`` (m,) (all of them unless given)."""
        values = np.asarray(values, dtype=np.float64)
        return self.ratio(values, np.ones_like(values), rows)

    def ratio(
        self, numerator: npt.ArrayLike, denominator: npt.ArrayLike, rows: npt.ArrayLike | None = None
    ) -> Estimate:
        """Ratio of means: mean of ``numerator`` (m,) over mean of ``denominator`` (m,), same sentences in both.

        Args:
            numerator, denominator: one value per sentence.
            rows: sentence numbers (m,) in 0..n-1 that the values belong to; all sentences in order unless given.

        Raises:
            ValueError: sizes differ, a value is not finite, or the denominator's mean is not positive.
        """
        top, bottom, columns = self._checked(numerator, denominator, rows)
        return self.estimate(top.mean() / bottom.mean(), self._resampled(top, bottom, columns))

    def difference(
        self, alternative: npt.ArrayLike, own: npt.ArrayLike, base: npt.ArrayLike, rows: npt.ArrayLike | None = None
    ) -> Estimate:
        """Paired difference of ratios, alternative/base - own/base; positive where the alternative is worse."""
        return self.ratio(np.asarray(alternative, np.float64) - np.asarray(own, np.float64), base, rows)

    def sums(self, values: Array, rows: npt.NDArray[np.intp]) -> Array:
        """sum_i c_i v_i of every resample, (S, k), for `values` (m, k) of the sentences `rows` (m,)."""
        found = np.empty((self.samples, values.shape[1]))
        block = max(1, _BLOCK_ELEMENTS // rows.size)
        for start in range(0, self.samples, block):
            found[start : start + block] = self._counts[start : start + block][:, rows].astype(np.float64) @ values
        return found

    def average(self, parts: Sequence[tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike | None]]) -> Estimate:
        """Unweighted average of several ratios (numerator, denominator, rows), all resampled with the same counts."""
        if not parts:
            raise ValueError("an average needs at least one ratio")
        value, resampled = 0.0, np.zeros(self.samples)
        for numerator, denominator, rows in parts:
            top, bottom, columns = self._checked(numerator, denominator, rows)
            value += top.mean() / bottom.mean() / len(parts)
            resampled += self._resampled(top, bottom, columns) / len(parts)
        return self.estimate(value, resampled)

    def _checked(
        self, numerator: npt.ArrayLike, denominator: npt.ArrayLike, rows: npt.ArrayLike | None
    ) -> tuple[Array, Array, npt.NDArray[np.intp]]:
        top = np.asarray(numerator, dtype=np.float64)
        bottom = np.asarray(denominator, dtype=np.float64)
        columns = np.arange(self.sentences) if rows is None else np.asarray(rows, dtype=np.intp)
        if top.ndim != 1 or top.shape != bottom.shape or top.shape != columns.shape or top.size == 0:
            raise ValueError(
                f"expected one numerator and one denominator per sentence, got shapes {top.shape} and {bottom.shape} "
                f"for {columns.size} sentences"
            )
        if not (np.isfinite(top).all() and np.isfinite(bottom).all()):
            raise ValueError("a per-sentence value is not finite: the adapted model's states or losses are broken")
        if bottom.mean() <= 0:
            raise ValueError(
                f"the denominator's mean must be positive, got {bottom.mean():.3g}: the ratio is undefined"
            )
        return top, bottom, columns

    def _resampled(self, top: Array, bottom: Array, columns: npt.NDArray[np.intp]) -> Array:
        """R(c) for every resample, (S,); NaN where the resampled denominator is not positive."""
        return defined_ratio(*self.sums(np.stack([top, bottom], axis=1), columns).T)

    @staticmethod
    def estimate(value: float, resampled: Array) -> Estimate:
        """A value with the interval of its resamples (S,), those that are NaN left out.

        Raises:
            ValueError: all of them are.
        """
        defined = resampled[~np.isnan(resampled)]
        if defined.size == 0:
            raise ValueError("no resample has a positive denominator: too few sentences differ from the base")
        low, high = np.percentile(defined, [2.5, 97.5])
        return Estimate(float(value), float(low), float(high), int(defined.size))


class TaskBootstrap:
    """Resamples of tasks, and of the examples within each task that is drawn (two-level bootstrap).

    The estimate is the mean over tasks of each task's mean over its examples. Resamples depend on the sizes and the
    seed alone, so the same ones serve every arm.

    Args:
        sizes: number of examples of each task, at least 1.
        samples: number of resamples S.
        seed: of numpy's default generator.
    """

    def __init__(self, sizes: Sequence[int], *, samples: int = 4000, seed: int = 0) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"a bootstrap over tasks needs tasks with at least one example each, got sizes {sizes}")
        self.sizes, self.samples = tuple(sizes), samples
        generator = np.random.default_rng(seed)
        drawn = generator.integers(len(sizes), size=(samples, len(sizes)))
        self._places = [np.nonzero(drawn == task)[0] for task in range(len(sizes))]
        self._counts = [
            generator.multinomial(size, np.full(size, 1.0 / size), size=len(places)).astype(np.uint16)
            for size, places in zip(sizes, self._places, strict=True)
        ]

    def mean(self, values: Sequence[npt.ArrayLike]) -> Estimate:
        """Mean over tasks of the means of `values`, one array (examples,) per task.

        Raises:
            ValueError: sizes differ from those given, or a value is not finite.
        """
        value, resampled = self._means(values)
        low, high = np.percentile(resampled, [2.5, 97.5])
        return Estimate(value, float(low), float(high), self.samples)

    def ratio(self, numerator: Sequence[npt.ArrayLike], denominator: Sequence[npt.ArrayLike]) -> Estimate | None:
        """`mean` of the numerator over that of the denominator; None unless the latter is positive.

        Resamples whose denominator is not positive are left out.

        Raises:
            ValueError: as for `mean`.
        """
        (top, tops), (bottom, bottoms) = self._means(numerator), self._means(denominator)
        if bottom <= 0:
            return None
        ratios = tops[bottoms > 0] / bottoms[bottoms > 0]
        low, high = np.percentile(ratios, [2.5, 97.5])
        return Estimate(top / bottom, float(low), float(high), len(ratios))

    def _means(self, values: Sequence[npt.ArrayLike]) -> tuple[float, Array]:
        """The mean, and that of every resample (S,)."""
        rows = [np.asarray(part, dtype=np.float64) for part in values]
        if tuple(len(row) for row in rows) != self.sizes:
            raise ValueError(f"expected {self.sizes} values per task, got {tuple(len(row) for row in rows)}")
        if not all(np.isfinite(row).all() for row in rows):
            raise ValueError("a value of an example is not finite: the adapted model's losses are broken")
        resampled = np.zeros(self.samples)
        for row, places, counts in zip(rows, self._places, self._counts, strict=True):
            np.add.at(resampled, places, counts @ row / len(row))
        return float(np.mean([row.mean() for row in rows])), resampled / len(rows)
