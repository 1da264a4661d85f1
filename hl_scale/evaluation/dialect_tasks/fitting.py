"""Training baselines on what the hypernetwork is trained on: the same pairs in the same order, and as many steps.

One process; the base stays as it is and only the adaptation's own parameters are trained. Three losses: alignment (the
hypernetwork's own objective), TADA, and, for the price of annotations, cross-entropy of a task's frozen head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hl_scale.adaptations import Adaptation
from hl_scale.adaptations.lora import LoraAdaptation
from hl_scale.base import AdaptedModel
from hl_scale.conditions import typology
from hl_scale.config import Config, TaskAdapterConfig, TrainingConfig
from hl_scale.data.corpus import Corpus, Pair
from hl_scale.data.labelled import LabelledExample
from hl_scale.data.sampling import plan_batches
from hl_scale.engine.alignment import AlignmentBatch, AlignmentWorkload
from hl_scale.engine.loop import learning_rate as scheduled
from hl_scale.engine.targets import tokenize
from hl_scale.engine.training_module import is_finite
from hl_scale.engine.zero3 import World
from hl_scale.evaluation.labelled import TaskAdapter
from hl_scale.evaluation.labelled.measuring import encode, padded
from hl_scale.evaluation.measurement import EvaluationError
from hl_scale.lora import sum_factors
from hl_scale.objectives.tada import TadaObjective, sentence_state_of

Advance = Callable[[int, float], None]
_HISTORY = 50


class DialectPairs(Corpus):
    """Sentences of one dialect beside their Standard English originals, taken from a labelled set without its labels.

    Args:
        variety: full name.
        examples: of that variety.
        fingerprint: of where they come from.
    """

    def __init__(self, variety: str, examples: Sequence[LabelledExample], fingerprint: str) -> None:
        super().__init__(Path(), {"fingerprint": fingerprint})
        texts = [pair for example in examples for pair in zip(example.standard, example.texts, strict=True)]
        vector = typology.vector(variety)
        self._pairs = [Pair(row, row, variety, vector, old, new, ()) for row, (old, new) in enumerate(texts)]

    @cached_property
    def train(self) -> list[Pair]:
        return self._pairs


def open_workload(
    config: Config, base: AdaptedModel, corpus: Corpus, report: Callable[[str], None]
) -> AlignmentWorkload:
    """What is aligned, ready to be collated; a corpus smaller than a batch makes batches of its own size.

    Raises:
        ConfigError: sentences that are too long or empty.
    """
    size = min(config.training.global_batch_size, len(corpus.train))
    training = config.training.model_copy(
        update={"global_batch_size": size, "micro_batch_size": min(config.training.micro_batch_size, size)}
    )
    workload = AlignmentWorkload(config.model_copy(update={"training": training}), base, corpus)
    workload.prepare(World(0, 1, next(base.model.parameters()).device), report)
    return workload


def fit_by_alignment(
    adaptation: Adaptation, workload: AlignmentWorkload, learning_rate: float, advance: Advance
) -> dict[str, Any]:
    """Train an adaptation by the objective of the workload's configuration.

    Args:
        adaptation: of the workload's base; a conditional one is given each pair's vector.
        workload: see `open_workload`.
        learning_rate: peak; schedule, steps and clipping are those of the configuration.
        advance: called with the steps done and the loss.

    Returns:
        Steps, pairs seen, distinct pairs, and the mean loss over stretches of steps.

    Raises:
        EvaluationError: a loss that is not finite.
    """
    base = workload.base

    def loss(batch: AlignmentBatch) -> Tensor:
        states = base.hidden_states(batch.input_ids, batch.attention_mask)
        if not is_finite(states):  # the objective would say so of a sample, not of the training
            return states.sum() * math.nan
        parts = (batch.attention_mask, batch.target, batch.target_mask, batch.target_self)
        found, _ = workload.objective(states, *parts)
        return found

    return _fit_on_pairs(adaptation, workload, list(adaptation.parameters()), loss, learning_rate, advance)


def fit_by_tada(
    adaptation: Adaptation, workload: AlignmentWorkload, learning_rate: float, seed: int, advance: Advance
) -> dict[str, Any]:
    """Train an adaptation against TADA's critic, which is thrown away; see `fit_by_alignment`."""
    base = workload.base
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        objective = TadaObjective(base.hidden_size, sentence_state_of(base))
    device = next(base.model.parameters()).device
    objective.to(device)
    standard: dict[str, Tensor] = {}

    def loss(batch: AlignmentBatch) -> Tensor:
        states = base.hidden_states(batch.input_ids, batch.attention_mask)
        found, _ = objective(states, batch.attention_mask, standard["states"], standard["mask"])
        return found

    def before(samples: np.ndarray) -> None:
        """The bare base's states of the originals."""
        ids, mask = tokenize(base, [workload.pairs[int(sample)].standard for sample in samples])
        standard["mask"] = mask.to(device)
        with torch.no_grad():
            standard["states"] = base.hidden_states(ids.to(device), standard["mask"])

    parameters = [*adaptation.parameters(), *objective.parameters()]
    return _fit_on_pairs(adaptation, workload, parameters, loss, learning_rate, advance, before)


def fit_by_labels(
    adaptation: LoraAdaptation,
    base: AdaptedModel,
    task: TaskAdapter,
    examples: Sequence[LabelledExample],
    config: Config,
    settings: TaskAdapterConfig,
    learning_rate: float,
    advance: Advance,
) -> dict[str, Any]:
    """Train a LoRA that is added to a frozen task adapter so that its frozen head is right on annotated sentences.

    Args:
        adaptation: the LoRA.
        base: the frozen base.
        task: adapter and head.
        examples: annotated sentences of a dialect.
        config: of the hypernetwork's run: steps, batch size, schedule.
        settings: of the task adapter: bound in tokens.
        learning_rate: peak.
        advance: called with the steps done and the loss.

    Raises:
        EvaluationError: a loss that is not finite.
    """
    training = config.training
    encoded, _ = encode(base, [example.texts for example in examples], settings.maximum_tokens)
    labels = torch.tensor([example.label for example in examples], dtype=torch.float32)
    device = next(base.model.parameters()).device
    generator = np.random.default_rng(config.run.seed)

    def losses(step: int) -> Generator[Tensor, None, None]:
        rows = generator.permutation(len(encoded))[: training.global_batch_size].tolist()
        ids, mask = padded([encoded[row] for row in rows], base.tokenizer.pad_token_id)
        ids, mask = ids.to(device), mask.to(device)
        states = base.hidden_states(ids, mask, sum_factors(adaptation.factors(), task.factors))
        yield task.head.loss(task.head(states, mask), labels[rows].to(device))

    history = _descend(list(adaptation.parameters()), losses, training, learning_rate, advance)
    seen = training.steps * min(training.global_batch_size, len(examples))
    return {"steps": training.steps, "pairs_seen": seen, "distinct_pairs": len(examples), "history": history}


def _fit_on_pairs(
    adaptation: Adaptation,
    workload: AlignmentWorkload,
    parameters: list[torch.nn.Parameter],
    loss: Callable[[AlignmentBatch], Tensor],
    learning_rate: float,
    advance: Advance,
    before: Callable[[np.ndarray], None] = lambda samples: None,
) -> dict[str, Any]:
    training = workload.config.training
    plan = plan_batches(training.global_batch_size, training.micro_batch_size, 1)
    device = next(workload.base.model.parameters()).device

    def losses(step: int) -> Generator[Tensor, None, None]:
        for samples in workload.sampler.micro_batches(step, 0, plan):
            before(samples)
            batch = workload.collate(samples).to(device)
            conditions = batch.conditions[batch.condition_index] if adaptation.conditional else None
            # Still attached when what is yielded goes backward: recomputed blocks need it.
            with adaptation.attached(workload.base, conditions):
                yield loss(batch) * (len(samples) / training.global_batch_size)

    history = _descend(parameters, losses, training, learning_rate, advance)
    return {
        "steps": training.steps,
        "pairs_seen": training.steps * training.global_batch_size,
        "distinct_pairs": len(workload.pairs),
        "history": history,
    }


def _descend(
    parameters: list[torch.nn.Parameter],
    losses: Callable[[int], Generator[Tensor, None, None]],
    training: TrainingConfig,
    peak: float,
    advance: Advance,
) -> list[dict[str, float]]:
    """AdamW with the schedule and clipping of a configuration; mean losses over stretches of steps."""
    paced = training.model_copy(update={"learning_rate": peak})
    optimizer = torch.optim.AdamW(
        parameters, lr=peak, betas=training.betas, eps=training.adam_epsilon, weight_decay=training.weight_decay
    )
    history: list[dict[str, float]] = []
    recent: list[float] = []
    for step in range(training.steps):
        optimizer.zero_grad()
        total = 0.0
        with closing(losses(step)) as parts:  # an error leaves nothing attached
            for part in parts:
                if not is_finite(part):
                    raise EvaluationError(
                        f"the loss of a baseline is not finite at step {step + 1}\n"
                        "  fix: lower its suite.learning_rates"
                    )
                part.backward()  # type: ignore[no-untyped-call]
                total += part.item()
        if training.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(parameters, training.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = scheduled(paced, step)
        optimizer.step()
        recent.append(total)
        if len(recent) == _HISTORY or step + 1 == training.steps:
            history.append({"step": step + 1, "loss": float(np.mean(recent))})
            recent.clear()
        advance(step + 1, total)
    return history
