"""Checkpoints: what is refused, what is passed over, what is kept, and what a failed save leaves behind."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from hl_scale.engine import checkpoint, zero3
from hl_scale.engine.checkpoint import CheckpointError
from hl_scale.engine.loop import train


@pytest.fixture(scope="module")
def finished(single_process, tiny_config, tmp_path_factory):
    """`checkpoints` of a one-rank run with steps 2, 4 and 6."""
    directory = tmp_path_factory.mktemp("runs") / "finished"
    train(tiny_config(directory))
    return directory / "checkpoints"


@pytest.fixture
def copied(finished, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(finished, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def shard_of(directory, step):
    (shard,) = (directory / f"step-{step:06d}").glob("*.safetensors")
    return shard


def remove(shard):
    shard.unlink()


def truncate(shard):
    shard.write_bytes(shard.read_bytes()[:-1])


def flip(shard):
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(bytes(content))


DAMAGES = {"missing": remove, "truncated": truncate, "flipped bit": flip}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_verify_names_the_damaged_shard_and_the_older_checkpoint_is_used(copied, damage):
    shard = shard_of(copied, 6)
    damage(shard)
    with pytest.raises(CheckpointError, match=shard.name):
        checkpoint.verify(copied / "step-000006")
    found, problems = checkpoint.newest(copied)
    assert found.step == 4
    assert len(problems) == 1 and str(shard) in problems[0]


def test_asking_for_a_damaged_step_is_an_error_instead_of_another_step(copied):
    flip(shard_of(copied, 4))
    with pytest.raises(CheckpointError, match=r"step 4.*damaged"):
        checkpoint.newest(copied, step=4)
    with pytest.raises(CheckpointError, match=r"no such checkpoint.*step-000002, step-000004, step-000006"):
        checkpoint.newest(copied, step=5)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 99}'])
def test_an_unreadable_manifest_is_passed_over_and_named(copied, text):
    (copied / "step-000006" / "manifest.json").write_text(text)
    found, problems = checkpoint.newest(copied)
    assert found.step == 4 and "step-000006" in problems[0]


def test_a_directory_without_a_manifest_is_no_checkpoint(copied):
    (copied / "step-000006" / "manifest.json").unlink()
    (copied / "old-step-000009").mkdir()
    shutil.copy(copied / "step-000004" / "manifest.json", copied / "old-step-000009")
    assert [path.name for path in checkpoint.find(copied)] == ["step-000002", "step-000004"]


def test_no_checkpoint_is_not_an_error(tmp_path):
    assert checkpoint.newest(tmp_path / "nothing") == (None, [])


def test_a_manifest_cannot_point_outside_its_directory(copied, tmp_path):
    path = copied / "step-000006" / "manifest.json"
    manifest = json.loads(path.read_text())
    shard = shard_of(copied, 6)
    shutil.move(shard, tmp_path / shard.name)
    manifest["shards"][0]["name"] = f"../../{shard.name}"
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"shards\.0\.name"):
        checkpoint.verify(copied / "step-000006")


def test_only_the_newest_checkpoints_are_kept(single_process, tiny_config, tmp_path):
    train(tiny_config(tmp_path / "run", {"training.save_every": 1, "training.keep_checkpoints": 2}))
    kept = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert sorted(kept) == ["LATEST", "step-000005", "step-000006"]


def test_a_damaged_newer_checkpoint_never_pushes_a_good_one_out(single_process, tiny_config, copied):
    flip(shard_of(copied, 6))
    shutil.rmtree(copied / "step-000002")
    config = tiny_config(copied.parent, {"training.keep_checkpoints": 1, "training.save_every": 1})
    train(config, stop_at=5)
    found, problems = checkpoint.newest(copied)
    assert found.step == 5 and len(problems) == 1


def test_a_run_without_any_good_checkpoint_is_not_started_over(single_process, tiny_config, copied):
    for step in (2, 4, 6):
        remove(shard_of(copied, step))
    before = sorted(path.name for path in copied.iterdir())
    with pytest.raises(CheckpointError, match=r"can be used:(.|\n)*step-000006.*is missing"):
        train(tiny_config(copied.parent))
    assert sorted(path.name for path in copied.iterdir()) == before


def test_resuming_passes_over_a_damaged_checkpoint_and_says_so(single_process, tiny_config, copied, finished, capsys):
    flip(shard_of(copied, 6))
    result = train(tiny_config(copied.parent))
    errors = capsys.readouterr().err.replace("\n", "")
    assert "checkpoint passed over" in errors and "resuming from step 4" in errors
    assert result.step == 6
    again, before = (checkpoint.read_full(checkpoint.newest(path)[0]) for path in (copied, finished))
    assert all(again[name][kind].equal(before[name][kind]) for name in before for kind in before[name])


@pytest.mark.parametrize("victim", ["save_file", "_write_text", "_flush", "os.rename"])
def test_a_failed_save_leaves_no_trace_and_the_run_goes_on_later(
    single_process, tiny_config, tmp_path, monkeypatch, victim
):
    def fail(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    config = tiny_config(tmp_path / "run", {"training.save_every": 1})
    train(config, stop_at=1)
    with monkeypatch.context() as patch:
        patch.setattr(f"hl_scale.engine.checkpoint_writer.{victim}", fail)
        with pytest.raises(CheckpointError, match="No space left"):
            train(config, stop_at=2)
    kept = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name != ".LATEST.tmp"]
    assert sorted(kept) == ["LATEST", "step-000001"]
    assert train(config, stop_at=2).step == 2


def test_what_a_killed_process_left_is_swept_by_the_next_save(single_process, tiny_config, tmp_path):
    config = tiny_config(tmp_path / "run")
    stale = tmp_path / "run" / "checkpoints" / ".step-000004.tmp"
    stale.mkdir(parents=True)
    (stale / "rank-0000-of-0001.safetensors").write_bytes(b"half")
    train(config, stop_at=2)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["LATEST", "step-000002"]


def test_weights_of_another_network_are_refused_by_name(finished):
    found, _ = checkpoint.newest(finished)
    with pytest.raises(CheckpointError, match=r"does not fit this hypernetwork.*first"):
        checkpoint.load_weights(torch.nn.Linear(3, 2), found)


def test_a_checkpoint_holds_nothing_of_the_base(finished):
    found, _ = checkpoint.newest(finished)
    assert all(name.startswith("hypernetwork.") for name in found.manifest.shapes)
    assert set(checkpoint.read_full(found)[next(iter(found.manifest.shapes))]) == {"master", *zero3.MOMENTS}
