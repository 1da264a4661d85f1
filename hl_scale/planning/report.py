"""Plans as text and for programs, and sizes as people write them."""

from __future__ import annotations

import re
from typing import Any

from rich.table import Table

from hl_scale.planning.memory import CUDA_RESERVE
from hl_scale.planning.phases import MemoryPlan
from hl_scale.planning.step_time import StepPlan
from hl_scale.planning.wire import WirePlan

_NOT_COUNTED = (
    "these are lower bounds: kernels reach a ceiling on large products alone; passes over memory (dequantising, norms, "
    "the optimizer), logits of answers, the launches of Sinkhorn iterations and stragglers are not counted"
)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str) -> int:
    """Bytes of "80GiB", "24 GB" or "16e9".

    Raises:
        ValueError: not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size <= 0:
        raise ValueError(f"{text!r} is not a size of memory\n  fix: write it as 80GiB or 24GB")
    return size


def parse_rate(text: str, unit: str = "FLOP/s") -> float:
    """Per second: "50GB/s" of a network (bytes), "620e12" or "620TFLOP/s" of products.

    Raises:
        ValueError: not a positive rate.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmgt]i?)?(?:b|flops?)?(?:/s)?\s*", text.lower())
    rate = float(match[1]) * _UNITS[match[2] or ""] if match else 0.0
    if rate <= 0:
        example = "50GB/s" if unit == "bytes/s" else "620e12 or 620TFLOP/s"
        raise ValueError(f"{text!r} is not a rate in {unit}\n  fix: write it as {example}")
    return rate


def gigabytes(size: int) -> str:
    """ "6.1 GB", or megabytes below a tenth of one."""
    return f"{size / 1e9:.1f} GB" if size >= 10**8 else f"{size / 1e6:.1f} MB"


def render_plan(plan: MemoryPlan) -> Table:
    """Components by phase, in megabytes (10^6 bytes)."""
    where = "resident memory of each rank" if plan.device == "cpu" else "tensors on each rank's GPU"
    title = f"{where} in MB: {plan.world_size} ranks, {plan.micro_batch} samples of {plan.tokens} tokens a pass"
    table = Table(title=title, title_justify="left")
    table.add_column("component")
    for phase in plan.phases:
        table.add_column(phase.name, justify="right", style="bold" if phase is plan.largest else None)
    for part in dict.fromkeys(part for phase in plan.phases for part in phase.parts):
        sizes = [phase.parts.get(part, 0) for phase in plan.phases]
        if any(sizes):
            table.add_row(part, *(f"{size / 1e6:,.1f}" if size else "" for size in sizes))
    table.add_section()
    table.add_row("sum", *(f"{phase.total / 1e6:,.1f}" for phase in plan.phases))
    return table


def conclusions(plan: MemoryPlan) -> list[str]:
    """What the table comes to, a line each."""
    lines = [
        f"peak per rank: {plan.peak:,} bytes ({gigabytes(plan.peak)}), in phase {plan.largest.name}",
        f"checkpoint on disk: {plan.checkpoint:,} bytes ({gigabytes(plan.checkpoint)})",
    ]
    if plan.capacity is None:
        return lines
    if plan.device == "cuda":
        lines.append(f"set aside on the GPU for what is not a tensor: {gigabytes(CUDA_RESERVE)} (assumed)")
    fits = plan.peak + (CUDA_RESERVE if plan.device == "cuda" else 0) <= plan.capacity
    lines.append(f"{'fits' if fits else 'does NOT fit'} into {plan.capacity:,} bytes")
    if plan.largest_micro_batch:
        lines.append(f"largest training.micro_batch_size that fits: {plan.largest_micro_batch}")
    else:
        lines.append("not even training.micro_batch_size = 1 fits: use more ranks, base.placement=zero3, "
                     "base.gradient_checkpointing=true or zero3.offload=cpu")  # fmt: skip
    return lines


def render_wire(plan: WirePlan) -> Table:
    """What a rank sends in a step, in megabytes."""
    passes = f"{plan.accumulation} pass{'es' if plan.accumulation > 1 else ''}"
    table = Table(title=f"sent by each rank in a step of {passes}, in MB (rings)", title_justify="left")
    table.add_column("component")
    table.add_column("sent", justify="right")
    for part, size in plan.parts.items():
        if size:
            table.add_row(part, f"{size / 1e6:,.3f}" if size < 10**5 else f"{size / 1e6:,.1f}")
    table.add_section()
    table.add_row("sum", f"{plan.total / 1e6:,.1f}")
    return table


def step_conclusions(plan: StepPlan) -> list[str]:
    """Operations, and what follows from the ceilings that are known, a line each."""
    lines = [f"products of each rank in a step: {plan.flops:.4g} floating-point operations"]
    if plan.compute_seconds is not None and plan.matmul is not None:
        origin = "measured here" if plan.measured else "given"
        lines.append(f"at {plan.matmul:.3g} of them a second ({origin}): {seconds(plan.compute_seconds)}")
    if plan.wire_seconds is not None and plan.network is not None:
        lines.append(f"sending {plan.network / 1e9:.3g} GB/s: {seconds(plan.wire_seconds)}")
    if plan.step_seconds is not None and plan.tokens_per_second is not None:
        (low, high), (fast, slow) = plan.step_seconds, plan.tokens_per_second
        rate = f"; {slow:,.0f} to {fast:,.0f} tokens a second over all ranks" if plan.tokens else ""
        lines.append(f"step: {seconds(low)} (communication hidden) to {seconds(high)} (none hidden){rate}")
    if plan.compute_seconds is not None or plan.wire_seconds is not None:
        lines.append(_NOT_COUNTED)
    return lines


def seconds(value: float) -> str:
    """ "1.24 s", or milliseconds below a tenth."""
    return f"{value:.3g} s" if value >= 0.1 else f"{value * 1e3:.3g} ms"


def as_dict(plan: MemoryPlan, wire: WirePlan | None = None, step: StepPlan | None = None) -> dict[str, Any]:
    """Everything in bytes, operations and seconds, for programs."""
    found: dict[str, Any] = _memory(plan)
    if wire is not None:
        found["wire"] = {"accumulation": wire.accumulation, "sent_bytes": {**wire.parts, "sum": wire.total}}
    if step is not None:
        low_high, fast_slow = step.step_seconds or (None, None), step.tokens_per_second or (None, None)
        found["step"] = {
            "flops": step.flops,
            "tokens": step.tokens,
            "matmul_flops_per_second": step.matmul,
            "matmul_measured": step.measured,
            "network_bytes_per_second": step.network,
            "compute_seconds": step.compute_seconds,
            "wire_seconds": step.wire_seconds,
            "overlapped_seconds": low_high[0],
            "sequential_seconds": low_high[1],
            "tokens_per_second": list(fast_slow),
        }
    return found


def _memory(plan: MemoryPlan) -> dict[str, Any]:
    return {
        "world_size": plan.world_size,
        "device": plan.device,
        "micro_batch": plan.micro_batch,
        "tokens": plan.tokens,
        "phases": {phase.name: {**phase.parts, "sum": phase.total} for phase in plan.phases},
        "peak_bytes": plan.peak,
        "peak_phase": plan.largest.name,
        "checkpoint_bytes": plan.checkpoint,
        "capacity_bytes": plan.capacity,
        "largest_micro_batch": plan.largest_micro_batch,
    }
