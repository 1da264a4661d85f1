"""The task evaluation: does a description bring out the answers of its task, and is it the description that does?

Every test example is answered greedily under several arms (`hl_scale.evaluation.arms`), seen tasks under wordings of
the training and under new ones, and tasks that were never trained on. Exact match says how often an answer is right;
the margin, loss under another adapter minus loss under the own one in nats per answer token, says how much of it
hangs on the description. Tasks with a few labels, which may be guessed, are kept apart from those with open answers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hl_scale.data.tasks import TaskSet, named_tasks
from hl_scale.engine.conditions import DescriptionConditions, OneHotConditions
from hl_scale.engine.run import LoadedRun, environment
from hl_scale.engine.supervised import PromptFormat
from hl_scale.evaluation import provenance
from hl_scale.evaluation import steering_summaries as summaries
from hl_scale.evaluation.answers import Answerer
from hl_scale.evaluation.arms import (
    ARMS,
    LORA,
    OTHER,
    OWN,
    RANDOM,
    AdapterLibrary,
    TrialVectors,
    chosen_arms,
    generated_factors,
    make_arms,
)
from hl_scale.evaluation.measurement import EvaluationError, delta_gram
from hl_scale.evaluation.trials import GROUPS, HELDOUT, Trial, make_trials
from hl_scale.progress import counting_bar

COLLAPSED = 1e-3
"""Variance of updates across tasks, relative to the squared norm of their mean, below which they are called equal."""
ROUNDING = 1e-4
"""Nats that losses may differ by because texts were padded to another length (in bfloat16 more)."""
WORDINGS = 4
"""Most wordings of a task whose updates are compared."""
TASKS = 64
"""Most tasks whose updates are compared, spread evenly over those that are asked."""
_PROMPT_SETTINGS = ("prompt", "answer_prefix", "answer_end", "chat_template")
_CAVEATS = (
    "Intervals are over tasks and their examples; they do not include the variance between training seeds, nor that "
    "tasks of one family share their inputs.",
    "An answer counts as right if its first line is the expected one (or passes the task's own checker), whatever else "
    "the model might say.",
)


def evaluate_tasks(
    run: LoadedRun,
    tasks: TaskSet,
    *,
    lora: LoadedRun | None = None,
    prompted: LoadedRun | None = None,
    library: AdapterLibrary | None = None,
    only: Sequence[str] | None = None,
    arms: Sequence[str] | None = None,
    examples: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate a run on the test examples of a task set.

    Args:
        run: the trained hypernetwork with its base.
        tasks: the prepared task set of that run.
        lora: a run of kind ``plain_lora`` on the same base and tasks.
        prompted: the same, trained with ``data.description_in_prompt``.
        library: LoRAs trained on each task alone.
        only: names or globs of the tasks that are asked; all unless given.
        arms: names of the arms to run; all that are possible unless given. `own` always runs.
        examples: the first so many test examples of each task; all unless given.
        progress: show a progress bar.

    Returns:
        A JSON-serialisable result: by group and kind of answers exact match, loss, differences and margins with
        intervals; one row per task and group; copied answers; how updates depend on tasks; warnings, caveats and
        provenance.

    Raises:
        EvaluationError: tasks without test examples, another task set, a control or arm that does not fit, a prompt
            that is longer than the context.
    """
    started = time.perf_counter()
    settings = run.config.evaluation
    _check_tasks(run, tasks)
    _check_control(run, lora, "--control", described=False)
    _check_control(run, prompted, "--prompted", described=True)
    conditions = run.conditions
    assert isinstance(conditions, DescriptionConditions | OneHotConditions)
    asked = tasks if only is None else replace(tasks, tasks=tuple(named_tasks(tasks.tasks, only, "--tasks")))
    trials = make_trials(asked, examples, one_hot=isinstance(conditions, OneHotConditions))
    text = PromptFormat(run.base.tokenizer, run.config.tasks, run.base.context_length)
    vectors = TrialVectors(conditions, trials, settings.seed)
    possible = make_arms(run, text, vectors, lora=lora, prompted=prompted, library=library)
    chosen = chosen_arms(possible, arms)
    answerer = Answerer(text, settings.batch_size)
    total = sum(answerer.passes(arm, trials) for arm in chosen.values())
    with counting_bar("evaluating", total, progress, unit="answers") as answerer.advance:
        answers = {name: answerer.answers(arm, trials, all_outputs=name == OWN) for name, arm in chosen.items()}
    known = summaries.answers_by_input(tasks)
    groups = summaries.group_summaries(trials, answers, settings)
    dependence = _dependence(run, vectors, trials)
    result: dict[str, Any] = {
        "evaluation": "tasks",
        "format": 1,
        "examples": {"used": len({(t.task.name, t.number) for t in trials}), "available": _available(tasks)},
        "reduced": _reductions(run, examples, tasks, asked, [name for name in possible if name not in chosen]),
        "warnings": _warnings(groups, dependence),
        "arms": {name: ARMS[name] for name in chosen},
        "group_meanings": {group: GROUPS[group] for group in groups},
        "groups": groups,
        "tasks": summaries.task_rows(trials, answers, known),
        "copied_answers": summaries.copied_answers(trials, answers[OWN], tasks, known),
        "updates": dependence,
        "caveats": [*_CAVEATS, *_control_caveats(run, lora, prompted, groups)],
        "provenance": _provenance(run, lora, prompted, tasks),
    }
    result["provenance"]["wall_seconds"] = round(time.perf_counter() - started, 1)
    return result


def _check_tasks(run: LoadedRun, tasks: TaskSet) -> None:
    """Refuse another task set: its test examples may have been trained on."""
    if run.config.data.kind != "tasks":
        raise EvaluationError(f"{run.directory} was not trained on tasks\n  fix: evaluate it without a task set")
    fingerprint = str(tasks.manifest.get("fingerprint"))
    if run.data_fingerprint is not None and run.data_fingerprint.split(":")[0] != fingerprint:
        raise EvaluationError(
            f"{run.directory} was trained on tasks {run.data_fingerprint[:12]}, but {tasks.directory} now holds "
            f"{fingerprint[:12]}: test examples there may have been trained on\n"
            "  fix: prepare the tasks with the run's own config.yaml, or train again"
        )


def _check_control(run: LoadedRun, control: LoadedRun | None, option: str, *, described: bool) -> None:
    if control is None:
        return
    where, config = f"{option} {control.directory}", control.config
    if config.data.kind != "tasks" or config.hypernetwork.kind != "plain_lora":
        raise EvaluationError(
            f"{where} has data.kind {config.data.kind!r} and hypernetwork.kind {config.hypernetwork.kind!r}, expected "
            "'tasks' and 'plain_lora'\n  fix: train one on the same tasks with hypernetwork.kind=plain_lora"
        )
    if config.data.description_in_prompt != described:
        raise EvaluationError(
            f"{where} has data.description_in_prompt = {str(not described).lower()}\n"
            f"  fix: train one with data.description_in_prompt={str(described).lower()}"
        )
    if control.base.fingerprint != run.base.fingerprint:
        raise EvaluationError(
            f"{where} was trained on another base ({control.base.fingerprint[:12]} instead of "
            f"{run.base.fingerprint[:12]})\n  fix: train the control with the same base section"
        )
    for name in _PROMPT_SETTINGS:
        own, theirs = getattr(run.config.data, name), getattr(config.data, name)
        if own != theirs:
            raise EvaluationError(
                f"{where} was trained with data.{name} = {theirs!r} instead of {own!r}\n"
                "  fix: train the control with the same data section"
            )
    ours, theirs = run.data_fingerprint, control.data_fingerprint
    if None not in (ours, theirs) and str(ours).split(":")[0] != str(theirs).split(":")[0]:
        raise EvaluationError(
            f"{where} was trained on other tasks ({str(theirs)[:12]} instead of {str(ours)[:12]})\n"
            "  fix: train the control with the same data section"
        )


def _available(tasks: TaskSet) -> int:
    return sum(len(task.test) for task in tasks.tasks)


def _dependence(run: LoadedRun, vectors: TrialVectors, trials: Sequence[Trial]) -> dict[str, Any]:
    """`steering_summaries.dependence_on_tasks` of the updates that `own` uses: some tasks, a few wordings of each."""
    by_task: dict[str, dict[str, Trial]] = {}
    for trial in sorted(trials, key=lambda t: t.wording):
        wordings = by_task.setdefault(trial.task.name, {})
        if len(wordings) < WORDINGS:
            wordings.setdefault(trial.description, trial)
    tasks = list(by_task.values())
    spread = np.linspace(0, len(tasks) - 1, min(TASKS, len(tasks))).round().astype(int)
    chosen = [trial for place in spread for trial in tasks[place].values()]
    factors = generated_factors(run, [vectors.vector(trial, OWN) for trial in chosen])
    gram = delta_gram(factors)
    if factors.conditions == 1:
        gram = np.broadcast_to(gram, (len(chosen), len(chosen)))
    return summaries.dependence_on_tasks(gram, [trial.task.name for trial in chosen])


def _warnings(groups: dict[str, Any], dependence: dict[str, Any]) -> list[str]:
    warnings = []
    variance = dependence["relative_variance"]
    if variance is None or variance < COLLAPSED:
        found = "delta W is 0 everywhere" if not dependence["norm"] else f"relative variance {variance or 0.0:.1e}"
        warnings.append(f"COLLAPSE: the generated updates hardly depend on the description ({found}).")
    for group, kinds in groups.items():
        for kind, summary in kinds.items():
            for arm in (OTHER, RANDOM):
                margin = summary["margin"].get(arm)
                if margin is not None and margin["low"] <= ROUNDING:
                    warnings.append(
                        f"{group}, {kind} answers: the margin over the {arm} adapter is not clear of 0 "
                        f"({margin['value']:.3f} [{margin['low']:.3f}, {margin['high']:.3f}])."
                    )
    return warnings


def _reductions(
    run: LoadedRun, examples: int | None, tasks: TaskSet, asked: TaskSet, left_out: Sequence[str]
) -> list[str]:
    """In what this evaluation is smaller than the run's own recipe; empty for a full one."""
    reductions = []
    if len(asked.tasks) < len(tasks.tasks):
        reductions.append(f"{len(asked.tasks)} of {len(tasks.tasks)} tasks")
    longest = max(len(task.test) for task in asked.tasks)
    if examples is not None and examples < longest:
        reductions.append(f"{examples} of {longest} test examples per task")
    if run.step < run.config.training.steps:
        reductions.append(f"checkpoint of step {run.step} of {run.config.training.steps}")
    if left_out:
        reductions.append(f"without the arms {', '.join(left_out)}")
    return reductions


def _control_caveats(
    run: LoadedRun, lora: LoadedRun | None, prompted: LoadedRun | None, groups: dict[str, Any]
) -> list[str]:
    caveats = []
    if lora is None:
        caveats.append("No plain LoRA to compare with: what one shared adapter gains is not told apart.")
    budget = run.step * run.config.training.global_batch_size
    for name, control in ((LORA, lora), ("prompted LoRA", prompted)):
        if control is None:
            continue
        theirs = control.step * control.config.training.global_batch_size
        if theirs != budget:
            caveats.append(f"Budgets differ: {budget} training examples for this run, {theirs} for the {name}.")
        if control.config.lora != run.config.lora:
            caveats.append(f"The {name} was trained with another lora section.")
    if HELDOUT not in groups:
        caveats.append("No task was held out: this says nothing about tasks that were never trained on.")
    return caveats


def _provenance(run: LoadedRun, lora: LoadedRun | None, prompted: LoadedRun | None, tasks: TaskSet) -> dict[str, Any]:
    return {
        "run": provenance.describe_run(run),
        "control": provenance.describe_run(lora) if lora else None,
        "prompted": provenance.describe_run(prompted) if prompted else None,
        "tasks": {
            "fingerprint": tasks.manifest.get("fingerprint"),
            "manifest_sha256": provenance.content_hash(tasks.manifest),
        },
        "conditions": run.config.conditions.model_dump(mode="json"),
        "evaluation": run.config.evaluation.model_dump(mode="json"),
        "objective": run.config.objective.model_dump(mode="json"),
        "device": str(next(run.base.model.parameters()).device),
        "environment": environment(),
    }
