"""Predictions of an adapted base with a head on labelled texts, and what they are worth."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hl_scale.base import AdaptedModel
from hl_scale.data.durable import write_text
from hl_scale.data.labelled import LabelledExample, TaskFacts
from hl_scale.evaluation.labelled.head import ClassifierHead
from hl_scale.evaluation.measurement import EvaluationError
from hl_scale.lora import FactorSource

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measurement:
    """What was predicted, example by example, so that measurements can be compared sentence by sentence.

    Attributes:
        task: what is predicted.
        example_ids: (N,) of the examples, in their order.
        labels, predictions: (N,) class indices or scores.
        losses: (N,) cross-entropy in nats, or squared error.
        truncated: texts that were cut at the bound in tokens.
    """

    task: TaskFacts
    example_ids: tuple[int, ...]
    labels: Array
    predictions: Array
    losses: Array
    truncated: int = 0

    @property
    def correct(self) -> Array:
        """(N,) 1 where the class is right, else 0: the mean of it is the accuracy. For a regression minus the squared
        error: larger is better in both."""
        if self.task.kind == "classification":
            return (self.labels == self.predictions).astype(np.float64)
        return -self.losses

    @property
    def metrics(self) -> dict[str, float]:
        """accuracy and macro_f1, or pearson, spearman and mean_squared_error; and the mean loss."""
        loss = float(self.losses.mean())
        if self.task.kind == "classification":
            scores = {"accuracy": float(self.correct.mean()), "macro_f1": macro_f1(self.labels, self.predictions)}
            return {**scores, "loss": loss}
        return {
            "pearson": pearson(self.labels, self.predictions),
            "spearman": pearson(ranks(self.labels), ranks(self.predictions)),
            "mean_squared_error": loss,
            "loss": loss,
        }

    @property
    def score(self) -> float:
        """What measurements are chosen by: accuracy, or Pearson's correlation."""
        return self.metrics["accuracy" if self.task.kind == "classification" else "pearson"]

    def save(self, path: Path, **facts: Any) -> None:
        """Write metrics, facts and every prediction as JSON, whole or not at all."""
        columns = {name: getattr(self, name).tolist() for name in ("labels", "predictions", "losses")}
        tree = {
            **facts,
            "task": {"name": self.task.name, "kind": self.task.kind, "labels": list(self.task.labels)},
            "metrics": self.metrics,
            "truncated": self.truncated,
            "example_ids": list(self.example_ids),
            **columns,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(tree) + "\n")


def load_measurement(path: Path) -> Measurement:
    """What `Measurement.save` wrote.

    Raises:
        EvaluationError: missing or damaged.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        task = TaskFacts(tree["task"]["name"], tree["task"]["kind"], tuple(tree["task"]["labels"]))
        labels, said, losses = (np.asarray(tree[name], np.float64) for name in ("labels", "predictions", "losses"))
        return Measurement(task, tuple(tree["example_ids"]), labels, said, losses, int(tree["truncated"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{path} is not a measurement: {error}\n  fix: delete it and measure again") from None


@torch.no_grad()
def measure(
    base: AdaptedModel,
    head: ClassifierHead,
    examples: Sequence[LabelledExample],
    factors: FactorSource | None = None,
    *,
    context: AbstractContextManager[Any] | None = None,
    batch_size: int = 64,
    maximum_tokens: int = 128,
    advance: Callable[[int], None] = lambda done: None,
) -> Measurement:
    """Predict the labels of examples.

    Args:
        base: the frozen base.
        head: over its final states.
        examples: what is predicted, at least one.
        factors: one adapter (E == 1), for example the sum of a task's and a dialect's, or None.
        context: entered while the base runs, for adaptations other than LoRA: `adaptation.attached(base, condition)`.
        batch_size: most texts in a forward pass; texts of similar length are run together.
        maximum_tokens: longer texts are cut there.
        advance: called with the number of examples that were just done.

    Returns:
        Predictions in the order of examples.

    Raises:
        EvaluationError: no examples, several adapters, or outputs that are not finite.
    """
    if not examples:
        raise EvaluationError("there are no examples to measure on\n  fix: prepare a labelled set that has some")
    if factors is not None and factors.conditions != 1:
        raise EvaluationError(
            f"a measurement is of one adapter, got {factors.conditions}\n  fix: call select(i) and measure one by one"
        )
    texts = [example.texts for example in examples]
    encoded, truncated = encode(base, texts, maximum_tokens)
    labels = torch.tensor([example.label for example in examples], dtype=torch.float32)
    predictions, losses = torch.empty(len(examples), dtype=torch.float64), torch.empty(len(examples))
    device = next(base.model.parameters()).device
    with context or nullcontext():
        for rows in batches(encoded, batch_size):
            ids, mask = padded([encoded[row] for row in rows], base.tokenizer.pad_token_id)
            states = base.hidden_states(ids.to(device), mask.to(device), factors)
            outputs = head(states, mask.to(device)).cpu()
            predictions[rows] = head.predict(outputs)
            losses[rows] = _losses(head, outputs, labels[rows])
            advance(len(rows))
    if not bool(torch.isfinite(losses).all()):
        raise EvaluationError("a prediction is not finite: the adapter or the head holds NaN or infinity")
    # Labels as they are stored: float32 is for the loss alone.
    stored = np.asarray([example.label for example in examples], np.float64)
    ids_of = tuple(example.example_id for example in examples)
    return Measurement(head.task, ids_of, stored, predictions.numpy(), losses.double().numpy(), truncated)


def _losses(head: ClassifierHead, outputs: Tensor, labels: Tensor) -> Tensor:
    if head.task.kind == "classification":
        return torch.nn.functional.cross_entropy(outputs, labels.long(), reduction="none")
    return (outputs[:, 0] - labels) ** 2


def encode(base: AdaptedModel, texts: Sequence[tuple[str, ...]], maximum_tokens: int) -> tuple[list[list[int]], int]:
    """Tokens of texts, and how many were cut.

    A pair goes through the tokenizer's own form for pairs in an encoder (segments are not told apart by type), and is
    one text of two lines in a decoder.
    """
    limit = min(maximum_tokens, base.context_length)
    found, truncated = [], 0
    for text in texts:
        parts = ("\n".join(text),) if base.has_head else text
        whole = base.tokenizer(*parts)["input_ids"]
        if len(whole) > limit:
            whole = base.tokenizer(*parts, truncation=True, max_length=limit)["input_ids"]
            truncated += 1
        found.append(whole)
    return found, truncated


def batches(encoded: Sequence[list[int]], batch_size: int) -> Iterator[list[int]]:
    """Rows of each batch, neighbours in length, longest first: what does not fit in memory fails at once."""
    order = sorted(range(len(encoded)), key=lambda row: -len(encoded[row]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def padded(rows: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask (B, T) int64, padded on the right."""
    ids = torch.full((len(rows), max(map(len, rows))), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return ids, mask


def macro_f1(labels: npt.ArrayLike, predictions: npt.ArrayLike) -> float:
    """Mean over classes, of those that occur as label or prediction, of F1 = 2 TP / (2 TP + FP + FN)."""
    right, said = np.asarray(labels), np.asarray(predictions)
    scores = []
    for name in np.union1d(right, said):
        both = float(((right == name) & (said == name)).sum())
        scores.append(2 * both / float((right == name).sum() + (said == name).sum()))
    return float(np.mean(scores))


def pearson(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Correlation of (N,) and (N,); 0 where one of them is constant."""
    a, b = (np.asarray(v, np.float64) - np.mean(np.asarray(v, np.float64)) for v in (x, y))
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 0 else 0.0


def ranks(x: npt.ArrayLike) -> Array:
    """Ranks from 1, of equal values the mean of theirs: Pearson's correlation of ranks is Spearman's."""
    _, inverse, counts = np.unique(np.asarray(x), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], np.float64)
