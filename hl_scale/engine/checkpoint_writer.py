"""Writing checkpoints: all of one or nothing, whenever a process is killed.

1. Rank 0 makes a hidden directory; every rank copies its partition.
2. Every rank writes its copy there as safetensors, forces it to disk and hashes it; in a thread of its own.
3. All exchange (name, bytes, sha256); rank 0 writes the manifest, forces it to disk and renames the directory.
4. Rank 0 replaces LATEST and removes what the retention policy gives up.

Nothing before the rename is visible under a checkpoint's name. Before 1 and 3, rank 0 sees that the run directory is
still its own: a process that was held up for long may find that another run has begun there. Threads use no
collectives, so that every backend can train meanwhile; one checkpoint is under way at a time, which bounds memory to
one copy.
"""

from __future__ import annotations

import logging
import math
import os
import random
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hl_scale.data.durable import flush, hash_file, write_text
from hl_scale.engine import zero3
from hl_scale.engine.checkpoint import (
    LATEST,
    MANIFEST,
    CheckpointError,
    Manifest,
    ShardEntry,
    find,
    step_of,
)
from hl_scale.engine.run_lock import Claim
from hl_scale.engine.zero3 import RankError, World

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the `newest` ones, and those whose step is a multiple of `every`."""

    newest: int
    every: int | None = None

    def expendable(self, paths: list[Path]) -> list[Path]:
        """Of checkpoints, oldest first, those that go."""
        old = paths[: -self.newest]
        return [path for path in old if self.every is None or step_of(path) % self.every]


@dataclass(frozen=True)
class _Pending:
    """A checkpoint under way."""

    step: int
    details: dict[str, Any]
    shapes: dict[str, list[int]]
    written: Future[ShardEntry]


class CheckpointWriter:
    """Writes the checkpoints of one run.

    Args:
        directory: the run's `checkpoints` directory, shared by all ranks.
        world: this process.
        retention: what stays.
        claim: this group's hold on the run directory.
        damaged: names of checkpoints that were passed over; they do not count as kept.
        commit: "rename": shards are written to a hidden directory, which gets its name when all is there. "manifest":
            they are written where they belong, and the manifest, written last, makes them a checkpoint: for object
            stores mounted as a file system, which cannot rename a directory in one operation.
    """

    def __init__(
        self,
        directory: Path,
        world: World,
        retention: Retention,
        claim: Claim,
        commit: Literal["rename", "manifest"] = "rename",
        damaged: Iterable[str] = (),
    ) -> None:
        self.directory, self.world, self.retention, self.commit = directory, world, retention, commit
        self.claim, self.damaged = claim, frozenset(damaged)
        if world.is_main:
            for stale in directory.glob(".*"):  # of processes that were killed
                _remove(stale)
        self._pending: _Pending | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    @property
    def pending_step(self) -> int | None:
        """Step of the checkpoint under way."""
        return None if self._pending is None else self._pending.step

    @property
    def is_written(self) -> bool:
        """Whether this rank's part of the checkpoint under way is on disk."""
        return self._pending is not None and self._pending.written.done()

    def begin(self, engine: Any, partitions: dict[str, dict[str, Tensor]], step: int, details: dict[str, Any]) -> None:
        """Start to write the checkpoint of `step`; collective. `finish` commits it.

        Args:
            engine: ZeRO-3 engine.
            partitions: copies of this rank's partitions (`zero3.local_partitions`).
            step: optimizer steps done.
            details: further fields of the manifest.

        Raises:
            CheckpointError: no directory, or too little space; raised on all ranks.
        """
        assert self._pending is None, "one checkpoint at a time"
        staging = self._staging(step)
        shapes = zero3.full_shapes(engine.module)
        with zero3.together(self.world), _writing(step):
            if self.world.is_main:
                self._check_claim()
                self._prepare(staging, 4 * 3 * sum(map(math.prod, shapes.values())))
        tensors = {f"{name}|{kind}": t for name, kinds in partitions.items() for kind, t in kinds.items()}
        tensors |= {f"random|{name}": state for name, state in random_states().items()}
        shard = staging / f"rank-{self.world.rank:04d}-of-{self.world.size:04d}.safetensors"
        self._pending = _Pending(step, details, shapes, self._thread.submit(_write_shard, shard, tensors))

    def finish(self) -> Path:
        """Wait for all ranks' parts and commit the checkpoint under way; collective.

        Raises:
            CheckpointError: a rank could not write its part; raised on all of them, and nothing is left.
        """
        pending = self._pending
        assert pending is not None
        staging, final = self._staging(pending.step), self.directory / f"step-{pending.step:06d}"
        entry: ShardEntry | None = None
        try:
            with zero3.together(self.world), _writing(pending.step):
                entry = pending.written.result()
            entries = zero3.gather_objects(entry, self.world)
            with zero3.together(self.world), _writing(pending.step):
                if self.world.is_main:
                    self._check_claim()
                    manifest = Manifest(
                        step=pending.step,
                        world_size=self.world.size,
                        shapes=pending.shapes,
                        shards=entries,
                        **pending.details,
                    )
                    self._commit(staging, final, manifest)
        except (CheckpointError, RankError):
            if self.world.is_main and (staging != final or not (final / MANIFEST).is_file()):
                _remove(staging)
            raise
        finally:
            self._pending = None
        if self.world.is_main:
            self._point_at(final)
            self._retain(pending.step)
        return final

    def close(self) -> None:
        """Leave a checkpoint under way unfinished."""
        self._thread.shutdown(wait=True)

    def _staging(self, step: int) -> Path:
        name = f"step-{step:06d}"
        return self.directory / (f".{name}.{self.claim.token}.tmp" if self.commit == "rename" else name)

    def _check_claim(self) -> None:
        if not self.claim.holds():
            raise CheckpointError(
                f"another run has taken {self.directory.parent} over while this one was held up\n"
                "  fix: nothing; this one must not write there any more"
            )

    def _prepare(self, staging: Path, needed: int) -> None:
        """Make the directory, and see that there is room."""
        if staging.exists():  # a damaged checkpoint, or shards that no manifest followed
            _discard(staging)
        staging.mkdir(parents=True)
        free = shutil.disk_usage(staging).free
        if free < needed:
            shutil.rmtree(staging)
            raise OSError(f"{needed:,} bytes are needed in {self.directory}, {free:,} are free")

    def _commit(self, staging: Path, final: Path, manifest: Manifest) -> None:
        """Write the manifest and give the directory its name."""
        write_text(staging / MANIFEST, manifest.model_dump_json(indent=1))
        flush(staging)
        if staging != final:
            if final.exists():  # damaged, and passed over when this run resumed
                _discard(final)
            os.rename(staging, final)
        flush(final.parent)

    def _point_at(self, final: Path) -> None:
        """Replace LATEST. The checkpoint is valid without: a failure is only told."""
        try:
            write_text(self.directory / LATEST, final.name + "\n")
            flush(self.directory)
        except OSError as error:
            _LOG.warning("%s still names an older checkpoint than %s: %s", self.directory / LATEST, final.name, error)

    def _retain(self, step: int) -> None:
        good = [path for path in find(self.directory) if step_of(path) <= step and path.name not in self.damaged]
        for old in self.retention.expendable(good):
            _discard(old)


def random_states() -> dict[str, Tensor]:
    """The states of this process's generators (torch, CUDA, NumPy, Python) as tensors."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    version, numbers, next_gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy_position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([gauss], dtype=torch.float64),
        "python": torch.tensor([version, *numbers], dtype=torch.int64),
        "python_gauss": torch.tensor([] if next_gauss is None else [next_gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: dict[str, Tensor]) -> None:
    """Set this process's generators to what `random_states` gave."""
    torch.set_rng_state(states["torch"])
    position, has_gauss = states["numpy_position"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, float(states["numpy_gauss"][0])))
    version, *numbers = states["python"].tolist()
    gauss = states["python_gauss"].tolist()
    random.setstate((version, tuple(numbers), gauss[0] if gauss else None))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _write_shard(shard: Path, tensors: dict[str, Tensor]) -> ShardEntry:
    """Write one rank's file and force it to disk."""
    save_file(tensors, shard)
    flush(shard)
    return ShardEntry(name=shard.name, bytes=shard.stat().st_size, sha256=hash_file(shard))


@contextmanager
def _writing(step: int) -> Iterator[None]:
    """Turn a failed write into a `CheckpointError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint of step {step} was not written: {error}\n"
            "  fix: free space or correct the permissions; earlier checkpoints are intact: run the same command again"
        ) from error


def _discard(path: Path) -> None:
    """Remove a checkpoint so that no half of it is ever seen under its name."""
    hidden = path.with_name(f".{path.name}.old")
    try:
        os.rename(path, hidden)
    except OSError:  # where directories cannot be renamed, it stops being a checkpoint with its manifest
        (path / MANIFEST).unlink(missing_ok=True)
        hidden = path
    _remove(hidden)


def _remove(path: Path) -> None:
    """Remove a directory, a file or a link; what cannot be removed is only told."""
    try:
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)
    except OSError as error:
        _LOG.warning("%s was not removed: %s", path, error)
