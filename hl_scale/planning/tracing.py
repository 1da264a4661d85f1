"""Memory of code that is run without data: tensors on the meta device have sizes, lifetimes and autograd graphs.

What a forward and backward pass keeps follows from the code itself, from transformers' blocks to recomputation and the
adapted layers, so it is traced rather than written down again as formulas: every storage that is created is counted
until it is freed. Kernels' own workspaces are not tensors and are not seen.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hl_scale.base import AdaptedModel
from hl_scale.hypernetwork import Hypernetwork
from hl_scale.kernels import Segments
from hl_scale.lora import LoraFactors, with_fixed
from hl_scale.objectives.alignment import AlignmentObjective

ACTIVATIONS = "activations"
FACTORS = "generated factors"
GRADIENTS = "gradients of activations and factors"
OBJECTIVE = "objective"
_UNCOUNTED = "dequantised weights"
_LONGEST_CLOUD = 256


class Allocations(TorchDispatchMode):
    """While active, counts the bytes of storages that operations create, by what they are for.

    Args:
        answer: what code gets that asks a meta tensor for a truth value.
        block: on CPUs, bytes from which a storage lies outside the heap.

    Attributes:
        live: kind -> bytes alive now.
        peak: kind -> bytes alive when their sum was largest.
        heap: most bytes alive in smaller storages.
        reducing: most bytes alive in others when `take_gradient` is called.
    """

    def __init__(self, answer: bool = False, block: int = 0) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.heap = self._in_heap = self.reducing = 0
        self._block = block
        self.kind = ACTIVATIONS
        self._answer = answer
        self._seen: dict[int, weakref.ref[Any]] = {}

    @contextmanager
    def counting(self, kind: str) -> Iterator[None]:
        """What is created inside is of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def restart(self) -> dict[str, int]:
        """The peak so far; a new one begins with what is alive."""
        peak, self.peak = self.peak, {}
        self._note()
        return peak

    def take_gradient(self, parameter: Tensor) -> None:
        """Drop a gradient: buckets and partitions are counted elsewhere."""
        self.reducing = max(self.reducing, _counted(self.live) - self._in_heap)
        parameter.grad = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return self._answer if args[0].dtype == torch.bool else args[0].dtype.is_floating_point * 1.0
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), args, kwargs)
        return results

    def _count(self, storage: torch.UntypedStorage, args: Any, kwargs: Any) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        if any(isinstance(a, Tensor) and a.untyped_storage()._cdata == key for a in tree_leaves((args, kwargs))):
            return  # a view of, or an update to, something that was there before
        size, kind = storage.nbytes(), self.kind
        self._seen[key] = weakref.ref(storage, partial(self._freed, key, size, kind))
        self.live[kind] += size
        if size < self._block and kind != _UNCOUNTED:
            self._in_heap += size
            self.heap = max(self.heap, self._in_heap)
        self._note()

    def _freed(self, key: int, size: int, kind: str, reference: Any) -> None:
        self._seen.pop(key, None)
        self.live[kind] -= size
        if size < self._block and kind != _UNCOUNTED:
            self._in_heap -= size

    def _note(self) -> None:
        if _counted(self.live) > _counted(self.peak):
            self.peak = _without_weights(self.live)


@contextmanager
def _attention_fused() -> Iterator[None]:
    """Attention without data is fused, as it is on CPUs and GPUs: weights of T x T numbers are not kept.

    The function is replaced for the time being: modes that would catch its calls are off within a backward pass.
    """
    real = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = partial(_attend, real)
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = real


def _attend(
    real: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if not query.is_meta:
        return real(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _without_weights(sizes: dict[str, int]) -> dict[str, int]:
    return {kind: size for kind, size in sizes.items() if kind != _UNCOUNTED}


def _counted(sizes: dict[str, int]) -> int:
    return sum(_without_weights(sizes).values())


@dataclass(frozen=True)
class PassMemory:
    """Bytes of one micro-batch by kind, without weights, their gradients and dequantised weights.

    Attributes:
        generated: while the hypernetwork runs.
        forward: when the forward pass holds most.
        kept: when it is done.
        loss: until the loss is there; as `kept` if it is traced apart.
        backward: when the backward pass holds most.
        heap: the most in storages below `block`, at any time.
        reducing: the most outside the heap when a gradient of the hypernetwork is ready.
    """

    generated: dict[str, int]
    forward: dict[str, int]
    kept: dict[str, int]
    loss: dict[str, int]
    backward: dict[str, int]
    heap: int = 0
    reducing: int = 0

    def extended(self, smaller: PassMemory, times: float) -> PassMemory:
        """This and so many times what it takes more than a smaller pass."""
        names = ("generated", "forward", "kept", "loss", "backward")
        extended: dict[str, Any] = {}
        for name in names:
            more, less = getattr(self, name), getattr(smaller, name)
            extended[name] = {kind: round(v + times * (v - less.get(kind, 0))) for kind, v in more.items()}
        heap, reducing = (
            round(most + times * (most - less))
            for most, less in ((self.heap, smaller.heap), (self.reducing, smaller.reducing))
        )
        return PassMemory(**extended, heap=heap, reducing=max(reducing, 0))


def trace_pass(
    base: AdaptedModel,
    hypernetwork: Hypernetwork,
    pairs: int,
    tokens: int,
    packed: bool,
    block: int = 0,
    fixed: LoraFactors | None = None,
) -> PassMemory:
    """A training pass over `pairs` texts of `tokens` tokens under as many conditions.

    Args:
        base: on the meta device (`outline_base`), or with weights, which gives the same numbers.
        hypernetwork: on the same device.
        packed: texts end to end instead of as rows.
        block: see `Allocations`.
        fixed: factors of a task adapter, which are added to generated ones.
    """

    def run(factors: Any) -> Tensor:
        return states(base, with_fixed(factors, fixed), pairs, tokens, packed)

    return trace_job(base, hypernetwork, pairs, run, block=block)


def trace_job(
    base: AdaptedModel,
    hypernetwork: Hypernetwork,
    conditions: int,
    run: Callable[[Any], Any],
    loss: Callable[[Any, Any], Tensor] | None = None,
    block: int = 0,
) -> PassMemory:
    """A training pass: the hypernetwork on so many conditions, `run(factors)`, `loss(what it gave, factors)`, backward.

    Without a loss the backward pass starts from what was run. Other arguments as for `trace_pass`.
    """
    memory = Allocations(block=block)
    handles = [
        parameter.register_post_accumulate_grad_hook(memory.take_gradient) for parameter in hypernetwork.parameters()
    ]
    device = next(base.parameters()).device
    try:
        with memory, _attention_fused(), _weights_apart(base, memory):
            with memory.counting(FACTORS):
                factors = hypernetwork(torch.zeros(conditions, hypernetwork.condition_size, device=device))
            generated = dict(memory.peak)
            out = run(factors)
            forward, kept = memory.restart(), _without_weights(memory.live)
            with memory.counting(OBJECTIVE):
                out = out if loss is None else loss(out, factors)
            closing = memory.restart()
            del factors
            with memory.counting(GRADIENTS):
                out.backward(torch.zeros_like(out))
            return PassMemory(generated, forward, kept, closing, memory.peak, memory.heap, memory.reducing)
    finally:
        for handle in handles:
            handle.remove()


def trace_bare_pass(base: AdaptedModel, texts: int, tokens: int) -> int:
    """Peak bytes of one pass of the bare base without gradients, as frozen targets are computed."""
    memory = Allocations()
    with memory, _attention_fused(), _weights_apart(base, memory), torch.no_grad():
        states(base, None, texts, tokens, packed=False)
    return _counted(memory.peak)


def trace_call(function: Callable[[], Any], answer: bool = True) -> int:
    """Peak bytes of the tensors a call creates, on any device."""
    memory = Allocations(answer)
    with memory:
        function()
    return _counted(memory.peak)


def trace_objective(objective: AlignmentObjective, tokens: int, width: int) -> int:
    """Peak bytes of the objective for one pair, forward and backward; computed on random states.

    Longer clouds than `_LONGEST_CLOUD` are taken to need more by the square of their length, as costs do.
    """
    needed = max(tokens - objective.config.skip_first_token, 1)
    count = min(needed, _LONGEST_CLOUD)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, count + objective.config.skip_first_token, width, generator=generator).requires_grad_()
    target = torch.randn(1, count, width, generator=generator) / width**0.5
    mask, target_mask = torch.ones(hidden.shape[:2]), torch.ones(1, count, dtype=torch.bool)

    def run() -> None:
        objective(hidden, mask, target, target_mask)[0].backward()

    return math.ceil(trace_call(run) * (needed / count) ** 2)


def states(
    base: AdaptedModel,
    factors: Any,
    texts: int,
    tokens: int,
    packed: bool,
    adapted: Segments | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """States (B, T, D) or packed (B * T, D) of texts of equal length; see `AdaptedModel` for the other arguments."""
    device = next(base.parameters()).device
    if packed:
        ids = torch.zeros(texts * tokens, dtype=torch.int64, device=device)
        noise = None if noise is None else noise.flatten(0, 1).clone()
        return base.packed_hidden_states(ids, Segments.equal(texts, tokens), factors, adapted=adapted, noise=noise)
    ids = torch.zeros(texts, tokens, dtype=torch.int64, device=device)
    mask = torch.ones_like(ids)
    mask[:, -1] = 0  # texts of several lengths: attention then needs a mask
    return base.hidden_states(ids, mask, factors, noise=noise)


@contextmanager
def _weights_apart(base: AdaptedModel, memory: Allocations) -> Iterator[None]:
    """Weights that layers dequantise are not counted: their size is known, and CPUs keep one for all layers."""
    for layer in base.linears.values():
        layer.weight_source = partial(_sized_weight, layer, memory)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in base.linears.values():
            del layer.weight_source  # the class's own again


def _sized_weight(layer: Any, memory: Allocations, dtype: torch.dtype, update: Any = None) -> Tensor:
    with memory.counting(_UNCOUNTED):
        return torch.empty(layer.out_features, layer.in_features, dtype=dtype, device=layer._frozen.device)
