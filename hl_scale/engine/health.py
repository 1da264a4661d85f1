"""What goes wrong without an error: looked for at every step or at every checkpoint, on all ranks at once."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hl_scale.data.durable import write_text
from hl_scale.engine import zero3
from hl_scale.engine.zero3 import World

NO_EFFECT = 1e-6
"""Two losses that differ by less than this share are taken as equal; float32 sums in another order differ by less."""


_SAME_LOSS = 1e-2
"""Relative; kernels of two GPU generations may round differently."""


class TrainingAborted(ValueError):
    """Training stopped because its numbers can no longer be right."""


def write_nonfinite(
    directory: Path, step: int, loss: float, passes: Sequence[tuple[list[Any], float]], world: World
) -> Path:
    """Write what the batch of a non-finite step was made of: nonfinite-step-000012.json; collective.

    Args:
        directory: run directory.
        step: number of the step, from 1.
        loss: mean loss over all ranks.
        passes: names of samples and loss of each of this rank's passes.
        world: this process.
    """
    everywhere = zero3.gather_objects(list(passes), world)
    ranks = [
        {"rank": rank, "passes": [{"samples": ids, "loss": repr(value)} for ids, value in own]}
        for rank, own in enumerate(everywhere)
    ]
    path = directory / f"nonfinite-step-{step:06d}.json"
    with zero3.together(world):
        if world.is_main:
            write_text(path, json.dumps({"step": step, "loss": repr(loss), "ranks": ranks}, indent=1))
    return path


def untouched_parameters(partitions: dict[str, dict[str, Tensor]], world: World) -> list[str]:
    """Names of parameters that no gradient has ever reached: Adam's second moment is zero in all parts; collective."""
    touched = [name for name, kinds in partitions.items() if bool(kinds["exp_avg_sq"].any())]
    reached = set().union(*zero3.gather_objects(touched, world))
    return sorted(set(partitions) - reached)


def check_replicas(engine: Any, world: World) -> None:
    """Compare the parameters that every rank holds whole; collective.

    Raises:
        TrainingAborted: on every rank, naming a rank and parameter that differ.
    """
    everywhere = zero3.gather_objects(zero3.replica_checksums(engine), world)
    for rank, checksums in enumerate(everywhere):
        different = sorted(name for name in checksums if everywhere[0].get(name) != checksums[name])
        if different:
            raise TrainingAborted(
                f"rank {rank} holds other values than rank 0 in {len(different)} parameters, first {different[0]}\n"
                "  fix: the run cannot be trusted from its last checkpoint on; look for faulty memory on that rank's "
                "host, then run the same command again: it resumes from that checkpoint"
            )


def condition_effect(engine: Any, batch: Any, world: World) -> tuple[float, float]:
    """Loss under the pairs' own conditions, and under those of other pairs, (own, other); collective.

    Equal losses mean that the hypernetwork ignores its condition: it has collapsed to one adapter for all. As all ranks
    compute the same, they must also come to the same.

    Args:
        engine: ZeRO-3 engine.
        batch: the same on every rank; NaN is returned if it has one condition only.
        world: this process.

    Raises:
        TrainingAborted: on every rank, naming one whose loss is another.
    """
    if len(batch.conditions) < 2:
        return float("nan"), float("nan")
    swapped = dataclasses.replace(batch, conditions=batch.conditions.roll(1, dims=0))
    engine.module.eval()  # no dropout, no noise: both losses, and those of all ranks, can be compared
    with torch.no_grad():
        own, other = float(engine.module(batch)), float(engine.module(swapped))
    engine.module.train()
    engine.empty_partition_cache()  # ZeRO-3 keeps what was gathered for a backward pass, which does not come
    for rank, loss in enumerate(losses := zero3.gather_objects(own, world)):
        if not math.isclose(loss, losses[0], rel_tol=_SAME_LOSS) and not (math.isnan(loss) and math.isnan(losses[0])):
            raise TrainingAborted(
                f"rank {rank} computes a loss of {loss:.6g} where rank 0 computes {losses[0]:.6g}: they hold other "
                "weights\n  fix: look for faulty memory or a damaged model file on that rank's host, then run the same "
                "command again: it resumes from the last checkpoint"
            )
    return own, other
