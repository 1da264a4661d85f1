"""One LoRA for each task on a local Ray: each the one that a training of its own gives, each written whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hl_scale.cluster.library import RUNS, task_config, train_library
from hl_scale.config import Config, ConfigError
from hl_scale.data.library import Library
from hl_scale.data.tasks import TaskError, prepare_tasks
from hl_scale.serving import OutputError

TASKS = ("garden", "summer")
"""The second is held out of training a hypernetwork; `long` has inputs that do not fit."""
DEADLINE = 300
"""Seconds until the command counts as hanging."""


@pytest.fixture(scope="module")
def library_config(tiny_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Three prepared tasks over the same inputs; the answer of two is always their name."""
    folder = tmp_path_factory.mktemp("tasks")
    words = ["the", "old", "man", "said", "that", "she", "was", "not", "sure", "whether", "this", "film"]
    inputs = [f"{first} {second}" for first in words[:6] for second in words[6:]]
    lines = [
        {
            "name": name,
            "descriptions": [f"say {name}", "say it"],
            "examples": [{"input": f"{text}{' man' * padding}", "answer": name} for text in inputs],
            "seen": name != "summer",
        }
        for name, padding in (("garden", 0), ("summer", 0), ("long", 60))
    ]
    source = folder / "tasks.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    config = tiny_config(
        folder / "unused",
        {
            "data.kind": "tasks", "data.directory": str(folder / "set"), "data.maximum_tokens": 32,
            "data.sources": [{"kind": "jsonl", "path": str(source)}], "data.test_examples": 4,
            "objective.kind": "supervised", "cluster.use_gpu": False,
        },
    )  # fmt: skip
    prepare_tasks(config.tasks)
    return config


@pytest.fixture(scope="module")
def start(
    write_yaml: Callable[[Config, Path], Path], process_environment: dict[str, str]
) -> Callable[..., subprocess.Popen[str]]:
    """start(config, out, *arguments) -> `hl-scale library` on a Ray of its own."""

    def run(config: Config, out: Path, *arguments: str) -> subprocess.Popen[str]:
        path = write_yaml(config, out.with_suffix(".yaml"))
        environment = {key: value for key, value in process_environment.items() if key != "RAY_ADDRESS"}
        return subprocess.Popen(
            [sys.executable, "-m", "hl_scale.cli", "library", str(path), "--out", str(out), *arguments],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def made(
    start: Callable[..., subprocess.Popen[str]], library_config: Config, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """The library of all three tasks, two at a time: directory, status, stdout and stderr of the command."""
    out = tmp_path_factory.mktemp("libraries") / "library"
    status, stdout, stderr = finish(start(library_config, out))
    return SimpleNamespace(directory=out, status=status, stdout=stdout, stderr=stderr)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr; nothing of its group is left."""
    try:
        stdout, stderr = process.communicate(timeout=DEADLINE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, stdout, stderr


def provenance(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "hl_provenance.json").read_text(encoding="utf-8"))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def test_a_task_that_cannot_be_trained_is_named_at_the_end_and_costs_no_other(made):
    assert made.status == 1, made.stderr[-4000:]
    assert "(2 trained, 0 kept, 1 failed)" in made.stdout
    assert "failed: long: task long: an example has" in made.stderr and "fix: raise data.maximum_tokens" in made.stderr
    assert "Traceback" not in made.stderr
    assert sorted(path.name for path in made.directory.iterdir()) == [*TASKS]


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("name", TASKS)
def test_peft_and_our_reader_load_the_lora_that_a_training_on_that_task_alone_gives(
    made, library_config, tiny_model, tmp_path, name
):
    import peft
    from transformers import AutoModelForCausalLM

    from hl_scale.engine.loop import train
    from hl_scale.engine.run import load_run
    from hl_scale.serving.export import generate_factors

    config = task_config(library_config, name, tmp_path)
    result = train(config)
    facts = provenance(made.directory / name)
    assert (facts["task"], facts["step"], facts["seed"]) == (name, 6, 0)
    assert facts["loss"] == pytest.approx(result.loss, rel=1e-4)
    _, factors = generate_factors(load_run(config.run.directory), f"task:{name}")
    read = Library(made.directory, factors.slots).read(name)
    assert read.scale == factors.scale
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), made.directory / name)
    found = peft.get_peft_model_state_dict(model)
    for slot in factors.slots:
        for kind, tensors in (("A", factors.a), ("B", factors.b)):
            own = found.pop(f"base_model.model.{slot.path}.lora_{kind}.weight")
            assert (own - tensors[slot.path][0]).norm() <= 1e-4 * tensors[slot.path].norm()
            assert own.equal((read.a if kind == "A" else read.b)[slot.path][0])
    assert not found
    assert not weights(made.directory / "garden")[f"base_model.model.{slot.path}.lora_B.weight"].allclose(
        weights(made.directory / "summer")[f"base_model.model.{slot.path}.lora_B.weight"]
    )


def test_whole_adapters_are_kept_and_ray_is_not_started_for_them(made, library_config):
    import ray

    before = {path: path.stat().st_mtime_ns for path in made.directory.rglob("*")}
    again = train_library(library_config, made.directory, ["garden", "sum*"])
    assert again.kept == [*TASKS] and not again.trained and not again.failed
    assert {path: path.stat().st_mtime_ns for path in made.directory.rglob("*")} == before
    assert not ray.is_initialized()


def test_a_library_of_other_settings_is_refused_before_anything_is_written(made, library_config):
    training = library_config.training.model_copy(update={"learning_rate": 1e-3})
    other = library_config.model_copy(update={"training": training})
    with pytest.raises(ConfigError, match=r"garden: another settings_fingerprint\n(.|\n)*fix: give another --out"):
        train_library(other, made.directory)
    assert sorted(path.name for path in made.directory.iterdir()) == [*TASKS]
    saved_differently = library_config.training.model_copy(update={"save_every": 3})
    assert train_library(
        library_config.model_copy(update={"training": saved_differently}), made.directory, TASKS
    ).kept == [*TASKS]


def test_adapters_of_examples_that_have_changed_are_refused_and_others_kept(made, library_config, tmp_path):
    source = Path(library_config.tasks.sources[0].path)
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    lines[1]["examples"][0]["answer"] = lines[1]["examples"][1]["answer"] = "rained"
    changed = tmp_path / "tasks.jsonl"
    changed.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    data = library_config.tasks.model_dump() | {
        "directory": str(tmp_path / "set"),
        "sources": [{"kind": "jsonl", "path": str(changed)}],
    }
    config = library_config.model_copy(update={"data": type(library_config.data).model_validate(data)})
    prepare_tasks(config.tasks)
    assert train_library(config, made.directory, ["garden"]).kept == ["garden"]
    with pytest.raises(ConfigError, match="summer: another data_fingerprint"):
        train_library(config, made.directory, ["garden", "summer"])


def test_files_of_someone_else_are_not_replaced(library_config, tmp_path):
    (tmp_path / "garden").mkdir()
    (tmp_path / "garden" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not written by hl_scale"):
        train_library(library_config, tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["garden", "thesis.tex"]


def test_a_name_that_no_task_has_is_refused(library_config, tmp_path):
    with pytest.raises(TaskError, match="--tasks names 'gardne', which no task is called; there are garden"):
        train_library(library_config, tmp_path / "library", ["gardne"])
    assert not (tmp_path / "library").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("single_process")
def test_a_damaged_adapter_is_made_again_and_an_interrupted_task_goes_on(made, start, library_config, tmp_path):
    from hl_scale.engine.loop import train

    out = tmp_path / "library"
    shutil.copytree(made.directory, out)
    with (out / "garden" / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(1000)
    shutil.rmtree(out / "summer")
    train(task_config(library_config, "summer", out), stop_at=4)
    checkpoint = out / RUNS / "summer" / "checkpoints" / "step-000004" / "manifest.json"
    written = checkpoint.stat().st_mtime_ns
    status, stdout, stderr = finish(start(library_config, out, "--tasks", "[gs]*", "--keep-runs"))
    assert status == 0, stderr[-4000:]
    assert "(2 trained, 0 kept, 0 failed)" in stdout
    assert checkpoint.stat().st_mtime_ns == written
    for name in TASKS:
        assert equal(weights(out / name), weights(made.directory / name))


@pytest.mark.slow
def test_ctrl_c_lets_every_running_task_save_what_it_has(start, library_config, tmp_path):
    training = library_config.training.model_copy(update={"steps": 100_000, "save_every": 100_000})
    cluster = library_config.cluster.model_copy(update={"num_workers": 1})
    config = library_config.model_copy(update={"training": training, "cluster": cluster})
    process = start(config, tmp_path / "library")
    run = tmp_path / "library" / RUNS / "garden"
    deadline = time.monotonic() + DEADLINE
    while not ((run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline, finish(process)[2][-4000:]
        time.sleep(0.05)  # between looks, not instead of them
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    status, stdout, stderr = finish(process)
    assert status == 130, stderr[-4000:]
    assert "(0 trained, 0 kept, 0 failed)" in stdout and "run the same command to go on" in stdout
    assert "Traceback" not in stderr
    assert [path.name for path in (tmp_path / "library").iterdir()] == [RUNS]
    assert [path.name for path in (tmp_path / "library" / RUNS).iterdir()] == ["garden"]
    assert list((run / "checkpoints").glob("step-*/manifest.json"))
