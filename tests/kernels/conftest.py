"""Compiles a Triton kernel for a GPU that is not there, and reads what the binary uses; runs it interpreted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def assert_no_spills() -> Callable[..., None]:
    return _assert_no_spills


@pytest.fixture
def interpreted() -> Callable[[str], dict[str, float]]:
    """Runs a test file as a script under Triton's interpreter; returns the JSON that it prints.

    In a process of its own, because Triton decides at import whether it interprets.
    """

    def run(script: str) -> dict[str, float]:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(
            [sys.executable, script], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        errors: dict[str, float] = json.loads(done.stdout)
        return errors

    return run


def _assert_no_spills(
    kernel: Any, signature: Mapping[str, str], constants: Mapping[str, Any], capability: int, warps: int, folder: Path
) -> None:
    """Registers suffice (no local memory, no stack) and shared memory fits without asking for more than the default."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_triton

    whole = {**signature, **dict.fromkeys(constants, "constexpr")}
    target = GPUTarget("cuda", capability, 32)
    compiled = compile_triton(
        ASTSource(kernel, whole, constexprs=dict(constants)), target=target, options={"num_warps": warps}
    )
    assert compiled.metadata.shared <= 48 * 1024
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    binary = Path(sys.modules["triton"].__file__ or "").parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([binary, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    assert re.search(rf"{kernel.__name__}:\s+REG:\d+ STACK:0 .*LOCAL:0 ", usage), usage
