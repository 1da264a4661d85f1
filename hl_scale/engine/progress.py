"""What a run says while it works: metrics.jsonl, a progress bar, and optional TensorBoard, W&B or MLflow."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hl_scale.config import ConfigError


class Sink(Protocol):
    def log(self, step: int, metrics: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class MetricsFile:
    """metrics.jsonl: one JSON object per logged step. Lines after the step a run resumes from are dropped first."""

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file; a last line cut short by a crash is left out."""
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                break
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                break
            lines.append(line)
    return lines


class _TensorBoard:
    def __init__(self, directory: Path, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, directory: Path, config: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project="hl_scale", name=directory.name, dir=str(directory), config=config, resume="allow"
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, directory: Path, config: dict[str, Any]) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.start_run(run_name=directory.name)
        mlflow.log_params({f"{section}.{key}": value for section in config for key, value in config[section].items()})

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._mlflow.log_metrics(metrics, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


_SINKS: dict[str, Any] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _MLflow}


def check_loggers(names: Sequence[str]) -> None:
    """Raise `ConfigError` for a logger whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"training.loggers names {name!r}, which is not installed\n  fix: pip install {name}")


class Reporter:
    """Progress of one run on the main rank: bar on a terminal, a line every few seconds elsewhere, and all sinks."""

    def __init__(
        self, directory: Path, total: int, resume_step: int, loggers: Sequence[str], config: dict[str, Any]
    ) -> None:
        self.total = total
        self._sinks: list[Sink] = [MetricsFile(directory / "metrics.jsonl", resume_step)]
        self._sinks += [_SINKS[name](directory, config) for name in loggers]
        self._console = Console(file=sys.stderr)
        self._bar: Progress | None = None
        self._first: tuple[float, int] | None = None  # when steps began, and the step before
        self._last_line = 0.0
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                console=self._console,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task("training", total=total, completed=resume_step)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for sink in self._sinks:
            sink.log(step, metrics)

    def show(self, step: int, metrics: dict[str, float]) -> None:
        """Move the bar, or print a line if the last one is ten seconds old."""
        text = f"loss {metrics['loss']:.4f}  {metrics['tokens_per_second']:.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
            return
        now = time.monotonic()
        if self._first is None:
            self._first = now - metrics["seconds"], step - 1
        if now - self._last_line >= 10 or step == self.total:
            left = (now - self._first[0]) / (step - self._first[1]) * (self.total - step)
            self._console.print(f"step {step}/{self.total}  {text}  {left / 60:.1f} min left", highlight=False)
            self._last_line = now

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        for sink in self._sinks:
            sink.close()
