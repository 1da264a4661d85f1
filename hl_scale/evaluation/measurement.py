"""What evaluation measures on texts: divergence to frozen states, token variances, loss; and the size of delta W.

Texts are sorted by length, padded on the right and run through the model in batches; nothing is truncated. Frozen
states of the standard sentences are computed once and kept as one float32 token cloud (n_i, D) per sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hl_scale.lora import sum_factors

if TYPE_CHECKING:
    from hl_scale.base import AdaptedModel, TaskAdapter
    from hl_scale.lora import LoraFactors
    from hl_scale.objectives.alignment import AlignmentObjective

Array = npt.NDArray[np.float64]
Tokens = list[list[int]]

LOGIT_BYTES = 256 * 2**20
"""Bound on the float32 logits of one chunk when the language-model loss is measured."""
GRAM_ENTRIES = 1 << 24
"""Numbers at a time when updates are compared, 128 MiB in float64."""


class EvaluationError(ValueError):
    """An evaluation that cannot be done as asked; the message says what was found and how to fix it."""


@dataclass(frozen=True)
class CloudStatistics:
    """Per sentence, over its tokens' normalised states: ``within`` (n,) mean squared distance to ``mean`` (n, D)."""

    within: Array
    mean: Array

    @property
    def between(self) -> float:
        """Mean squared distance of the sentence means to their own mean."""
        return float(np.square(self.mean - self.mean.mean(axis=0)).sum(axis=1).mean())


class Measurer:
    """Runs one adapted model over texts.

    With a task adapter "the base" is the base that carries it, here and in what uses this: factors are added to it.

    Args:
        base: the adapted model.
        objective: supplies the normalisation, the token mask and the divergence that training used.
        batch_size: largest number of sentences in a forward pass.
        advance: called with the number of sentences that were just done.
        task_adapter: what the run was trained on top of, if anything.
    """

    def __init__(
        self,
        base: AdaptedModel,
        objective: AlignmentObjective,
        batch_size: int,
        advance: Callable[[int], None] = lambda done: None,
        task_adapter: TaskAdapter | None = None,
    ) -> None:
        self.base = base
        self.objective = objective
        self.batch_size = batch_size
        self.advance = advance
        self.device = next(base.model.parameters()).device
        self.fixed = None if task_adapter is None else task_adapter.factors.to(self.device)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Token ids of every text, special tokens included.

        Raises:
            EvaluationError: a text has more tokens than the model's context.
        """
        tokens = [list(self.base.tokenizer(text)["input_ids"]) for text in texts]
        for text, ids in zip(texts, tokens, strict=True):
            if len(ids) > self.base.context_length:
                raise EvaluationError(
                    f"a sentence has {len(ids)} tokens, the model's context holds {self.base.context_length}: "
                    f"{text[:80]!r}...\n  fix: lower data.maximum_words and prepare the corpus again"
                )
        return tokens

    @torch.inference_mode()
    def frozen_clouds(self, tokens: Tokens) -> list[Tensor]:
        """The frozen base's normalised states of every text, one (n_i, D) float32 tensor on the CPU each."""
        clouds: list[Tensor] = [torch.empty(0)] * len(tokens)
        for rows in self._batches(tokens):
            input_ids, attention_mask = self._padded([tokens[row] for row in rows])
            states = self.objective.normalize(self._hidden(input_ids, attention_mask, None)).cpu()
            mask = self.objective.token_mask(attention_mask).cpu()
            for row, cloud, keep in zip(rows, states, mask, strict=True):
                clouds[row] = cloud[keep].clone()
                if not len(clouds[row]):
                    raise EvaluationError(
                        f"standard sentence number {row} has no token left to align after the first one is dropped\n"
                        "  fix: raise data.minimum_words and prepare the corpus again"
                    )
            self.advance(len(rows))
        return clouds

    @torch.inference_mode()
    def divergences(
        self, tokens: Tokens, targets: Sequence[Tensor], factors: LoraFactors | None
    ) -> tuple[Array, CloudStatistics]:
        """Divergence of every text's states under ``factors`` (E = 1, or None for the base) to its target cloud.

        Returns:
            Divergences (n,) in the order of ``tokens``, and the statistics of the texts' own clouds.
        """
        values, within = np.empty(len(tokens)), np.empty(len(tokens))
        means = np.empty((len(tokens), targets[0].shape[1]))
        for rows in self._batches(tokens):
            input_ids, attention_mask = self._padded([tokens[row] for row in rows])
            hidden = self._hidden(input_ids, attention_mask, factors)
            target, target_mask = self._stacked([targets[row] for row in rows])
            batch = self.objective.divergence(hidden, attention_mask, target, target_mask)
            mask = self.objective.token_mask(attention_mask)
            centre, spread = _moments(self.objective.normalize(hidden), mask)
            values[rows] = batch.double().cpu().numpy()
            means[rows], within[rows] = centre.cpu().numpy(), spread.cpu().numpy()
            self.advance(len(rows))
        return values, CloudStatistics(within, means)

    @torch.inference_mode()
    def language_model_losses(self, tokens: Tokens, factors: LoraFactors | None) -> tuple[Array, Array]:
        """Summed next-token loss in nats, and the number of predicted tokens, of every text: (n,) and (n,)."""
        losses = np.zeros(len(tokens))
        vocabulary = int(self.base.model.config.get_text_config().vocab_size)
        longest = max(len(ids) for ids in tokens)
        rows_per_chunk = max(1, min(self.batch_size, LOGIT_BYTES // (4 * vocabulary * longest)))
        for rows in self._batches(tokens, rows_per_chunk):
            input_ids, attention_mask = self._padded([tokens[row] for row in rows])
            logits = self.base.logits(input_ids, attention_mask, self._carried(factors))[:, :-1]
            labels = input_ids[:, 1:].masked_fill(attention_mask[:, 1:] == 0, -100)
            for row, row_logits, row_labels in zip(rows, logits, labels, strict=True):
                loss = torch.nn.functional.cross_entropy(row_logits.float(), row_labels, reduction="sum")
                losses[row] = loss.item()
            self.advance(len(rows))
        return losses, np.array([len(ids) - 1 for ids in tokens], dtype=np.float64)

    def _hidden(self, input_ids: Tensor, attention_mask: Tensor, factors: LoraFactors | None) -> Tensor:
        return self.base.hidden_states(input_ids, attention_mask, self._carried(factors))

    def _carried(self, factors: LoraFactors | None) -> LoraFactors | None:
        """What the model carries: the factors, added to the task adapter."""
        if self.fixed is None or factors is None:
            return self.fixed if factors is None else factors
        return sum_factors(factors, self.fixed)

    def _batches(self, tokens: Tokens, batch_size: int | None = None) -> list[npt.NDArray[np.intp]]:
        """Row numbers of every batch, neighbours in length together."""
        order = np.argsort([len(ids) for ids in tokens], kind="stable")
        size = batch_size or self.batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _padded(self, rows: Tokens) -> tuple[Tensor, Tensor]:
        """Right-padded ids and mask, both (B, T) long."""
        pad = self.base.tokenizer.pad_token_id
        width = max(len(ids) for ids in rows)
        input_ids = torch.full((len(rows), width), 0 if pad is None else pad, dtype=torch.long)
        attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
        for index, ids in enumerate(rows):
            input_ids[index, : len(ids)] = torch.tensor(ids, dtype=torch.long)
            attention_mask[index, : len(ids)] = 1
        return input_ids.to(self.device), attention_mask.to(self.device)

    def _stacked(self, clouds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Zero-padded clouds (B, M, D) float32 and their mask (B, M) bool."""
        target = torch.nn.utils.rnn.pad_sequence(list(clouds), batch_first=True)
        lengths = torch.tensor([len(cloud) for cloud in clouds])
        mask = torch.arange(target.shape[1])[None] < lengths[:, None]
        return target.to(self.device), mask.to(self.device)


def cloud_statistics(clouds: Sequence[Tensor]) -> CloudStatistics:
    """Statistics of clouds (n_i, D) that are already normalised."""
    means = torch.stack([cloud.double().mean(dim=0) for cloud in clouds])
    within = [
        (cloud.double() - mean).square().sum(dim=1).mean().item() for cloud, mean in zip(clouds, means, strict=True)
    ]
    return CloudStatistics(np.array(within), means.numpy())


def delta_gram(factors: LoraFactors) -> Array:
    """Inner products <s B_i A_i, s B_j A_j> of E conditions, summed over the slots, (E, E), in float64.

    <B_i A_i, B_j A_j> = trace((B_i^T B_j) (A_j A_i^T)), a product of two r x r matrices, where these cost less than
    the entries of delta W; else delta W is formed, a few of its rows at a time.
    """
    gram = torch.zeros(factors.conditions, factors.conditions, dtype=torch.float64)
    for slot in factors.slots:
        a, b = factors.a[slot.path].detach().double(), factors.b[slot.path].detach().double()
        gram += _slot_gram(a, b).cpu()
    return gram.numpy() * factors.scale**2


def _slot_gram(a: Tensor, b: Tensor) -> Tensor:
    """<B_i A_i, B_j A_j> for a (E, r, in) and b (E, out, r), with about `GRAM_ENTRIES` numbers at a time."""
    (conditions, rank, inputs), outputs = a.shape, b.shape[1]
    if rank**2 * (inputs + outputs) <= inputs * outputs:
        size = max(1, GRAM_ENTRIES // (conditions * rank**2))
        parts = [
            torch.einsum("irx,jsx->ijrs", some_a, a).mul_(torch.einsum("ior,jos->ijrs", some_b, b)).sum(dim=(2, 3))
            for some_a, some_b in zip(a.split(size), b.split(size), strict=True)
        ]
        return torch.cat(parts)
    gram = a.new_zeros(conditions, conditions)
    for rows in b.split(max(1, GRAM_ENTRIES // (conditions * inputs)), dim=1):
        updates = (rows @ a).flatten(1)
        gram.addmm_(updates, updates.T)
    return gram


def _moments(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (B, D) and mean squared distance to it (B,) of the masked rows of ``states`` (B, T, D), in float64."""
    weight = mask.double() / mask.sum(dim=1, keepdim=True).clamp(min=1)
    states = states.double()
    centre = torch.einsum("bt,btd->bd", weight, states)
    return centre, torch.einsum("bt,btd->b", weight, (states - centre[:, None]).square())
