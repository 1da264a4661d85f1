"""Whether kernels for CUDA tensors can be had, and where they are launched."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from contextlib import AbstractContextManager

import torch


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Launch Triton kernels on the GPU that holds `tensor`; nothing for CPU tensors, which the interpreter takes."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
