"""What computes: NF4 and Sinkhorn kernels on the device against their definitions, bitsandbytes, an all-reduce."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from hl_scale.doctor.findings import Finding, ok, problem
from hl_scale.kernels import dequantize_nf4, quantize_nf4
from hl_scale.kernels.nf4 import BLOCK_SIZE, NF4_CODE
from hl_scale.sinkhorn import naive_sinkhorn_divergence, sinkhorn_divergence

RANKS = 2
DEADLINE = 120.0
"""Seconds for two processes to start and add their numbers up; about 5 on a free machine."""
_NF4_TOLERANCE, _DOUBLE_TOLERANCE = 1e-6, 0.03  # block constants in 8 bits are off by less than 1%
_SINKHORN_TOLERANCE = 1e-4
_REINSTALL = "reinstall torch (and triton on GPUs) for this device, and report the numbers if that does not help"


def check_nf4(device: str) -> Finding:
    """Quantise and dequantise a random matrix on `device`, and do the same by the definition in float64."""
    check = f"NF4 on {device}"
    weight = torch.randn(96, 130, generator=torch.Generator().manual_seed(0))
    code = torch.tensor(NF4_CODE, dtype=torch.float64)
    blocks = weight.double().view(-1, BLOCK_SIZE)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    nearest = (blocks[..., None] / absmax[..., None] - code).abs().argmin(-1)
    expected = (code[nearest] * absmax).view_as(weight)
    for double, tolerance in ((False, _NF4_TOLERANCE), (True, _DOUBLE_TOLERANCE)):
        try:
            packed, constants = quantize_nf4(weight.to(device), double_quantization=double)
            error = (dequantize_nf4(packed, constants).cpu().double() - expected).abs().max().item()
        except (RuntimeError, ValueError, ImportError) as raised:
            return problem(check, f"raises {_said(raised)}", _REINSTALL)
        if not error <= tolerance:
            way = "doubly quantised weights" if double else "weights"
            return problem(check, f"{way} are off by up to {error:.1e} (at most {tolerance:.0e})", _REINSTALL)
    return ok(check, "agrees with its definition")


def check_sinkhorn(device: str) -> Finding:
    """The divergence of two small clouds on `device` in float32 against its definition in float64."""
    check = f"Sinkhorn on {device}"
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(23, 8, generator=generator), torch.randn(19, 8, generator=generator)
    expected = naive_sinkhorn_divergence(x.double(), y.double()).item()
    try:
        error = abs(sinkhorn_divergence(x.to(device), y.to(device)).item() / expected - 1)
    except (RuntimeError, ValueError, ImportError) as raised:
        return problem(check, f"raises {_said(raised)}", _REINSTALL)
    if not error <= _SINKHORN_TOLERANCE:
        return problem(check, f"off by a relative {error:.1e} (at most {_SINKHORN_TOLERANCE:.0e})", _REINSTALL)
    return ok(check, f"agrees with its definition (relative error {error:.1e})")


def check_bitsandbytes() -> Finding:
    """Whether it can be imported; a build for another CUDA version cannot."""
    try:
        module = importlib.import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError, AttributeError) as raised:
        fix = "pip install --force-reinstall bitsandbytes, in a version built for this torch"
        return problem("bitsandbytes", f"cannot be imported: {_said(raised)}", fix)
    return ok("bitsandbytes", f"{module.__version__} can be imported")


def check_all_reduce(deadline: float = DEADLINE) -> Finding:
    """Two processes on this machine add their numbers up: over NCCL where there are two GPUs, else over Gloo.

    Args:
        deadline: seconds after which they are killed.
    """
    backend = "nccl" if torch.cuda.is_available() and torch.cuda.device_count() >= RANKS else "gloo"
    check, variable = f"all-reduce ({backend})", f"{backend.upper()}_SOCKET_IFNAME"
    fix = (
        f"set {variable} to an interface that `ip addr` lists, let the firewall pass connections between ranks, and "
        "give this machine's name an address in /etc/hosts"
    )
    with tempfile.TemporaryDirectory(prefix="hl-scale-doctor-") as directory:
        started = time.monotonic()
        logs = [Path(directory) / f"rank-{rank}" for rank in range(RANKS)]
        arguments = [str(RANKS), f"{directory}/rendezvous", str(deadline)]
        processes = [_start_rank([backend, str(rank), *arguments], log) for rank, log in enumerate(logs)]
        try:
            for process in processes:
                process.wait(max(started + deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            return problem(check, f"{RANKS} processes did not finish within {deadline:g} s", fix)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        seconds = time.monotonic() - started
        for rank, (process, log) in enumerate(zip(processes, logs, strict=True)):
            if process.returncode:
                return problem(check, f"rank {rank} failed: {_last_line(log)}", fix)
    return ok(check, f"{RANKS} processes agree after {seconds:.0f} s")


def _start_rank(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """`all_reduce` in a process that finds this package, with all it says in a file."""
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "hl_scale.doctor.all_reduce", *arguments]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in paths if path))
    with log.open("wb") as file:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return (lines or ["it said nothing"])[-1][:300]


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
