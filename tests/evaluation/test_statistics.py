"""The sentence bootstrap against closed forms and against scipy."""

import math

import numpy as np
import pytest
import scipy.stats

from hl_scale.evaluation.statistics import Estimate, SentenceBootstrap, TaskBootstrap


def test_the_interval_of_a_mean_is_the_normal_interval_for_many_sentences():
    values = np.random.default_rng(3).normal(5.0, 2.0, size=400)
    estimate = SentenceBootstrap(400, samples=20_000, seed=1).mean(values)
    half = 1.959964 * values.std() / math.sqrt(400)
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.04 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.04 * half)


def test_the_interval_of_a_ratio_agrees_with_scipys_paired_percentile_bootstrap():
    rng = np.random.default_rng(0)
    base = rng.gamma(4.0, 1.0, size=120)
    adapted = 0.7 * base + 0.2 * rng.normal(size=120)
    ours = SentenceBootstrap(120, samples=20_000, seed=5).ratio(adapted, base)
    theirs = scipy.stats.bootstrap(
        (adapted, base),
        lambda a, b, axis=-1: a.mean(axis=axis) / b.mean(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(6),
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.value == pytest.approx(adapted.mean() / base.mean())
    assert abs(ours.low - theirs.low) < 0.03 * width
    assert abs(ours.high - theirs.high) < 0.03 * width


def test_two_sentences_give_the_three_known_resamples():
    # The counts are (2,0), (1,1), (0,2) with probability 1/4, 1/2, 1/4: the 2.5% and 97.5% points are the extremes.
    estimate = SentenceBootstrap(2, samples=4000, seed=0).ratio([1.0, 6.0], [2.0, 3.0])
    assert (estimate.value, estimate.low, estimate.high) == (7 / 5, 1 / 2, 2.0)


def test_a_constant_ratio_has_an_interval_of_width_zero():
    base = np.random.default_rng(1).gamma(2.0, size=50)
    estimate = SentenceBootstrap(50, samples=500).ratio(0.25 * base, base)
    assert estimate.low == pytest.approx(0.25)
    assert estimate.high == pytest.approx(0.25)


def test_pairing_removes_the_variance_that_both_conditions_share():
    rng = np.random.default_rng(2)
    base = rng.gamma(4.0, size=200)
    own = base * rng.uniform(0.2, 1.2, size=200)
    alternative = own + 0.05 * base
    paired = SentenceBootstrap(200, seed=0).difference(alternative, own, base)
    unpaired_width = SentenceBootstrap(200, seed=0).ratio(own, base)
    assert paired.value == pytest.approx(0.05)
    assert paired.high - paired.low < 1e-9 < unpaired_width.high - unpaired_width.low
    assert paired.excludes(0.0)


def test_the_interval_covers_the_truth_in_about_95_of_100_repetitions():
    rng = np.random.default_rng(8)
    covered = 0
    for repetition in range(300):
        base = rng.gamma(4.0, size=80)
        adapted = base * rng.uniform(0.4, 1.0, size=80)
        estimate = SentenceBootstrap(80, samples=400, seed=repetition).ratio(adapted, base)
        covered += estimate.low <= 0.7 <= estimate.high
    assert 0.90 <= covered / 300 <= 0.98


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    values = np.random.default_rng(4).normal(size=31)
    first, again, other = (SentenceBootstrap(31, samples=300, seed=seed).mean(values) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_a_subset_of_sentences_is_resampled_with_the_counts_of_the_whole_set():
    values = np.random.default_rng(5).gamma(2.0, size=40)
    bootstrap = SentenceBootstrap(40, samples=1000, seed=0)
    rows = np.array([3, 8, 21, 39, 0, 11])
    masked = np.zeros(40)
    masked[rows] = 1.0
    assert bootstrap.mean(values[rows], rows).low == pytest.approx(bootstrap.ratio(values * masked, masked).low)


def test_an_average_of_identical_ratios_is_that_ratio_because_resamples_are_shared():
    rng = np.random.default_rng(6)
    top, bottom = rng.gamma(2.0, size=30), rng.gamma(3.0, size=30)
    bootstrap = SentenceBootstrap(30, samples=800, seed=0)
    single, average = bootstrap.ratio(top, bottom), bootstrap.average([(top, bottom, None)] * 3)
    assert average.value == pytest.approx(single.value)
    assert (average.low, average.high) == pytest.approx((single.low, single.high))


def test_resamples_without_a_denominator_are_left_out_and_counted():
    bottom = np.zeros(4)
    bottom[0] = 1.0
    estimate = SentenceBootstrap(4, samples=4000, seed=0).ratio(bottom * 0.5, bottom)
    # A resample misses the only changed sentence with probability (3/4)^4 = 0.316.
    assert estimate.value == estimate.low == estimate.high == 0.5
    assert estimate.resamples / 4000 == pytest.approx(1 - 0.75**4, abs=0.03)


@pytest.mark.parametrize(
    ("numerator", "denominator", "message"),
    [
        ([1.0, 2.0], [1.0, 2.0, 3.0], "one numerator and one denominator per sentence"),
        ([1.0, float("nan"), 1.0], [1.0, 1.0, 1.0], "not finite"),
        ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], "ratio is undefined"),
    ],
)
def test_unusable_values_are_refused(numerator, denominator, message):
    with pytest.raises(ValueError, match=message):
        SentenceBootstrap(3, samples=10).ratio(numerator, denominator)


def test_one_sentence_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        SentenceBootstrap(1)


def test_an_interval_that_touches_a_value_does_not_exclude_it():
    assert not Estimate(0.5, 0.0, 1.0, 10).excludes(0.0)
    assert Estimate(0.5, 0.1, 1.0, 10).excludes(0.0)


def test_a_task_bootstrap_covers_both_the_choice_of_tasks_and_that_of_examples():
    rng = np.random.default_rng(1)
    sizes = [30] * 40
    # Variance of the mean: between / T + within / (T n), the second part counted once more by resampling within tasks.
    for between, within in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        values = [between * rng.normal() + within * rng.normal(size=size) for size in sizes]
        means = np.array([value.mean() for value in values])
        expected = np.sqrt((means.var() + np.mean([value.var() for value in values]) / 30) / 40)
        estimate = TaskBootstrap(sizes, samples=4000).mean(values)
        assert estimate.value == pytest.approx(means.mean())
        assert (estimate.high - estimate.low) / (2 * 1.96) == pytest.approx(expected, rel=0.06)


def test_a_task_bootstrap_weighs_tasks_alike_whatever_their_size():
    estimate = TaskBootstrap([1, 9], samples=200).mean([[1.0], [0.0] * 9])
    assert (estimate.value, estimate.low, estimate.high) == (0.5, 0.0, 1.0)


def test_a_task_bootstrap_refuses_values_that_do_not_fit():
    with pytest.raises(ValueError, match="at least one example each"):
        TaskBootstrap([3, 0])
    with pytest.raises(ValueError, match="expected"):
        TaskBootstrap([2, 2], samples=100).mean([[1.0], [1.0, 2.0]])
    with pytest.raises(ValueError, match="not finite"):
        TaskBootstrap([1, 1], samples=100).mean([[1.0], [np.nan]])


def test_a_ratio_of_task_means_has_the_paired_interval_of_scipy():
    rng = np.random.default_rng(2)
    possible = rng.gamma(4.0, 1.0, size=60)
    gained = 0.8 * possible + 0.3 * rng.normal(size=60)
    ours = TaskBootstrap([1] * 60, samples=20_000).ratio(gained[:, None], possible[:, None])
    theirs = scipy.stats.bootstrap(
        (gained, possible),
        lambda a, b, axis=-1: a.mean(axis=axis) / b.mean(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(6),
    ).confidence_interval
    assert ours is not None and ours.value == pytest.approx(gained.mean() / possible.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.004)


def test_a_ratio_of_task_means_is_undefined_without_a_positive_denominator():
    assert TaskBootstrap([1, 1], samples=100).ratio([[1.0], [1.0]], [[-1.0], [1.0]]) is None
