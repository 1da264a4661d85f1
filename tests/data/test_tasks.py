"""Task sets: what is prepared is read back, what cannot be used is refused whole, and samples come in fair turns."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hl_scale.config import TaskDataConfig
from hl_scale.data.sampling import TaskSampler, plan_batches
from hl_scale.data.shards import CorpusError
from hl_scale.data.task_sources import split_instruction
from hl_scale.data.tasks import TaskError, load_tasks, open_tasks, prepare_tasks


def line(name: str, count: int = 40, **changes: Any) -> dict[str, Any]:
    examples = [{"input": f"in {i}", "answer": f"{name} {i}"} for i in range(count)]
    return {
        "name": name,
        "descriptions": [f"{name} one", f"{name} two", f"{name} three"],
        "examples": examples,
    } | changes


@pytest.fixture
def prepare(tmp_path: Path) -> Any:
    def run(*lines: dict[str, Any] | str, **settings: Any) -> Any:
        file = tmp_path / "tasks.jsonl"
        file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in lines), encoding="utf-8")
        sources = [{"kind": "jsonl", "path": str(file)}]
        directory = str(tmp_path / "set")
        defaults = {"kind": "tasks", "directory": directory, "sources": sources, "test_examples": 8}
        return prepare_tasks(TaskDataConfig.model_validate(defaults | settings))

    return run


def test_what_was_prepared_is_read_back_equal(prepare: Any) -> None:
    made = prepare(line("upper", answers="open"), line("sign", seen=False, checker="exact", variety="Nigerian English"))
    again = load_tasks(made.tasks.directory)
    assert again == made.tasks
    upper, sign = again.tasks
    assert (upper.seen, sign.seen, sign.variety) == (True, False, "Nigerian English")
    assert len(upper.test) == 8 and len(upper.train) == 32
    assert upper.descriptions == ("upper one",) and upper.heldout_descriptions == ("upper two", "upper three")
    assert prepare(
        line("upper", answers="open"), line("sign", seen=False, checker="exact", variety="Nigerian English")
    ).reused


def test_no_test_input_is_trained_on_even_if_it_comes_twice(prepare: Any) -> None:
    twice = [{"input": f"in {i % 10}", "answer": str(i)} for i in range(40)]
    task = prepare(line("count", examples=twice)).tasks.tasks[0]
    assert not {example.input for example in task.train} & {example.input for example in task.test}


def test_tasks_are_held_out_kept_and_excluded_by_globs(prepare: Any) -> None:
    tasks = prepare(line("sort.up"), line("sort.down"), line("copy"), heldout_tasks=["sort.d*"]).tasks
    assert [task.name for task in tasks.heldout] == ["sort.down"]
    assert [task.name for task in prepare(line("a"), line("b"), tasks=["b"]).tasks.tasks] == ["b"]
    lines = line("b.one"), line("b.two"), line("c")
    assert [t.name for t in prepare(*lines, tasks=["b*"], excluded_tasks=["b.o*"]).tasks.tasks] == ["b.two"]
    with pytest.raises(TaskError, match="no task is called"):
        prepare(line("a"), heldout_tasks=["z*"])


def test_one_task_alone_is_trained_on_even_if_held_out_and_known_by_its_examples_whatever_the_others_are(
    prepare: Any,
) -> None:
    data = {"kind": "tasks", "directory": "", "sources": [{"kind": "builtin"}], "only_task": "b"}

    def alone(*lines: dict[str, Any]) -> Any:
        directory = str(prepare(*lines).tasks.directory)
        return open_tasks(TaskDataConfig.model_validate(data | {"directory": directory}))

    found = alone(line("a"), line("b", seen=False))
    assert [(task.name, task.seen) for task in found.seen] == [("b", True)] and not found.heldout
    fingerprint = found.manifest["fingerprint"]
    assert alone(line("b"), line("c")).manifest["fingerprint"] == fingerprint
    assert alone(line("b", count=41), line("c")).manifest["fingerprint"] != fingerprint
    with pytest.raises(TaskError, match="has no task 'b'"):
        alone(line("a"))
    with pytest.raises(TaskError, match=r"task b .* has no training examples"):
        alone(line("a"), line("b", examples=[], test=[{"input": "x", "answer": "y"}], seen=False))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (line("a", examples=[]), "0 training and 0 test examples"),
        (line("a", descriptions=["  ", "b"]), "a description is empty"),
        (line("a", descriptions=[]), "no description"),
        (line("a", heldout_descriptions=["a one"]), "a held-out description is also trained on"),
        (line("a", examples=[{"input": str(i), "answer": " "} for i in range(9)]), "an answer is empty"),
        (line("a", test=[{"input": "in 3", "answer": "x"}]), "a test input is also trained on"),
        (line("No spaces"), "a name is lower-case letters"),
        ({"name": "a", "descriptions": ["x"]}, "line 1 must be an object with name, descriptions and examples"),
        (line("a", exampels=[]), "line 1 must be an object"),
        (line("a", examples=[{"input": "x"}]), 'an example needs "input" and "answer"'),
        ("{broken", "line 1 is not JSON"),
    ],
)
def test_a_task_that_cannot_be_used_is_refused_and_nothing_is_written(
    prepare: Any, tmp_path: Path, row: Any, reason: str
) -> None:
    with pytest.raises(TaskError, match=reason):
        prepare(row)
    assert not (tmp_path / "set").exists()


def test_every_problem_of_every_task_is_listed_at_once(prepare: Any) -> None:
    with pytest.raises(TaskError, match=r"(?s)a: it has no description.*b: an answer is empty"):
        prepare(line("a", descriptions=[]), line("b", examples=[{"input": str(i), "answer": ""} for i in range(30)]))


def test_a_corpus_of_sentences_is_no_task_set(tiny_corpus: Path, prepare: Any) -> None:
    with pytest.raises(CorpusError, match="parallel sentences, not tasks"):
        load_tasks(tiny_corpus)


def test_a_damaged_task_set_is_refused(prepare: Any) -> None:
    directory = prepare(line("a")).tasks.directory
    shard = directory / "examples-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CorpusError, match="damaged"):
        load_tasks(directory)


def test_an_instruction_is_split_into_definition_and_bare_input() -> None:
    text = (
        "Definition: Say whether it is a fruit.\nAnswer yes or no.\n\n"
        "Positive Example 1 -\nInput: apple\nOutput: yes\n\n"
        "Now complete the following example -\nInput: a red\nbrick\nOutput: "
    )
    assert split_instruction(text) == ("Say whether it is a fruit.\nAnswer yes or no.", "a red\nbrick")
    assert split_instruction("plain text") == ("", "plain text")


def sampler(batch: int = 12, group: int = 2) -> TaskSampler:
    lengths = [np.arange(5, 5 + n) for n in (7, 20, 11, 3)]
    return TaskSampler(lengths, [3, 1, 4, 2], batch, group, seed=3)


def test_tasks_come_equally_often_and_their_examples_and_wordings_in_full_rounds() -> None:
    rows = np.concatenate([sampler().batch(step) for step in range(14)])
    assert Counter(rows[:, 0].tolist()) == {task: 42 for task in range(4)}
    seen = Counter((task, example) for task, _, example, _ in rows.tolist())
    assert {seen[0, e] for e in range(7)} == {6} and {seen[3, e] for e in range(3)} == {14}
    wordings = Counter((task, d) for task, d, _, _ in rows.tolist())
    assert max(wordings[0, d] for d in range(3)) - min(wordings[0, d] for d in range(3)) <= 2
    assert sorted(rows[:, 3].tolist()) == list(range(14 * 12)), "each draw has a number of its own"


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_any_number_of_ranks_sees_the_same_batch_and_groups_stay_together_where_they_can(world: int) -> None:
    plan = plan_batches(12, 4, world)
    shares = [sampler().micro_batches(2, rank, plan) for rank in range(world)]
    together = np.concatenate([rows for share in shares for rows in share])
    expected = sampler().batch(2)
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, expected.tolist()))
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    if world == 3:
        for share in shares:
            rows = np.concatenate(share)
            assert all(rows[i, 0] == rows[i + 1, 0] for i in range(0, len(rows), 2))


def test_a_batch_that_is_no_whole_number_of_groups_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no multiple of data\.examples_per_condition"):
        sampler(batch=9, group=2)
