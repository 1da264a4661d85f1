"""A heap as glibc keeps it: how much room blocks take that come and go, with the gaps that freed ones leave.

What a process on a CPU holds is not the sum of its tensors: a freed block leaves a gap, the next one takes the smallest
gap it fits into and splits it, and what fits nowhere goes on top. Pages that were written stay resident.
"""

from __future__ import annotations

from bisect import bisect_left, insort

_ALIGNMENT, _OVERHEAD = 64, 80  # of torch's blocks on CPUs; what glibc takes more for one


class Heap:
    """Blocks by address.

    Attributes:
        highest: bytes from the bottom to the highest byte that was ever in use.
    """

    def __init__(self) -> None:
        self.highest = self._top = 0
        self._sizes: dict[int, int] = {}  # start -> bytes of each block
        self._gaps: list[tuple[int, int]] = []  # (bytes, start), in order
        self._starts: dict[int, int] = {}  # start -> bytes of each gap
        self._ends: dict[int, int] = {}  # end -> start of each gap

    def take(self, size: int) -> int:
        """Place a block; returns its address."""
        size = -(-(size + _OVERHEAD) // _ALIGNMENT) * _ALIGNMENT
        found = bisect_left(self._gaps, (size, -1))
        if found < len(self._gaps):
            room, start = self._gaps[found]
            self._remove(start)
            if room > size:
                self._add(start + size, room - size)
        else:
            start, self._top = self._top, self._top + size
            self.highest = max(self.highest, self._top)
        self._sizes[start] = size
        return start

    def give_back(self, start: int) -> None:
        """Free the block at an address; neighbouring gaps become one."""
        size = self._sizes.pop(start)
        after = self._starts.get(start + size)
        if after is not None:
            self._remove(start + size)
            size += after
        before = self._ends.get(start)
        if before is not None:
            size += start - before
            self._remove(before)
            start = before
        if start + size == self._top:
            self._top = start
        else:
            self._add(start, size)

    def _add(self, start: int, size: int) -> None:
        insort(self._gaps, (size, start))
        self._starts[start], self._ends[start + size] = size, start

    def _remove(self, start: int) -> None:
        size = self._starts.pop(start)
        del self._ends[start + size]
        del self._gaps[bisect_left(self._gaps, (size, start))]
