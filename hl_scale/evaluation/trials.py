"""What a task evaluation asks: every test example once in each group, under the wordings of its task in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hl_scale.data.tasks import Example, Task, TaskSet
from hl_scale.evaluation.measurement import EvaluationError

TRAINED, NEW, HELDOUT = "seen, trained wording", "seen, new wording", "held out"
GROUPS = {
    TRAINED: "tasks of the training, under descriptions of the training",
    NEW: "tasks of the training, under descriptions that were never trained on",
    HELDOUT: "tasks that were never trained on, under all their descriptions",
}


@dataclass(frozen=True)
class Trial:
    """A test example under one description of its task, and under one of another task.

    Attributes:
        task: whose example it is.
        number: of the example among the task's test examples.
        group: one of `GROUPS`.
        wording: number of the description among those of its group.
        description: in words.
        other: another task.
        other_description: a description of that task.
    """

    task: Task
    number: int
    group: str
    wording: int
    description: str
    other: Task
    other_description: str

    @property
    def example(self) -> Example:
        return self.task.test[self.number]


def make_trials(tasks: TaskSet, examples: int | None = None, *, one_hot: bool = False) -> list[Trial]:
    """Trials of all tasks, those of one task and group next to each other.

    Args:
        tasks: the set.
        examples: the first so many test examples of each task; all of them unless given.
        one_hot: conditions know no wordings and no tasks but the seen ones.

    Raises:
        EvaluationError: a task has no test examples, or there is one task alone.
    """
    empty = [task.name for task in tasks.tasks if not task.test]
    if empty:
        raise EvaluationError(
            f"{tasks.directory} has no test examples for {', '.join(empty[:5])}\n"
            "  fix: give these tasks examples, or leave them out with data.tasks, and prepare again"
        )
    if len(tasks.seen if one_hot else tasks.tasks) < 2:
        raise EvaluationError(
            f"{tasks.directory} has one task alone, so no adapter of another task to compare with\n"
            "  fix: add tasks to data.sources and prepare again"
        )
    found: list[Trial] = []
    for task in tasks.seen:
        found += _trials(task, TRAINED, task.descriptions[:1] if one_hot else task.descriptions, tasks, examples)
        if not one_hot:
            found += _trials(task, NEW, task.heldout_descriptions, tasks, examples)
    for task in () if one_hot else tasks.heldout:
        found += _trials(task, HELDOUT, (*task.descriptions, *task.heldout_descriptions), tasks, examples)
    return found


def _trials(task: Task, group: str, wordings: Sequence[str], tasks: TaskSet, examples: int | None) -> list[Trial]:
    others = _others(task, tasks)
    found = []
    for number in range(len(task.test[:examples]) if wordings else 0):
        wording = number % len(wordings)
        other = others[wording % len(others)]
        texts = other.heldout_descriptions if group == NEW and other.heldout_descriptions else other.descriptions
        found.append(
            Trial(task, number, group, wording, wordings[wording], other, texts[wording % len(texts)])
        )  # fmt: skip
    return found


def _others(task: Task, tasks: TaskSet) -> list[Task]:
    """Tasks to confuse a task with, in turn: seen ones over the same inputs, else other seen ones, else any."""
    position = tasks.tasks.index(task)
    after = [*tasks.tasks[position + 1 :], *tasks.tasks[:position]]
    seen = [other for other in after if other.seen]
    return [other for other in seen if other.family == task.family] or seen or after
