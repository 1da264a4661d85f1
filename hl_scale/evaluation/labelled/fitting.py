"""Training a task adapter: plain LoRA factors and a classification head on labelled sentences, in one process."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hl_scale.base import AdaptedModel
from hl_scale.base.adapted import find_slots
from hl_scale.config import BaseModelConfig, LoraConfig, TaskAdapterConfig
from hl_scale.data.labelled import LabelledExample, TaskFacts
from hl_scale.evaluation.labelled.head import ClassifierHead, Pooling, choose_pooling
from hl_scale.evaluation.labelled.measuring import Measurement, encode, measure, padded
from hl_scale.evaluation.labelled.task_adapter import (
    TaskAdapter,
    TaskAdapterError,
    load_task_adapter,
    write_task_adapter,
)
from hl_scale.hypernetwork.hyperlora import PlainLora
from hl_scale.lora import LoraFactors
from hl_scale.progress import counting_bar


def fit_task_adapter(
    base: AdaptedModel,
    task: TaskFacts,
    training: Sequence[LabelledExample],
    validation: Sequence[LabelledExample],
    directory: str | os.PathLike[str],
    *,
    config: TaskAdapterConfig,
    lora: LoraConfig,
    base_config: BaseModelConfig,
    say: Callable[[str], None] | None = None,
) -> TaskAdapter:
    """Train LoRA factors and a head, keep the state that is best on the validation examples, write it, and return it.

    A directory that already holds the adapter of these settings and examples is read, not trained again.

    Args:
        base: the frozen base.
        task: what is predicted.
        training, validation: examples, of Standard English for a task adapter, of a dialect for a baseline.
        directory: where the adapter is written.
        config: how it is trained.
        lora: layers, rank and scale of the factors; on a base that recomputes blocks the layers of `base.slots`.
        base_config: what the base is called, for the directory's provenance.
        say: told how far it is, after every step; a progress bar is shown unless it is given.

    Raises:
        TaskAdapterError: the directory holds something else, too few examples, or a loss that is not finite.
        BaseModelError: `lora` names layers that the base does not have.
    """
    directory = Path(directory)
    identity = training_identity(base, task, training, validation, config, lora)
    if directory.exists():
        found = load_task_adapter(directory, base)
        if found.facts["identity"] != identity:
            raise TaskAdapterError(
                f"{directory} holds a task adapter of other settings or examples\n"
                "  fix: choose another directory, or remove this one"
            )
        return found
    if not training or not validation:
        raise TaskAdapterError(
            f"task {task.name!r} has {len(training)} training and {len(validation)} validation examples\n"
            "  fix: at least one of each is needed"
        )
    # Random states are the caller's again afterwards: cells of a suite do not depend on each other.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        fitting = _Fitting(base, task, training, validation, config, lora)
        with counting_bar(task.name, config.steps, say is None, unit="steps") as bar:

            def advance(loss: float, best: float | None) -> None:
                bar(1)
                text = f"loss {loss:.3f}, validation {'-' if best is None else format(best, '.3f')}"
                bar.say(f"{task.name}: {text}")
                if say is not None:
                    say(f"{task.name}: step {bar.count}/{config.steps}, {text}")

            fitting.run(advance)
    facts = {"identity": identity, **fitting.facts(), "settings": config.model_dump(mode="json")}
    adapter = TaskAdapter(fitting.best_factors(), fitting.best_head(), facts)
    write_task_adapter(adapter, directory, base, base_config, lora)
    return load_task_adapter(directory, base)


def training_identity(
    base: AdaptedModel,
    task: TaskFacts,
    training: Sequence[LabelledExample],
    validation: Sequence[LabelledExample],
    config: TaskAdapterConfig,
    lora: LoraConfig,
) -> str:
    """sha256 over all that decides a task adapter: base, examples in their order, settings."""
    settings = config.model_dump(mode="json", exclude={"evaluation_batch_size"})
    tree = [
        base.fingerprint, dataclasses.asdict(task), settings, lora.model_dump(mode="json", exclude={"apply"}),
        *([[example.texts, example.label] for example in part] for part in (training, validation)),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()


class _Fitting:
    """One training: parameters, optimizer, and the best state so far."""

    def __init__(
        self,
        base: AdaptedModel,
        task: TaskFacts,
        training: Sequence[LabelledExample],
        validation: Sequence[LabelledExample],
        config: TaskAdapterConfig,
        lora: LoraConfig,
    ) -> None:
        self.base, self.config, self.validation = base, config, validation
        self.device = next(base.model.parameters()).device
        pooling: Pooling = choose_pooling(base) if config.pooling == "auto" else config.pooling
        labels = np.asarray([example.label for example in training])
        graded = task.kind == "regression"
        center, spread = (float(labels.mean()), float(labels.std()) or 1.0) if graded else (0.0, 1.0)
        self.head = ClassifierHead(base.hidden_size, task, pooling, center, spread).to(self.device)
        self.network = PlainLora(lora, find_slots(base.linears, lora), 1).to(self.device)
        self.parameters = [*self.network.parameters(), *self.head.parameters()]
        self.encoded, self.truncated = encode(base, [e.texts for e in training], config.maximum_tokens)
        self.labels = torch.tensor(labels, dtype=torch.float32)
        self.best: tuple[float, float] | None = None
        self.best_step, self.history = 0, list[dict[str, float]]()
        self.kept: dict[str, dict[str, Tensor]] = {}

    def factors(self) -> LoraFactors:
        """The adapter as it is now, in float32; the base's layers bring it to the type that they compute in."""
        factors: LoraFactors = self.network(torch.zeros(1, 1, device=self.device))
        return factors

    def run(self, advance: Callable[[float, float | None], None]) -> None:
        """All steps; `advance` is told the loss and the best validation score so far."""
        config = self.config
        optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        for step, rows in zip(range(1, config.steps + 1), self._order(), strict=False):
            loss = self._loss(rows)
            if not bool(torch.isfinite(loss)):
                raise TaskAdapterError(
                    f"the loss is not finite at step {step}\n  fix: lower task_adapter.learning_rate"
                )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, config.gradient_clipping)
            optimizer.step()
            schedule.step()
            if step % config.validate_every == 0 or step == config.steps:
                self._validate(step, loss.item())
            advance(loss.item(), None if self.best is None else self.best[0])

    def _rate(self, done: int) -> float:
        """Linear warm-up to 1, then linear to 0."""
        warm = round(self.config.warmup_ratio * self.config.steps)
        if done < warm:
            return (done + 1) / warm
        return (self.config.steps - done) / max(self.config.steps - warm, 1)

    def _order(self) -> Iterator[list[int]]:
        """Batches of epochs without end; the last batch of an epoch takes from the next."""
        waiting: list[int] = []
        while True:
            while len(waiting) < self.config.batch_size:
                waiting += torch.randperm(len(self.encoded)).tolist()
            yield waiting[: self.config.batch_size]
            waiting = waiting[self.config.batch_size :]

    def _loss(self, rows: list[int]) -> Tensor:
        ids, mask = padded([self.encoded[row] for row in rows], self.base.tokenizer.pad_token_id)
        ids, mask = ids.to(self.device), mask.to(self.device)
        states = self.base.hidden_states(ids, mask, self.factors())
        return self.head.loss(self.head(states, mask), self.labels[rows].to(self.device))

    def _validate(self, step: int, loss: float) -> None:
        """Measure, and keep this state if it is the best so far: by its score, then by its loss."""
        measured = self._measured()
        self.history.append({"step": step, "training_loss": loss, **measured.metrics})
        found = (measured.score, -measured.metrics["loss"])
        if self.best is None or found > self.best:
            self.best, self.best_step = found, step
            self.kept = {"network": _copy(self.network), "head": _copy(self.head)}

    def _measured(self) -> Measurement:
        with torch.no_grad():
            factors = self.factors()
        config = self.config
        return measure(
            self.base, self.head, self.validation, factors,
            batch_size=config.evaluation_batch_size, maximum_tokens=config.maximum_tokens,
        )  # fmt: skip

    def best_factors(self) -> LoraFactors:
        self.network.load_state_dict(self.kept["network"])
        with torch.no_grad():
            return self.factors()

    def best_head(self) -> ClassifierHead:
        self.head.load_state_dict(self.kept["head"])
        return self.head

    def facts(self) -> dict[str, Any]:
        """What head.json says of the training."""
        return {
            "training_examples": len(self.encoded),
            "validation_examples": len(self.validation),
            "truncated": self.truncated,
            "best_step": self.best_step,
            "validation": next(row for row in self.history if row["step"] == self.best_step),
            "history": self.history,
        }


def _copy(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
