"""Paired comparisons, against numbers worked out by hand and by scipy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from hl_scale.conditions import typology
from hl_scale.data.labelled import TaskFacts
from hl_scale.evaluation.dialect_tasks.alignment import AlignmentMeasurement
from hl_scale.evaluation.dialect_tasks.comparison import TaskTable
from hl_scale.evaluation.dialect_tasks.statistics import correlations, crossing, mcnemar
from hl_scale.evaluation.dialect_tasks.workbench import Row
from hl_scale.evaluation.labelled import Measurement

TASK = TaskFacts("sentiment", "classification", ("negative", "positive"))
NIGERIAN, CHICANO = "Nigerian English", "Chicano English"


def row(method: str, variety: str, right: Sequence[int], seed: int = 0, ids: Sequence[int] = (), seen=False) -> Row:
    """Labels are all 1, so that predictions are what is right."""
    said = np.asarray(right, np.float64)
    numbers = tuple(ids or range(10, 10 + len(right)))
    measured = Measurement(TASK, numbers, np.ones_like(said), said, 1 - said)
    cell = f"{method}-{variety}-{seed}"
    return Row("sentiment", method, variety, seed, None, "", seen, 8, 8, 4, cell, None, "task", measured)


ROWS = [
    row("none", typology.STANDARD, [1, 1, 1, 1, 1, 0]),
    row("none", NIGERIAN, [0, 0, 1, 1, 0, 0]),
    row("none", CHICANO, [1, 0, 1, 1, 0], ids=[10, 11, 12, 13, 15]),
    row("own", NIGERIAN, [1, 0, 1, 1, 0, 1]),
    row("own", CHICANO, [1, 1, 1, 1, 0], ids=[10, 11, 12, 13, 15]),
    row("lora", NIGERIAN, [1, 0, 0, 0, 1, 0]),
    row("lora", CHICANO, [1, 1, 1, 0, 0], ids=[10, 11, 12, 13, 15]),
    row("prefix", NIGERIAN, [0, 0, 0, 0, 0, 0]),
    row("prefix", CHICANO, [1, 1, 1, 1, 1], ids=[10, 11, 12, 13, 15]),
]


@pytest.fixture
def table() -> TaskTable:
    return TaskTable(ROWS, samples=400, seed=0)


def test_paired_differences_are_those_worked_out_by_hand(table) -> None:
    found = table.difference("own", "lora", [NIGERIAN, CHICANO])
    assert found["dialects"][NIGERIAN]["value"] == pytest.approx(4 / 6 - 2 / 6)
    assert found["dialects"][CHICANO]["value"] == pytest.approx(4 / 5 - 3 / 5)
    assert found["mean"]["value"] == pytest.approx((2 / 6 + 1 / 5) / 2)
    # Nigerian English: right under own alone in three sentences, under the LoRA alone in one.
    assert found["dialects"][NIGERIAN]["p"] == [pytest.approx(2 * (1 + 4) / 2**4)]


def test_the_interval_of_a_difference_is_that_of_resampled_sentences(table) -> None:
    found = table.difference("own", "none", [NIGERIAN])["mean"]
    differences = np.array([1, 0, 0, 0, 0, 1.0])
    counts = np.random.default_rng(0).multinomial(6, np.full(6, 1 / 6), size=400)
    low, high = np.percentile(counts @ differences / 6, [2.5, 97.5])
    assert (found["low"], found["high"]) == (pytest.approx(low), pytest.approx(high))


def test_points_lost_and_regained_are_of_the_same_sentences(table) -> None:
    headline = table.headline()
    # In Chicano English sentence 14 is missing: of the others 4 of 5 were right in Standard English, 3 of 5 in dialect.
    lost = ((5 / 6 - 2 / 6) + (4 / 5 - 3 / 5)) / 2
    regained = ((4 / 6 - 2 / 6) + (4 / 5 - 3 / 5)) / 2
    assert headline["lost"]["value"] == pytest.approx(lost)
    assert headline["regained"]["value"] == pytest.approx(regained)
    assert headline["best_baseline"] == "prefix"  # 0 and 1 against 2/6 and 3/5
    assert headline["over_best"]["value"] == pytest.approx((4 / 6 - 0 + 4 / 5 - 1) / 2)


def test_the_share_is_what_is_regained_over_what_is_lost_and_told_only_where_something_is() -> None:
    kept = [r for r in ROWS if r.method != "none" and r.variety == NIGERIAN]
    nothing_lost = [row("none", variety, [1, 1, 1, 1, 1, 0]) for variety in (typology.STANDARD, NIGERIAN)]
    headline = TaskTable([*nothing_lost, *kept], samples=200, seed=0).headline()
    assert headline["lost"]["value"] == 0 and headline["share"] is None
    rows = []
    for r in ROWS:  # ten times as many sentences
        m = r.measurement
        ids = [100 * n + i for n in range(10) for i in m.example_ids]
        rows.append(row(r.method, r.variety, [*m.correct] * 10, ids=ids))
    headline = TaskTable(rows, samples=200, seed=0).headline()
    share = (2 / 6 + 1 / 5) / (3 / 6 + 1 / 5)  # regained over lost, as they are told
    assert headline["lost"]["low"] > 0 and headline["share"]["value"] == pytest.approx(share)
    assert headline["share"]["low"] < share < headline["share"]["high"]


def scored(method: str, variety: str, labels: np.ndarray, said: np.ndarray, seed: int = 0) -> Row:
    task = TaskFacts("graded", "regression", ())
    measured = Measurement(task, tuple(range(len(labels))), labels, said, (said - labels) ** 2)
    return Row("graded", method, variety, seed, None, "", False, 8, 8, 4, "cell", None, "task", measured)


def test_scores_are_compared_by_pearsons_correlation_on_resampled_sentences() -> None:
    draw = np.random.default_rng(4)
    labels = draw.normal(3, 1, size=60)
    places = {("none", typology.STANDARD): 0.3, ("none", NIGERIAN): 1.5, ("own", NIGERIAN): 0.8, ("lora", NIGERIAN): 1}
    said = {(*k, seed): labels + noise * draw.normal(size=60) for k, noise in places.items() for seed in (0, 1)}
    table = TaskTable([scored(*k[:2], labels, v, k[2]) for k, v in said.items()], samples=300, seed=0)
    counts = np.random.default_rng(0).multinomial(60, np.full(60, 1 / 60), size=300)

    def resampled(*place: str) -> np.ndarray:
        found = []
        for drawn in [np.arange(60), *(np.repeat(np.arange(60), c) for c in counts)]:
            found.append([np.corrcoef(labels[drawn], said[(*place, seed)][drawn])[0, 1] for seed in (0, 1)])
        return np.mean(found, axis=1)

    def same(found: dict[str, float], values: np.ndarray) -> bool:
        low, high = np.percentile(values[1:], [2.5, 97.5])
        return [found["value"], found["low"], found["high"]] == pytest.approx([values[0], low, high])

    whole, bare, own, lora = (resampled(*place) for place in places)
    headline = table.headline()
    assert same(table.method_facts("own")["dialects"][NIGERIAN], own)
    assert same(headline["lost"], whole - bare) and same(headline["regained"], own - bare)
    assert same(headline["over_best"], own - lora) and same(headline["share"], (own - bare) / (whole - bare))
    assert table.metric == "Pearson's correlation"
    assert table.difference("own", "none", [NIGERIAN])["dialects"][NIGERIAN]["p"] is None


def test_the_share_of_divergence_removed_is_of_sums_over_resampled_sentences() -> None:
    draw = np.random.default_rng(5)
    base = draw.uniform(1, 3, size=40)
    left = {seed: base * draw.uniform(0.3, 1.1, size=40) for seed in (0, 1)}
    rows = [
        Row("alignment", method, NIGERIAN, seed, None, "", False, 8, 8, 4, "cell", None, "",
            AlignmentMeasurement(tuple(range(40)), base, base if method == "none" else left[seed]))
        for method in ("none", "own") for seed in left
    ]  # fmt: skip
    table = TaskTable(rows, samples=300, seed=0)
    counts = np.random.default_rng(0).multinomial(40, np.full(40, 1 / 40), size=300)
    mean = (left[0] + left[1]) / 2
    low, high = np.percentile(1 - (counts @ mean) / (counts @ base), [2.5, 97.5])
    found = table.difference("own", "none", [NIGERIAN])["mean"]
    value = 1 - mean.sum() / base.sum()
    assert [found["value"], found["low"], found["high"]] == pytest.approx([value, low, high])
    assert table.metric == "divergence removed" and rows[0].measurement.metrics["divergence_removed"] == 0


def test_dialects_that_training_has_seen_are_not_in_the_headline() -> None:
    rows = [r if r.variety != CHICANO else row(r.method, CHICANO, r.measurement.correct, ids=r.measurement.example_ids,
                                               seen=True) for r in ROWS]  # fmt: skip
    table = TaskTable(rows, samples=200, seed=0)
    assert table.headline()["varieties"] == [NIGERIAN]
    assert table.method_facts("own")["dialects"][CHICANO]["seen"] is True


def test_the_order_in_which_sentences_were_measured_plays_no_part() -> None:
    turned = []
    for r in ROWS:
        m = r.measurement
        ids = list(reversed(m.example_ids))
        turned.append(row(r.method, r.variety, list(reversed(m.correct)), ids=ids))
    a, b = (TaskTable(rows, samples=200, seed=0).headline() for rows in (ROWS, turned))
    assert a == b


def test_seeds_are_averaged_sentence_by_sentence_and_their_spread_is_told() -> None:
    rows = [row("own", NIGERIAN, right, seed) for seed, right in enumerate(([1, 1, 0, 0], [1, 0, 0, 0]))]
    rows += [row("none", NIGERIAN, [0, 0, 0, 0], seed) for seed in (0, 1)]
    table = TaskTable(rows, samples=200, seed=0)
    facts = table.method_facts("own")
    assert facts["by_seed"] == [0.5, 0.25] and facts["spread"] == pytest.approx(np.std([0.5, 0.25], ddof=1))
    assert facts["mean"]["value"] == pytest.approx(0.375)
    assert facts["dialects"][NIGERIAN]["cells"] == [f"own-{NIGERIAN}-0", f"own-{NIGERIAN}-1"]
    assert len(table.difference("own", "none", [NIGERIAN])["dialects"][NIGERIAN]["p"]) == 2


def test_mcnemar_is_the_exact_binomial_test_on_the_pairs_that_differ() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for size in (1, 7, 60, 400):
        a, b = rng.integers(0, 2, size), rng.integers(0, 2, size)
        wins, losses = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
        expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
        assert mcnemar(a, b) == pytest.approx(expected)
    assert mcnemar([1, 0], [1, 0]) == 1.0
    with pytest.raises(ValueError, match="paired outcomes have shapes"):
        mcnemar([1, 0], [1])


def test_correlations_are_those_of_scipy_and_their_intervals_hold_them() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    x = rng.uniform(size=30)
    y = x + 0.3 * rng.normal(size=30)
    found = correlations(x, y, samples=300)
    assert found["pearson"].value == pytest.approx(stats.pearsonr(x, y)[0])
    assert found["spearman"].value == pytest.approx(stats.spearmanr(x, y)[0])
    assert all(part.low < part.value < part.high for part in found.values())


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.5, 0.6, 0.8], 10**2.5), ([0.7, 0.6, 0.8], 10.0), ([0.6, 0.65, 0.7], 1000.0), ([0.1, 0.2, 0.3], None)],
)
def test_a_curve_crosses_a_level_on_a_straight_line_over_log_counts(values, expected) -> None:
    found = crossing([10, 100, 1000], values, 0.7)
    assert found == (None if expected is None else pytest.approx(expected))
