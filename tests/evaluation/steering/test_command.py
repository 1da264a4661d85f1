"""The task evaluation as a command: what it refuses, chooses and writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hl_scale.data.tasks import TaskSet
from hl_scale.engine.run import LoadedRun
from hl_scale.evaluation import EvaluationError, evaluate_run, evaluate_tasks
from hl_scale.evaluation.command import Request
from hl_scale.evaluation.trials import NEW, TRAINED
from hl_scale.serving import generate_adapter

from .conftest import (
    task_set,
)


def test_what_cannot_be_evaluated_is_refused(make_run: Callable[..., LoadedRun], tasks: TaskSet) -> None:
    run = make_run()

    def refused(match: str, of: TaskSet = tasks, **given: Any) -> None:
        with pytest.raises(EvaluationError, match=match):
            evaluate_tasks(run, of, progress=False, **given)

    untested = replace(tasks.tasks[2], test=())
    refused("no test examples for copy", replace(tasks, tasks=(*tasks.tasks[:2], untested)))
    refused("one task alone", replace(tasks, tasks=tasks.tasks[:1]))
    refused("was trained on tasks", replace(tasks, manifest={"fingerprint": "e" * 64}))
    refused("expected 'tasks' and 'plain_lora'", lora=run)
    plain = make_run({"kind": "plain_lora"})
    refused("description_in_prompt = false", prompted=plain)
    refused("description_in_prompt = true", lora=make_run({"kind": "plain_lora"}, data={"description_in_prompt": True}))
    plain.base.fingerprint = "0" * 64
    refused("was trained on another base", lora=plain)
    refused("data.prompt", lora=make_run({"kind": "plain_lora"}, data={"prompt": "{input}?"}))
    refused("on other tasks", lora=replace(make_run({"kind": "plain_lora"}), data_fingerprint="e" * 64))
    refused("there is no arm 'lora': for which something is missing", arms=["own", "lora"])
    refused("there is no arm 'best'", arms=["best"])


def test_a_prompt_beyond_the_context_is_refused(make_run: Callable[..., LoadedRun], tasks: TaskSet) -> None:
    with pytest.raises(EvaluationError, match=r"arm base\+examples: a prompt with its answer has"):
        evaluate_tasks(make_run(context=34), tasks, progress=False)


def test_a_set_without_held_out_tasks_is_evaluated_and_says_so(
    make_run: Callable[..., LoadedRun], tasks: TaskSet
) -> None:
    result = evaluate_tasks(make_run(), replace(tasks, tasks=tasks.seen), arms=["base"], progress=False)
    assert list(result["groups"]) == [TRAINED, NEW]
    assert any("No task was held out" in caveat for caveat in result["caveats"])


def test_the_command_writes_the_result_the_tables_and_a_page_with_charts(on_disk: LoadedRun) -> None:
    done = evaluate_run(on_disk, Request(arms=["own", "other", "base"], examples=2), lambda path: on_disk)
    assert json.loads((on_disk.directory / "evaluation.json").read_text()) == done.result
    page, text = done.report.read_text(), (on_disk.directory / "evaluation.md").read_text()
    assert page.count('src="data:image/svg+xml') == 3 and page.count("<table>") == 7
    for words in ("2 of 4 test examples per task", "held out, choice", "base"):
        assert words in page and words in text
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1


def test_seen_and_held_out_tasks_can_be_asked_for_as_such(on_disk: LoadedRun) -> None:
    found = {}
    for word in ("seen", "held-out"):
        request = Request(tasks=[word], arms=["own"], examples=1)
        done = evaluate_run(on_disk, request, lambda path: on_disk)
        found[word] = {row["task"] for row in done.result["tasks"]}
    assert found == {"seen": {"first", "last", "copy", "has_a"}, "held-out": {"back", "lacks_a"}}


@pytest.mark.parametrize("option", ["sentences"])
def test_an_option_of_another_kind_of_data_is_refused(on_disk: LoadedRun, option: str) -> None:
    with pytest.raises(EvaluationError, match=f"--{option} does not apply to a run on tasks"):
        evaluate_run(on_disk, Request(**{option: 3}), lambda path: on_disk)


def test_tasks_of_a_library_are_evaluated_alone_when_named(on_disk: LoadedRun, tmp_path: Path) -> None:
    description = task_set(tmp_path).task("first").descriptions[0]
    for name in ("first", "copy"):
        generate_adapter(on_disk, f"description:{description}", tmp_path / "library" / name)
    request = Request(library=tmp_path / "library", arms=["own", "base", "library"])
    with pytest.raises(EvaluationError, match="has no adapter for last, has_a, back"):
        evaluate_run(on_disk, request, lambda path: on_disk)
    done = evaluate_run(on_disk, replace(request, tasks=["fir*", "copy"]), lambda path: on_disk)
    assert {row["task"] for row in done.result["tasks"]} == {"first", "copy"}
    assert "2 of 6 tasks" in done.result["reduced"]
    assert "that the generated adapter recovers" in (on_disk.directory / "evaluation.md").read_text()
