"""A library of LoRAs: one plain LoRA for each task of a prepared set, trained side by side as Ray tasks.

Every task is a training of its own (`engine.loop.train` with one process) in a fresh worker process, which loads the
base: some seconds that are paid for each task. Its adapter appears whole, or not at all, as a PEFT directory.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hl_scale.cluster.session import ray_session, refuse_job_paths, with_absolute_paths, worker_environment
from hl_scale.config import Config, ConfigError, parse_config
from hl_scale.data.durable import hash_file

RUNS = ".runs"
"""Run directories of tasks under way, below the library."""
_REFRESH_SECONDS = 2.0
_LOSSES_SHOWN = 4


@dataclass
class LibraryResult:
    """What a call to `train_library` did.

    Attributes:
        directory: of the library.
        trained: task -> loss of its last step.
        kept: tasks whose adapter was there already.
        failed: task -> error.
        interrupted: whether tasks are left because of Ctrl-C.
    """

    directory: Path
    trained: dict[str, float] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


@dataclass(frozen=True)
class _Job:
    """One LoRA to be trained: its task, run configuration, PEFT directory, and what its provenance must say."""

    name: str
    config: Config
    directory: Path
    identity: dict[str, str]


def train_library(
    config: Config, out: str | os.PathLike[str], tasks: Sequence[str] = (), *, keep_runs: bool = False
) -> LibraryResult:
    """Train one LoRA for each task and write it as the PEFT directory `out`/TASK; wait for all.

    Whole adapters of the same settings, examples and base model are kept. A task that was interrupted, or failed, goes
    on from its last checkpoint. An error of one task does not stop the others. The first Ctrl-C lets running tasks
    save.

    Args:
        config: base, lora, objective and training hold for every task; `cluster` says how many train at a time (the
            maximum of a range), with which resources, and how often a lost worker is replaced. `hypernetwork`,
            `conditions` and `run.directory` are not used.
        out: where the library is, on storage that every node mounts.
        tasks: names or globs; all tasks with training examples unless given, also held-out ones, whose LoRAs are
            references for evaluation.
        keep_runs: keep the run directories `out`/.runs/TASK of finished tasks.

    Raises:
        ValueError: before anything is trained: there is no task set, no such task, or `out` holds adapters of other
            settings, or other files.
    """
    refuse_job_paths({"--out": str(out), "data.directory": config.data.directory})
    jobs = _jobs(with_absolute_paths(config), Path(out).absolute(), tasks)
    missing = _missing(jobs)
    result = LibraryResult(Path(out), kept=[job.name for job in jobs if job not in missing])
    if missing:
        with ray_session(log_to_driver=False), _Display(len(jobs), len(result.kept)) as display:
            _train_all(missing, config, result, display)
    if not keep_runs:
        for name in (*result.kept, *result.trained):
            shutil.rmtree(result.directory / RUNS / name, ignore_errors=True)
        if (result.directory / RUNS).is_dir() and not any((result.directory / RUNS).iterdir()):
            (result.directory / RUNS).rmdir()
    return result


def task_config(config: Config, name: str, out: Path) -> Config:
    """The run that trains the LoRA of one task.

    Its condition is a constant, so no description is encoded; metrics go to metrics.jsonl alone.
    """
    tree = config.model_dump(mode="json")
    tree["run"]["directory"] = str(out / RUNS / name)
    tree["data"] |= {"only_task": name, "description_in_prompt": False}
    tree["conditions"] = {"kind": "one_hot"}
    tree["hypernetwork"] = {"kind": "plain_lora"}
    tree["base"]["placement"] = "replicated"  # there is one process
    tree["training"]["loggers"] = []
    return parse_config(tree)


def _jobs(config: Config, out: Path, patterns: Sequence[str]) -> list[_Job]:
    from hl_scale.data.tasks import load_tasks, named_tasks
    from hl_scale.engine.run import settings_fingerprint

    assert config.supervised  # a ValueError for any other objective
    prepared = load_tasks(config.tasks.directory)
    trainable = [task for task in prepared.tasks if task.train]
    jobs = []
    for task in named_tasks(trainable, patterns, "--tasks") if patterns else trainable:
        own = task_config(config, task.name, out)
        identity = {
            "settings_fingerprint": settings_fingerprint(own),
            "data_fingerprint": prepared.only(task.name).manifest["fingerprint"],
            "base_model": own.base.model,
        }
        jobs.append(_Job(task.name, own, out / task.name, identity))
    return jobs


def _missing(jobs: Iterable[_Job]) -> list[_Job]:
    """Jobs without a whole adapter.

    Raises:
        ConfigError: there are whole adapters of other settings.
        OutputError: a directory of other files is in the way.
    """
    from hl_scale.serving.staging import check_replaceable

    missing, others = [], []
    for job in jobs:
        check_replaceable(job.directory, force=True)
        facts = _provenance(job.directory)
        differing = [key for key, value in job.identity.items() if facts and facts.get(key) != value]
        if differing:
            others.append(f"{job.directory.name}: another {', '.join(differing)}")
        elif not facts:
            missing.append(job)
    if others:
        more = f"\n  and {len(others) - 4} more" if len(others) > 4 else ""
        raise ConfigError(
            "this library holds adapters of other trainings:\n  "
            + "\n  ".join(others[:4])
            + more
            + "\n  fix: give another --out, the settings of then, or remove these adapters"
        )
    return missing


def _provenance(directory: Path) -> dict[str, Any]:
    """What a whole adapter says of itself; empty if there is none, or a damaged one."""
    from hl_scale.serving.export import CONFIG_FILE
    from hl_scale.serving.staging import PROVENANCE_FILE

    try:
        json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        facts: dict[str, Any] = json.loads((directory / PROVENANCE_FILE).read_text(encoding="utf-8"))
        for name, file in facts["files"].items():
            if hash_file(directory / name) != file["sha256"]:
                return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return facts


def _train_all(jobs: Iterable[_Job], config: Config, result: LibraryResult, display: _Display) -> None:
    """Keep as many tasks running as there are workers, until all have ended; fills `result`."""
    import ray

    cluster = config.cluster
    workers = cluster.num_workers if isinstance(cluster.num_workers, int) else cluster.num_workers[1]
    remote = ray.remote(
        num_cpus=cluster.cpus_per_worker,
        num_gpus=1 if cluster.use_gpu else 0,
        max_calls=1,  # a process for each task: DeepSpeed's state and the base's memory end with it
        max_retries=cluster.maximum_failures,
        runtime_env={"env_vars": worker_environment(config)},
    )(_train_task)
    waiting, running = deque(jobs), dict[Any, _Job]()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.popleft()
                running[remote.remote(job.config.model_dump(mode="json"), job.name, str(job.directory))] = job
            for reference in ray.wait(list(running), timeout=_REFRESH_SECONDS)[0]:
                _settle(reference, running.pop(reference), result, display)
            display.show(running.values())
    except KeyboardInterrupt:
        result.interrupted = True
        display.say("interrupted: running tasks finish their step and save; Ctrl-C again does not wait")
        for reference in running:
            ray.cancel(reference)
        for reference, job in running.items():
            _settle(reference, job, result, display)


def _settle(reference: Any, job: _Job, result: LibraryResult, display: _Display) -> None:
    """Take the outcome of a Ray task, for which this waits."""
    import ray
    from ray.exceptions import RayError, TaskCancelledError

    try:
        outcome = ray.get(reference)
    except TaskCancelledError:
        return
    except RayError as error:  # a lost worker, or an error that no user can mend: with its traceback
        outcome = {"error": str(error)}
    if "error" not in outcome and not outcome["interrupted"] and not _provenance(job.directory):
        outcome = {"error": f"{job.directory} was written to another node\n  fix: put --out on storage that all share"}
    if "error" in outcome:
        result.failed[job.name] = outcome["error"]
        display.done(f"failed {job.name}: {outcome['error'].splitlines()[0]}")
    elif not outcome["interrupted"]:
        result.trained[job.name] = outcome["loss"]
        display.done(f"trained {job.name}: loss {outcome['loss']:.4f}")


def _train_task(tree: dict[str, Any], name: str, directory: str) -> dict[str, Any]:
    """The Ray task: train one LoRA and write it.

    Returns:
        Loss and whether it was interrupted, or an error the user has to mend.
    """
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    import torch.distributed

    from hl_scale.engine.loop import train
    from hl_scale.engine.run import load_run, settings_fingerprint
    from hl_scale.engine.zero3 import default_device
    from hl_scale.serving import generate_adapter

    config, device = parse_config(tree), default_device()
    # Without a port: of many groups that start on one host, two might choose the same.
    backend, store = "nccl" if device == "cuda" else "gloo", torch.distributed.HashStore()
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        result = train(config)
        if not result.interrupted:
            run = load_run(config.run.directory, device=device)
            assert run.data_fingerprint is not None
            facts = {
                "task": name,
                "loss": result.loss,
                "settings_fingerprint": settings_fingerprint(config),
                "data_fingerprint": run.data_fingerprint.partition(":")[0],
            }
            generate_adapter(run, f"task:{name}", directory, force=True, facts=facts)
    except (ValueError, OSError) as error:
        return {"error": str(error)}
    return {"loss": result.loss, "interrupted": result.interrupted}


class _Display:
    """A bar of finished tasks with the losses of running ones on a terminal; a line for each finished one anywhere."""

    def __init__(self, total: int, kept: int) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=Console(stderr=True),
        )  # fmt: skip
        self._bar.disable = not self._bar.console.is_terminal
        self._task = self._bar.add_task("starting", total=total, completed=kept)

    def __enter__(self) -> _Display:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False)

    def done(self, text: str) -> None:
        """One more task has ended."""
        self._bar.advance(self._task)
        self.say(text)

    def show(self, running: Iterable[_Job]) -> None:
        if not self._bar.disable:
            losses = [text for job in running if (text := _last_loss(job))]
            self._bar.update(self._task, description=", ".join(losses[:_LOSSES_SHOWN]) or "starting")


def _last_loss(job: _Job) -> str:
    """Task, step and loss that its run has logged last; empty before the first."""
    from hl_scale.engine.progress import read_metrics

    lines = read_metrics(Path(job.config.run.directory) / "metrics.jsonl")
    return f"{job.name} {lines[-1]['step']}: {lines[-1]['loss']:.4f}" if lines else ""
