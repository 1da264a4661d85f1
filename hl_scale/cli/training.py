"""Commands that train and measure what was trained."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hl_scale.cli.arguments import ConfigPath, Device, Overrides, RunPath, Step, open_run, require_choice
from hl_scale.config import Config, load_config


def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train in this process alone; for several use `deepspeed launch/train.py` or `launch/ray_train.py`."""
    from hl_scale.engine.loop import train as run_training

    result = run_training(load_config(config, overrides or ()))
    state = "interrupted" if result.interrupted else "done"
    print(f"{state}: step {result.step}, loss {result.loss:.4f}, {result.checkpoint}")
    if result.interrupted:
        raise typer.Exit(130)


def library(
    config: ConfigPath,
    out: Annotated[Path, typer.Option(help="directory of the library")],
    overrides: Overrides = None,
    tasks: Annotated[list[str] | None, typer.Option(help="name or glob; may be repeated; all unless given")] = None,
    keep_runs: Annotated[bool, typer.Option("--keep-runs", help="keep run directories, in OUT/.runs")] = False,
) -> None:
    """Train one LoRA for each task of a prepared set, side by side on Ray; status 1 if a task failed."""
    from hl_scale.cluster.library import train_library

    made = train_library(load_config(config, overrides or ()), out, tasks or (), keep_runs=keep_runs)
    for name, error in made.failed.items():
        print(f"failed: {name}: {error}", file=sys.stderr)
    print(f"library: {made.directory} ({len(made.trained)} trained, {len(made.kept)} kept, {len(made.failed)} failed)")
    if made.interrupted:
        print("interrupted: run the same command to go on")
        raise typer.Exit(130)
    if made.failed:
        raise typer.Exit(1)


def evaluate(
    run: Annotated[Path, typer.Argument(help="run directory of a training; with --suite the suite's recipe")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="--suite: section.key=value, read after the recipe")
    ] = None,
    suite: Annotated[str | None, typer.Option(help="dialect-tasks: labelled tasks, against baselines")] = None,
    experiment: Annotated[
        str | None, typer.Option(help="--suite: main, alignment, annotations, coverage, leave_one_out, ablations")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="--suite: folder of its cells and reports")] = None,
    control: Annotated[Path | None, typer.Option(help="run of kind plain_lora with the same budget")] = None,
    prompted: Annotated[
        Path | None, typer.Option(help="tasks: run of kind plain_lora with data.description_in_prompt")
    ] = None,
    library: Annotated[Path | None, typer.Option(help="tasks: folder with a PEFT LoRA for each task")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="tasks: names or globs, for example 'words.*,number.*'; 'seen' or 'held-out'")
    ] = None,
    arms: Annotated[str | None, typer.Option(help="tasks: which to run, for example own,other,base")] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="tasks: test examples per task; all unless given")] = None,
    sentences: Annotated[int | None, typer.Option(help="dialects: held-out sentences; all unless given")] = None,
    step: Step = None,
    device: Device = None,
) -> None:
    """Measure a run against its controls, with intervals; writes evaluation.json, evaluation.md and report.html.

    With --suite a whole suite: whatever is missing is trained, and what is there is read.
    """
    if suite is not None:
        others = (control, prompted, library, tasks, arms, examples, sentences, step)
        if any(option is not None for option in others):
            raise ValueError("with --suite only --experiment, --out and --device apply: the rest is in its recipe")
        _evaluate_suite(suite, run, overrides or (), out, experiment or "main", device)
        return
    if overrides or experiment or out:
        raise ValueError("section.key=value, --experiment and --out go with --suite")
    from hl_scale.evaluation import evaluate_run
    from hl_scale.evaluation.command import Request

    loaded = open_run(run, step, device)
    named, chosen = (None if text is None else text.replace(" ", "").split(",") for text in (tasks, arms))
    request = Request(control, prompted, library, named, chosen, examples, sentences)
    done = evaluate_run(loaded, request, lambda directory: open_run(directory, None, device, loaded.base))
    # A table is wider than a pipe's 80 columns.
    Console(width=None if sys.stdout.isatty() else 200).print(done.table)
    print(f"saved: {run / 'evaluation.json'}, {run / 'evaluation.md'}")
    print(f"report: {done.report}")


def report(run: RunPath) -> None:
    """Write report.html again from metrics.jsonl and evaluation.json."""
    from hl_scale.evaluation import write_report

    print(f"report: {write_report(run)}")


def schema() -> None:
    """Print the JSON schema of a configuration, with the help text of every key."""
    print(json.dumps(Config.model_json_schema(), indent=1))


def _evaluate_suite(
    suite: str, recipe: Path, overrides: Sequence[str], out: Path | None, experiment: str, device: str | None
) -> None:
    require_choice("--suite", suite, ("dialect-tasks",))
    if out is None:
        raise ValueError("--suite needs --out, the folder of its cells and reports")
    from hl_scale.config import load_suite
    from hl_scale.engine.zero3 import default_device
    from hl_scale.evaluation.dialect_tasks import run_suite
    from hl_scale.evaluation.dialect_tasks.tables import lines

    done = run_suite(load_suite(recipe, overrides), out, experiment, device or default_device())
    for line in lines(done.result):
        print(line)
    print(f"cells: {done.made} made, {done.read} read, in {out / 'cells'}")
    print(f"tables: {done.directory / 'tables.md'}, report: {done.report}")
