"""Memory of each rank before anything runs: components in bytes, phase by phase.

Sizes of what is held follow from shapes, placement and world size (ZeRO-3 cuts every parameter into equal parts,
rounded up). Activations, generated factors and their gradients come from running the real forward and backward pass
without data (`tracing`). What a process needs before it holds any tensor is read off this process, which has loaded the
same libraries. Nothing is fitted to a run.
"""

from __future__ import annotations

import gc
import importlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from hl_scale.base import QuantizedLinear
from hl_scale.base.loading import local_directory, outline_base
from hl_scale.base.quantized_linear import SharedInput
from hl_scale.base.random_weights import is_random
from hl_scale.conditions import typology
from hl_scale.config import BaseModelConfig, Config
from hl_scale.data.sampling import plan_batches
from hl_scale.engine.memory import resident_bytes
from hl_scale.engine.targets import CLOUDS_IN_MEMORY, TEXTS_PER_CHUNK, TEXTS_PER_PASS
from hl_scale.hypernetwork import build_hypernetwork
from hl_scale.kernels import quantize_nf4
from hl_scale.objectives.alignment import AlignmentObjective
from hl_scale.planning import tracing

CUDA_RESERVE = 1 << 30
"""Bytes of a GPU that are not tensors: context, cuBLAS and NCCL buffers. Assumed."""

_REFINEMENTS = 3
_MOST_PAIRS = 1 << 16
_LARGEST_TRACED = 4

PROCESS = "process and tokenizer"
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
OBJECTIVE = "Sinkhorn divergence"
READING = "weights being read"
UPDATE = "update being computed"
COPIES = "copies being written"


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
        micro_batch, tokens: pairs of a pass and tokens of each text, of which all are assumed to be that long.
        phases: in the order of a run.
        checkpoint: bytes of one checkpoint on disk, of all ranks together.
        capacity: bytes of a GPU, if given.
        largest_micro_batch: pairs of a pass that fit into `capacity`; 0 if none do, None if no capacity was given.
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


def plan_memory(
    config: Config,
    world_size: int,
    *,
    device: str = "cpu",
    tokens: int | None = None,
    capacity: int | None = None,
) -> MemoryPlan:
    """Plan the memory of a training run.

    Args:
        config: the whole configuration.
        world_size: ranks.
        device: "cpu" or "cuda".
        tokens: of each text, special tokens included; `data.maximum_tokens` unless given.
        capacity: bytes of a GPU, to find the largest micro-batch for.

    Raises:
        ValueError: ranks that cannot share the batch, a base without a readable configuration, slots that do not exist.
    """
    batch = plan_batches(config.training.global_batch_size, config.training.micro_batch_size, world_size)
    model = _Model(config, world_size, device)
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


def process_baseline(base: BaseModelConfig) -> int:
    """Resident bytes of this process with the libraries of training, and with the tokenizer if its files are here."""
    for module in ("deepspeed", "hl_scale.engine.loop", "pyarrow.parquet"):
        importlib.import_module(module)
    gc.collect()
    directory = local_directory(base)
    if directory is None:
        return resident_bytes()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=base.trust_remote_code)
    except (OSError, ValueError):  # a directory that holds config.json alone
        tokenizer = None
    size = resident_bytes()
    del tokenizer
    return size


@dataclass(eq=False)
class _Model:
    """Base and hypernetwork without weights, and the sizes that follow from them."""

    config: Config
    world_size: int
    device: str

    def __post_init__(self) -> None:
        config = self.config
        self.base = outline_base(config.base.model_copy(update={"offload_activations": False}), config.lora)
        with torch.device("meta"):
            self.hypernetwork = build_hypernetwork(
                config.hypernetwork, config.lora, self.base.slots, typology.NUM_FEATURES
            )
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
        texts = min(TEXTS_PER_PASS, config.data.training_sentences)
        bare = self._bare(texts, tokens)
        traced = self._traced(pairs, tokens)
        whole, held = self._loaded(), self._held()
        moved = self._moved_to_host(pairs, tokens)
        clouds = min(TEXTS_PER_CHUNK, config.data.training_sentences) * tokens * self.base.hidden_size * self.item
        yield Phase("load", {**whole, **self._reading()})
        targets = {tracing.ACTIVATIONS: bare, TARGETS: clouds if self.on_cpu else 0}
        yield Phase("targets", {**whole, **targets, DEQUANTIZED: self._dequantized})
        yield Phase("partition", {**whole, **self._partitioning()})
        forward = {**held, **traced.forward, GATHERED: self._gathered, DEQUANTIZED: self._dequantized}
        yield Phase("embed", {**held, GATHERED: self._embedding_gathered})
        yield Phase("forward", forward)
        kept = {**traced.kept, tracing.ACTIVATIONS: traced.kept.get(tracing.ACTIVATIONS, 0) - moved}
        yield Phase("loss", {**held, **kept, OBJECTIVE: pairs * self._objective(tokens), GATHERED: self._reused})
        backward = {**traced.backward, tracing.ACTIVATIONS: traced.backward.get(tracing.ACTIVATIONS, 0) - moved}
        backward |= {GATHERED: self._gathered, DEQUANTIZED: self._dequantized}
        yield Phase("backward", {**held, **backward, BUCKETS: 0 if self.on_cpu else self._bucket})
        reduced = self._bucket + self.copies * self._waiting
        yield Phase("reduce", {**held, BUCKETS: reduced, GATHERED: self._head_gathered})
        stepped = {**held, MOMENTS: 2 * self._optimizer}
        yield Phase("step", {**stepped, UPDATE: 3 * self._optimizer})
        if self.on_cpu:
            yield Phase("save", {**stepped, COPIES: 3 * self._optimizer})

    @lru_cache  # noqa: B019
    def _traced(self, pairs: int, tokens: int) -> tracing.PassMemory:
        """A training pass. Each pair takes the same, so large batches follow from two small ones."""
        if pairs <= _LARGEST_TRACED:
            return tracing.trace_pass(self.base, self.hypernetwork, pairs, tokens, self.config.training.packed)
        half = _LARGEST_TRACED // 2
        small, large = self._traced(half, tokens), self._traced(_LARGEST_TRACED, tokens)
        return large.extended(small, (pairs - _LARGEST_TRACED) / half)

    @lru_cache  # noqa: B019
    def _bare(self, texts: int, tokens: int) -> int:
        return tracing.trace_bare_pass(self.base, texts, tokens)

    @lru_cache  # noqa: B019
    def _objective(self, tokens: int) -> int:
        objective = AlignmentObjective(self.config.objective)
        return tracing.trace_objective(objective, tokens, self.base.hidden_size)

    @property
    def checkpoint(self) -> int:
        return 3 * 4 * self._part * self.world_size

    def _loaded(self) -> dict[str, int]:
        """The base before ZeRO-3 takes it over: each rank holds all of it."""
        other = _bytes([*self._others, *self._buffers])
        return {PROCESS: self._process, PACKED: _bytes(self.packed), CONSTANTS: self._constants, OTHER: other}

    def _held(self) -> dict[str, int]:
        """What stays from step to step."""
        sizes = self._loaded()
        if self.partitioned:
            other = self._partition(self._others) + _bytes(self._buffers)
            sizes |= {PACKED: self._partition(self.packed), OTHER: other}
        later = self.config.training.steps > 1
        sentences = min(CLOUDS_IN_MEMORY, self.config.data.training_sentences)
        sentences = min(sentences, self.config.training.steps * self.config.training.global_batch_size)
        length = min(self.config.data.maximum_tokens, self.base.context_length)
        return sizes | {
            DEQUANTIZED: self._dequantized if self.on_cpu else 0,
            PARAMETERS: self._partition(self.trained),
            MASTER: self._optimizer,
            PARTITIONS: self.item * self._part,
            MOMENTS: 2 * self._optimizer if later else 0,
            TARGETS: sentences * length * self.base.hidden_size * self.item if self.on_cpu else 0,
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
        directory = local_directory(self.config.base)
        files = [] if directory is None else [path.stat().st_size for path in directory.glob("*.safetensors")]
        return {READING: workspace + (max(files, default=0) if self.on_cpu else 0)}

    def _moved_to_host(self, pairs: int, tokens: int) -> int:
        """Bytes between blocks that wait in host memory, where that is not the device's own."""
        if self.on_cpu or not self.config.base.offload_activations:
            return 0
        blocks = len({slot.layer for slot in self.base.slots})
        return blocks * pairs * tokens * self.base.hidden_size * self.item

    @cached_property
    def _process(self) -> int:
        return process_baseline(self.config.base) if self.on_cpu else 0

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
