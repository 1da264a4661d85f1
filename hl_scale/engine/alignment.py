"""Training on parallel sentences: dialect states are drawn to the frozen base's states of Standard English."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hl_scale.base import AdaptedModel, TaskAdapter
from hl_scale.config import Config, ConfigError
from hl_scale.data.corpus import Corpus, Pair
from hl_scale.data.sampling import GlobalSampler
from hl_scale.engine.targets import TargetCache, tokenize
from hl_scale.engine.training_module import TrainingModule, fixed_factors, is_finite, is_identity
from hl_scale.engine.zero3 import World
from hl_scale.hypernetwork import Hypernetwork
from hl_scale.kernels import Segments
from hl_scale.lora import FactorSource, LoraFactors, with_fixed
from hl_scale.objectives.alignment import AlignmentObjective


@dataclass
class AlignmentBatch:
    """A micro-batch of B pairs with E distinct conditions.

    Attributes:
        input_ids, attention_mask: (B, T) dialect sentences, padded on the right.
        conditions: (E, C) float32.
        condition_index: (B,) row of `conditions` for each pair.
        target: (B, M, D) normalised base states of the standard sentences, padded.
        target_mask: (B, M) bool.
        target_self: (B,) self terms of the targets where they are known beforehand.
    """

    input_ids: Tensor
    attention_mask: Tensor
    conditions: Tensor
    condition_index: Tensor
    target: Tensor
    target_mask: Tensor
    target_self: Tensor | None = None

    @property
    def tokens(self) -> int:
        return int(self.attention_mask.sum())

    def to(self, device: torch.device) -> AlignmentBatch:
        moved: dict[str, Any] = {
            name: None if value is None else value.to(device) for name, value in vars(self).items()
        }
        return AlignmentBatch(**moved)


class AlignmentModule(TrainingModule):
    """See `TrainingModule`. With `packed` the base sees sentences end to end, without padding; `fixed`, the factors of
    a frozen adapter (E = 1) under the hypernetwork's scale, are added to the generated ones."""

    def __init__(
        self,
        hypernetwork: Hypernetwork,
        base: AdaptedModel,
        objective: AlignmentObjective,
        partition_base: bool,
        packed: bool = False,
        fixed: LoraFactors | None = None,
    ) -> None:
        super().__init__(hypernetwork, base, partition_base)
        self.objective = objective
        self.packed = packed
        self.fixed = fixed

    def forward(self, batch: AlignmentBatch) -> Tensor:
        """Mean divergence of the micro-batch, ()."""
        factors = self.hypernetwork(batch.conditions)
        if factors.conditions != 1 and not is_identity(batch.condition_index, factors.conditions):
            factors = factors.select(batch.condition_index)
        factors = with_fixed(factors, self.fixed)
        hidden = (
            self._packed_states(batch, factors)
            if self.packed
            else self.base.hidden_states(batch.input_ids, batch.attention_mask, factors)
        )
        if not (is_finite(hidden) and is_finite(batch.target)):
            return hidden.float().sum() * math.nan
        loss, _ = self.objective(hidden, batch.attention_mask, batch.target, batch.target_mask, batch.target_self)
        return loss if is_finite(loss) else loss * math.nan

    def _packed_states(self, batch: AlignmentBatch, factors: FactorSource) -> Tensor:
        """(B, T, D) as from a padded batch, zero where there is padding, which the base never sees."""
        mask = batch.attention_mask.bool()
        ends = mask.sum(1).cumsum(0).tolist()
        states = self.base.packed_hidden_states(batch.input_ids[mask], Segments((0, *ends)), factors)
        return states.new_zeros(*mask.shape, states.shape[1]).masked_scatter(mask[..., None], states)


class AlignmentWorkload:
    """The dialect job, see `hl_scale.engine.inputs.Workload`.

    Raises:
        ConfigError: sentences that are too long or empty.
    """

    def __init__(
        self, config: Config, base: AdaptedModel, corpus: Corpus, task_adapter: TaskAdapter | None = None
    ) -> None:
        training = config.training
        self.config, self.base, self.task_adapter = config, base, task_adapter
        self.pairs = corpus.train
        self.data_fingerprint = corpus_fingerprint(corpus)
        self.condition_size = corpus.source.NUM_FEATURES
        minimum = 1 + config.alignment.skip_first_token
        lengths = token_lengths(base, corpus.train, config.data.maximum_tokens, minimum)
        self.sampler = GlobalSampler(
            lengths, training.global_batch_size, config.run.seed, training.length_bucket_batches
        )
        self.objective = AlignmentObjective(config.alignment)
        self.targets = TargetCache(Path(f"{Path(config.data.directory)}-targets"), base, self.objective, task_adapter)

    def prepare(self, world: World, report: Callable[[str], None]) -> None:
        """Compute the frozen targets that are not on disk; collective."""

        def progress(done: int, total: int) -> None:
            report(f"computing frozen targets: {done}/{total} chunks")

        self.targets.prepare([pair.standard for pair in self.pairs], world, progress)

    def module(self, hypernetwork: Hypernetwork) -> AlignmentModule:
        partitioned, packed = self.config.base.placement == "zero3", self.config.training.packed
        fixed = fixed_factors(self.base, self.task_adapter, hypernetwork.scale)
        return AlignmentModule(hypernetwork, self.base, self.objective, partitioned, packed, fixed)

    def names(self, samples: np.ndarray) -> list[int]:
        """Pair ids."""
        return [self.pairs[int(sample)].pair_id for sample in samples]

    def collate(self, samples: np.ndarray) -> AlignmentBatch:
        """Sample numbers to a padded micro-batch with its distinct conditions."""
        pairs = [self.pairs[int(sample)] for sample in samples]
        input_ids, attention_mask = tokenize(self.base, [pair.dialect for pair in pairs])
        clouds = [self.targets.get(pair.standard) for pair in pairs]
        target = torch.nn.utils.rnn.pad_sequence(clouds, batch_first=True)
        sizes = torch.tensor([len(cloud) for cloud in clouds])
        self_terms = [self.targets.self_term(pair.standard) for pair in pairs]
        known = [term for term in self_terms if term is not None]  # all or none
        rows: dict[bytes, int] = {}
        index = [rows.setdefault(pair.vector.tobytes(), len(rows)) for pair in pairs]
        conditions = np.stack([np.frombuffer(row, dtype=np.float32) for row in rows])
        return AlignmentBatch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            conditions=torch.from_numpy(conditions.copy()),
            condition_index=torch.tensor(index),
            target=target,
            target_mask=torch.arange(target.shape[1])[None] < sizes[:, None],
            target_self=torch.cat(known) if known else None,
        )


def token_lengths(base: AdaptedModel, pairs: list[Pair], maximum_tokens: int, minimum_tokens: int = 1) -> list[int]:
    """Tokens of each dialect sentence.

    Raises:
        ConfigError: a sentence is longer than `maximum_tokens` or the model's context, or has fewer than
            `minimum_tokens`, so that none is left to align.
    """
    limit = min(maximum_tokens, base.context_length)
    dialect = _token_counts(base, [pair.dialect for pair in pairs])
    standard = _token_counts(base, [pair.standard for pair in pairs])
    for pair, own, other in zip(pairs, dialect, standard, strict=True):
        if max(own, other) > limit:
            raise ConfigError(
                f"pair {pair.pair_id} has {max(own, other)} tokens, more than {limit} "
                f"(data.maximum_tokens = {maximum_tokens}, context of the base = {base.context_length}): "
                f"{pair.dialect[:60]!r}\n"
                "  fix: raise data.maximum_tokens, or lower data.maximum_words and prepare again"
            )
        if min(own, other) < minimum_tokens:
            raise ConfigError(
                f"pair {pair.pair_id} has a sentence of {min(own, other)} tokens where {minimum_tokens} are needed: "
                f"{pair.standard[:60]!r} / {pair.dialect[:60]!r}\n  fix: prepare again without empty sentences"
            )
    return dialect


def _token_counts(base: AdaptedModel, texts: list[str]) -> list[int]:
    """Tokens of each text; some texts at a time, for the encoding of one takes kilobytes."""
    chunks = (texts[start : start + 512] for start in range(0, len(texts), 512))
    return [len(ids) for chunk in chunks for ids in base.tokenizer(chunk)["input_ids"]]


def corpus_fingerprint(corpus: Corpus) -> str:
    """What identifies the training data: the settings fingerprint in its manifest."""
    return str(corpus.manifest["fingerprint"])
