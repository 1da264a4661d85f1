"""What `hl-scale evaluate` does for each kind of data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Group

from hl_scale.config import parse_config
from hl_scale.data.corpus import load_corpus
from hl_scale.data.durable import write_text
from hl_scale.data.library import Library
from hl_scale.data.tasks import TaskSet, named_tasks, open_tasks
from hl_scale.engine.run import LoadedRun
from hl_scale.evaluation import steering_tables, tables
from hl_scale.evaluation.dialects import evaluate_dialects, save
from hl_scale.evaluation.measurement import EvaluationError
from hl_scale.evaluation.report import write_report
from hl_scale.evaluation.steering import evaluate_tasks


@dataclass(frozen=True)
class Request:
    """What beside the run was asked for; None where nothing was said."""

    control: Path | None = None
    prompted: Path | None = None
    library: Path | None = None
    tasks: Sequence[str] | None = None
    arms: Sequence[str] | None = None
    examples: int | None = None
    sentences: int | None = None


@dataclass(frozen=True)
class Evaluated:
    """The result, a table of it, and the files that were written."""

    result: dict[str, Any]
    table: Group
    report: Path


SEEN, HELD_OUT = "seen", "held-out"
_FOR_TASKS = ("prompted", "library", "tasks", "arms", "examples")


def evaluate_run(run: LoadedRun, request: Request, load: Callable[[Path], LoadedRun]) -> Evaluated:
    """Evaluate, and write evaluation.json, evaluation.md and report.html into the run.

    Args:
        run: what is evaluated.
        request: controls and sizes.
        load: opens another run on the same base.

    Raises:
        EvaluationError: an option that does not belong to the run's kind of data, and see the evaluations.
    """
    kind = run.config.data.kind
    for name in ("sentences",) if kind == "tasks" else _FOR_TASKS:
        if getattr(request, name) is not None:
            raise EvaluationError(f"--{name} does not apply to a run on {kind}\n  fix: leave it out")
    control = None if request.control is None else load(request.control)
    if kind == "tasks":
        result = _tasks(run, request, control, load)
        shown, text = steering_tables.render_table(result), steering_tables.markdown_table(result)
    else:
        result = _dialects(run, request, control)
        shown, text = tables.render_table(result), tables.markdown_table(result)
    save(result, run.directory)
    write_text(run.directory / "evaluation.md", text)
    return Evaluated(result, shown, write_report(run.directory))


def _dialects(run: LoadedRun, request: Request, control: LoadedRun | None) -> dict[str, Any]:
    if request.sentences is not None:
        tree = run.config.model_dump()
        tree["evaluation"]["sentences"] = request.sentences
        run = replace(run, config=parse_config(tree, "--sentences"))
    return evaluate_dialects(run, load_corpus(run.config.data.directory), control=control)


def _tasks(
    run: LoadedRun, request: Request, control: LoadedRun | None, load: Callable[[Path], LoadedRun]
) -> dict[str, Any]:
    tasks = open_tasks(run.config.tasks)
    only = None if request.tasks is None else _written_out(request.tasks, tasks)
    library = None if request.library is None else _library(run, request.library)
    if library is not None and run.config.objective.kind == "reconstruction" and only is None:
        only = [task.name for task in tasks.tasks if task.name in library.names]
    asked = tasks.tasks if only is None else named_tasks(tasks.tasks, only, "--tasks")
    missing = [task.name for task in asked if library is not None and task.name not in library.names]
    if missing:
        raise EvaluationError(
            f"{request.library} has no adapter for {', '.join(missing[:6])}{' ...' if len(missing) > 6 else ''}\n"
            "  fix: train them (`hl-scale library`), or name with --tasks the tasks that it has adapters for"
        )
    return evaluate_tasks(
        run,
        tasks,
        lora=control,
        prompted=None if request.prompted is None else load(request.prompted),
        library=library,
        only=only,
        arms=request.arms,
        examples=request.examples,
    )


def _written_out(patterns: Sequence[str], tasks: TaskSet) -> list[str]:
    """`seen` and `held-out` become the names of all these tasks."""
    groups = {SEEN: [task.name for task in tasks.seen], HELD_OUT: [task.name for task in tasks.tasks if not task.seen]}
    return [name for pattern in patterns for name in groups.get(pattern, [pattern])]


def _library(run: LoadedRun, directory: Path) -> Library:
    library = Library(directory, run.base.slots)
    if library.base_fingerprint not in (None, run.base.fingerprint):
        raise EvaluationError(
            f"the adapters of {directory} were trained on base {str(library.base_fingerprint)[:12]} instead of "
            f"{run.base.fingerprint[:12]}\n  fix: train the library with the same base section"
        )
    return library
