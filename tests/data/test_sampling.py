"""Sample order from counters: the same global batches for every world size, every epoch complete and different."""

from __future__ import annotations

import numpy as np
import pytest

from hl_scale.data.sampling import BatchPlan, GlobalSampler, plan_batches

LENGTHS = np.random.default_rng(3).integers(3, 60, size=103)


@pytest.mark.parametrize(
    ("world_size", "largest", "expected"),
    [
        (1, 12, BatchPlan(1, 1, 12, 12)),
        (1, 5, BatchPlan(1, 3, 4, 12)),
        (3, 3, BatchPlan(3, 2, 2, 12)),
        (12, 9, BatchPlan(12, 1, 1, 12)),
        (5, 4, BatchPlan(5, 1, 3, 12)),
        (5, 2, BatchPlan(5, 2, 2, 12)),
        (16, 4, BatchPlan(16, 1, 1, 12)),
    ],
)
def test_a_plan_takes_the_fewest_passes_within_the_bound(world_size: int, largest: int, expected: BatchPlan) -> None:
    assert plan_batches(12, largest, world_size) == expected


@pytest.mark.parametrize(
    ("world_size", "largest"), [(1, 12), (1, 5), (2, 6), (2, 4), (3, 1), (5, 4), (5, 1), (7, 2), (16, 3)]
)
def test_the_global_batch_does_not_depend_on_world_size_or_accumulation(world_size: int, largest: int) -> None:
    sampler, plan = GlobalSampler(LENGTHS, 12, seed=5, bucket_batches=4), plan_batches(12, largest, world_size)
    for step in (0, 3, 9, 17):
        shares = [sampler.micro_batches(step, rank, plan) for rank in range(world_size)]
        assert all(len(share) == plan.accumulation for share in shares)
        sizes = [len(micro) for share in shares for micro in share]
        assert (
            max(sizes) == plan.micro_batch <= largest
            and max(map(sum, _sizes(shares))) - min(map(sum, _sizes(shares))) <= 1
        )
        union = np.concatenate([micro for share in shares for micro in share])
        assert sorted(union) == sorted(sampler.batch(step))


@pytest.mark.parametrize(("world_size", "largest"), [(1, 12), (1, 5), (3, 2), (5, 4), (5, 1), (7, 2), (16, 3)])
def test_weighted_means_over_ranks_and_passes_are_the_mean_over_the_global_batch(world_size: int, largest: int) -> None:
    sampler, plan = GlobalSampler(LENGTHS, 12, seed=5), plan_batches(12, largest, world_size)
    loss = np.random.default_rng(0).normal(size=len(LENGTHS))
    total = 0.0
    for rank in range(world_size):
        for micro in sampler.micro_batches(2, rank, plan):
            total += plan.weight(len(micro)) * (loss[micro].mean() if len(micro) else 1e9)
    assert total / world_size / plan.accumulation == pytest.approx(loss[sampler.batch(2)].mean(), rel=1e-12)


def test_equal_shares_weigh_exactly_one() -> None:
    assert plan_batches(12, 2, 3).weight(2) == 1.0 == plan_batches(49, 1, 7).weight(1)


def test_a_resumed_sampler_continues_with_the_same_batches() -> None:
    first = GlobalSampler(LENGTHS, 8, seed=1, bucket_batches=3)
    batches = [first.batch(step) for step in range(40)]
    resumed = GlobalSampler(LENGTHS, 8, seed=1, bucket_batches=3)
    for step in (31, 12, 39, 13):
        assert np.array_equal(resumed.batch(step), batches[step])


@pytest.mark.parametrize("bucket_batches", [1, 3, 100])
def test_no_sample_occurs_twice_in_an_epoch_and_only_a_rest_is_left_out(bucket_batches: int) -> None:
    sampler = GlobalSampler(LENGTHS, 8, seed=2, bucket_batches=bucket_batches)
    assert sampler.batches_per_epoch == 12
    for epoch in range(3):
        seen = np.concatenate([sampler.batch(12 * epoch + index) for index in range(12)])
        assert len(set(seen.tolist())) == len(seen) == 96
        assert seen.min() >= 0 and seen.max() < len(LENGTHS)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    one, other = GlobalSampler(LENGTHS, 8, seed=0), GlobalSampler(LENGTHS, 8, seed=1)
    assert not np.array_equal(one.batch(0), one.batch(one.batches_per_epoch))
    assert not np.array_equal(one.batch(0), other.batch(0))
    left_out = [set(range(103)) - {int(i) for s in range(12) for i in one.batch(12 * e + s)} for e in range(4)]
    assert len({frozenset(rest) for rest in left_out}) > 1, "the rest that is left out changes with the epoch"


def test_bucketing_by_length_pads_less_than_a_plain_shuffle() -> None:
    def padding(bucket_batches: int) -> int:
        sampler = GlobalSampler(LENGTHS, 8, seed=4, bucket_batches=bucket_batches)
        batches = [LENGTHS[sampler.batch(step)] for step in range(sampler.batches_per_epoch)]
        return int(sum(lengths.max() * len(lengths) - lengths.sum() for lengths in batches))

    assert padding(12) < padding(4) < padding(1)
    assert padding(12) < padding(1) / 4


def test_bucketed_batches_do_not_come_in_the_order_of_their_lengths() -> None:
    sampler = GlobalSampler(LENGTHS, 8, seed=4, bucket_batches=12)
    means = [LENGTHS[sampler.batch(step)].mean() for step in range(12)]
    assert means != sorted(means) and means != sorted(means, reverse=True)


def test_ranks_get_samples_of_like_length() -> None:
    sampler, plan = GlobalSampler(LENGTHS, 12, seed=0), plan_batches(12, 4, 3)
    longest = [max(LENGTHS[micro].max() for micro in sampler.micro_batches(0, rank, plan)) for rank in range(3)]
    batch = sorted(LENGTHS[sampler.batch(0)], reverse=True)
    assert longest == batch[:3]


def test_fewer_samples_than_one_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"(?s)3 training samples are fewer than one global batch of 4.*fix: prepare"):
        GlobalSampler([5, 6, 7], 4, seed=0)


def test_exactly_one_batch_is_an_epoch() -> None:
    sampler = GlobalSampler([5, 6, 7], 3, seed=0)
    assert sampler.batches_per_epoch == 1 and sorted(sampler.batch(7)) == [0, 1, 2]


def _sizes(shares: list[list[np.ndarray]]) -> list[list[int]]:
    return [[len(micro) for micro in share] for share in shares]
