"""`launch/train.py`: what a user can get wrong ends in one clean error and status 2; Ctrl-C saves."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hl_scale.engine.loop import train

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "train.py"


@pytest.fixture
def launched_here(single_process, monkeypatch, write_yaml, tmp_path, capsys):
    """launched_here(config, *overrides) -> exit status and stderr of the script's main function, in this process.

    `launched_here.output` is the last call's stdout.
    """
    specification = importlib.util.spec_from_file_location("launch_train", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)

    def run(config, *overrides):
        path = write_yaml(config, tmp_path / "config.yaml")
        monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(path), *overrides])
        status = module.main()
        captured = capsys.readouterr()
        run.output = captured.out
        return status, captured.err

    return run


def test_training_ends_with_the_memory_it_took_and_the_memory_planned(launched_here, tiny_config, tmp_path):
    status, _ = launched_here(tiny_config(tmp_path / "run", {"training.steps": 1}))
    assert status == 0
    said = re.search(r"^peak memory per rank: ([\d.]+) GB \(planned ([\d.]+) GB\)$", launched_here.output, re.M)
    assert said and float(said[1]) > 0.1 and float(said[2]) > 0.1
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert line["peak_memory_bytes"] / 1e9 <= float(said[1]) + 0.05  # saving may take more than the step


def long_pair(rows):
    rows[30]["dialect"] = "the old man " * 60


def empty_pair(rows):
    rows[31]["dialect"] = ""


def few_pairs(rows):
    del rows[5:]


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (long_pair, "pair 30 has"),
        (empty_pair, "pair 31 has a sentence of 1 tokens where 2 are needed"),
        (few_pairs, "5 training samples are fewer than one global batch of 8"),
    ],
)
def test_pairs_that_cannot_be_trained_on_are_refused(
    launched_here, tiny_config, write_tiny_corpus, tmp_path, edit, expected
):
    corpus = write_tiny_corpus(tmp_path / "corpus", edit)
    status, error = launched_here(tiny_config(tmp_path / "run", {"data.directory": str(corpus)}))
    assert status == 2
    assert error.startswith("error: ") and expected in error and "fix:" in error
    assert not (tmp_path / "run").exists() and not (tmp_path / "corpus-targets").exists()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.directory=/nowhere/at/all"], "no corpus at /nowhere/at/all"),
        (["base.model=./no-such-model"], "is not a directory"),
        (["lora.target_modules=[query]"], "its linear layers are called"),
        (["lora.rank=40"], "lora.rank = 40 is larger than slot"),
        (["training.stepz=3"], "did you mean 'steps'?"),
        (["training.loggers=[mlflow]"], "training.loggers names 'mlflow', which is not installed"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(
    launched_here, tiny_config, tmp_path, overrides, expected
):
    if "mlflow" in expected and importlib.util.find_spec("mlflow"):
        pytest.skip("mlflow is installed")
    status, error = launched_here(tiny_config(tmp_path / "run"), *overrides)
    assert status == 2
    assert error.startswith("error: ") and expected in error
    assert not (tmp_path / "run").exists()


def test_a_damaged_corpus_shard_is_named(launched_here, tiny_config, write_tiny_corpus, tmp_path):
    corpus = write_tiny_corpus(tmp_path / "corpus")
    shard = corpus / "train-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    status, error = launched_here(tiny_config(tmp_path / "run", {"data.directory": str(corpus)}))
    assert status == 2 and str(shard) in error and "sha256" in error
    assert not (tmp_path / "run").exists()


def overflowing_vectors(rows):
    for row in rows:
        row["vector"] = [3e38] * len(row["vector"])


def test_a_run_whose_numbers_overflow_ends_with_a_diagnosis(launched_here, tiny_config, write_tiny_corpus, tmp_path):
    corpus = write_tiny_corpus(tmp_path / "corpus", overflowing_vectors)
    status, error = launched_here(tiny_config(tmp_path / "run", {"data.directory": str(corpus)}))
    assert status == 2 and "5 non-finite steps in a row" in error


def test_two_ranks_refuse_a_directory_of_another_run_and_none_hangs(
    deepspeed_run, tiny_config, write_yaml, launch, tmp_path
):
    before = sorted((path.name, path.stat().st_mtime_ns) for path in deepspeed_run.iterdir())
    path = write_yaml(tiny_config(deepspeed_run), tmp_path / "config.yaml")
    done = launch(SCRIPT, "--config", str(path), "training.learning_rate=0.5")
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1 and "training.learning_rate: 0.01 there, 0.5 now" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert sorted((path.name, path.stat().st_mtime_ns) for path in deepspeed_run.iterdir()) == before


def test_ctrl_c_under_the_launcher_saves_and_the_run_goes_on(
    single_process, tiny_config, write_yaml, deepspeed_command, process_environment, losses_of, tmp_path
):
    """As a terminal does it: SIGINT to the whole foreground process group."""
    directory = tmp_path / "run"
    config = tiny_config(directory, {"training.steps": 100_000, "training.save_every": 100_000})
    command = deepspeed_command(SCRIPT, "--config", str(write_yaml(config, tmp_path / "config.yaml")))
    process = subprocess.Popen(
        command, env=process_environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 600
        metrics = directory / "metrics.jsonl"
        while not (metrics.is_file() and metrics.read_text().count("\n") > 3):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)  # between looks, not instead of them
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=600)  # until the ranks have closed their end too
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode != 0
    (saved,) = (directory / "checkpoints").glob("step-*")
    step = int(saved.name.removeprefix("step-"))
    assert f"interrupted: saved step {step}" in output
    assert len(losses_of(directory)) == step
    assert train(config, stop_at=step + 2).step == step + 2
    assert len(losses_of(directory)) == step + 2
