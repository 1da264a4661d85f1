"""The parts and phases that a memory plan is made of."""

from __future__ import annotations

from dataclasses import dataclass

PROCESS = "process, tokenizer and data"
PACKED = "packed base"
CONSTANTS = "block constants"
OTHER = "embeddings, norms, biases"
PARAMETERS = "hypernetwork parameters"
MASTER = "master weights"
MOMENTS = "Adam moments"
PARTITIONS = "gradient partitions"
GATHERED = "gathered weights"
DEQUANTIZED = "dequantised weight"
BUCKETS = "gradients being reduced"
TARGETS = "frozen targets"
ENCODER = "encoder of descriptions"
DESCRIPTIONS = "embedded descriptions"
LIBRARY = "library of adapters"
OBJECTIVE = "objective"
READING = "weights being read"
UPDATE = "update being computed"
COPIES = "copies being written"
FREED = "freed, kept by the heap"


@dataclass(frozen=True)
class Phase:
    """What one rank holds when this part of a run holds most: component -> bytes."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of each rank.

    Attributes:
        world_size: ranks.
        device: "cpu" (resident memory of the process) or "cuda" (tensors on the GPU).
        micro_batch, tokens: samples of a pass (pairs, examples or adapters) and tokens of each text, of which all are
            assumed to be that long; no tokens where the base is not run.
        phases: in the order of a run.
        checkpoint: bytes of one checkpoint on disk, of all ranks together.
        capacity: bytes of a GPU, if given.
        largest_micro_batch: samples of a pass that fit into `capacity`; 0 if none do, None if no capacity was given.
    """

    world_size: int
    device: str
    micro_batch: int
    tokens: int
    phases: tuple[Phase, ...]
    checkpoint: int
    capacity: int | None = None
    largest_micro_batch: int | None = None

    @property
    def largest(self) -> Phase:
        """The phase that decides."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> int:
        """Bytes of each rank at most."""
        return self.largest.total
