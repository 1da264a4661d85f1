"""A memory plan as text, and sizes as people write them."""

from __future__ import annotations

import re
from typing import Any

from rich.table import Table

from hl_scale.planning.memory import CUDA_RESERVE
from hl_scale.planning.phases import MemoryPlan

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


def gigabytes(size: int) -> str:
    """ "6.1 GB", or megabytes below a tenth of one."""
    return f"{size / 1e9:.1f} GB" if size >= 10**8 else f"{size / 1e6:.1f} MB"


def render_plan(plan: MemoryPlan) -> Table:
    """Components by phase, in megabytes (10^6 bytes)."""
    where = "resident memory of each rank" if plan.device == "cpu" else "tensors on each rank's GPU"
    title = f"{where} in MB: {plan.world_size} ranks, {plan.micro_batch} pairs of {plan.tokens} tokens a pass"
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


def as_dict(plan: MemoryPlan) -> dict[str, Any]:
    """Everything in bytes, for programs."""
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
