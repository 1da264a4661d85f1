"""How rows are timed: ours and the peers in turn on the same inputs, after a check against float64.

Times are medians of calls in turn, after one call of each for the check and for memory. Memory is the peak during a
call above what was in use before it: resident memory of the process on CPUs (Linux), allocated memory on CUDA. A row
whose check fails is not timed.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hl_scale.engine.memory import peak_bytes, resident_bytes

Computation = Callable[[], list[Tensor]]
"""Returns a value and gradients."""


@dataclass
class Row:
    """One comparison.

    Attributes:
        name: the case.
        ours: computation of this package.
        exact: what `ours` must return, in float64.
        tolerance: largest error of `ours` relative to the largest entry of each of `exact`.
        peers: other computations of the same by name; their errors are shown, not judged.
        once: takes minutes: time the call that is checked.
        comparable: peers compute the same, so that their error means something.
    """

    name: str
    ours: Computation
    exact: list[Tensor]
    tolerance: float
    peers: dict[str, Computation] = field(default_factory=dict)
    once: bool = False
    comparable: bool = True


def run_benchmark(
    what: str,
    *,
    device: str = "cpu",
    threads: int | None = None,
    repeats: int = 5,
    long: bool = False,
    recipe: Path | None = None,
) -> int:
    """Print the table of `what`, "sinkhorn", "lora", "step" or "t2l"; returns the number of rows whose check failed.

    Args:
        device: "cpu" or "cuda".
        threads: of torch on the CPU; its own choice unless given.
        repeats: timed calls of each computation.
        long: also rows that take minutes.
        recipe: configuration whose step is timed; of the demo unless given.

    Raises:
        ValueError: there is no such benchmark or device.
    """
    from hl_scale.benchmark.lora import lora_rows
    from hl_scale.benchmark.sinkhorn import sinkhorn_rows

    if what not in ("sinkhorn", "lora", "step", "t2l") or device not in ("cpu", "cuda"):
        raise ValueError(
            f"cannot time {what} on {device}: choose sinkhorn, lora, step or t2l, and --device cpu or cuda"
        )
    if what in ("step", "t2l"):
        if device != "cpu":
            raise ValueError(f"{what} is timed on the CPU\n  fix: leave --device out")
        from hl_scale.benchmark.step import run_step_benchmark  # need the whole package, unlike the others
        from hl_scale.benchmark.text_to_lora import run_text_to_lora_benchmark

        run = run_step_benchmark if what == "step" else run_text_to_lora_benchmark
        return run(recipe, threads, repeats)
    if threads is not None:
        torch.set_num_threads(threads)
    print(describe_machine(device))
    print("\n| case | by | time, ms | its time / ours | extra memory, MB | error |\n|---|---|---|---|---|---|")
    rows = {"sinkhorn": sinkhorn_rows, "lora": lora_rows}[what]
    return sum(not print_row(row, device, repeats) for row in rows(device, long))


def describe_machine(device: str) -> str:
    """Processor or GPU, threads and versions, in a line."""
    names = ("torch", "triton", "geomloss", "POT", "flash-sinkhorn", "bitsandbytes")
    versions = []
    for name in names:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    where = torch.cuda.get_device_name() if device == "cuda" else f"{_processor()}, {torch.get_num_threads()} threads"
    return f"{where}, Python {platform.python_version()}, {', '.join(versions)}; forward and backward"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def print_row(row: Row, device: str, repeats: int) -> bool:
    """Check, time and print a row; False where the check failed."""
    found, first_seconds, first_memory = measured(row.ours, device)
    own_error = error(found, row.exact)
    del found
    if not own_error <= row.tolerance:
        print(
            f"| {row.name} | ours | not timed: error {own_error:.1e} is above {row.tolerance:.0e} | | | |", flush=True
        )
        return False
    times, memory, errors = {"ours": first_seconds}, {"ours": first_memory}, {"ours": f"{own_error:.0e}"}
    failed: dict[str, str] = {}
    for name, peer in row.peers.items():
        try:
            found, times[name], memory[name] = measured(peer, device)
        except (RuntimeError, ValueError) as problem:  # out of memory, a shape it does not take
            failed[name] = str(problem).splitlines()[0][:100]
            continue
        errors[name] = f"{error(found, row.exact):.0e}" if row.comparable else ""
        del found
    if not row.once:
        computations = {"ours": row.ours, **{name: row.peers[name] for name in row.peers if name not in failed}}
        samples: dict[str, list[float]] = {name: [] for name in computations}
        for _ in range(max(repeats, 1)):
            for name, computation in computations.items():
                samples[name].append(timed(computation, device)[1])
        times = {name: statistics.median(taken) for name, taken in samples.items()}
    for name in times:
        ratio = "" if name == "ours" else f"{times[name] / times['ours']:.2f}"
        case = row.name if name == "ours" else ""
        extra = f"{memory[name] / 1e6:.0f}"
        print(f"| {case} | {name} | {1e3 * times[name]:.1f} | {ratio} | {extra} | {errors[name]} |", flush=True)
    for name, problem_line in failed.items():
        print(f"|  | {name} | failed: {problem_line} | | | |", flush=True)
    return True


def error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest error over the value and gradients, each relative to its largest entry; nan if any entry is."""
    errors = [(f.double() - e).abs().max() / e.abs().max().clamp(min=1e-30) for f, e in zip(found, exact, strict=True)]
    return torch.stack(errors).max().item()


def timed(computation: Computation, device: str) -> tuple[list[Tensor], float]:
    """Result and seconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = computation()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def measured(computation: Computation, device: str) -> tuple[list[Tensor], float, float]:
    """Result, seconds, and peak bytes above those in use before of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = float(torch.cuda.memory_allocated())
    else:
        before = _reset_peak()
    result, elapsed = timed(computation, device)
    peak = peak_bytes(torch.device(device))
    return result, elapsed, peak - before


def _reset_peak() -> float:
    """Forget the highest resident size of this process so far; returns the present one (nan where unknown).

    Freed memory that the allocator holds on to is given back first, or calls would reuse it unseen.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):
        return math.nan
    return float(resident_bytes())
