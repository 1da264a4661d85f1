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


class TaskSampler:
    """Global batches of task examples: every task equally often, a description and some of its examples at a time.

    Tasks, the descriptions of a task and its examples are each gone through in shuffled rounds. A sample is a row of
    four numbers: task, description, example, and the number of the draw, which seeds whatever noise it gets.

    Args:
        lengths: for each task (N,) tokens of its examples.
        descriptions: for each task how many there are.
        global_batch: examples per step.
        per_condition: examples that share a task and description.
        seed: of the order.

    Raises:
        ValueError: the batch cannot be made of whole groups.
    """

    def __init__(
        self,
        lengths: Sequence[Sequence[int]],
        descriptions: Sequence[int],
        global_batch: int,
        per_condition: int,
        seed: int,
    ) -> None:
        if global_batch % per_condition:
            raise ValueError(
                f"training.global_batch_size = {global_batch} is no multiple of data.examples_per_condition = "
                f"{per_condition}\n  fix: change one of them"
            )
        self.lengths = [np.asarray(own) for own in lengths]
        self.descriptions = list(descriptions)
        self.global_batch = global_batch
        self.per_condition = per_condition
        self.seed = seed
        self._shuffled = lru_cache(maxsize=4 * len(self.lengths) + 4)(self._shuffle)

    def batch(self, step: int) -> np.ndarray:
        """(global_batch, 4) samples of optimizer step `step` (from 0), groups with the longest examples first."""
        groups = self.global_batch // self.per_condition
        rows = np.stack([self._group(step * groups + number) for number in range(groups)])
        totals = [sum(self.lengths[task][example] for task, _, example, _ in group) for group in rows]
        return rows[np.argsort(-np.asarray(totals), kind="stable")].reshape(-1, 4)

    def micro_batches(self, step: int, rank: int, plan: BatchPlan) -> list[np.ndarray]:
        """This rank's share, cut into `accumulation` pieces: groups are dealt in turn, and cut where shares ask for it,
        which differ by at most one sample."""
        groups = self.batch(step).reshape(-1, self.per_condition, 4)
        dealt = np.concatenate([groups[first :: plan.world_size] for first in range(plan.world_size)]).reshape(-1, 4)
        return np.array_split(np.array_split(dealt, plan.world_size)[rank], plan.accumulation)

    def _group(self, number: int) -> np.ndarray:
        """(per_condition, 4) samples of group `number` since the beginning of training."""
        visit, place = divmod(number, len(self.lengths))
        task = int(self._shuffled(0, visit, len(self.lengths))[place])
        description = self._pick(3 * task + 1, visit, self.descriptions[task])
        first, count = visit * self.per_condition, len(self.lengths[task])
        examples = [self._pick(3 * task + 2, first + i, count) for i in range(self.per_condition)]
        draw = number * self.per_condition
        return np.array([(task, description, example, draw + i) for i, example in enumerate(examples)])

    def _pick(self, stream: int, position: int, count: int) -> int:
        turn, place = divmod(position, count)
        return int(self._shuffled(stream, turn, count)[place])

    def _shuffle(self, stream: int, turn: int, count: int) -> np.ndarray:
        return np.random.default_rng([self.seed, stream, turn]).permutation(count)
