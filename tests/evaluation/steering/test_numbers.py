"""Every number of the task evaluation against a slow twin."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hl_scale.conditions.descriptions import EncoderError
from hl_scale.data.tasks import TaskSet
from hl_scale.engine.conditions import DescriptionConditions
from hl_scale.engine.run import LoadedRun
from hl_scale.engine.supervised import PromptFormat
from hl_scale.evaluation import evaluate_tasks, steering, steering_summaries, steering_tables
from hl_scale.evaluation.answers import Answer, Answerer
from hl_scale.evaluation.arms import ARMS, TrialVectors, in_context, make_arms
from hl_scale.evaluation.trials import HELDOUT, NEW, TRAINED, make_trials
from hl_scale.lora import LoraFactors

from .conftest import (
    INPUTS,
    OPERATIONS,
    VOCABULARY,
    frozen_adapter,
    slow_answers,
    slow_loss,
    with_outputs_as_answers,
)

GENERATING_ARMS = ["own", "other", "random", "shuffled", "base", "base+description"]


@pytest.mark.parametrize(("arm", "on_top"), [*((arm, False) for arm in GENERATING_ARMS), ("own", True), ("base", True)])
def test_answers_and_losses_are_those_of_generating_and_scoring_every_trial_alone(
    make_run: Callable[..., LoadedRun], tasks: TaskSet, arm: str, on_top: bool
) -> None:
    run = make_run()
    run = replace(run, task_adapter=frozen_adapter(run)) if on_top else run
    tasks = with_outputs_as_answers(tasks, run, "base" if arm.startswith("base") else arm)
    trials = make_trials(tasks)
    text = PromptFormat(run.base.tokenizer, run.config.tasks, run.base.context_length)
    arms = make_arms(run, text, TrialVectors(run.conditions, trials, 0))
    expected = slow_answers(run, tasks, arm)
    assert {right for right, _ in expected} == {True, False} or arm == "base+description"
    for every in (False, True):
        answers = Answerer(text, 5).answers(arms[arm], trials, all_outputs=every)
        assert [answer.right for answer in answers] == [right for right, _ in expected]
        np.testing.assert_allclose([answer.loss for answer in answers], [loss for _, loss in expected], rtol=1e-4)
        assert not every or all(answer.output is not None for answer in answers)


def test_outputs_here_hold_tokens_that_no_answer_is_split_into(make_run: Callable[..., LoadedRun]) -> None:
    """Else the test above would not see that a first token other than the answer's may still begin the answer."""
    base = make_run().base
    ids = torch.tensor([[1, *base.tokenizer(f"{INPUTS[0]} =>", add_special_tokens=False)["input_ids"]]])
    (tokens,) = base.generate(ids, torch.ones_like(ids), max_new_tokens=8, stop_ids=[VOCABULARY.index("\n")])
    assert any(len(VOCABULARY[token]) == 2 for token in tokens), tokens


def test_group_numbers_are_means_over_tasks_of_means_over_examples(
    make_run: Callable[..., LoadedRun], tasks: TaskSet
) -> None:
    run = make_run()
    tasks = with_outputs_as_answers(tasks, run, "own")
    # Tasks of unequal size, so that a mean over all examples would be another number.
    first = replace(tasks.tasks[0], test=tasks.tasks[0].test[:1])
    tasks = replace(tasks, tasks=(first, *tasks.tasks[1:]))
    result = evaluate_tasks(run, tasks, progress=False)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    trials, slow = make_trials(tasks), {arm: slow_answers(run, tasks, arm) for arm in ("own", "other", "base")}
    for group in (TRAINED, NEW, HELDOUT):
        for kind in ("open", "choice"):
            names = list(dict.fromkeys(t.task.name for t in trials if t.group == group and t.task.answers == kind))

            def mean(arm: str, part: int, names: list[str] = names, group: str = group) -> float:
                rows = [[i for i, t in enumerate(trials) if t.group == group and t.task.name == n] for n in names]
                return float(np.mean([np.mean([slow[arm][i][part] for i in row]) for row in rows]))

            summary = result["groups"][group][kind]
            assert summary["tasks"] == len(names)
            for arm in slow:
                assert summary["exact"][arm]["value"] == pytest.approx(mean(arm, 0))
                assert summary["loss"][arm]["value"] == pytest.approx(mean(arm, 1), rel=1e-4)
            for arm in ("other", "base"):
                assert summary["margin"][arm]["value"] == pytest.approx(mean(arm, 1) - mean("own", 1), abs=1e-4)
                assert summary["difference"][arm]["value"] == pytest.approx(mean("own", 0) - mean(arm, 0))
    assert result["groups"][NEW]["choice"]["most_frequent_answer"]["value"] <= 0.75
    assert [row["examples"] for row in result["tasks"] if row["task"] == "first"] == [1, 1]


def test_each_test_example_is_asked_once_in_each_group_and_wordings_take_turns(tasks: TaskSet) -> None:
    trials = make_trials(tasks)
    asked = [(t.task.name, t.group, t.number) for t in trials]
    assert len(set(asked)) == len(asked) == 4 * 4 * 2 + 2 * 4
    for trial in trials:
        seen, trained = trial.group != HELDOUT, trial.task.descriptions
        own = {TRAINED: trained, NEW: trial.task.heldout_descriptions}.get(
            trial.group, trained + trial.task.heldout_descriptions
        )
        assert trial.description == own[trial.number % len(own)] and trial.task.seen == seen
        assert trial.other.seen and trial.other.name != trial.task.name
        assert (trial.other_description in trial.other.heldout_descriptions) == (trial.group == NEW)
    assert len(make_trials(tasks, 2)) == 2 * 10


def test_a_run_that_ignores_its_condition_has_margins_of_0_and_the_collapse_warning(
    make_run: Callable[..., LoadedRun], tasks: TaskSet
) -> None:
    result = evaluate_tasks(make_run({"kind": "plain_lora"}), tasks, progress=False)
    for kinds in result["groups"].values():
        for summary in kinds.values():
            for arm in ("other", "random", "shuffled"):
                assert [summary["margin"][arm][key] for key in ("low", "value", "high")] == pytest.approx(
                    [0] * 3, abs=1e-6
                )
                assert summary["difference"][arm]["value"] == 0.0
    assert result["updates"]["relative_variance"] == 0.0
    assert result["updates"]["effective_rank"] == pytest.approx(1.0)
    assert sum("is not clear of 0" in warning for warning in result["warnings"]) == 6 * 2
    assert "COLLAPSE" in result["warnings"][0] and "COLLAPSE" in steering_tables.markdown_table(result)


def test_a_run_that_reads_its_condition_has_no_collapse_warning(
    make_run: Callable[..., LoadedRun], tasks: TaskSet
) -> None:
    result = evaluate_tasks(make_run(), tasks, arms=["other"], progress=False)
    assert list(result["arms"]) == ["own", "other"] and "without the arms random" in result["reduced"][0]
    assert not any("COLLAPSE" in warning for warning in result["warnings"])
    assert result["updates"]["relative_variance"] > 1e-3


def test_updates_of_many_tasks_are_compared_for_a_few_of_them(
    make_run: Callable[..., LoadedRun], tasks: TaskSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    every = evaluate_tasks(run, tasks, arms=["other"], progress=False)["updates"]
    monkeypatch.setattr(steering, "TASKS", 3)
    few = evaluate_tasks(run, tasks, arms=["other"], progress=False)["updates"]
    spread = [tasks.tasks[place].name for place in (0, 2, 5)]  # np.round of 2.5 is 2
    alone = evaluate_tasks(run, tasks, arms=["other"], only=spread, progress=False)["updates"]
    assert (every["tasks"], few["tasks"]) == (6, 3) and few == pytest.approx(alone) and few != pytest.approx(every)


def test_one_hot_conditions_are_asked_about_seen_tasks_alone(
    make_run: Callable[..., LoadedRun], tasks: TaskSet
) -> None:
    result = evaluate_tasks(make_run(conditions={"kind": "one_hot"}), tasks, progress=False)
    assert list(result["groups"]) == [TRAINED] and "shuffled" not in result["arms"]
    assert any("No task was held out" in caveat for caveat in result["caveats"])


def test_shuffled_words_that_an_encoder_does_not_read_are_left_out_from_the_end(
    make_run: Callable[..., LoadedRun], tasks: TaskSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    trial = make_trials(tasks)[0]
    whole = TrialVectors(run.conditions, [trial], 0).shuffle(trial).split()
    assert sorted(whole) == sorted(trial.description.split()) and len(whole) == 3
    assert isinstance(run.conditions, DescriptionConditions)

    def check(texts: list[str]) -> None:
        if any(len(text.split()) > 2 for text in texts):
            raise EncoderError("too long")

    monkeypatch.setattr(run.conditions.encoder, "check", check)
    assert TrialVectors(run.conditions, [trial], 0).shuffle(trial).split() == whole[:2]


def test_controls_and_a_library_become_arms(make_run: Callable[..., LoadedRun], tasks: TaskSet) -> None:
    run, plain = make_run(), make_run({"kind": "plain_lora"})
    prompted = make_run({"kind": "plain_lora"}, data={"description_in_prompt": True})
    trials = make_trials(tasks)
    vectors = TrialVectors(run.conditions, trials, 0)
    seen: dict[str, LoraFactors] = {}
    for trial in trials:
        seen[trial.task.name] = run.hypernetwork(torch.from_numpy(vectors.vector(trial, "own"))[None])

    class Adapters:
        def read_all(self, names: Any) -> LoraFactors:
            each = [seen[name] for name in names]
            a = {s.path: torch.cat([f.a[s.path] for f in each]) for s in run.base.slots}
            b = {s.path: torch.cat([f.b[s.path] for f in each]) for s in run.base.slots}
            return LoraFactors(run.base.slots, a, b, each[0].scale)

    text = PromptFormat(run.base.tokenizer, run.config.tasks, run.base.context_length)
    arms = make_arms(run, text, vectors, lora=plain, prompted=prompted, library=Adapters())
    assert list(arms) == list(ARMS)
    shared = plain.hypernetwork(torch.zeros(1, plain.conditions.size))
    for arm in ("lora", "prompted", "library"):
        answers = Answerer(text, 5).answers(arms[arm], trials)
        for trial, answer in list(zip(trials, answers, strict=True))[::5]:
            prompt = f"{trial.description}\n" * (arm == "prompted") + f"{trial.example.input} =>"
            factors = seen[trial.task.name] if arm == "library" else shared
            assert answer.loss == pytest.approx(slow_loss(run.base, prompt, trial.example.answer, factors), rel=1e-4)
    shots = run.base.tokenizer.decode(in_context(trials[0], text, 0))
    assert shots.count("\n") == 4 and all(f"{e.input} => {e.answer}" in shots for e in trials[0].task.train if
                                          f"{e.input} =>" in shots)  # fmt: skip


def test_wrong_answers_that_a_seen_task_would_give_are_counted_as_copied(tasks: TaskSet) -> None:
    trials = make_trials(tasks)
    known = steering_summaries.answers_by_input(tasks)
    own = []
    for trial in trials:
        name = {0: "first", 1: "copy", 2: "back", 3: "nothing"}[trial.number]
        output = OPERATIONS[name](trial.example.input) if name in OPERATIONS else "eeee"
        own.append(Answer(1.0, output == trial.example.answer, output))
    result = steering_summaries.copied_answers(trials, own, tasks, known)
    # back: one right, three wrong, of which two are those of first and copy; ace, deaf, fab, bead are no palindromes.
    assert (result["open"]["wrong"], result["open"]["copied"]) == (3, 2)
    (back,) = result["open"]["tasks"]
    assert {row["task"]: row["times"] for row in back["most_often"]} == {"first": 1, "copy": 1}
    assert result["choice"]["wrong"] == 4 and result["choice"]["copied"] == 2


def test_dependence_on_tasks_is_that_of_the_formed_updates() -> None:
    rng = np.random.default_rng(0)
    names = ["a", "a", "b", "b", "b", "c", "c"]
    updates = rng.normal(size=(7, 30)) + rng.normal(size=30)
    found = steering_summaries.dependence_on_tasks(updates @ updates.T, names)
    means = np.stack([updates[[i for i, n in enumerate(names) if n == name]].mean(0) for name in "abc"])
    centre = means.mean(0)
    variance = np.square(means - centre).sum(1).mean()
    assert found["relative_variance"] == pytest.approx(variance / np.square(centre).sum())
    shares = np.linalg.svd(means, compute_uv=False) ** 2
    shares /= shares.sum()
    assert found["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    distance = {
        same: np.mean(
            [
                np.square(updates[i] - updates[j]).sum()
                for i in range(7)
                for j in range(7)
                if i != j and (names[i] == names[j]) == same
            ]
        )
        for same in (True, False)
    }
    assert found["wordings_over_tasks"] == pytest.approx(distance[True] / distance[False])


def test_the_recovered_gain_is_that_of_the_own_adapter_over_that_of_the_tasks_lora(
    make_run: Callable[..., LoadedRun], tasks: TaskSet
) -> None:
    trials = [trial for trial in make_trials(tasks) if trial.group == TRAINED and trial.task.answers == "open"]
    base = [Answer(4.0, False, None) for _ in trials]
    library = [Answer(1.0, trial.number > 0, None) for trial in trials]  # 3 of 4 right, 3 nats better
    own = [Answer(2.5, trial.number == 1, None) for trial in trials]  # 1 of 4 right, 1.5 nats better
    answers = {"own": own, "base": base, "library": library}
    settings = make_run().config.evaluation
    recovered = steering_summaries.group_summaries(trials, answers, settings)[TRAINED]["open"]["recovered"]
    assert recovered["exact"]["value"] == pytest.approx(1 / 3)
    assert recovered["loss"] == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5, "resamples": 200})
    answers["library"] = base
    recovered = steering_summaries.group_summaries(trials, answers, settings)[TRAINED]["open"]["recovered"]
    assert recovered == {"exact": None, "loss": None}
