"""How much memory this process holds and has held at most."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
LARGE_BLOCK = 1 << 20
"""Bytes from which `return_large_blocks` lets a block go back at once."""
LARGEST_KEPT = 32 << 20
"""Bytes from which `keep_blocks` does; glibc's own largest."""


def share_one_heap() -> None:
    """Let all threads take memory from one heap; for CPUs, and for glibc alone, before the threads start.

    glibc gives each thread a heap of its own. Those of the process group hold gathered and reduced tensors for a
    moment and then keep the room for them: 50 MB a rank on Gemma 3 270M.
    """
    _mallopt(_M_ARENA_MAX, 1)
    _mallopt(_M_MMAP_THRESHOLD, 1 << 17)


def keep_blocks() -> None:
    """Keep freed blocks of up to 32 MiB for the next ones, as glibc does once it has seen one of that size."""
    _mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT)
    _mallopt(_M_TRIM_THRESHOLD, 2 * LARGEST_KEPT)


def return_freed() -> None:
    """Give memory that was freed back to the system now: the heap's, and what Parquet files were read into."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
    if "pyarrow" in sys.modules:
        sys.modules["pyarrow"].default_memory_pool().release_unused()


def return_large_blocks() -> None:
    """Let freed blocks of a megabyte and more go back to the system at once; for CPUs, and for glibc alone.

    glibc learns from the first large block that is freed to keep those up to 32 MiB. Gathered layers come in a few
    sizes of about that, and fresh ones rarely fit into the gaps that freed ones leave: a process that gathered and
    freed the layers of a 7B model one after the other grew by 3 GB in one forward pass. It costs time where many
    blocks of that size come and go (about a fifth of a step on Gemma 3 270M), so it is for partitioned bases.
    """
    _mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK)


def _mallopt(option: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(option, value)


def resident_bytes() -> int:
    """Resident memory of this process now; 0 where the system does not say (it is read from /proc)."""
    return _status("VmRSS")


def peak_bytes(device: torch.device) -> int:
    """The most this process has held so far: tensors on a GPU, resident memory otherwise.

    Resident memory counts pages of libraries and of mapped files too.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(name: str) -> int:
    """A field of /proc/self/status in bytes."""
    path = Path("/proc/self/status")
    if path.is_file():
        for line in path.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    return 0
