"""A linear layer over one state per text: classes, or a score.

Which state: decoders are read at their last token, the only one that has seen the whole text; RoBERTa at its first,
<s>, as published (arXiv 1907.11692); other encoders by the mean over tokens, as sentence encoders of the MiniLM family
are trained (arXiv 1908.10084). The pooled state is brought to mean 0 and variance 1 over its D entries: final norms of
decoders differ by orders of magnitude, and one learning rate then serves all.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from hl_scale.base import AdaptedModel
from hl_scale.data.labelled import TaskFacts

Pooling = Literal["first", "mean", "last"]
_FIRST_TOKEN = ("roberta", "xlm-roberta", "camembert")


def choose_pooling(base: AdaptedModel) -> Pooling:
    """The pooling of a kind of model; see the module's text."""
    if base.has_head:
        return "last"
    return "first" if base.model.config.model_type in _FIRST_TOKEN else "mean"


def pool(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One state per text.

    Args:
        states: (B, T, D).
        mask: (B, T), 1 for tokens, padded on the right; at least one token per text.
        pooling: which state.

    Returns:
        (B, D) float32.
    """
    states = states.float()
    if pooling == "first":
        return states[:, 0]
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
    weights = mask.to(states.dtype)[..., None]
    return (states * weights).sum(1) / weights.sum(1)


class ClassifierHead(nn.Module):
    """Pooled states to scores of classes, or to one value; float32.

    Args:
        hidden_size: D.
        task: what is predicted.
        pooling: which state of a text is read.
        center, spread: of a regression: the output is center + spread * (what the layer gives), so that the layer works
            on scores with mean 0 and variance 1.
    """

    def __init__(
        self, hidden_size: int, task: TaskFacts, pooling: Pooling, center: float = 0.0, spread: float = 1.0
    ) -> None:
        super().__init__()
        self.task, self.pooling, self.center, self.spread = task, pooling, center, spread
        self.linear = nn.Linear(hidden_size, max(len(task.labels), 1))
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """States (B, T, D) and mask (B, T) -> logits (B, classes), or scores (B, 1)."""
        pooled = pool(states, mask, self.pooling)
        found: Tensor = self.linear(nn.functional.layer_norm(pooled, pooled.shape[1:]))
        return found if self.task.kind == "classification" else self.center + self.spread * found

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy in nats, or mean squared error over spread^2; labels (B,) as in examples."""
        if self.task.kind == "classification":
            return nn.functional.cross_entropy(outputs, labels.long())
        return nn.functional.mse_loss(outputs[:, 0], labels) / self.spread**2

    def predict(self, outputs: Tensor) -> Tensor:
        """(B,) class indices, or scores; float64."""
        return (outputs.argmax(1) if self.task.kind == "classification" else outputs[:, 0]).double()
