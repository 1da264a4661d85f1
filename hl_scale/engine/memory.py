"""How much memory this process holds and has held at most."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

import torch

_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE = 1 << 20


def return_large_blocks() -> None:
    """Let freed blocks of a megabyte and more go back to the system at once; for CPUs, and for glibc alone.

    glibc learns from the first large block that is freed to keep those up to 32 MiB. Gathered layers come in a few
    sizes of about that, and fresh ones rarely fit into the gaps that freed ones leave: a process that gathered and
    freed the layers of a 7B model one after the other grew by 3 GB in one forward pass. It costs time where many
    blocks of that size come and go (about a fifth of a step on Gemma 3 270M), so it is for partitioned bases.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)


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
