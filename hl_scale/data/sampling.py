"""Which samples make up each global batch, from counters alone.

Order depends on (seed, epoch) only: never on rank, world size or worker. Any world size therefore sees the same global
batches, and resuming needs nothing but the step number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class BatchPlan:
    """How one global batch is spread: over `world_size` ranks, each in `accumulation` passes of at most `micro_batch`
    samples. Shares of ranks and passes differ by at most one sample; they can be empty."""

    world_size: int
    accumulation: int
    micro_batch: int
    global_batch: int

    def weight(self, samples: int) -> float:
        """What the mean loss over a pass of so many samples is multiplied by, so that a plain mean over ranks and
        passes is the mean over the global batch; 1 if all passes are equal."""
        return samples * self.world_size * self.accumulation / self.global_batch


def plan_batches(global_batch: int, largest_micro_batch: int, world_size: int) -> BatchPlan:
    """The fewest accumulation passes that keep every micro-batch within the bound, on any number of ranks."""
    per_rank = -(-global_batch // world_size)
    accumulation = -(-per_rank // largest_micro_batch)
    return BatchPlan(world_size, accumulation, -(-per_rank // accumulation), global_batch)


class GlobalSampler:
    """Global batches of sample numbers.

    Samples are shuffled per epoch; pools of `bucket_batches` batches are sorted by length before they are cut, so that
    a batch holds similar lengths and little is padded; the batches of a pool are then shuffled again.

    Args:
        lengths: (N,) length of each sample, in tokens.
        global_batch: samples per step.
        seed: of the order.
        bucket_batches: batches per pool; 1 keeps the plain shuffle.

    Raises:
        ValueError: fewer samples than one global batch.
    """

    def __init__(self, lengths: Sequence[int], global_batch: int, seed: int, bucket_batches: int = 1) -> None:
        self.lengths = np.asarray(lengths)
        if len(self.lengths) < global_batch:
            raise ValueError(
                f"{len(self.lengths)} training samples are fewer than one global batch of {global_batch}\n"
                "  fix: prepare more sentences or lower training.global_batch_size"
            )
        self.global_batch = global_batch
        self.seed = seed
        self.bucket_batches = bucket_batches
        self.batches_per_epoch = len(self.lengths) // global_batch
        self._epoch_order = lru_cache(maxsize=2)(self._order)

    def batch(self, step: int) -> np.ndarray:
        """(global_batch,) sample numbers of optimizer step `step` (from 0), longest first."""
        epoch, index = divmod(step, self.batches_per_epoch)
        samples = self._epoch_order(epoch)[index]
        return samples[np.argsort(-self.lengths[samples], kind="stable")]

    def micro_batches(self, step: int, rank: int, plan: BatchPlan) -> list[np.ndarray]:
        """This rank's share of a global batch: every world_size-th sample, cut into `accumulation` pieces."""
        return np.array_split(self.batch(step)[rank :: plan.world_size], plan.accumulation)

    def _order(self, epoch: int) -> np.ndarray:
        """(batches_per_epoch, global_batch) sample numbers."""
        generator = np.random.default_rng([self.seed, epoch])
        kept = generator.permutation(len(self.lengths))[: self.batches_per_epoch * self.global_batch]
        pools = []
        for start in range(0, len(kept), self.bucket_batches * self.global_batch):
            pool = kept[start : start + self.bucket_batches * self.global_batch]
            pool = pool[np.argsort(self.lengths[pool], kind="stable")].reshape(-1, self.global_batch)
            pools.append(pool[generator.permutation(len(pool))])
        return np.concatenate(pools)
