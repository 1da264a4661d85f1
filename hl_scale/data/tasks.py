"""Task sets: descriptions in plain words, and examples of input and answer, prepared once and read back verified.

The input of an example carries no instruction: what to do with it is told by the description alone. Tasks and
wordings that are set apart are never trained on.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from hl_scale.config import TaskDataConfig
from hl_scale.data.shards import (
    FORMAT_VERSION,
    CorpusError,
    ShardWriter,
    read_manifest,
    read_shards,
    replaced_directory,
    verify_shards,
    write_manifest,
)

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,119}")
_TEXTS = pa.list_(pa.string())
TASK_SCHEMA = pa.schema(
    {"name": pa.string(), "family": pa.string(), "answers": pa.string(), "descriptions": _TEXTS,
     "heldout_descriptions": _TEXTS, "seen": pa.bool_(), "checker": pa.string(), "variety": pa.string()}
)  # fmt: skip
EXAMPLE_SCHEMA = pa.schema(
    {"task": pa.int32(), "split": pa.string(), "input": pa.string(), "answer": pa.string(), "metadata": pa.string()}
)
# Settings of how tasks are put to the model; they decide nothing about what is prepared.
_NOT_IN_FINGERPRINT = {
    "directory", "maximum_tokens", "rows_per_shard", "examples_per_condition", "prompt", "description_in_prompt",
    "answer_prefix", "answer_end", "chat_template", "only_task",
}  # fmt: skip


class TaskError(ValueError):
    """Tasks that cannot be used; the message names each, and the fix."""


@dataclass(frozen=True)
class Example:
    """One input and its answer, a single line each way of reading it; `metadata` is JSON for checkers that need it."""

    input: str
    answer: str
    metadata: str = ""


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: unique; lower-case letters, digits, `_`, `.`, `-`.
        family: tasks over the same inputs share it.
        answers: `choice` if every answer is one of at most three labels, which a model may guess; else `open`.
        descriptions: wordings to train on.
        heldout_descriptions: other wordings, for evaluation only.
        train, test: examples; no input of `test` is one of `train`.
        seen: whether it is trained on.
        checker: what says whether an output is right, see `hl_scale.data.checkers`.
        variety: English variety of its answers, or "".
    """

    name: str
    family: str
    answers: Literal["open", "choice"]
    descriptions: tuple[str, ...]
    heldout_descriptions: tuple[str, ...]
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    seen: bool = True
    checker: str = "exact"
    variety: str = ""


@dataclass(frozen=True)
class TaskSet:
    """A verified task set on disk: its folder, manifest and tasks."""

    directory: Path
    manifest: dict[str, Any]
    tasks: tuple[Task, ...]

    @property
    def seen(self) -> tuple[Task, ...]:
        """Tasks to train on."""
        return tuple(task for task in self.tasks if task.seen)

    @property
    def heldout(self) -> tuple[Task, ...]:
        """Tasks that are never trained on."""
        return tuple(task for task in self.tasks if not task.seen)

    def task(self, name: str) -> Task:
        """By name; TaskError lists what there is."""
        for task in self.tasks:
            if task.name == name:
                return task
        names = [task.name for task in self.tasks]
        near = ", ".join(difflib.get_close_matches(name, names, n=8, cutoff=0.3) or names[:8])
        # Without the directory: a server's clients read this.
        raise TaskError(f"the task set has no task {name[:80]!r}\n  fix: use one of its {len(names)}, such as {near}")

    def only(self, name: str) -> TaskSet:
        """One task by itself, as a seen one. Its fingerprint is that of what is trained on, its training examples: it
        stays the same when other tasks of the set change.

        Raises:
            TaskError: there is no such task, or it has no training examples.
        """
        task = self.task(name)
        if not task.train:
            raise TaskError(f"task {name} of {self.directory} has no training examples\n  fix: choose another task")
        fingerprint = hashlib.sha256(repr((name, task.train)).encode()).hexdigest()
        return TaskSet(self.directory, {**self.manifest, "fingerprint": fingerprint}, (replace(task, seen=True),))


@dataclass(frozen=True)
class PreparedTasks:
    """What `prepare_tasks` made or found: the set, and whether an existing one was kept."""

    tasks: TaskSet
    reused: bool


def select_tasks(tasks: Iterable[Task], data: TaskDataConfig) -> list[Task]:
    """Tasks of `data.tasks` that are not in `data.excluded_tasks`; those of `data.heldout_tasks` marked as not seen.

    Raises:
        TaskError: a pattern matches no task.
    """
    found = list(tasks)
    apart = {task.name for task in named_tasks(found, data.heldout_tasks, "data.heldout_tasks")}
    excluded = {task.name for task in named_tasks(found, data.excluded_tasks, "data.excluded_tasks")}
    kept = named_tasks(found, data.tasks, "data.tasks") if data.tasks else found
    return [
        replace(task, seen=False) if task.name in apart else task for task in kept if task.name not in excluded
    ]  # fmt: skip


def named_tasks(tasks: Sequence[Task], patterns: Iterable[str], setting: str) -> list[Task]:
    """The tasks that a name or glob fits, in their order; `setting` is what errors call the patterns.

    Raises:
        TaskError: a pattern matches no task.
    """
    chosen = set()
    for pattern in patterns:
        names = fnmatch.filter((task.name for task in tasks), pattern)
        if not names:
            some = ", ".join(task.name for task in tasks[:6])
            raise TaskError(f"{setting} names {pattern!r}, which no task is called; there are {some} ...")
        chosen.update(names)
    return [task for task in tasks if task.name in chosen]


def check_tasks(tasks: Sequence[Task]) -> None:
    """Refuse what no training could use.

    Raises:
        TaskError: lists every problem: names, missing examples, descriptions or answers, test inputs that are trained
            on, wordings that are held out and trained on.
    """
    problems = []
    names: set[str] = set()
    for task in tasks:
        if not _NAME.fullmatch(task.name):
            problems.append(f"{task.name!r}: a name is lower-case letters, digits, '_', '.', '-'")
        if task.name in names:
            problems.append(f"{task.name}: there are two tasks of this name")
        names.add(task.name)
        problems += [f"{task.name}: {problem}" for problem in _problems(task)]
    if not any(task.seen for task in tasks):
        problems.append("no task is left to train on")
    if problems:
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise TaskError(
            "these tasks cannot be used:\n  "
            + "\n  ".join(problems[:8])
            + more
            + "\n  fix: mend the source, or leave such tasks out with data.tasks"
        )


def _problems(task: Task) -> list[str]:
    found = []
    if not task.test or (task.seen and not task.train):
        found.append(f"it has {len(task.train)} training and {len(task.test)} test examples; both are needed")
    if not task.descriptions:
        found.append("it has no description to train on")
    if any(not text.strip() for text in (*task.descriptions, *task.heldout_descriptions)):
        found.append("a description is empty")
    if set(task.descriptions) & set(task.heldout_descriptions):
        found.append("a held-out description is also trained on")
    if any(not example.answer.strip() for example in (*task.train, *task.test)):
        found.append("an answer is empty")
    if {example.input for example in task.train} & {example.input for example in task.test}:
        found.append("a test input is also trained on")
    return found


def prepare_tasks(data: TaskDataConfig, *, force: bool = False) -> PreparedTasks:
    """Collect the tasks of all sources, check them, and write them; an intact set of the same settings is kept.

    Raises:
        TaskError: see `check_tasks`, or a source that cannot be read.
        CorpusError: the folder holds something else.
    """
    from hl_scale.data.task_sources import read_sources

    directory = Path(data.directory)
    tasks = select_tasks(read_sources(data), data)
    check_tasks(tasks)
    content = hashlib.sha256(repr(tasks).encode()).hexdigest()
    settings = {"config": data.model_dump(mode="json", exclude=_NOT_IN_FINGERPRINT), "content": content}
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    if not force and directory.exists():
        try:
            existing = load_tasks(directory)
        except CorpusError:
            existing = None
        if existing is not None and existing.manifest["fingerprint"] == fingerprint:
            return PreparedTasks(existing, reused=True)
    with replaced_directory(directory) as fresh:
        writers = {
            "tasks": ShardWriter(fresh, "tasks", TASK_SCHEMA, data.rows_per_shard),
            "examples": ShardWriter(fresh, "examples", EXAMPLE_SCHEMA, data.rows_per_shard),
        }
        writers["tasks"].add(pa.Table.from_pylist([_row(task) for task in tasks], TASK_SCHEMA))
        for number, task in enumerate(tasks):
            writers["examples"].add(pa.Table.from_pylist(_example_rows(number, task), EXAMPLE_SCHEMA))
        shards = {name: writer.close() for name, writer in writers.items()}
        counts = {
            "tasks": len(tasks),
            "heldout_tasks": sum(not task.seen for task in tasks),
            "descriptions": sum(len(task.descriptions) + len(task.heldout_descriptions) for task in tasks),
            "examples": sum(len(task.train) + len(task.test) for task in tasks),
        }
        manifest = {
            "format_version": FORMAT_VERSION, "kind": "tasks", "fingerprint": fingerprint, **settings, "counts": counts,
            "shards": shards,
        }  # fmt: skip
        write_manifest(fresh, manifest)
    return PreparedTasks(load_tasks(directory), reused=False)


def open_tasks(data: TaskDataConfig) -> TaskSet:
    """The prepared task set of a configuration, or of it `data.only_task` alone; raises as `load_tasks`."""
    tasks = load_tasks(data.directory)
    return tasks if data.only_task is None else tasks.only(data.only_task)


def load_tasks(directory: str | Path) -> TaskSet:
    """Open a prepared task set.

    Raises:
        CorpusError: there is none, it is a corpus of another kind, or a file is missing or damaged.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if manifest.get("kind") != "tasks":
        raise CorpusError(
            f"{directory} holds parallel sentences, not tasks\n"
            "  fix: set data.directory to the folder of a task set, or to a new one and run hl-scale prepare CONFIG"
        )
    verify_shards(directory, manifest)
    examples: dict[tuple[int, str], list[Example]] = {}
    for row in read_shards(directory, manifest, "examples", EXAMPLE_SCHEMA).to_pylist():
        example = Example(row["input"], row["answer"], row["metadata"])
        examples.setdefault((row["task"], row["split"]), []).append(example)
    tasks = []
    for number, row in enumerate(read_shards(directory, manifest, "tasks", TASK_SCHEMA).to_pylist()):
        row |= {name: tuple(row[name]) for name in ("descriptions", "heldout_descriptions")}
        row |= {split: tuple(examples.get((number, split), ())) for split in ("train", "test")}
        tasks.append(Task(**row))
    return TaskSet(directory, manifest, tuple(tasks))


def _row(task: Task) -> dict[str, Any]:
    return {name: getattr(task, name) for name in TASK_SCHEMA.names}


def _example_rows(number: int, task: Task) -> list[dict[str, Any]]:
    return [
        {"task": number, "split": split, **vars(example)}
        for split, examples in (("train", task.train), ("test", task.test))
        for example in examples
    ]
