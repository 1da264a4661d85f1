"""What the answers of a task evaluation come to: groups, tasks, copied answers, dependence of updates on tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from hl_scale.config import EvaluationConfig
from hl_scale.data.checkers import check
from hl_scale.data.tasks import TaskSet
from hl_scale.evaluation.answers import Answer
from hl_scale.evaluation.arms import BASE, LIBRARY, OTHER, OWN
from hl_scale.evaluation.statistics import TaskBootstrap
from hl_scale.evaluation.trials import GROUPS, HELDOUT, Trial

Array = npt.NDArray[np.float64]
Answers = Mapping[str, Sequence[Answer]]
"""Arm -> answers in the order of trials."""
SAMPLES = 3
"""Outputs kept for each task."""


def group_summaries(trials: Sequence[Trial], answers: Answers, settings: EvaluationConfig) -> dict[str, Any]:
    """Group -> "open" and "choice" -> exact match, loss and their differences, each arm with an interval."""
    summaries: dict[str, Any] = {}
    for group in GROUPS:
        for kind in ("open", "choice"):
            rows = [i for i, t in enumerate(trials) if t.group == group and t.task.answers == kind]
            if rows:
                summaries.setdefault(group, {})[kind] = _summary(trials, answers, rows, settings)
    return summaries


def _summary(
    trials: Sequence[Trial], answers: Answers, rows: Sequence[int], settings: EvaluationConfig
) -> dict[str, Any]:
    parts = [list(part) for _, part in groupby(rows, lambda row: trials[row].task.name)]
    bootstrap = TaskBootstrap([len(part) for part in parts], samples=settings.bootstrap_samples, seed=settings.seed)

    def estimate(values: Array) -> dict[str, Any]:
        return bootstrap.mean([values[part] for part in parts]).to_dict()

    right = {arm: np.array([answer.right for answer in found], np.float64) for arm, found in answers.items()}
    loss = {arm: np.array([answer.loss for answer in found]) for arm, found in answers.items()}
    guessed = np.array([_guess_is_right(trial) for trial in trials], np.float64)
    summary = {
        "tasks": len(parts),
        "examples": len(rows),
        "exact": {arm: estimate(values) for arm, values in right.items()},
        "difference": {arm: estimate(right[OWN] - values) for arm, values in right.items() if arm != OWN},
        "loss": {arm: estimate(values) for arm, values in loss.items()},
        "margin": {arm: estimate(values - loss[OWN]) for arm, values in loss.items() if arm != OWN},
        "most_frequent_answer": estimate(guessed),
    }
    if BASE in answers and LIBRARY in answers:
        gains = {"exact": right, "loss": {arm: -values for arm, values in loss.items()}}
        summary["recovered"] = {name: _recovered(values, parts, bootstrap) for name, values in gains.items()}
    return summary


def _recovered(
    values: Mapping[str, Array], parts: Sequence[Sequence[int]], bootstrap: TaskBootstrap
) -> dict[str, Any] | None:
    """Of what a task's own LoRA gains over the base, the share that the generated adapter gains; means over tasks."""
    gained, possible = values[OWN] - values[BASE], values[LIBRARY] - values[BASE]
    share = bootstrap.ratio([gained[part] for part in parts], [possible[part] for part in parts])
    return None if share is None else share.to_dict()


def _guess_is_right(trial: Trial) -> bool:
    """Whether the most frequent training answer of the task is right."""
    counts = Counter(example.answer for example in trial.task.train)
    return bool(counts) and check(trial.task, trial.example, counts.most_common(1)[0][0])


def task_rows(
    trials: Sequence[Trial], answers: Answers, known: Mapping[Any, Mapping[str, str]]
) -> list[dict[str, Any]]:
    """One row per task and group: means of each arm, the tasks it was confused with, and a few outputs."""
    found = []
    by_task = groupby(range(len(trials)), lambda row: (trials[row].task.name, trials[row].group))
    for (name, group), part in by_task:
        rows = list(part)
        task = trials[rows[0]].task
        exact = {arm: float(np.mean([each[row].right for row in rows])) for arm, each in answers.items()}
        loss = {arm: float(np.mean([each[row].loss for row in rows])) for arm, each in answers.items()}
        agree = [
            known[task.family, trials[row].example.input].get(trials[row].other.name) == trials[row].example.answer
            for row in rows
        ]
        found.append(
            {
                "task": name, "family": task.family, "group": group, "answers": task.answers, "seen": task.seen,
                "examples": len(rows), "wordings": len({trials[row].wording for row in rows}), "exact": exact,
                "loss": loss, "margin": {arm: value - loss[OWN] for arm, value in loss.items() if arm != OWN},
                OTHER: sorted({trials[row].other.name for row in rows}),
                "share_where_other_agrees": float(np.mean(agree)),
                "outputs": [
                    {
                        "input": trials[row].example.input, "answer": trials[row].example.answer,
                        "own": answers[OWN][row].output,
                    }
                    for row in rows[:SAMPLES]
                ],
            }
        )  # fmt: skip
    return found


def answers_by_input(tasks: TaskSet) -> dict[tuple[str, str], dict[str, str]]:
    """Family and input -> the answer of each task that the data have for it."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for task in tasks.tasks:
        for example in (*task.train, *task.test):
            found.setdefault((task.family, example.input), {})[task.name] = example.answer
    return found


def copied_answers(
    trials: Sequence[Trial], own: Sequence[Answer], tasks: TaskSet, known: Mapping[Any, Mapping[str, str]]
) -> dict[str, Any]:
    """Wrong outputs on held-out tasks that are what a seen task over the same inputs would have answered.

    Answers to one input may coincide, so an output can be that of several tasks; `most_often` counts it for each.
    """
    seen = {task.name for task in tasks.seen}
    result: dict[str, Any] = {}
    for kind in ("open", "choice"):
        rows = [i for i, t in enumerate(trials) if t.group == HELDOUT and t.task.answers == kind and not own[i].right]
        counts: dict[str, Counter[str]] = {}
        copied: Counter[str] = Counter()
        wrong = Counter(trials[row].task.name for row in rows)
        for row in rows:
            task = trials[row].task
            answers = known[task.family, trials[row].example.input]
            matching = [name for name, answer in answers.items() if name in seen and answer.strip() == own[row].output]
            counts.setdefault(task.name, Counter()).update(matching)
            copied[task.name] += bool(matching)
        result[kind] = {
            "wrong": len(rows),
            "copied": copied.total(),
            "share": copied.total() / len(rows) if rows else None,
            "tasks": [
                {
                    "task": name, "wrong": wrong[name], "copied": copied[name],
                    "most_often": [{"task": other, "times": n} for other, n in counts[name].most_common(3)],
                }
                for name in wrong
            ],
        }  # fmt: skip
    return result


def dependence_on_tasks(gram: Array, tasks: Sequence[str]) -> dict[str, Any]:
    """How generated updates differ between tasks and between wordings of one task.

    Args:
        gram: (n, n) inner products of delta W of n conditions.
        tasks: (n,) name of the task of each condition.

    Returns:
        `relative_variance`: mean squared distance of the tasks' updates (means over wordings) to their mean, over the
        squared norm of that mean. `effective_rank`: exp of the entropy of the eigenvalues of the tasks' Gram matrix,
        and `effective_rank_centred` with the mean taken out. `wordings_over_tasks`: mean squared distance between
        wordings of one task over that between wordings of different tasks. None where the denominator is 0.
    """
    names = list(dict.fromkeys(tasks))
    member = np.array([[float(task == name) for task in tasks] for name in names])
    averaging = member / member.sum(1, keepdims=True)
    of_tasks = averaging @ gram @ averaging.T
    mean = float(of_tasks.mean())
    scale = float(np.diag(of_tasks).mean())
    variance = max(scale - mean, 0.0)
    centring = np.eye(len(names)) - 1.0 / len(names)
    distance = np.diag(gram)[:, None] + np.diag(gram)[None] - 2 * gram
    same = (member.T @ member).astype(bool)
    within, between = distance[same & ~np.eye(len(tasks), dtype=bool)], distance[~same]
    # Differences of inner products are exact to about this much.
    rounding = 1e-12 * scale
    differs = between.size > 0 and float(between.mean()) > rounding
    return {
        "tasks": len(names),
        "conditions": len(tasks),
        "norm": float(np.sqrt(max(scale, 0.0))),
        "relative_variance": (variance if variance > rounding else 0.0) / mean if mean > 0 else None,
        "effective_rank": _effective_rank(of_tasks),
        "effective_rank_centred": _effective_rank(centring @ of_tasks @ centring) if differs else 0.0,
        "wordings_over_tasks": float(within.mean() / between.mean()) if within.size and differs else None,
    }


def _effective_rank(gram: Array) -> float:
    values = np.linalg.eigvalsh(gram).clip(min=0)
    if values.sum() <= 0:
        return 0.0
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))
