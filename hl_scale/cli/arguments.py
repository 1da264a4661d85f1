"""Arguments that commands share, and what they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hl_scale.base import AdaptedModel, TaskAdapter
    from hl_scale.engine.run import LoadedRun

ConfigPath = Annotated[Path, typer.Argument(help="YAML configuration, for example one of configs/")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, read after the file")]
RunPath = Annotated[Path, typer.Argument(help="run directory of a training")]
CONDITION_HELP = (
    '"dialect:NAME", "standard" or "features:FILE.json" ({feature: 0..1}); "task:NAME" or "description:WORDS"'
)
Condition = Annotated[str, typer.Option("--condition", help=CONDITION_HELP)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; a GPU unless there is none")]
WithAdapter = Annotated[Path | None, typer.Option(help="PEFT directory of a trained LoRA on the same base, to add")]
Step = Annotated[int | None, typer.Option(help="checkpoint step; the newest unless given")]


def require_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless the value of an option is one of the choices."""
    if value not in choices:
        raise ValueError(f"{option} {value} is not one of {', '.join(choices)}")


def open_run(directory: Path, step: int | None, device: str | None, base: AdaptedModel | None = None) -> LoadedRun:
    """The run of a `RunPath`, at a `Step`, on a `Device`."""
    from hl_scale.engine.run import load_run
    from hl_scale.engine.zero3 import default_device

    return load_run(directory, step, base, device or default_device())


def read_added(run: LoadedRun, directory: Path | None) -> TaskAdapter | None:
    """The adapter of a `WithAdapter`, for a run's base."""
    from hl_scale.base import read_task_adapter

    return None if directory is None else read_task_adapter(directory, run.base, run.config.base)
