"""Ray Train around the same loop: the same losses as under the DeepSpeed launcher, and errors that are not retried."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hl_scale.cluster.session import with_absolute_paths
from hl_scale.config import load_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "ray_train.py"
CONFIGS = ROOT / "configs"


@pytest.fixture
def on_ray(write_yaml, process_environment, tmp_path):
    """on_ray(config, *overrides) -> the finished `launch/ray_train.py` on a Ray of its own."""

    def run(config, *overrides):
        path = write_yaml(config, tmp_path / "config.yaml")
        environment = {key: value for key, value in process_environment.items() if key != "RAY_ADDRESS"}
        return subprocess.run(
            [sys.executable, str(SCRIPT), "--config", str(path), *overrides],
            env=environment, capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip

    return run


def test_two_ray_workers_give_the_losses_of_the_deepspeed_launcher(
    on_ray, deepspeed_run, tiny_config, losses_of, tmp_path
):
    done = on_ray(tiny_config(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "done: step 6" in done.stdout
    assert losses_of(tmp_path / "run") == losses_of(deepspeed_run)
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step-000006" / "manifest.json").read_text())
    assert manifest["world_size"] == 2


@pytest.mark.slow
def test_what_a_worker_finds_wrong_is_reported_once_and_not_tried_again(on_ray, tiny_config, tmp_path):
    done = on_ray(tiny_config(tmp_path / "run"), f"data.directory={tmp_path}/nothing")
    assert done.returncode == 2
    assert done.stderr.count("error: no corpus at") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_paths_become_absolute_because_workers_run_elsewhere(tiny_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    paths = {"data.directory": "data/y", "base.model": "model", "lora.task_adapter": "adapters/z"}
    absolute = with_absolute_paths(tiny_config(Path("runs/x"), paths))
    assert absolute.lora.task_adapter == str(tmp_path / "adapters/z")
    assert absolute.run.directory == str(tmp_path / "runs/x")
    assert absolute.data.directory == str(tmp_path / "data/y")
    assert absolute.base.model == str(tmp_path / "model")
    assert with_absolute_paths(tiny_config(Path("r"), {"base.model": "org/name"})).base.model == "org/name"


def test_paths_of_an_encoder_and_a_library_become_absolute_and_ids_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "encoder").mkdir()
    overrides = ["objective.library=libraries/x", "conditions.encoder=encoder"]
    absolute = with_absolute_paths(load_config(CONFIGS / "reconstruct_gemma270m_cpu.yaml", overrides))
    assert absolute.reconstruction.library == str(tmp_path / "libraries/x")
    assert absolute.conditions.encoder == str(tmp_path / "encoder")
    absolute = with_absolute_paths(load_config(CONFIGS / "t2l_gemma270m_cpu.yaml"))
    assert absolute.conditions.encoder == "package:all-minilm-l6-v2 + base_mean"
    assert absolute.base.model == "package:gemma3-270m"
