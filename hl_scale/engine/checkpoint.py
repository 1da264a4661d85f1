"""Checkpoints of what is trained: safetensors shards and a JSON manifest, committed by rename, resharded on load.

    checkpoints/step-000100/
        rank-0000-of-0002.safetensors   flat float32 partitions: "<parameter>|master", "|exp_avg", "|exp_avg_sq"
        rank-0001-of-0002.safetensors
        manifest.json                   step, world size, shapes, sha256 of each shard, fingerprints

Every rank writes its own partition into a temporary directory, forces it to disk and sends its hash; rank 0 writes the
manifest and renames the directory. A directory without a manifest is not a checkpoint. The frozen base is never saved:
the manifest holds its fingerprint. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hl_scale.engine import zero3
from hl_scale.engine.zero3 import World

_NAME = re.compile(r"step-(\d{6,})")
FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; says which file is wrong and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint directory and its manifest."""

    directory: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def skipped_steps(self) -> int:
        """Steps among them that changed nothing because a number was not finite; Adam did not count those."""
        return int(self.manifest.get("skipped_steps", 0))

    @property
    def loss(self) -> float:
        """Loss of the last step."""
        return float(self.manifest.get("loss", "nan"))


def save(directory: Path, engine: Any, step: int, world: World, keep: int, details: dict[str, Any]) -> Path:
    """Write one checkpoint, or nothing; collective.

    Args:
        directory: the run's `checkpoints` directory, shared by all ranks.
        engine: ZeRO-3 engine.
        step: optimizer steps done.
        world: this process.
        keep: newest checkpoints kept afterwards.
        details: JSON values added to the manifest (fingerprints, seed, skipped steps, loss).

    Raises:
        CheckpointError: a rank could not write its part; raised on all of them.
    """
    final = directory / f"step-{step:06d}"
    staging = directory / f".step-{step:06d}.tmp"
    try:
        with zero3.together(world), _writing(staging):
            if world.is_main:
                for stale in directory.glob(".step-*.tmp"):  # of a process that was killed
                    shutil.rmtree(stale)
                staging.mkdir(parents=True)
        with zero3.together(world), _writing(staging):
            entry = _write_shard(staging, engine, world)
        entries: list[Any] = [None] * world.size
        dist.all_gather_object(entries, entry)
        with zero3.together(world), _writing(staging):
            if world.is_main:
                manifest = {
                    "format": FORMAT,
                    "step": step,
                    "world_size": world.size,
                    "shapes": zero3.full_shapes(engine.module),
                    "shards": entries,
                    **details,
                }
                _commit(staging, final, manifest)
                # Newer ones, if any, were passed over as damaged when this run resumed: they do not count.
                for old in [path for path in find(directory) if _step_of(path) <= step][:-keep]:
                    shutil.rmtree(old)
    finally:
        if world.is_main:
            shutil.rmtree(staging, ignore_errors=True)
    return final


def _write_shard(staging: Path, engine: Any, world: World) -> dict[str, Any]:
    """Write this rank's partition and force it to disk; its manifest entry."""
    shard = staging / f"rank-{world.rank:04d}-of-{world.size:04d}.safetensors"
    partitions = zero3.local_partitions(engine)
    save_file({f"{name}|{kind}": t for name, kinds in partitions.items() for kind, t in kinds.items()}, shard)
    _flush(shard)
    return {"name": shard.name, "bytes": shard.stat().st_size, "sha256": file_sha256(shard)}


def _commit(staging: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest and move the directory to its name."""
    _write_json(staging / "manifest.json", manifest)
    _flush(staging)
    if final.exists():
        shutil.rmtree(final)
    os.rename(staging, final)
    _flush(final.parent)


@contextmanager
def _writing(staging: Path) -> Iterator[None]:
    """Turn a failed write into a `CheckpointError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint {staging.name} was not written: {error}\n"
            "  fix: free space or correct the permissions; earlier checkpoints are intact: run the same command again"
        ) from error


def find(directory: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name) and (path / "manifest.json").is_file()]
    return sorted(found, key=_step_of)


def newest(directory: Path, step: int | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies (or the one of `step`), and what was wrong with newer ones.

    Raises:
        CheckpointError: `step` was asked for and is missing or damaged.
    """
    problems: list[str] = []
    for path in reversed(find(directory)):
        if step is not None and _step_of(path) != step:
            continue
        try:
            return verify(path), problems
        except CheckpointError as error:
            problems.append(str(error))
    if step is not None:
        steps = ", ".join(path.name for path in find(directory)) or "none"
        reason = "; ".join(problems) or f"there is no such checkpoint in {directory} (found: {steps})"
        raise CheckpointError(f"checkpoint of step {step}: {reason}")
    return None, problems


def verify(path: Path) -> Checkpoint:
    """Check every shard against the manifest.

    Raises:
        CheckpointError: unreadable manifest, missing shard, wrong size or hash.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        form = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}/manifest.json cannot be read: {error!r}") from None
    if form != FORMAT:
        raise CheckpointError(f"{path} has format {form}, this version reads {FORMAT}")
    for entry in manifest["shards"]:
        shard = _shard_path(path, entry)
        if not shard.is_file():
            raise CheckpointError(f"{shard} is missing; use an older checkpoint or restore the file")
        if shard.stat().st_size != entry["bytes"] or file_sha256(shard) != entry["sha256"]:
            raise CheckpointError(f"{shard} is damaged (size or sha256 differs from the manifest)")
    return Checkpoint(path, manifest)


def read_full(
    checkpoint: Checkpoint, kinds: tuple[str, ...] = ("master", *zero3.MOMENTS)
) -> dict[str, dict[str, Tensor]]:
    """Whole flat float32 tensors per parameter and kind, put together from all shards and trimmed of padding."""
    shards = [load_file(_shard_path(checkpoint.directory, entry)) for entry in checkpoint.manifest["shards"]]
    full: dict[str, dict[str, Tensor]] = {}
    for name, shape in checkpoint.manifest["shapes"].items():
        count = int(torch.Size(shape).numel())
        full[name] = {kind: torch.cat([shard[f"{name}|{kind}"] for shard in shards])[:count] for kind in kinds}
    return full


def load_weights(module: nn.Module, checkpoint: Checkpoint, full: dict[str, dict[str, Tensor]]) -> None:
    """Copy master weights into an unpartitioned module.

    Raises:
        CheckpointError: parameter names or shapes differ, which means another configuration wrote the checkpoint.
    """
    parameters = zero3.trainable_parameters(module)
    shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
    if shapes != checkpoint.manifest["shapes"]:
        other = checkpoint.manifest["shapes"]
        names = sorted(name for name in shapes.keys() | other.keys() if shapes.get(name) != other.get(name))
        raise CheckpointError(
            f"{checkpoint.directory} does not fit this hypernetwork: {len(names)} parameters differ, first {names[0]}: "
            f"saved {other.get(names[0])}, expected {shapes.get(names[0])}\n"
            "  fix: use the configuration it was trained with, or another run.directory"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(full[name]["master"].view(parameter.shape))


def _shard_path(directory: Path, entry: dict[str, Any]) -> Path:
    """A shard's file; a manifest cannot point outside its directory."""
    return directory / Path(entry["name"]).name


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
    _flush(path)


def _flush(path: Path) -> None:
    """Force a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
