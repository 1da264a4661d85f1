"""Training on tasks: the generated adapter of a description must bring out the answers of its task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hl_scale.base import AdaptedModel, TaskAdapter
from hl_scale.config import Config, ConfigError, TaskDataConfig
from hl_scale.data.sampling import TaskSampler
from hl_scale.data.tasks import Example, TaskSet
from hl_scale.engine.conditions import TaskVectors
from hl_scale.engine.training_module import TrainingModule, fixed_factors, is_finite
from hl_scale.engine.zero3 import World
from hl_scale.hypernetwork import Hypernetwork
from hl_scale.kernels import Segments
from hl_scale.lora import LoraFactors, with_fixed
from hl_scale.objectives.supervised import ResponseLoss, neftune_noise, unfamiliar_penalty, weight_penalty


@dataclass
class TaskBatch:
    """A micro-batch of B examples with E distinct conditions, examples of one condition next to each other.

    Attributes:
        input_ids, attention_mask: (B, T) prompts with their answers, padded on the right.
        answers: (B, T) bool, tokens that belong to answers.
        conditions: (E, C) float32.
        condition_index: (B,) rises from 0 to E - 1.
        draws: (B,) numbers that seed noise.
        unfamiliar: (E, C) random conditions, or (0, C).
    """

    input_ids: Tensor
    attention_mask: Tensor
    answers: Tensor
    conditions: Tensor
    condition_index: Tensor
    draws: Tensor
    unfamiliar: Tensor

    @property
    def tokens(self) -> int:
        return int(self.attention_mask.sum())

    def to(self, device: torch.device) -> TaskBatch:
        return TaskBatch(**{name: value.to(device) for name, value in vars(self).items()})


class SupervisedModule(TrainingModule):
    """See `TrainingModule`: mean cross-entropy of each answer, mean over examples. `fixed`, the factors of a frozen
    adapter (E = 1) under the hypernetwork's scale, are added to the generated ones."""

    def __init__(
        self, hypernetwork: Hypernetwork, base: AdaptedModel, config: Config, fixed: LoraFactors | None = None
    ) -> None:
        super().__init__(hypernetwork, base, config.base.placement == "zero3")
        self.config = config.supervised
        self.seed = config.run.seed
        self.packed = config.training.packed
        self.fixed = fixed
        loss = ResponseLoss(base.output_head, self.config, base.logit_softcap)
        if config.base.placement == "zero3":
            self.partitioned_loss = loss
        self._loss = (loss,)

    def forward(self, batch: TaskBatch) -> Tensor:
        """Mean loss of the micro-batch, ()."""
        known = len(batch.conditions)
        factors = self.hypernetwork(torch.cat((batch.conditions, batch.unfamiliar)))
        own = factors.select(slice(known)) if len(batch.unfamiliar) else factors
        states, targets, example = self._predicting_states(batch, own)
        if not is_finite(states):
            return states.float().sum() * math.nan
        loss = self._loss[0](states, targets, example, len(batch.input_ids)).mean()
        counts = torch.bincount(batch.condition_index, minlength=known)
        if self.config.weight_penalty:
            loss = loss + self.config.weight_penalty * weight_penalty(own, counts if own.conditions > 1 else None)
        if self.config.unfamiliar_penalty:
            loss = loss + self.config.unfamiliar_penalty * unfamiliar_penalty(factors, counts)
        return loss if is_finite(loss) else loss * math.nan

    def example_losses(self, batch: TaskBatch, factors: LoraFactors) -> Tensor:
        """(B,) mean loss of each answer under given factors (E conditions or one), added to the fixed ones."""
        return self._loss[0](*self._predicting_states(batch, factors), len(batch.input_ids))

    def _predicting_states(self, batch: TaskBatch, factors: Any) -> tuple[Tensor, Tensor, Tensor]:
        """States (N, D) at the tokens before each answer token, those tokens (N,), and their examples (N,)."""
        mask, noise = batch.attention_mask.bool(), self._noise(batch)
        predicting = torch.zeros_like(batch.answers)
        predicting[:, :-1] = batch.answers[:, 1:]
        if factors.conditions > 1 and not self.packed:
            factors = factors.select(batch.condition_index)
        factors = with_fixed(factors, self.fixed)
        if self.packed:
            ends = mask.sum(1).cumsum(0).tolist()
            hidden = self.base.packed_hidden_states(
                batch.input_ids[mask],
                Segments((0, *ends)),
                factors,
                adapted=_condition_segments(batch.condition_index, ends),
                noise=None if noise is None else noise[mask],
            )
            states = hidden[predicting[mask]]
        else:
            states = self.base.hidden_states(batch.input_ids, batch.attention_mask, factors, noise=noise)[predicting]
        example = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)[batch.answers]
        return states, batch.input_ids[batch.answers], example

    def _noise(self, batch: TaskBatch) -> Tensor | None:
        if not (self.training and self.config.neftune_alpha):
            return None
        noise = torch.zeros(*batch.input_ids.shape, self.base.hidden_size)
        for row, (draw, tokens) in enumerate(
            zip(batch.draws.tolist(), batch.attention_mask.sum(1).tolist(), strict=True)
        ):
            shape, seed = (tokens, self.base.hidden_size), self.seed * 1_000_003 + draw
            noise[row, :tokens] = neftune_noise(shape, self.config.neftune_alpha, seed)
        return noise.to(batch.input_ids.device)


def _condition_segments(index: Tensor, ends: Sequence[int]) -> Segments:
    """Tokens of each condition, of texts that lie end to end."""
    sizes = [sum(1 for _ in group) for _, group in groupby(index.tolist())]
    return Segments((0, *(ends[last - 1] for last in accumulate(sizes))))


def check_head(base: AdaptedModel) -> None:
    """Refuse a base that predicts no tokens; ConfigError."""
    if not base.has_head:
        raise ConfigError("objective.kind 'supervised' needs a causal model: set base.architecture or another base")


class SupervisedWorkload:
    """The task job, see `hl_scale.engine.inputs.Workload`.

    Raises:
        ValueError: an answer that does not fit, a model without a head, an encoder that cannot be loaded.
    """

    def __init__(
        self, config: Config, base: AdaptedModel, tasks: TaskSet, task_adapter: TaskAdapter | None = None
    ) -> None:
        self.config, self.base, self.task_adapter = config, base, task_adapter
        check_head(base)
        self.tasks = tasks.seen
        self.vectors = TaskVectors(config, self.tasks, base)
        self.condition_size = self.vectors.conditions.size
        self.data_fingerprint = f"{tasks.manifest['fingerprint']}:{self.vectors.conditions.fingerprint}"
        self.format = PromptFormat(base.tokenizer, config.tasks, base.context_length)
        self.prompts = [[self.format.prompt(example.input) for example in task.train] for task in self.tasks]
        self.answers = [[self.format.answer(example) for example in task.train] for task in self.tasks]
        self.texts = [self._heads(task.descriptions) for task in self.tasks]
        lengths = [
            [self.format.checked(p, a, t.name) for p, a in zip(prompts, answers, strict=True)]
            for t, prompts, answers in zip(self.tasks, self.prompts, self.answers, strict=True)
        ]
        batch, group = config.training.global_batch_size, config.tasks.examples_per_condition
        self.sampler = TaskSampler(lengths, self.vectors.counts(), batch, group, config.run.seed)

    def _heads(self, descriptions: Sequence[str]) -> list[list[int]]:
        """Tokens that go before prompts: the description, where the run is the control that reads it."""
        if not self.config.tasks.description_in_prompt:
            return [[] for _ in descriptions]
        return [self.format.description(text) for text in descriptions]

    def prepare(self, world: World, report: Callable[[str], None]) -> None:
        """Embed descriptions; collective."""
        self.vectors.prepare_together(world, report)

    def module(self, hypernetwork: Hypernetwork) -> SupervisedModule:
        fixed = fixed_factors(self.base, self.task_adapter, hypernetwork.scale)
        return SupervisedModule(hypernetwork, self.base, self.config, fixed)

    def names(self, samples: np.ndarray) -> list[str]:
        """Task, wording and example."""
        return [f"{self.tasks[t].name} wording {d} example {e}" for t, d, e, _ in samples.tolist()]

    def collate(self, samples: np.ndarray) -> TaskBatch:
        """Rows of task, description, example and draw to a padded micro-batch."""
        order = sorted(samples.tolist(), key=lambda row: (row[0], row[1]))
        rows: dict[tuple[int, int], int] = {}
        index = [rows.setdefault((task, wording), len(rows)) for task, wording, *_ in order]
        first = {key: next(row[3] for row in order if (row[0], row[1]) == key) for key in rows}
        conditions = np.stack([self.vectors.vector(*key, first[key]) for key in rows])
        unfamiliar = conditions[:0]
        if self.config.supervised.unfamiliar_penalty:
            unfamiliar = np.stack([self.vectors.unfamiliar(*key, first[key]) for key in rows])
        texts = [
            (self.format.start + self.texts[t][w] + self.prompts[t][e], self.answers[t][e]) for t, w, e, _ in order
        ]
        return task_batch(texts, conditions, index, [row[3] for row in order], unfamiliar)


def task_batch(
    texts: Sequence[tuple[list[int], list[int]]],
    conditions: np.ndarray,
    index: Sequence[int],
    draws: Sequence[int],
    unfamiliar: np.ndarray | None = None,
) -> TaskBatch:
    """Token ids of (prompt, answer) to a padded batch; see `TaskBatch`."""
    longest = max(len(prompt) + len(answer) for prompt, answer in texts)
    shape = (len(texts), longest)
    input_ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    answers = torch.zeros(shape, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(texts):
        size = len(prompt) + len(answer)
        input_ids[row, :size] = torch.tensor(prompt + answer)
        mask[row, :size] = 1
        answers[row, len(prompt) : size] = True
    vectors = torch.from_numpy(np.ascontiguousarray(conditions))
    random = vectors[:0] if unfamiliar is None else torch.from_numpy(np.ascontiguousarray(unfamiliar))
    return TaskBatch(input_ids, mask, answers, vectors, torch.tensor(index), torch.tensor(draws), random)


class PromptFormat:
    """How an example is put to the model, in token ids.

    Args:
        tokenizer: of the base.
        data: prompt, prefix and end of answers.
        context_length: of the base.
    """

    def __init__(self, tokenizer: Any, data: TaskDataConfig, context_length: int) -> None:
        self.tokenizer, self.data = tokenizer, data
        self.limit = min(data.maximum_tokens, context_length)
        self.start = [] if data.chat_template or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        if data.chat_template and not getattr(tokenizer, "chat_template", None):
            raise ConfigError("data.chat_template is set, but the base's tokenizer has none\n  fix: leave it out")
        if not data.answer_end and tokenizer.eos_token_id is None:
            raise ConfigError(
                "data.answer_end is empty, and the tokenizer has no end-of-sequence token\n  fix: set one"
            )
        self.end = self._ids(data.answer_end) if data.answer_end else [tokenizer.eos_token_id]

    def prompt(self, text: str) -> list[int]:
        """What the model reads before the answer, without `start`."""
        filled = self.data.prompt.replace("{input}", text)
        if not self.data.chat_template:
            return self._ids(filled)
        turns = [{"role": "user", "content": filled}]
        rendered = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return self._ids(rendered)

    def description(self, text: str) -> list[int]:
        """A description that goes before a prompt."""
        return self._ids(f"{text}\n")

    def answer(self, example: Example) -> list[int]:
        """The answer and its end."""
        return self._ids(self.data.answer_prefix + example.answer) + self.end

    def checked(self, prompt: list[int], answer: list[int], task: str) -> int:
        """Tokens of both.

        Raises:
            ConfigError: more than data.maximum_tokens or the context holds.
        """
        size = len(self.start) + len(prompt) + len(answer)
        if size > self.limit:
            raise ConfigError(
                f"task {task}: an example has {size} tokens ({len(answer)} of its answer), more than {self.limit}\n"
                "  fix: raise data.maximum_tokens up to the base's context, or leave the task out with data.tasks"
            )
        return size

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
