"""Bytes that each rank sends in one optimizer step, by what they are for.

How often ZeRO-3 gathers a parameter follows from the order in which modules run. So the real pass is run without data,
with DeepSpeed's hooks in their places, and DeepSpeed's rules (`PartitionedParameterCoordinator`) are applied to what
they see: a parameter is gathered when a module that owns it runs, stays while it is small or needed again soon, and is
gathered ahead where there is room. Counted is a step whose order DeepSpeed knows, from the second on. (A tiled MLP is
one module in that order, however many tiles it runs. An output layer that is tied to the embeddings may be counted once
too often: with prefetching, DeepSpeed was seen to keep it from the loss to the loss's backward pass.)

Sizes are those of rings, the least that an all-gather or a reduce-scatter over W ranks can send: (W - 1) / W of the
whole; an all-reduce sends twice that.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from hl_scale.config import Config, Zero3Config
from hl_scale.data.sampling import plan_batches
from hl_scale.planning.jobs import Job

BASE_FORWARD = "base gathered for forward"
BASE_BACKWARD = "base gathered for backward"
HYPERNETWORK_FORWARD = "hypernetwork gathered for forward"
HYPERNETWORK_BACKWARD = "hypernetwork gathered for backward"
UPDATED = "small parameters after the update"
GRADIENTS = "gradients reduced"
SUMS = "overflow flag, gradient norm"

_MOST_LIVE = 1_000_000_000  # stage3_max_live_parameters, which is left at its default
_NORM, _FLAG = 8, 1  # a float64, and in 16 bits a byte

Event = tuple[Literal["fetch", "release"], nn.Module, bool]
"""What happens, to whose parameters, and whether a forward hook said so."""


@dataclass(frozen=True)
class WirePlan:
    """What a rank sends in a step.

    Attributes:
        world_size: ranks.
        accumulation: passes of a step.
        parts: component -> bytes.
    """

    world_size: int
    accumulation: int
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def plan_wire(config: Config, world_size: int, *, tokens: int | None = None) -> WirePlan:
    """Plan what each rank sends in a step; arguments and errors as for `plan_memory`."""
    accumulation = plan_batches(
        config.training.global_batch_size, config.training.micro_batch_size, world_size
    ).accumulation
    job = Job(config)
    trained = list(job.hypernetwork.parameters())
    frozen: list[nn.Parameter] = []
    if job.partitioned:
        job.base.gather_shared_inputs()
        frozen = list(job.base.parameters())
    events = record_pass(job, job.length(tokens))
    gathers = _Coordinator(config.zero3, world_size, [*trained, *frozen])
    for _ in range(2):  # the second step finds what the first one left
        counted = gathers.step(events, accumulation)

    def sent(parameters: Iterable[nn.Parameter], how_often: dict[int, int]) -> int:
        return sum(how_often.get(id(p), 0) * (world_size - 1) * part_bytes(p, world_size) for p in parameters)

    parts = {
        BASE_FORWARD: sent(frozen, counted["forward"]),
        BASE_BACKWARD: sent(frozen, counted["backward"]),
        HYPERNETWORK_FORWARD: sent(trained, counted["forward"]),
        HYPERNETWORK_BACKWARD: sent(trained, counted["backward"]),
        UPDATED: sent([*trained, *frozen], counted["update"]),
        GRADIENTS: accumulation * (world_size - 1) * sum(part_bytes(p, world_size) for p in trained),
        SUMS: 2 * (_NORM + _FLAG * (config.base.compute_dtype != "float32")) * (world_size - 1) // world_size,
    }
    return WirePlan(world_size, accumulation, parts)


def part_bytes(parameter: nn.Parameter, world_size: int) -> int:
    """Bytes of one rank's part of a parameter, padding included."""
    return -(-parameter.numel() // world_size) * parameter.element_size()


def most_gathered(job: Job, world_size: int) -> dict[str, int]:
    """The most bytes of the hypernetwork that a rank has gathered at once, in the forward and the backward pass."""
    trained = list(job.hypernetwork.parameters())
    frozen = list(job.base.parameters()) if job.partitioned else []
    gathers = _Coordinator(job.config.zero3, world_size, [*trained, *frozen])
    gathers.sizes = {id(p): p.numel() * p.element_size() for p in trained if id(p) not in gathers.persistent}
    events = record_pass(job, min(2, job.length(None)))
    for _ in range(2):
        gathers.step(events, 1)
    return {part: gathers.most[part] for part in ("forward", "backward")}


def record_pass(job: Job, tokens: int) -> list[Event]:
    """What DeepSpeed's hooks would be told in a pass; modules without parameters of their own change nothing."""
    events: list[Event] = []
    with _hooks([m for m in job.modules if _own(m)], events):
        job.trace(1, tokens)
    return events


def _own(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module._parameters.values() if parameter is not None]


@contextmanager
def _hooks(modules: Sequence[nn.Module], events: list[Event]) -> Iterator[None]:
    """As DeepSpeed registers them: before and after forward, and on the gradients of outputs and of inputs."""
    waiting: Counter[int] = Counter()

    def before(module: nn.Module, inputs: Any) -> Any:
        events.append(("fetch", module, True))
        waiting[id(module)] = 0

        def follow(tensor: torch.Tensor) -> torch.Tensor:
            waiting[id(module)] += tensor.requires_grad
            return _Seen.apply(tensor, lambda: after_gradient(module))

        return tree_map_only(torch.Tensor, follow, inputs)

    def after_gradient(module: nn.Module) -> None:
        waiting[id(module)] -= 1
        if waiting[id(module)] == 0:
            events.append(("release", module, False))

    def after(module: nn.Module, inputs: Any, outputs: Any) -> Any:
        events.append(("release", module, True))
        return tree_map_only(
            torch.Tensor, lambda t: _Seen.apply(t, lambda: events.append(("fetch", module, False))), outputs
        )

    handles = [module.register_forward_pre_hook(before) for module in modules]
    handles += [module.register_forward_hook(after) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Seen(torch.autograd.Function):
    """Identity that calls back when its gradient passes."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, callback: Any) -> torch.Tensor:
        ctx.callback = callback
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.callback()
        return gradients[0], None


class _Coordinator:
    """Which parameters are gathered when, by DeepSpeed's rules for a pass whose order it knows."""

    def __init__(self, zero3: Zero3Config, world_size: int, parameters: Sequence[nn.Parameter]) -> None:
        self.zero3, self.alone = zero3, world_size == 1
        self.persistent = {id(p) for p in parameters if p.numel() <= zero3.parameter_persistence_threshold}
        self.available: set[int] = set()
        self.sizes: dict[int, int] = {}
        """Bytes of the parameters that `most` counts."""
        self.most: Counter[str] = Counter()
        """The most that was gathered at once, by part of a step."""

    def step(self, events: Sequence[Event], passes: int) -> dict[str, Counter[int]]:
        """Run the passes of a step; returns how often each parameter (by id) was gathered in which part of it."""
        self.counted: dict[str, Counter[int]] = {"forward": Counter(), "backward": Counter(), "update": Counter()}
        for _ in range(passes):
            self._pass(events)
        self.available.clear()  # all are cut anew, and small ones gathered at once
        self._gather(self.persistent, "update")
        return self.counted

    def _gather(self, parameters: Iterable[int], part: str) -> None:
        missing = [p for p in parameters if p not in self.available]
        self.available.update(missing)
        if not self.alone:
            self.counted[part].update(missing)
        gathered = sum(size for key, size in self.sizes.items() if key in self.available)
        self.most[part] = max(self.most[part], gathered)

    def _pass(self, events: Sequence[Event]) -> None:
        self.order = [_own(module) for kind, module, _ in events if kind == "fetch"]
        self.queue = deque((p, step) for step, own in enumerate(self.order) for p in own)
        self.fetched_for: dict[int, int] = {}
        self.active: dict[int, Counter[int]] = {}
        self.ahead: set[int] = set()
        self.backward: dict[int, nn.Module] = {}  # modules whose backward is under way, with what they recomputed
        self.recomputed: dict[int, set[int]] = {}
        self.now = self.live = 0
        self.part = "forward"
        for kind, module, by_forward in events:
            if kind == "fetch":
                self._fetch(module, by_forward)
            else:
                self._release(module, by_forward)
        for module in self.backward.values():  # whose inputs had no gradient
            mine = {id(p) for p in _own(module)} | self.recomputed.get(id(module), set())
            self.available -= mine - self.persistent
        self.available -= self.ahead

    def _fetch(self, module: nn.Module, by_forward: bool) -> None:
        own = {id(p): p for p in _own(module)}
        if not by_forward:
            self.part = "backward"
            self.backward[id(module)] = module
        self.live += sum(p.numel() for key, p in own.items() if key not in self.available)
        self._gather(own, self.part)
        self.ahead -= own.keys()
        for key, parameter in own.items():
            self.active.setdefault(key, Counter())[id(module)] = 1
            if by_forward and self.backward and not parameter.requires_grad:
                self.recomputed.setdefault(next(reversed(self.backward)), set()).add(key)
        left = sum(self.fetched_for.get(key, -1) < self.now for key in own)
        while self.queue and left:
            parameter, step = self.queue.popleft()
            self.fetched_for[id(parameter)] = step
            left -= 1
        self._fetch_ahead()
        self.now += 1

    def _fetch_ahead(self) -> None:
        room, elements, chosen = min(_MOST_LIVE - self.live, self.zero3.prefetch_bucket_size), 0, []
        while self.queue and elements < room:
            parameter, step = self.queue.popleft()
            key = id(parameter)
            self.fetched_for[key] = max(self.fetched_for.get(key, -1), step)
            if key not in self.available and key not in chosen:
                chosen.append(key)
                elements += parameter.numel()
        self.live += elements
        self._gather(chosen, self.part)
        self.ahead.update(chosen)

    def _release(self, module: nn.Module, by_forward: bool) -> None:
        own = {id(p): p.numel() for p in _own(module)}
        kept = {key for key in own if self.fetched_for.get(key, -1) > self.now}
        distance = 0
        for later in self.order[self.now :]:
            if distance >= self.zero3.maximum_reuse_distance:
                break
            kept.update(id(p) for p in later)
            distance += sum(p.numel() for p in later)
        released = own.keys() - self.persistent - kept
        if not by_forward:
            self.backward.pop(id(module), None)
            released |= self.recomputed.pop(id(module), set()) - self.persistent
        for key in own.keys() | released:
            self.active.get(key, Counter()).pop(id(module), None)
            if key in released and key in self.available and not self.active.get(key):
                self.available.discard(key)
                self.live -= own.get(key, 0)
