"""Memory of each rank before anything runs: components in bytes, phase by phase.

Sizes of what is held follow from shapes, placement and world size (ZeRO-3 cuts every parameter into equal parts,
rounded up). Activations, generated factors and their gradients come from running the real forward and backward pass
without data (`tracing`). What a process needs before it holds any tensor is measured (`process`).

On CPUs resident memory is planned. There a block that was freed stays with the process unless it is large
(`engine.memory`): what backward frees is still there when gradients are reduced and weights updated, with the gaps
between such blocks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from hl_scale.base import QuantizedLinear
from hl_scale.base.loading import local_directory
from hl_scale.base.quantized_linear import SharedInput
from hl_scale.base.random_weights import is_random
from hl_scale.config import Config
from hl_scale.data.sampling import plan_batches
from hl_scale.engine.checkpoint_writer import random_states
from hl_scale.engine.memory import LARGE_BLOCK, LARGEST_KEPT
from hl_scale.engine.targets import CLOUDS_IN_MEMORY, TEXTS_PER_CHUNK, TEXTS_PER_PASS
from hl_scale.kernels import quantize_nf4
from hl_scale.objectives.alignment import AlignmentObjective
from hl_scale.planning import tracing
from hl_scale.planning.outline import outline
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
    TARGETS,
    UPDATE,
    MemoryPlan,
    Phase,
)
from hl_scale.planning.process import PAIR, process_baseline

CUDA_RESERVE = 1 << 30
"""Bytes of a GPU that are not tensors: context, cuBLAS and NCCL buffers. Assumed."""

GAPS = 0.35
"""Bytes of gaps in the heap for each byte of a pass's blocks in it. Measured (mallinfo2 between the passes of Gemma 3
270M, 8 pairs of 23 to 44 tokens: 0.32 to 0.40): a block does not fit into the gap that one of its size has left, for
glibc wants room to align it."""

_REFINEMENTS = 3
_MOST_PAIRS = 1 << 16
_LARGEST_TRACED = 4


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
        ValueError: a base without a readable configuration, slots that do not exist.
        OSError: no process could be started to measure.
    """
    batch = plan_batches(config.training.global_batch_size, config.training.micro_batch_size, world_size)
    model = _Model(config, world_size, device, process)
    length = min(tokens or config.data.maximum_tokens, model.base.context_length)
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
        ValueError: a base without a readable configuration, slots that do not exist.
    """
    return _Model(config, 1, "cpu").checkpoint


def _largest_micro_batch(model: _Model, length: int, room: int) -> int:
    """Most pairs whose peak is within `room` bytes: peaks of large batches grow by the same amount with each pair."""

    def peak(pairs: int) -> int:
        return max(phase.total for phase in model.phases(pairs, length))

    if peak(1) > room:
        return 0
    low, high = 1, 5
    for _ in range(_REFINEMENTS):
        slope = max((peak(high) - peak(low)) // (high - low), 1)
        guess = min(low + (room - peak(low)) // slope, _MOST_PAIRS)
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
        self.base, self.hypernetwork = outline(config)
        self.item = getattr(torch, config.base.compute_dtype).itemsize
        self.on_cpu = self.device == "cpu"
        self.layers = [layer for layer in self.base.linears.values() if isinstance(layer, QuantizedLinear)]
        self.packed = [layer.packed for layer in self.layers]
        self.trained = list(self.hypernetwork.parameters())
        self.partitioned = config.base.placement == "zero3"
        # gloo gathers into a buffer of its own first, NCCL in place.
        self.copies = 1 if self.world_size == 1 else 2 if self.on_cpu else 1

    @lru_cache  # noqa: B019 - as long as the plan is made
    def phases(self, pairs: int, tokens: int) -> tuple[Phase, ...]:
        """All phases with so many pairs of so many tokens a pass."""
        return tuple(self._all_phases(pairs, tokens))

    def _all_phases(self, pairs: int, tokens: int) -> Iterable[Phase]:
        config = self.config
        texts = min(TEXTS_PER_PASS, config.dialects.training_sentences)
        bare = self._bare(texts, tokens)
        traced = self._traced(pairs, tokens)
        whole, held = self._loaded(), self._held(tokens)
        in_heap = traced.heap + self._reused if self.on_cpu else 0
        kept = round((1 + GAPS) * max(in_heap, self._heap_of_shorter(pairs, tokens)))
        gaps, freed = kept - in_heap, {FREED: kept}
        moved = self._moved_to_host(pairs, tokens)
        clouds = min(TEXTS_PER_CHUNK, config.dialects.training_sentences) * tokens * self.base.hidden_size * self.item
        yield Phase("load", {**whole, **self._reading()})
        targets = {tracing.ACTIVATIONS: bare, TARGETS: clouds if self.on_cpu else 0}
        yield Phase("targets", {**whole, **targets, DEQUANTIZED: self._dequantized})
        yield Phase("partition", {**whole, **self._partitioning()})
        forward = {**held, **traced.forward, GATHERED: self._gathered, DEQUANTIZED: self._dequantized, FREED: gaps}
        before = freed if self._passes > 1 else {}
        yield Phase("embed", {**held, **before, GATHERED: self._embedding_gathered})
        yield Phase("forward", forward)
        between = {**traced.kept, tracing.ACTIVATIONS: traced.kept.get(tracing.ACTIVATIONS, 0) - moved}
        between |= {OBJECTIVE: pairs * self._objective(tokens), GATHERED: self._reused, FREED: gaps}
        yield Phase("loss", {**held, **between})
        backward = {**traced.backward, tracing.ACTIVATIONS: traced.backward.get(tracing.ACTIVATIONS, 0) - moved}
        backward |= {GATHERED: self._gathered, DEQUANTIZED: self._dequantized, FREED: gaps}
        yield Phase("backward", {**held, **backward})
        reduced = self._bucket + self.copies * self._waiting
        gathered = 0 if self._reused else self._head_gathered
        reducing = {BUCKETS: reduced, GATHERED: gathered, tracing.GRADIENTS: traced.reducing}
        yield Phase("reduce", {**held, **freed, **reducing})
        stepped = {**held, **freed, BUCKETS: self._bucket, MOMENTS: 2 * self._optimizer}
        yield Phase("step", {**stepped, UPDATE: 3 * self._optimizer})
        if self.on_cpu:
            yield Phase("save", {**stepped, COPIES: 3 * self._optimizer})

    @lru_cache  # noqa: B019
    def _traced(self, pairs: int, tokens: int) -> tracing.PassMemory:
        """A training pass. Each pair takes the same, so large batches follow from two small ones."""
        return self._traced_with(pairs, tokens, pairs)

    def _heap_of_shorter(self, pairs: int, tokens: int) -> int:
        """Bytes that the longest texts leave in the heap whose hidden states are not blocks of their own yet."""
        length = (LARGE_BLOCK - 1) // (pairs * self.base.hidden_size * self.item)
        if not (self.on_cpu and self.partitioned and 0 < length < tokens):
            return 0
        return self._traced(pairs, length).heap + self._reused

    @lru_cache  # noqa: B019
    def _traced_with(self, pairs: int, tokens: int, real: int) -> tracing.PassMemory:
        """Blocks of fewer pairs are small where they are small with so many as there really are."""
        if pairs <= _LARGEST_TRACED:
            block = (LARGE_BLOCK if self.partitioned else LARGEST_KEPT) * pairs // real if self.on_cpu else 0
            return tracing.trace_pass(self.base, self.hypernetwork, pairs, tokens, self.config.training.packed, block)
        half = _LARGEST_TRACED // 2
        small, large = (self._traced_with(count, tokens, real) for count in (half, _LARGEST_TRACED))
        return large.extended(small, (pairs - _LARGEST_TRACED) / half)

    @lru_cache  # noqa: B019
    def _bare(self, texts: int, tokens: int) -> int:
        return tracing.trace_bare_pass(self.base, texts, tokens)

    @lru_cache  # noqa: B019
    def _objective(self, tokens: int) -> int:
        objective = AlignmentObjective(self.config.alignment)
        return tracing.trace_objective(objective, tokens, self.base.hidden_size)

    @property
    def checkpoint(self) -> int:
        return (3 * 4 * self._part + _bytes(random_states().values())) * self.world_size

    def _loaded(self) -> dict[str, int]:
        """The base before ZeRO-3 takes it over: each rank holds all of it."""
        other = _bytes([*self._others, *self._buffers])
        return {PROCESS: self._process, PACKED: _bytes(self.packed), CONSTANTS: self._constants, OTHER: other}

    def _held(self, tokens: int) -> dict[str, int]:
        """What stays from step to step; what the first step brings is there before it where there are more."""
        sizes = self._loaded()
        if self.partitioned:
            other = self._partition(self._others) + _bytes(self._buffers)
            sizes |= {PACKED: self._partition(self.packed), OTHER: other}
        later = self.config.training.steps > 1
        sentences = min(CLOUDS_IN_MEMORY, self.config.dialects.training_sentences)
        sentences = min(sentences, self.config.training.steps * self.config.training.global_batch_size)
        return sizes | {
            DEQUANTIZED: self._dequantized if self.on_cpu else 0,
            PARAMETERS: self._partition(self.trained),
            MASTER: self._optimizer,
            PARTITIONS: self.item * self._part,
            MOMENTS: 2 * self._optimizer if later else 0,
            BUCKETS: self._bucket if later or not self.on_cpu else 0,
            COPIES: 3 * self._optimizer if self.on_cpu and self.config.training.save_in_background else 0,
            TARGETS: sentences * tokens * self.base.hidden_size * self.item if self.on_cpu else 0,
        }

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
        now = most = _bytes(self.trained)
        for parameter in parameters:
            part = -(-parameter.numel() // self.world_size) * parameter.element_size()
            most = max(most, now + part)
            now += part - parameter.numel() * parameter.element_size()
        return {PARAMETERS: most, DEQUANTIZED: self._dequantized if self.on_cpu else 0}

    def _reading(self) -> dict[str, int]:
        """What reading one file and quantising one tensor takes; random weights are drawn in pieces."""
        if is_random(self.config.base.model) or not self.layers:
            return {}
        shape = max((layer.constants.shape for layer in self.layers), key=math.prod)
        workspace = tracing.trace_call(lambda: quantize_nf4(torch.empty(shape, dtype=torch.bfloat16, device="meta")))
        directory = local_directory(self.config.base) if self.on_cpu else None
        files = [] if directory is None else directory.glob("*.safetensors")
        return {READING: workspace + max(map(_largest_tensor, files), default=0)}

    def _moved_to_host(self, pairs: int, tokens: int) -> int:
        """Bytes between blocks that wait in host memory, where that is not the device's own."""
        if self.on_cpu or not self.config.base.offload_activations:
            return 0
        blocks = len({slot.layer for slot in self.base.slots})
        return blocks * pairs * tokens * self.base.hidden_size * self.item

    @cached_property
    def _process(self) -> int:
        if not self.on_cpu:
            return 0
        data = self.config.dialects
        rows = len(data.training_varieties) if data.mode == "named" else data.variants_per_sentence
        pairs = data.training_sentences * (rows + data.identity_per_sentence)
        return (self.process or process_baseline(self.config.base)) + pairs * PAIR

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

    @cached_property
    def _embedding_gathered(self) -> int:
        if not self.partitioned or self.world_size == 1:
            return 0
        return self.copies * _bytes([self.base.model.get_input_embeddings().weight])

    @cached_property
    def _head_gathered(self) -> int:
        return self.copies * max(_bytes([p]) for p in self.trained) if self.world_size > 1 else 0

    @cached_property
    def _gathered(self) -> int:
        """Layers that are computed together, what is fetched ahead (from the second pass on), and what is reused."""
        if self.world_size == 1:
            return 0
        together = [_bytes(layer.get_parameter("packed") for layer in shared.layers) for shared in self._shared]
        alone = [_bytes([packed]) for packed in self.packed]
        if self.config.base.mlp_tile_tokens is not None:  # all tiles of an MLP share one gathering
            together += [
                _bytes(layer.packed for layer in mlp.layers if isinstance(layer, QuantizedLinear))
                for mlp in self.base.tiled_mlps
            ]
        now = max([*together, *alone], default=0) if self.partitioned else 0
        ahead = self.config.zero3.prefetch_bucket_size if self.partitioned and self._passes > 1 else 0
        return self.copies * now + min(ahead, _bytes(self.packed)) + self._reused

    @cached_property
    def _reused(self) -> int:
        """Gathered weights that stay from forward to backward: the last of the forward pass, up to the distance."""
        if self.world_size == 1 or self._passes == 1:
            return 0
        left, total = self.config.zero3.maximum_reuse_distance, 0
        for parameter in [*(reversed(self.packed) if self.partitioned else []), *reversed(self.trained)]:
            if left < parameter.numel():
                break
            left -= parameter.numel()
            total += _bytes([parameter])
        return total

    @property
    def _shared(self) -> list[SharedInput]:
        return [s for s in self.base.shared_inputs if all(isinstance(layer, QuantizedLinear) for layer in s.layers)]

    @property
    def _passes(self) -> int:
        batch = plan_batches(
            self.config.training.global_batch_size, self.config.training.micro_batch_size, self.world_size
        )
        return self.config.training.steps * batch.accumulation


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _largest_tensor(file: Path) -> int:
    """Bytes of the largest tensor in a safetensors file, from its header."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    header.pop("__metadata__", None)
    return max((end - start for start, end in (entry["data_offsets"] for entry in header.values())), default=0)
