"""Memory of each rank before anything runs: components in bytes, phase by phase.

Sizes of what is held follow from shapes, placement and world size (ZeRO-3 cuts every parameter into equal parts,
rounded up). Activations, generated factors and their gradients come from running the real forward and backward pass
without data (`tracing`). What a process needs before it holds any tensor is measured (`process`).

On CPUs resident memory is planned. There a block that was freed stays with the process unless it is large
(`engine.memory`): what backward frees is still there when gradients are reduced and weights updated, with the gaps
between such blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from hl_scale.base import QuantizedLinear
from hl_scale.base.loading import local_directory
from hl_scale.base.random_weights import is_random
from hl_scale.config import Config
from hl_scale.data.sampling import plan_batches
from hl_scale.engine.checkpoint_writer import random_states
from hl_scale.engine.memory import LARGE_BLOCK, LARGEST_KEPT
from hl_scale.kernels import quantize_nf4
from hl_scale.planning import tracing
from hl_scale.planning.gathering import Gathering, num_bytes
from hl_scale.planning.jobs import Job
from hl_scale.planning.phases import (
    BUCKETS,
    CONSTANTS,
    COPIES,
    DEQUANTIZED,
    FREED,
    GATHERED,
    MASTER,
    MOMENTS,
    OBJECTIVE,
    OTHER,
    PACKED,
    PARAMETERS,
    PARTITIONS,
    PROCESS,
    READING,
    UPDATE,
    MemoryPlan,
    Phase,
)
from hl_scale.planning.preparation import Preparation, tensor_sizes
from hl_scale.planning.process import process_baseline

CUDA_RESERVE = 1 << 30
"""Bytes of a GPU that are not tensors: context, cuBLAS and NCCL buffers. Assumed."""

GAPS = 0.35
"""Bytes of gaps in the heap for each byte of a pass's blocks in it. Measured (mallinfo2 between the passes of Gemma 3
270M, 8 pairs of 23 to 44 tokens: 0.32 to 0.40): a block does not fit into the gap that one of its size has left, for
glibc wants room to align it."""

_REFINEMENTS = 3
_MOST_SAMPLES = 1 << 16
_GROUPS_TRACED = 4


def plan_memory(
    config: Config,
    world_size: int,
    *,
    device: str = "cpu",
    tokens: int | None = None,
    capacity: int | None = None,
    process: int | None = None,
) -> MemoryPlan:
    """Plan the memory of a training run.

    Args:
        config: the whole configuration.
        world_size: ranks.
        device: "cpu" or "cuda".
        tokens: of each text, special tokens included; `data.maximum_tokens` unless given.
        capacity: bytes of a GPU, to find the largest micro-batch for.
        process: bytes of a process on a CPU without tensors; measured in a new process unless given.

    Raises:
        ValueError: see `Job`.
        OSError: no process could be started to measure.
    """
    batch = plan_batches(config.training.global_batch_size, config.training.micro_batch_size, world_size)
    model = _Model(config, world_size, device, process)
    length = model.job.length(tokens)
    plan = MemoryPlan(
        world_size, device, batch.micro_batch, length, model.phases(batch.micro_batch, length), model.checkpoint
    )
    if capacity is None:
        return plan
    room = capacity - (CUDA_RESERVE if device == "cuda" else 0)
    return replace(plan, capacity=capacity, largest_micro_batch=_largest_micro_batch(model, length, room))


def checkpoint_bytes(config: Config) -> int:
    """Bytes of one checkpoint on disk, of all ranks together; what `plan_memory` says, without the rest.

    Raises:
        ValueError: see `Job`.
    """
    return _Model(config, 1, "cpu").checkpoint


def _largest_micro_batch(model: _Model, length: int, room: int) -> int:
    """Most samples whose peak is within `room` bytes: peaks of large batches grow by the same amount with each one."""

    def peak(samples: int) -> int:
        return max(phase.total for phase in model.phases(samples, length))

    if peak(1) > room:
        return 0
    low, high = 1, 5
    for _ in range(_REFINEMENTS):
        slope = max((peak(high) - peak(low)) // (high - low), 1)
        guess = min(low + (room - peak(low)) // slope, _MOST_SAMPLES)
        low, high = max(guess // 2, 1), guess + 1
    while guess > 1 and peak(guess) > room:
        guess -= 1
    return guess


@dataclass(eq=False)
class _Model:
    """Base and hypernetwork without weights, and the sizes that follow from them."""

    config: Config
    world_size: int
    device: str
    process: int | None = None

    def __post_init__(self) -> None:
        config = self.config
        self.job = Job(config)
        self.base, self.hypernetwork = self.job.base, self.job.hypernetwork
        self.preparation = Preparation(self.job, self.device == "cpu")
        self.item = getattr(torch, config.base.compute_dtype).itemsize
        self.on_cpu = self.device == "cpu"
        self.layers = [layer for layer in self.base.linears.values() if isinstance(layer, QuantizedLinear)]
        self.packed = [layer.packed for layer in self.layers]
        self.trained = list(self.hypernetwork.parameters())
        self.partitioned = self.job.partitioned
        self.gathering = Gathering(self.job, self.world_size, self.on_cpu, self._passes)

    @lru_cache  # noqa: B019 - as long as the plan is made
    def phases(self, samples: int, tokens: int) -> tuple[Phase, ...]:
        """All phases with so many samples of so many tokens a pass."""
        return tuple(self._all_phases(samples, tokens))

    def _all_phases(self, samples: int, tokens: int) -> Iterable[Phase]:
        traced = self._traced(samples, tokens)
        whole, held = self._loaded(), self._held(tokens)
        in_heap = traced.heap + self.gathering.reused if self.on_cpu else 0
        kept = round((1 + GAPS) * max(in_heap, self._heap_of_shorter(samples, tokens)))
        gaps, freed = kept - in_heap, {FREED: kept}
        moved = 0 if self.on_cpu else self.job.moved_to_host(samples, tokens)
        at_work = {DEQUANTIZED: self._dequantized} if self.job.runs_base else {}
        yield Phase("load", {**whole, **self._reading()})
        name, preparing = self.preparation.phase(tokens)
        run = {DEQUANTIZED: self._dequantized} if self._prepared_by_base else {}
        yield Phase(name, {**whole, **preparing, **run})
        yield Phase("partition", {**whole, **self._partitioning()})
        before = freed if self._passes > 1 else {}
        heads = self.gathering.heads
        room = sum(traced.generated.values()) + heads["forward"]  # of which what earlier passes left is taken first
        left = {FREED: max(before.get(FREED, 0) - room, 0)}
        yield Phase("generate", {**held, **left, **traced.generated, GATHERED: heads["forward"]})
        yield Phase("embed", {**held, **before, GATHERED: self.gathering.embedding})
        gathered = {part: self.gathering.layers + (heads[part] if self.gathering.per_block else 0) for part in heads}
        yield Phase("forward", {**held, **traced.forward, **at_work, GATHERED: gathered["forward"], FREED: gaps})
        between: dict[str, int] = {**traced.loss, tracing.ACTIVATIONS: traced.loss.get(tracing.ACTIVATIONS, 0) - moved}
        between[OBJECTIVE] = between.get(OBJECTIVE, 0) + self._objective(samples, tokens)
        head = self.gathering.output if self.job.loss is not None else 0
        yield Phase("loss", {**held, **between, GATHERED: self.gathering.reused + head, FREED: gaps})
        backward = {**traced.backward, tracing.ACTIVATIONS: traced.backward.get(tracing.ACTIVATIONS, 0) - moved}
        yield Phase("backward", {**held, **backward, **at_work, GATHERED: gathered["backward"], FREED: gaps})
        reduced = self._bucket + self.gathering.copies * self._waiting
        again = 0 if self.gathering.reused else self.gathering.largest_head
        reducing = {BUCKETS: reduced, GATHERED: again, tracing.GRADIENTS: traced.reducing}
        yield Phase("reduce", {**held, **freed, **reducing})
        stepped = {**held, **freed, BUCKETS: self._bucket, MOMENTS: 2 * self._optimizer}
        yield Phase("step", {**stepped, UPDATE: 3 * self._optimizer})
        if self.on_cpu:
            yield Phase("save", {**stepped, COPIES: 3 * self._optimizer})

    @lru_cache  # noqa: B019
    def _traced(self, samples: int, tokens: int) -> tracing.PassMemory:
        """A training pass. Each group of samples takes the same, so large batches follow from two small ones."""
        return self._traced_with(samples, tokens, samples)

    def _heap_of_shorter(self, samples: int, tokens: int) -> int:
        """Bytes that the longest texts leave in the heap whose hidden states are not blocks of their own yet."""
        length = (LARGE_BLOCK - 1) // (samples * self.base.hidden_size * self.item)
        if not (self.on_cpu and self.partitioned and 0 < length < tokens):
            return 0
        return self._traced(samples, length).heap + self.gathering.reused

    @lru_cache  # noqa: B019
    def _traced_with(self, samples: int, tokens: int, real: int) -> tracing.PassMemory:
        """Blocks of fewer samples are small where they are small with so many as there really are."""
        most = _GROUPS_TRACED * self.job.group
        if samples <= most:
            block = (LARGE_BLOCK if self.partitioned else LARGEST_KEPT) * samples // real if self.on_cpu else 0
            return self.job.trace(samples, tokens, block)
        half = most // 2
        small, large = (self._traced_with(count, tokens, real) for count in (half, most))
        return large.extended(small, (samples - most) / half)

    @lru_cache  # noqa: B019
    def _objective(self, samples: int, tokens: int) -> int:
        return self.job.objective(samples, tokens, self.on_cpu)

    @property
    def checkpoint(self) -> int:
        return (3 * 4 * self._part + num_bytes(random_states().values())) * self.world_size

    def _loaded(self) -> dict[str, int]:
        """The base before ZeRO-3 takes it over: each rank holds all of it."""
        other = num_bytes([*self._others, *self._buffers])
        return {PROCESS: self._process, PACKED: num_bytes(self.packed), CONSTANTS: self._constants, OTHER: other}

    def _held(self, tokens: int) -> dict[str, int]:
        """What stays from step to step; what the first step brings is there before it where there are more."""
        sizes = self._loaded()
        if self.partitioned:
            other = self._partition(self._others) + num_bytes(self._buffers)
            sizes |= {PACKED: self._partition(self.packed), OTHER: other}
        later = self.config.training.steps > 1
        return (
            sizes
            | self.preparation.held(tokens)
            | {
                DEQUANTIZED: self._dequantized if self.on_cpu and self.job.runs_base else 0,
                PARAMETERS: self._partition(self.trained),
                MASTER: self._optimizer,
                PARTITIONS: self.item * self._part,
                MOMENTS: 2 * self._optimizer if later else 0,
                BUCKETS: self._bucket if later or not self.on_cpu else 0,
                COPIES: 3 * self._optimizer if self.on_cpu and self.config.training.save_in_background else 0,
            }
        )

    def _partition(self, parameters: Iterable[Tensor]) -> int:
        """Bytes of this rank's parts, and of small parameters that stay whole once they were gathered."""
        total = 0
        for parameter in parameters:
            total += -(-parameter.numel() // self.world_size) * parameter.element_size()
            if self.world_size > 1 and parameter.numel() <= self.config.zero3.parameter_persistence_threshold:
                total += parameter.numel() * parameter.element_size()
        return total

    def _partitioning(self) -> dict[str, int]:
        """The most that is held while parameters are cut one after the other, beyond the whole base."""
        parameters = [*self.trained, *(self.base.parameters() if self.partitioned else [])]
        now, most = num_bytes(self.trained), 4 * sum(p.numel() for p in self.trained)  # it is built in float32
        for parameter in parameters:
            part = -(-parameter.numel() // self.world_size) * parameter.element_size()
            most = max(most, now + part)
            now += part - parameter.numel() * parameter.element_size()
        return {PARAMETERS: most, DEQUANTIZED: self._dequantized if self.on_cpu and self._prepared_by_base else 0}

    def _reading(self) -> dict[str, int]:
        """What reading one file and quantising one tensor takes; random weights are drawn in pieces."""
        if is_random(self.config.base.model) or not self.layers:
            return {}
        shape = max((layer.constants.shape for layer in self.layers), key=math.prod)
        workspace = tracing.trace_call(lambda: quantize_nf4(torch.empty(shape, dtype=torch.bfloat16, device="meta")))
        directory = local_directory(self.config.base) if self.on_cpu else None
        files = [] if directory is None else directory.glob("*.safetensors")
        return {READING: workspace + max((max(tensor_sizes(file), default=0) for file in files), default=0)}

    @cached_property
    def _process(self) -> int:
        if not self.on_cpu:
            return 0
        return (self.process or process_baseline(self.config)) + self.preparation.data

    @cached_property
    def _others(self) -> list[Tensor]:
        """Parameters of the base that are not packed weights."""
        packed = {id(p) for p in self.packed}
        return [p for p in self.base.parameters() if id(p) not in packed]

    @cached_property
    def _buffers(self) -> list[Tensor]:
        return list(self.base.buffers())

    @cached_property
    def _constants(self) -> int:
        return sum(layer.constants.num_bytes for layer in self.layers)

    @cached_property
    def _dequantized(self) -> int:
        return max((math.prod(layer.constants.shape) for layer in self.layers), default=0) * self.item

    @cached_property
    def _part(self) -> int:
        """Elements of the hypernetwork that this rank updates."""
        return sum(-(-p.numel() // self.world_size) for p in self.trained)

    @cached_property
    def _optimizer(self) -> int:
        """Bytes of one float32 number for each of them, where the optimizer's numbers are on the device."""
        return 0 if self.config.zero3.offload == "cpu" and not self.on_cpu else 4 * self._part

    @cached_property
    def _waiting(self) -> int:
        """Bytes of whole gradients that are reduced together."""
        together = min(self.config.zero3.reduce_bucket_size, sum(p.numel() for p in self.trained))
        return max(together, *(p.numel() for p in self.trained)) * self.item

    @cached_property
    def _bucket(self) -> int:
        """The buffer they wait in; on CPUs, memory that is never written is not resident."""
        return self._waiting if self.on_cpu else self.config.zero3.reduce_bucket_size * self.item

    @property
    def _prepared_by_base(self) -> bool:
        """Whether the base runs before training, and leaves room for a dequantised weight behind."""
        return tracing.ACTIVATIONS in self.preparation.phase(1)[1]

    @property
    def _passes(self) -> int:
        training = self.config.training
        batch = plan_batches(training.global_batch_size, training.micro_batch_size, self.world_size)
        return training.steps * batch.accumulation
