"""Checkpoints: what is refused, what is passed over, what is kept, and what a failed save leaves behind."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hl_scale.engine import checkpoint, checkpoint_writer, zero3
from hl_scale.engine.checkpoint import CheckpointError
from hl_scale.engine.loop import Hooks, train


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


@pytest.mark.parametrize("victim", ["save_file", "write_text", "flush", "os.rename"])
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
    kept = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert sorted(kept) == ["LATEST", "step-000001"]
    assert train(config, stop_at=2).step == 2


def test_what_a_killed_process_left_is_swept_when_the_run_goes_on(single_process, tiny_config, tmp_path):
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


def test_steps_that_are_multiples_stay_for_good(single_process, tiny_config, tmp_path):
    settings = {"training.save_every": 1, "training.keep_checkpoints": 1, "training.keep_every": 2}
    train(tiny_config(tmp_path / "run", settings), stop_at=5)
    kept = [path.name for path in checkpoint.find(tmp_path / "run" / "checkpoints")]
    assert kept == ["step-000002", "step-000004", "step-000005"]


def test_where_directories_cannot_be_renamed_the_manifest_commits(
    single_process, tiny_config, finished, tmp_path, monkeypatch
):
    """An object store mounted as a file system: files can be replaced, directories cannot be renamed."""
    rename = os.rename

    def files_only(old, new):
        if Path(old).is_dir():
            raise OSError(95, "Operation not supported")
        rename(old, new)

    monkeypatch.setattr("os.rename", files_only)
    config = tiny_config(tmp_path / "run", {"training.commit": "manifest", "training.keep_checkpoints": 1})
    train(config, stop_at=4)
    # What a killed process left: shards that no manifest followed.
    unfinished = tmp_path / "run" / "checkpoints" / "step-000006"
    unfinished.mkdir()
    (unfinished / "rank-0000-of-0004.safetensors").write_bytes(b"half")
    assert train(config).step == 6
    assert [path.name for path in checkpoint.find(tmp_path / "run" / "checkpoints")] == ["step-000006"]
    assert sorted(path.name for path in unfinished.iterdir()) == ["manifest.json", "rank-0000-of-0001.safetensors"]
    mine, other = (checkpoint.read_full(checkpoint.newest(path)[0]) for path in (unfinished.parent, finished))
    assert all(mine[name][kind].equal(other[name][kind]) for name in other for kind in other[name])


def test_random_states_come_back_as_they_were():
    def draw():
        return torch.rand(3).tolist(), np.random.standard_normal(3).tolist(), random.gauss(0, 1), random.random()

    random.gauss(0, 1), np.random.standard_normal()  # leave a second number waiting
    states = checkpoint_writer.random_states()
    first = draw()
    draw()
    checkpoint_writer.restore_random_states(states)
    assert draw() == first


def test_any_range_of_a_parameter_is_read_from_shards_of_any_number(tmp_path):
    whole = {"w": torch.arange(23, dtype=torch.float32), "one": torch.tensor([5.0]), "none": torch.empty(0)}
    for ranks in (1, 2, 3, 5, 30):
        directory = tmp_path / str(ranks)
        directory.mkdir()
        shards = []
        for rank in range(ranks):
            tensors = {}
            for name, values in whole.items():
                size = -(-len(values) // ranks)
                part = torch.full((size,), torch.nan)
                own = values[rank * size : (rank + 1) * size]
                part[: len(own)] = own
                tensors[f"{name}|master"] = part
            file = directory / f"rank-{rank:04d}-of-{ranks:04d}.safetensors"
            save_file(tensors, file)
            shards.append({"name": file.name, "bytes": file.stat().st_size, "sha256": "0" * 64})
        manifest = checkpoint.Manifest(
            step=1, world_size=ranks, shapes={"w": [23], "one": [1], "none": [0]}, shards=shards,
            base_fingerprint="b", data_fingerprint="d", seed=0,
        )  # fmt: skip
        with checkpoint.Shards(checkpoint.Checkpoint(directory, manifest)) as read:
            for start in range(24):
                for stop in range(start, 27):
                    assert read.read("w", "master", start, stop).equal(whole["w"][start:stop]), (ranks, start, stop)
            assert read.read("one", "master").tolist() == [5.0] and read.read("none", "master").numel() == 0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"step": -1}, "step"), ({"shards": []}, "shards"), ({"world_size": "two"}, "world_size"),
        ({"shapes": {"w": [-3]}}, "shapes.w.0"), ({"format": 3}, "format"), ({"command": "rm"}, "command"),
        ({"world_size": 2}, r"\(whole file\): .*1 shards of 2 ranks"), ({"skipped_steps": 7}, ".*7 of 6 steps"),
    ],
)  # fmt: skip
def test_a_manifest_with_a_field_that_cannot_be_right_is_refused_by_its_name(copied, change, complaint):
    path = copied / "step-000006" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=rf"manifest.json cannot be read: {complaint}"):
        checkpoint.verify(copied / "step-000006")


def test_too_little_space_is_found_before_anything_is_written(single_process, tiny_config, tmp_path, monkeypatch):
    config = tiny_config(tmp_path / "run", {"training.save_every": 1})
    train(config, stop_at=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 100, 100))
    with pytest.raises(CheckpointError, match=r"step 2 was not written: [\d,]+ bytes are needed in .*, 100 are free"):
        train(config, stop_at=2)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("*step*")] == ["step-000001"]


def test_latest_names_the_newest_checkpoint(finished):
    assert (finished / "LATEST").read_text() == "step-000006\n"


def test_a_run_whose_directory_another_has_taken_writes_no_more(single_process, tiny_config, tmp_path):
    def taken_over(step, metrics):
        if step == 3:
            (tmp_path / "run" / ".lock.json").write_text('{"host": "elsewhere", "process": 1, "token": "other"}')
        return False

    with pytest.raises(CheckpointError, match=r"another run has taken .*run over while this one was held up"):
        train(tiny_config(tmp_path / "run"), hooks=Hooks(on_step=taken_over))
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["LATEST", "step-000002"]


def test_what_cannot_be_removed_does_not_end_the_run(single_process, tiny_config, tmp_path, monkeypatch, caplog):
    remove = shutil.rmtree

    def busy(path, **options):
        if str(path).endswith(".old"):
            raise OSError(16, "Device or resource busy")
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", busy)
    config = tiny_config(tmp_path / "run", {"training.save_every": 1, "training.keep_checkpoints": 1})
    assert train(config, stop_at=3).step == 3
    assert [path.name for path in checkpoint.find(tmp_path / "run" / "checkpoints")] == ["step-000003"]
    assert "was not removed" in caplog.text


def test_a_checkpoint_that_was_moved_and_linked_is_unlinked_and_its_files_stay(single_process, tiny_config, tmp_path):
    config = tiny_config(tmp_path / "run", {"training.save_every": 1, "training.keep_checkpoints": 1})
    train(config, stop_at=1)
    first = tmp_path / "run" / "checkpoints" / "step-000001"
    shutil.move(first, tmp_path / "elsewhere")
    first.symlink_to(tmp_path / "elsewhere")
    assert train(config, stop_at=3).step == 3
    assert sorted(path.name for path in first.parent.iterdir()) == ["LATEST", "step-000003"]
    assert (tmp_path / "elsewhere" / "manifest.json").is_file()


def test_a_damaged_checkpoint_does_not_count_as_one_that_is_kept(single_process, tiny_config, copied):
    flip(shard_of(copied, 4))
    shutil.rmtree(copied / "step-000006")
    train(tiny_config(copied.parent, {"training.keep_checkpoints": 2, "training.save_every": 5}))  # from 2: 5 and 6
    assert [path.name for path in checkpoint.find(copied)] == ["step-000004", "step-000005", "step-000006"]


def test_a_checkpoint_under_another_step_s_name_is_refused(copied):
    shutil.rmtree(copied / "step-000006")
    (copied / "step-000004").rename(copied / "step-000006")
    with pytest.raises(CheckpointError, match="step-000006 holds the checkpoint of step 4"):
        checkpoint.verify(copied / "step-000006")
