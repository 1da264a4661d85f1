"""Checkpoints of what is trained: what they hold, finding and verifying them, and reading them at any world size.

    checkpoints/LATEST                      name of the newest one, replaced last
    checkpoints/step-000100/
        rank-0000-of-0002.safetensors       flat float32 partitions: "<parameter>|master", "|exp_avg", "|exp_avg_sq",
        rank-0001-of-0002.safetensors       and the rank's random states: "random|torch", ...
        manifest.json                       step, world size, shapes, size and sha256 of each shard, fingerprints

A directory without a manifest is not a checkpoint. The frozen base is never saved: the manifest holds its fingerprint.
Nothing is ever unpickled, and a manifest is data from outside: every field is checked. `checkpoint_writer` writes them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hl_scale.data.durable import hash_file
from hl_scale.engine import zero3
from hl_scale.engine.zero3 import World

LATEST = "LATEST"
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{6,})")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; says which file is wrong and what to do."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ShardEntry(_Strict):
    """One rank's file. Its name cannot lead out of the checkpoint's directory."""

    name: Annotated[str, Field(pattern=r"^rank-\d{4,}-of-\d{4,}\.safetensors$")]
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(_Strict):
    """What a checkpoint is of. Format 1 had neither random states nor the settings' fingerprint."""

    format: Literal[1, 2] = 2
    step: Annotated[int, Field(ge=0)]
    """Optimizer steps done: the sampler and the schedule are functions of it, and metrics up to it are kept."""
    world_size: Annotated[int, Field(ge=1)]
    shapes: dict[str, list[Annotated[int, Field(ge=0)]]]
    """Unpartitioned shape of every trained parameter."""
    shards: Annotated[list[ShardEntry], Field(min_length=1)]
    """In the order of ranks."""
    base_fingerprint: str
    data_fingerprint: str
    settings_fingerprint: str | None = None
    task_adapter_fingerprint: str | None = None
    """Of `lora.task_adapter`, where there is one."""
    seed: int
    skipped_steps: Annotated[int, Field(ge=0)] = 0
    """Steps among them that changed nothing because a number was not finite; Adam did not count those."""
    loss: float | None = None
    """Of the last step."""
    version: str | None = None
    """Of this package."""

    @model_validator(mode="after")
    def _fields_agree(self) -> Manifest:
        if len(self.shards) != self.world_size:
            raise ValueError(f"{len(self.shards)} shards of {self.world_size} ranks")
        if self.skipped_steps > self.step:
            raise ValueError(f"{self.skipped_steps} of {self.step} steps were skipped")
        return self


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint directory and its manifest."""

    directory: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def skipped_steps(self) -> int:
        return self.manifest.skipped_steps

    @property
    def loss(self) -> float:
        """Loss of the last step."""
        return math.nan if self.manifest.loss is None else self.manifest.loss


@dataclass(frozen=True)
class Found:
    """The newest checkpoint that can be used, if any, and name -> what is wrong of those that were passed over."""

    checkpoint: Checkpoint | None
    damaged: dict[str, str]


def find(directory: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=step_of)


def newest(directory: Path, step: int | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies (or the one of `step`), and what was wrong with newer ones.

    Raises:
        CheckpointError: `step` was asked for and is missing or damaged.
    """
    problems: list[str] = []
    for path in reversed(find(directory)):
        if step is not None and step_of(path) != step:
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


def newest_together(directory: Path, world: World) -> Found:
    """As `newest`, the shards to verify shared out over the ranks; the same on every rank; collective."""
    listed: list[str] = []
    with zero3.together(world):
        if world.is_main:
            listed = [path.name for path in find(directory)]
    names = zero3.gather_objects(listed, world)[0]
    damaged: dict[str, str] = {}
    for name in reversed(names):
        found: Checkpoint | None = None
        problem = None
        try:
            found = verify(directory / name, part=world.rank, parts=world.size)
        except (CheckpointError, OSError) as error:
            problem = str(error)
        everywhere = zero3.gather_objects(problem, world)
        if not any(everywhere):
            return Found(found, damaged)
        damaged[name] = "; ".join(sorted({text for text in everywhere if text}))
    return Found(None, damaged)


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint directory.

    Raises:
        CheckpointError: missing, unreadable, or with a field that cannot be right.
    """
    file = path / MANIFEST
    try:
        return Manifest.model_validate_json(file.read_text(encoding="utf-8"))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"])) or "(whole file)"
        raise CheckpointError(
            f"{file} cannot be read: {where}: {problem['msg']}; use an older checkpoint, or the version that wrote it"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error!r}; use an older checkpoint") from None


def verify(path: Path, part: int = 0, parts: int = 1) -> Checkpoint:
    """Check every shard against the manifest: that it is there and of the right size, and every `parts`-th one from
    `part` also by its hash.

    Raises:
        CheckpointError: unreadable manifest, missing shard, wrong size or hash.
    """
    manifest = read_manifest(path)
    if manifest.step != step_of(path):
        raise CheckpointError(f"{path} holds the checkpoint of step {manifest.step}; give it back its name")
    for number, entry in enumerate(manifest.shards):
        shard = path / entry.name
        if not shard.is_file():
            raise CheckpointError(f"{shard} is missing; restore the file, or use an older checkpoint")
        size = shard.stat().st_size
        if size != entry.bytes:
            raise CheckpointError(
                f"{shard} is damaged: {size} bytes instead of {entry.bytes}; restore it, or use an older checkpoint"
            )
        if number % parts == part and hash_file(shard) != entry.sha256:
            raise CheckpointError(
                f"{shard} is damaged: its sha256 is not the manifest's; restore it, or use an older checkpoint"
            )
    return Checkpoint(path, manifest)


class Shards:
    """The tensors of a checkpoint, whatever world size wrote it; reads only what is asked for. A context manager.

    Raises:
        CheckpointError: a file that is no safetensors file, or lacks a tensor.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def numel(self, name: str) -> int:
        """Numbers in a whole parameter."""
        return math.prod(self.checkpoint.manifest.shapes[name])

    def read(self, name: str, kind: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements start to stop of a parameter's flat "master", "exp_avg" or "exp_avg_sq", float32.

        Elements behind its end are not there: the result can be shorter than asked for, or empty.
        """
        entries = self.checkpoint.manifest.shards
        # ZeRO-3 gives each rank an equal part, rounded up; the last ones are padded.
        size = -(-self.numel(name) // len(entries))
        stop = min(self.numel(name) if stop is None else stop, self.numel(name))
        pieces = [
            self._slice(entries[number], f"{name}|{kind}", size)[
                max(start - number * size, 0) : min(stop - number * size, size)
            ]
            for number in range(start // size if size else 0, -(-stop // size) if size else 0)
        ]
        return torch.cat(pieces) if pieces else torch.empty(0)

    def random_states(self, rank: int) -> dict[str, Tensor]:
        """Random states of one rank, as `checkpoint_writer.random_states` gave them; empty for format 1."""
        entry = self.checkpoint.manifest.shards[rank]
        keys = [key for key in list(self._open(entry).keys()) if key.startswith("random|")]
        try:
            return {key.removeprefix("random|"): self._open(entry).get_tensor(key) for key in keys}
        except SafetensorError as error:
            raise CheckpointError(f"{self.checkpoint.directory / entry.name}: {error}") from None

    def _slice(self, entry: ShardEntry, key: str, size: int) -> Any:
        file = self._open(entry)
        try:
            part = file.get_slice(key)
        except SafetensorError as error:
            raise CheckpointError(f"{self.checkpoint.directory / entry.name}: {error}") from None
        if list(part.get_shape()) != [size] or part.get_dtype() != "F32":
            raise CheckpointError(
                f"{self.checkpoint.directory / entry.name}: {key} is {part.get_dtype()} {part.get_shape()}, "
                f"the manifest's shape asks for F32 [{size}]"
            )
        return part

    def _open(self, entry: ShardEntry) -> Any:
        if entry.name not in self._files:
            path = self.checkpoint.directory / entry.name
            try:
                self._files[entry.name] = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from None
        return self._files[entry.name]


def read_full(
    checkpoint: Checkpoint, kinds: Iterable[str] = ("master", *zero3.MOMENTS)
) -> dict[str, dict[str, Tensor]]:
    """Whole flat float32 tensors per parameter and kind."""
    with Shards(checkpoint) as shards:
        return {name: {kind: shards.read(name, kind) for kind in kinds} for name in checkpoint.manifest.shapes}


def load_weights(module: nn.Module, checkpoint: Checkpoint, prefix: str = "") -> None:
    """Copy master weights into an unpartitioned module, whose names are the checkpoint's after `prefix`.

    Raises:
        CheckpointError: parameter names or shapes differ, which means another configuration wrote the checkpoint.
    """
    parameters = {prefix + name: parameter for name, parameter in zero3.trainable_parameters(module).items()}
    shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
    other = checkpoint.manifest.shapes
    if shapes != other:
        names = sorted(name for name in shapes.keys() | other.keys() if shapes.get(name) != other.get(name))
        raise CheckpointError(
            f"{checkpoint.directory} does not fit this hypernetwork: {len(names)} parameters differ, first {names[0]}: "
            f"saved {other.get(names[0])}, expected {shapes.get(names[0])}\n"
            "  fix: use the configuration it was trained with, or another run.directory"
        )
    with torch.no_grad(), Shards(checkpoint) as shards:
        for name, parameter in parameters.items():
            parameter.copy_(shards.read(name, "master").view(parameter.shape))


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
