"""Runs of packed tokens that share one adapter: consecutive rows of x (T, in), some of them perhaps empty."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Segment e is the rows bounds[e] to bounds[e + 1].

    Attributes:
        bounds: E + 1 numbers that rise from 0 to T; equal neighbours are an empty segment.
    """

    bounds: tuple[int, ...]
    _blocks: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        rises = all(low <= high for low, high in pairwise(self.bounds))
        if len(self.bounds) < 2 or self.bounds[0] != 0 or not rises:
            raise ValueError(f"segment bounds must rise from 0 to the number of tokens, got {self.bounds[:8]}")

    @classmethod
    def of(cls, offsets: Tensor) -> Segments:
        """From (E + 1,) integer offsets.

        Raises:
            ValueError: not one dimension, or they do not rise from 0.
        """
        if offsets.ndim != 1 or offsets.is_floating_point():
            raise ValueError(f"offsets must be (E + 1,) integers, got {tuple(offsets.shape)} of {offsets.dtype}")
        return cls(tuple(offsets.tolist()))

    @classmethod
    def equal(cls, count: int, length: int) -> Segments:
        """`count` segments of `length` tokens."""
        return cls(tuple(range(0, count * length + 1, length)) if length else (0,) * (count + 1))

    @property
    def count(self) -> int:
        """E."""
        return len(self.bounds) - 1

    @property
    def tokens(self) -> int:
        """T."""
        return self.bounds[-1]

    def slices(self) -> list[slice]:
        """Rows of each segment."""
        return [slice(low, high) for low, high in pairwise(self.bounds)]

    def cut(self, start: int, stop: int) -> Segments:
        """The parts of all segments within rows `start` to `stop`, numbered from 0; some may be empty."""
        return Segments(tuple(min(max(bound, start), stop) - start for bound in self.bounds))

    def blocks(self, size: int, device: torch.device) -> Tensor:
        """(n, 3) int32 on `device`: segment, first row and last row + 1 of each run of at most `size` rows.

        Made once per size and device; empty segments have no blocks.
        """
        key = (size, device)
        if key not in self._blocks:
            rows = [
                (e, start, min(start + size, high))
                for e, (low, high) in enumerate(pairwise(self.bounds))
                for start in range(low, high, size)
            ]
            self._blocks[key] = torch.tensor(rows, dtype=torch.int32).reshape(-1, 3).to(device)
        return self._blocks[key]
