"""Thousands of adapters in a fraction of their size: bases that they share, and a small core for each.

    compressed.safetensors   for each slot: PATH.U (out, K)  PATH.V (in, K)  PATH.left (n, K, r)  PATH.right (n, r, K)
    compressed.json          slots and adapters, with the error of each, and each adapter's configuration and provenance
    hl_provenance.json       totals, and sha256 of both files

The update of adapter i in a slot is s U left_i right_i V^T, see `joint_basis`; B = U left_i and A = right_i V^T give it
back as a plain LoRA of its old rank and scale. One slot is worked on at a time: memory is that slot's factors of all
adapters, in float64.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import hl_scale
from hl_scale.data.durable import hash_file
from hl_scale.data.library import Library
from hl_scale.data.peft_directory import PROVENANCE_FILE, WEIGHTS_FILE
from hl_scale.lora import LoraFactors, Slot
from hl_scale.progress import counting_bar
from hl_scale.serving.export import check_finite, write_adapter_files, write_json
from hl_scale.serving.joint_basis import JointBasis, joint_basis
from hl_scale.serving.shards import TensorSource, write_safetensors
from hl_scale.serving.staging import check_replaceable, staged_directory

TENSORS_FILE = "compressed.safetensors"
MANIFEST_FILE = "compressed.json"
FORMAT = 1


class CompressionError(ValueError):
    """A set of adapters that cannot be compressed or restored."""


@dataclass(frozen=True)
class SlotError:
    """What the bases of one slot miss.

    Attributes:
        slot: the slot.
        columns: of U and V; at most the rank that was asked for.
        relative_error: norm of what is missed by the norm of the updates, over all adapters.
        spread_error: the same by the norm of what tells the adapters apart, their differences from their mean.
        iterations, converged: of `joint_basis`.
    """

    slot: Slot
    columns: int
    relative_error: float
    spread_error: float
    iterations: int
    converged: bool


class CompressedAdapters:
    """A compressed set on disk; tensors are read when they are asked for.

    Attributes:
        directory: where it is.
        names: of the adapters.
        rank: K.
        scale: s of all adapters.
        slots: the errors of each slot.
        relative_error, spread_error: over all slots, see `SlotError`.
        errors: name -> relative error of that adapter, over all slots.
        bytes_before, bytes_after: of the tensor files.
    """

    def __init__(self, directory: Path, manifest: Mapping[str, Any]) -> None:
        self.directory = directory
        self.rank, self.scale = int(manifest["rank"]), float(manifest["scale"])
        self.slots = tuple(SlotError(**{**entry, "slot": Slot(**entry["slot"])}) for entry in manifest["slots"])
        self.relative_error, self.spread_error = manifest["relative_error"], manifest["spread_error"]
        self._adapters = {entry["name"]: entry for entry in manifest["adapters"]}
        self._rows = {name: row for row, name in enumerate(self._adapters)}
        self.names = tuple(self._adapters)
        self.errors = {name: float(entry["relative_error"]) for name, entry in self._adapters.items()}
        self.bytes_before, self.bytes_after = manifest["bytes_before"], manifest["bytes_after"]

    def entry(self, name: str) -> Mapping[str, Any]:
        """An adapter's configuration, provenance and error; CompressionError if there is none of this name."""
        if name not in self._adapters:
            raise CompressionError(
                f"{self.directory} holds no adapter {name!r}\n  fix: use one of {', '.join(self.names[:8])} ..."
            )
        return self._adapters[name]

    def read(self, name: str) -> LoraFactors:
        """The factors of one adapter (E = 1), float32: A = right V^T and B = U left."""
        self.entry(name)
        row = self._rows[name]
        a, b = {}, {}
        with safe_open(self.directory / TENSORS_FILE, framework="pt") as file:
            for path in (error.slot.path for error in self.slots):
                u, v = file.get_tensor(f"{path}.U").double(), file.get_tensor(f"{path}.V").double()
                left, right = (file.get_slice(f"{path}.{side}")[row].double() for side in ("left", "right"))
                a[path], b[path] = (right @ v.mT).float()[None], (u @ left).float()[None]
        return LoraFactors(tuple(error.slot for error in self.slots), a, b, self.scale)


def compress_adapters(
    adapters: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    rank: int,
    *,
    measure: Callable[[Library, CompressedAdapters], Mapping[str, Any]] | None = None,
    force: bool = False,
    progress: bool = True,
) -> CompressedAdapters:
    """Compress a folder of PEFT directories that share rank, scale, slots and base.

    Args:
        adapters: the folder.
        directory: where to write; must not exist unless ``force``. Appears whole or not at all.
        rank: K, columns of the shared bases.
        measure: what else is to be known of the set before it is published; its result is added to the provenance.
        force: replace a directory that hl_scale wrote earlier.
        progress: show a progress bar on a terminal.

    Raises:
        LibraryError: adapters that are damaged, not plain LoRA, or unlike the others; all in one message.
        ValueError: a rank that is not positive, or a directory in the way.
    """
    if rank < 1:
        raise CompressionError(f"the rank of the shared bases must be positive, got {rank}")
    check_replaceable(directory, force=force)
    library = Library(adapters, None)
    work = _Work(library, rank)
    with staged_directory(directory, force=force) as staging:
        with counting_bar("compressing", len(library.slots), progress) as advance:
            write_safetensors(staging / TENSORS_FILE, work.sources(advance))
        manifest = work.manifest((staging / TENSORS_FILE).stat().st_size)
        write_json(staging / MANIFEST_FILE, manifest)
        staged = CompressedAdapters(staging, manifest)
        facts: dict[str, Any] = {
            "kind": "compressed adapters",
            "adapters": len(library.names),
            **{key: value for key, value in manifest.items() if not isinstance(value, list | dict)},
            "base_model": library.base_model,
            "base_fingerprint": library.base_fingerprint,
            "hl_scale": hl_scale.__version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        if measure is not None:
            facts["divergence"] = dict(measure(library, staged))
        files = {name: {"sha256": hash_file(staging / name)} for name in (TENSORS_FILE, MANIFEST_FILE)}
        write_json(staging / PROVENANCE_FILE, {**facts, "files": files})
    return CompressedAdapters(Path(directory), manifest)


def open_compressed(directory: str | os.PathLike[str]) -> CompressedAdapters:
    """Open a compressed set after comparing its files with their sha256.

    Raises:
        CompressionError: it is none, or a file is missing, damaged or of another format.
    """
    directory = Path(directory)
    fix = "\n  fix: pass a directory that `hl-scale compress` wrote, or compress the adapters again"
    try:
        facts = json.loads((directory / PROVENANCE_FILE).read_text(encoding="utf-8"))
        digests = {name: facts["files"][name]["sha256"] for name in (TENSORS_FILE, MANIFEST_FILE)}
        damaged = [name for name, digest in digests.items() if hash_file(directory / name) != digest]
        if damaged:
            raise CompressionError(f"{directory / damaged[0]} is damaged: its sha256 is not the recorded one{fix}")
        manifest = json.loads((directory / MANIFEST_FILE).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CompressionError(f"{directory} has format {manifest['format']}, this version reads {FORMAT}{fix}")
        return CompressedAdapters(directory, manifest)
    except CompressionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CompressionError(f"{directory} is no set of compressed adapters: {error!r}{fix}") from None


def decompress_adapter(
    compressed: CompressedAdapters, name: str, directory: str | os.PathLike[str], *, force: bool = False
) -> Path:
    """Write one adapter of a compressed set as a PEFT directory with the configuration that it had.

    Raises:
        CompressionError: there is no such adapter, or its tensors cannot be read.
        ExportError: its tensors hold NaN or infinity.
        OutputError: the directory exists and may not be replaced.
    """
    entry = compressed.entry(name)
    check_replaceable(directory, force=force)
    try:
        factors = compressed.read(name)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch's, where shapes do not go together
        raise CompressionError(f"{compressed.directory / TENSORS_FILE} cannot be read: {error}") from None
    check_finite(factors)
    facts = {
        **entry["provenance"],
        "scale": factors.scale,
        "shared_basis_rank": compressed.rank,
        "shared_basis_adapters": len(compressed.names),
        "shared_basis_error": entry["relative_error"],
    }
    with staged_directory(directory, force=force) as staging:
        write_adapter_files(staging, factors, entry["config"], facts)
    return Path(directory)


class _Work:
    """Compresses slot by slot, as the tensors are written, and keeps what is told of it."""

    def __init__(self, library: Library, rank: int) -> None:
        self.library, self.rank = library, rank
        self.slots: list[SlotError] = []
        self.square_error = self.square_norm = torch.zeros(len(library.names), dtype=torch.float64)
        self.square_spread = 0.0
        self.basis: JointBasis | None = None

    def sources(self, advance: Callable[[int], None]) -> list[TensorSource]:
        """The tensors of all slots in order; the first of a slot computes all four."""
        count, r = len(self.library.names), self.library.rank
        sources = []
        for slot in self.library.slots:
            columns = min(self.rank, slot.in_features, slot.out_features, count * r)
            shapes = {
                "U": (slot.out_features, columns), "V": (slot.in_features, columns),
                "left": (count, columns, r), "right": (count, r, columns),
            }  # fmt: skip
            for part, shape in shapes.items():
                produce = self._producer(slot, part, advance)
                sources.append(TensorSource(f"{slot.path}.{part}", shape, torch.float32, produce))
        return sources

    def _producer(self, slot: Slot, part: str, advance: Callable[[int], None]) -> Callable[[], Tensor]:
        def produce() -> Tensor:
            if part == "U":
                self.basis = self._compress(slot)
                advance(1)
            assert self.basis is not None
            return getattr(self.basis, part.lower()).float()

        return produce

    def _compress(self, slot: Slot) -> JointBasis:
        self.basis = None
        basis = joint_basis(*self.library.read_slot(slot), self.rank)
        error, norm, spread = (
            total.sum().item() for total in (basis.square_error, basis.square_norm, basis.square_spread)
        )
        relative = _relative(error, norm), _relative(error, spread)
        self.slots.append(SlotError(slot, basis.u.shape[1], *relative, basis.iterations, basis.converged))
        self.square_error = self.square_error + basis.square_error
        self.square_norm = self.square_norm + basis.square_norm
        self.square_spread += spread
        return basis

    def manifest(self, bytes_after: int) -> dict[str, Any]:
        """Content of compressed.json, once all tensors are written."""
        errors = map(_relative, self.square_error.tolist(), self.square_norm.tolist())
        adapters = [self._entry(name, error) for name, error in zip(self.library.names, errors, strict=True)]
        error = self.square_error.sum().item()
        return {
            "format": FORMAT,
            "rank": self.rank,
            "scale": self.library.scale,
            "relative_error": _relative(error, self.square_norm.sum().item()),
            "spread_error": _relative(error, self.square_spread),
            "worst_adapter_error": max(adapter["relative_error"] for adapter in adapters),
            "bytes_before": sum(
                (self.library.directory / name / WEIGHTS_FILE).stat().st_size for name in self.library.names
            ),
            "bytes_after": bytes_after,
            "slots": [asdict(slot) for slot in self.slots],
            "adapters": adapters,
        }

    def _entry(self, name: str, error: float) -> dict[str, Any]:
        facts = self.library.facts(name)
        provenance = {key: value for key, value in facts.provenance.items() if key != "files"}
        return {"name": name, "relative_error": error, "config": dict(facts.config), "provenance": provenance}


def _relative(square_error: float, square_norm: float) -> float:
    """Ratio of norms; 0 of nothing. Without differences between adapters every error is large: capped at 1."""
    return min(1.0, math.sqrt(square_error / square_norm)) if square_norm > 0 else 0.0
