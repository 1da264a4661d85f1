"""Write sharded safetensors files one tensor at a time.

The safetensors library takes all tensors of a file at once. Sizes are known beforehand here, so the header can be
written first and each tensor appended as it is produced: memory is one tensor, not one shard. The format is an 8-byte
little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, and the raw bytes in order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

INDEX_FILE = "model.safetensors.index.json"
_DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class TensorSource:
    """A tensor to be written: its name, shape and dtype, and a function that produces it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    produce: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> TensorSource:
        """A tensor at hand."""
        return cls(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)


def write_sharded(
    directory: Path,
    sources: Sequence[TensorSource],
    max_shard_bytes: int,
    advance: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Write ``model.safetensors``, or several shards and their index, into ``directory``.

    Args:
        directory: an existing directory.
        sources: tensors in the order to write them.
        max_shard_bytes: bound on the tensor bytes of a shard; a larger tensor gets a shard of its own.
        advance: called with the bytes just written.

    Returns:
        The names of the weight files.

    Raises:
        ValueError: ``max_shard_bytes`` is not positive, or a source produces another shape or dtype than it announced.
    """
    shards = plan_shards(sources, max_shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(directory / name, shard, advance=advance)
    if len(shards) > 1:
        weight_map = {source.name: name for name, shard in zip(names, shards, strict=True) for source in shard}
        index = {"metadata": {"total_size": sum(source.nbytes for source in sources)}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return names


def plan_shards(sources: Sequence[TensorSource], max_shard_bytes: int) -> list[list[TensorSource]]:
    """Cut the sources, in order, into shards of at most ``max_shard_bytes``."""
    if max_shard_bytes < 1:
        raise ValueError(f"the largest shard must have a positive size in bytes, got {max_shard_bytes}")
    shards: list[list[TensorSource]] = [[]]
    size = 0
    for source in sources:
        if shards[-1] and size + source.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(source)
        size += source.nbytes
    return shards


def write_safetensors(
    path: Path,
    sources: Iterable[TensorSource],
    metadata: Mapping[str, str] | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> None:
    """Write one file; the same tensors and metadata give the same bytes.

    Raises:
        ValueError: a source produces another shape or dtype than it announced.
        OSError: the file exists, or cannot be written.
    """
    sources = list(sources)
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for source in sources:
        header[source.name] = {
            "dtype": _DTYPE_NAMES[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [offset, offset + source.nbytes],
        }
        offset += source.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("xb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for source in sources:
            tensor = source.produce()
            if tuple(tensor.shape) != source.shape or tensor.dtype != source.dtype:
                raise ValueError(
                    f"{source.name} was announced as {source.dtype} {source.shape}, "
                    f"produced as {tensor.dtype} {tuple(tensor.shape)}"
                )
            file.write(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
            del tensor  # before the next one is produced
            advance(source.nbytes)
