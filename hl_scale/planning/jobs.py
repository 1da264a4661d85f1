"""What is trained, by objective: one pass of it without data, and the modules that ZeRO-3 takes over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hl_scale.base import AdaptedModel
from hl_scale.config import Config
from hl_scale.data.library import LibraryStatistics
from hl_scale.data.peft_directory import AdapterError, read_adapter
from hl_scale.engine.supervised import check_head
from hl_scale.hypernetwork import Hypernetwork
from hl_scale.kernels import Segments
from hl_scale.lora import LoraFactors, with_fixed
from hl_scale.objectives.alignment import AlignmentObjective
from hl_scale.objectives.reconstruction import ReconstructionObjective
from hl_scale.objectives.supervised import chunked_cross_entropy, unfamiliar_penalty, weight_penalty
from hl_scale.planning import tracing
from hl_scale.planning.outline import outline
from hl_scale.planning.tracing import PassMemory


class Job:
    """A run's base, hypernetwork and objective without weights.

    Args:
        config: the whole configuration.

    Attributes:
        base, hypernetwork: on the meta device.
        runs_base: whether a pass runs the base; a reconstruction run only loads it.
        partitioned: whether ZeRO-3 partitions the base.
        loss: the module that ZeRO-3 gathers the output layer for, where there is one.
        group: samples of a pass that share a condition.
        fixed: factors of the task adapter on the meta device, if there is one.

    Raises:
        ValueError: a base or an encoder without a readable configuration, slots that do not exist, a supervised run of
            a model without a head, a task adapter that cannot be read.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.base, self.hypernetwork = outline(config)
        self.kind = config.objective.kind
        self.runs_base = self.kind != "reconstruction"
        self.partitioned = config.base.placement == "zero3" and self.runs_base
        self.group = config.tasks.examples_per_condition if self.kind == "supervised" else 1
        self.loss: AnswerLoss | None = None
        self.fixed = _task_adapter(config, self.hypernetwork)
        if self.kind == "supervised":
            check_head(self.base)
            self.loss = AnswerLoss(self.base, config)
        if self.kind == "reconstruction":
            with tracing.Allocations(answer=True):  # which looks whether there is any spread
                self._objective = ReconstructionObjective(config.reconstruction, _statistics(self.hypernetwork), "meta")

    def length(self, tokens: int | None) -> int:
        """Tokens of each text: `data.maximum_tokens` unless given, at most the context; 0 if the base is not run."""
        return min(tokens or self.config.data.maximum_tokens, self.base.context_length) if self.runs_base else 0

    @property
    def modules(self) -> list[nn.Module]:
        """Those whose parameters ZeRO-3 gathers."""
        own = [self.base, *([] if self.loss is None else [self.loss])] if self.partitioned else []
        return [module for tree in (self.hypernetwork, *own) for module in tree.modules()]

    def trace(self, samples: int, tokens: int, block: int = 0) -> PassMemory:
        """A pass over so many pairs, examples or adapters; the divergence of an alignment run and the logits of a
        supervised one are traced apart. Arguments as for `tracing.trace_pass`."""
        base, hypernetwork, packed = self.base, self.hypernetwork, self.config.training.packed
        if self.kind == "alignment":
            return tracing.trace_pass(base, hypernetwork, samples, tokens, packed, block, self.fixed)
        if self.kind == "reconstruction":
            return tracing.trace_job(base, hypernetwork, samples, self._targets, self._distance, block)
        conditions = -(-samples // self.group) * (2 if self.config.supervised.unfamiliar_penalty else 1)
        run = _Examples(self.config, base, samples, tokens, self.fixed)
        return tracing.trace_job(base, hypernetwork, conditions, run.states, self._answer_loss, block)

    def objective(self, samples: int, tokens: int, on_cpu: bool) -> int:
        """Bytes of the objective that `trace` leaves out."""
        if self.kind == "alignment":
            each = tracing.trace_objective(AlignmentObjective(self.config.alignment), tokens, self.base.hidden_size)
            return samples * each
        return 0 if self.loss is None else self.loss.logit_bytes(samples * tokens, on_cpu)

    def moved_to_host(self, samples: int, tokens: int) -> int:
        """Bytes between blocks that wait in host memory, where that is not the device's own."""
        if not (self.config.base.offload_activations and self.runs_base):
            return 0
        blocks = len({slot.layer for slot in self.base.slots})
        item = next(self.hypernetwork.parameters()).element_size()
        return blocks * samples * tokens * self.base.hidden_size * item

    def _answer_loss(self, states: Tensor, factors: Any) -> Tensor:
        assert self.loss is not None
        loss: Tensor = self.loss(states)
        settings, own = self.config.supervised, _own(factors, self.config)
        counts = torch.ones(own.conditions, device=states.device)
        if settings.weight_penalty:
            loss = loss + settings.weight_penalty * weight_penalty(own, counts)
        if settings.unfamiliar_penalty:
            loss = loss + settings.unfamiliar_penalty * unfamiliar_penalty(factors, counts)
        return loss

    def _targets(self, factors: LoraFactors) -> LoraFactors:
        """A library's, in float32."""
        a, b = ({path: torch.zeros_like(f, dtype=torch.float32) for path, f in side.items()}
                for side in (factors.a, factors.b))  # fmt: skip
        return LoraFactors(factors.slots, a, b, factors.scale)

    def _distance(self, targets: LoraFactors, factors: LoraFactors) -> Tensor:
        return self._objective(factors, targets).mean()


class AnswerLoss(nn.Module):
    """The supervised loss of states (N, D) as memory and ZeRO-3 see it, on a vocabulary of one token.

    Logits exist for `objective.logit_tokens` tokens whatever the batch, so they are counted apart.
    """

    def __init__(self, base: AdaptedModel, config: Config) -> None:
        super().__init__()
        self.weight = base.output_head.weight
        self.bias = getattr(base.output_head, "bias", None)
        self.rows = config.supervised.logit_tokens
        self.softcap = base.logit_softcap

    def forward(self, states: Tensor) -> Tensor:
        """Mean loss, ()."""
        targets = torch.zeros(len(states), dtype=torch.int64, device=states.device)
        bias = None if self.bias is None else self.bias[:1]
        return chunked_cross_entropy(states, self.weight[:1], targets, bias=bias, rows=self.rows).mean()

    def logit_bytes(self, tokens: int, on_cpu: bool) -> int:
        """The most that a product with the whole vocabulary takes for some of so many answer tokens."""
        rows, vocabulary = min(self.rows, tokens), len(self.weight)
        whole = rows * vocabulary * 4
        copies = whole if self.softcap is not None else 0  # the slope of its tanh
        if self.weight.dtype != torch.float32 and not on_cpu:
            copies += rows * vocabulary * self.weight.element_size()  # the factor of the second product
        return whole + copies


class _Examples:
    """Examples of a supervised pass; all tokens count as answers, for configurations do not say how many do."""

    def __init__(
        self, config: Config, base: AdaptedModel, examples: int, tokens: int, fixed: LoraFactors | None
    ) -> None:
        self.config, self.base, self.examples, self.tokens, self.fixed = config, base, examples, tokens, fixed
        self.group = config.tasks.examples_per_condition

    def states(self, factors: Any) -> Tensor:
        """(B * T, D) states that predict tokens."""
        device, packed = next(self.base.parameters()).device, self.config.training.packed
        shape = (self.examples, self.tokens, self.base.hidden_size)
        noise = torch.zeros(shape, device=device) if self.config.supervised.neftune_alpha else None
        starts = range(0, self.examples, self.group)
        adapted = Segments((*(start * self.tokens for start in starts), self.examples * self.tokens))
        factors = _own(factors, self.config)
        if not packed and factors.conditions > 1:
            factors = factors.select(torch.zeros(self.examples, dtype=torch.int64, device=device))
        found = tracing.states(
            self.base, with_fixed(factors, self.fixed), self.examples, self.tokens, packed, adapted, noise
        )
        rows = torch.arange(self.examples * self.tokens, device=device)
        return found.flatten(0, -2)[rows]


def _own(factors: Any, config: Config) -> Any:
    """Those of descriptions; unfamiliar conditions, where they are penalised, are as many and follow them."""
    if factors.conditions == 1 or not config.supervised.unfamiliar_penalty:
        return factors
    return factors.select(slice(factors.conditions // 2))


def _statistics(hypernetwork: Hypernetwork) -> LibraryStatistics:
    """Of adapters like the generated ones, without numbers."""
    with torch.device("meta"):
        a = {slot.path: torch.empty(1, hypernetwork.rank, slot.in_features) for slot in hypernetwork.slots}
        b = {slot.path: torch.empty(1, slot.out_features, hypernetwork.rank) for slot in hypernetwork.slots}
    factors = LoraFactors(hypernetwork.slots, a, b, hypernetwork.scale)
    return LibraryStatistics(factors, factors, 1.0)


def _task_adapter(config: Config, hypernetwork: Hypernetwork) -> LoraFactors | None:
    """Sizes of `lora.task_adapter`, in the type that layers compute in; its numbers are not read."""
    if config.lora.task_adapter is None:
        return None
    try:
        facts = read_adapter(config.lora.task_adapter)
    except AdapterError as error:
        raise AdapterError(
            f"lora.task_adapter = {config.lora.task_adapter}: {error}\n  fix: give the PEFT directory of a plain LoRA"
        ) from None
    with torch.device("meta"):
        a = {slot.path: torch.empty(1, facts.rank, slot.in_features) for slot in facts.slots}
        b = {slot.path: torch.empty(1, slot.out_features, facts.rank) for slot in facts.slots}
    return LoraFactors(facts.slots, a, b, hypernetwork.scale).to("meta", getattr(torch, config.base.compute_dtype))
