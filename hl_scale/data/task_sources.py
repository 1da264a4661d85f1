"""Where tasks come from: the built-in set, the procedural grid, JSONL files, instruction data sets of the hub.

A JSONL line is a task: ``{"name", "descriptions": [...], "examples": [{"input", "answer"}, ...]}``, and if wanted
``"family"``, ``"answers"`` (open or choice), ``"heldout_descriptions"``, ``"test"`` (examples), ``"seen"``,
``"checker"``, ``"variety"``.
"""

from __future__ import annotations

import glob
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hl_scale.config import TaskDataConfig, TaskSource
from hl_scale.data.tasks import Example, Task, TaskError

_KEYS = {
    "name", "descriptions", "examples", "family", "answers", "heldout_descriptions", "test", "seen", "checker",
    "variety",
}  # fmt: skip
# Super-NaturalInstructions puts the definition and worked examples before each input.
_DEFINITION = re.compile(r"Definition:\s*(?P<definition>.+?)\s*\n\n", re.DOTALL)
_LAST_INPUT = re.compile(r"(?:^|\n)Input:\s*(?P<input>(?:(?!\nInput:).)+?)\s*\n\s*Output:\s*$", re.DOTALL)
_CHOICES = 3


def read_sources(data: TaskDataConfig) -> Iterator[Task]:
    """Tasks of all sources, in their order."""
    for position, source in enumerate(data.sources):
        tasks = list(_read(source, data))
        if source.limit is not None and source.limit < len(tasks):
            chosen = random.Random(f"{data.seed}/{position}").sample(range(len(tasks)), source.limit)
            tasks = [tasks[number] for number in sorted(chosen)]
        yield from tasks


def _read(source: TaskSource, data: TaskDataConfig) -> Iterator[Task]:
    if source.kind == "builtin":
        from hl_scale.data.builtin import builtin_tasks

        yield from builtin_tasks(data.seed, data.training_examples, data.test_examples)
    elif source.kind == "grid":
        from hl_scale.data.grid import grid_tasks

        yield from grid_tasks(data.seed, data.training_examples, data.test_examples)
    elif source.kind == "jsonl":
        yield from _jsonl_tasks(str(source.path), data)
    else:
        for identifier in str(source.path).split():
            yield _hub_task(identifier, source, data)


def _jsonl_tasks(pattern: str, data: TaskDataConfig) -> Iterator[Task]:
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise TaskError(f"no file matches {pattern}\n  fix: correct data.sources path")
    for path in paths:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise TaskError(f"{where} is not JSON: {error}\n  fix: one task per line") from None
            yield _task_of(row, where, data)


def _task_of(row: Any, where: str, data: TaskDataConfig) -> Task:
    if not isinstance(row, dict) or not {"name", "descriptions", "examples"} <= set(row) or set(row) - _KEYS:
        raise TaskError(
            f"{where} must be an object with name, descriptions and examples; it may have "
            f"{', '.join(sorted(_KEYS))}\n  fix: correct this line"
        )
    try:
        examples = [_example(value) for value in row["examples"]]
        test = [_example(value) for value in row.get("test", ())]
        texts = [[str(text) for text in row.get(key, ())] for key in ("descriptions", "heldout_descriptions")]
    except (TypeError, KeyError) as error:
        raise TaskError(f'{where}: an example needs "input" and "answer": {error}') from None
    answers = row.get("answers")
    if answers not in (None, "open", "choice"):
        raise TaskError(f'{where}: "answers" is {answers!r}, which is neither open nor choice')
    return make_task(
        str(row["name"]),
        texts[0],
        texts[1],
        examples,
        test,
        data,
        answers=answers,
        **{key: row[key] for key in ("family", "seen", "checker", "variety") if key in row},
    )


def make_task(
    name: str,
    descriptions: Sequence[str],
    heldout_descriptions: Sequence[str],
    examples: Sequence[Example],
    test: Sequence[Example],
    data: TaskDataConfig,
    **settings: Any,
) -> Task:
    """A task from whatever a source gives: sets test examples and wordings apart where the source does not.

    Test examples are drawn by input, so that an input that comes twice stays on one side.
    """
    draw = random.Random(f"{data.seed}/{name}")
    if not test:
        inputs = sorted({example.input for example in examples})
        draw.shuffle(inputs)
        apart = set(inputs[: min(data.test_examples, len(inputs) // 2)])
        test = [example for example in examples if example.input in apart]
        examples = [example for example in examples if example.input not in apart]
    if not heldout_descriptions and len(descriptions) > data.heldout_descriptions:
        cut = len(descriptions) - data.heldout_descriptions
        descriptions, heldout_descriptions = descriptions[:cut], descriptions[cut:]
    kept = [_some(part, count, draw) for part, count in
            ((examples, data.training_examples), (test, data.test_examples))]  # fmt: skip
    if settings.get("answers") is None:
        labels = {example.answer for part in kept for example in part}
        settings["answers"] = "choice" if len(labels) <= _CHOICES else "open"
    settings.setdefault("family", name)
    return Task(
        name=name, descriptions=tuple(descriptions), heldout_descriptions=tuple(heldout_descriptions), train=kept[0],
        test=kept[1], **settings,
    )  # fmt: skip


def _some(examples: Sequence[Example], count: int, draw: random.Random) -> tuple[Example, ...]:
    if len(examples) <= count:
        return tuple(examples)
    return tuple(examples[number] for number in sorted(draw.sample(range(len(examples)), count)))


def _example(value: Mapping[str, Any]) -> Example:
    return Example(str(value["input"]), str(value["answer"]), str(value.get("metadata", "")))


def _hub_task(identifier: str, source: TaskSource, data: TaskDataConfig) -> Task:
    from datasets import load_dataset

    try:
        rows = load_dataset(identifier, split=source.split, revision=source.revision)
        missing = {"input", "output"} - set(rows.column_names)
    except Exception as error:  # what the hub client raises differs by cause and version
        raise TaskError(
            f"{identifier} cannot be loaded: {str(error)[:200]}\n  fix: check the id and the connection"
        ) from error
    if missing:
        raise TaskError(
            f"{identifier} has no column {' or '.join(sorted(missing))}: it has {', '.join(rows.column_names)}\n"
            "  fix: name data sets of instruction tasks, or write a JSONL file"
        )
    examples, definitions = [], dict[str, None]()
    for row in rows:
        definition, text = split_instruction(str(row["input"]))
        definitions.setdefault(definition)
        answer = row["output"][0] if isinstance(row["output"], list) else row["output"]
        examples.append(Example(text, " ".join(str(answer).split())))
    name = re.sub(r"[^a-z0-9_.-]+", "_", identifier.rsplit("/", 1)[-1].lower())
    return make_task(name, [text for text in definitions if text], [], examples, [], data)


def split_instruction(text: str) -> tuple[str, str]:
    """Definition and bare input of a Super-NaturalInstructions prompt; ("", text) for any other."""
    definition, last = _DEFINITION.match(text), _LAST_INPUT.search(text)
    return (definition["definition"], last["input"]) if definition and last else ("", text)
