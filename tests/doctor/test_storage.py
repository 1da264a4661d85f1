"""Storage that works, that is full, read-only or too small, whose clock differs, or that one node has."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from filelock import FileLock

from hl_scale.doctor.storage import check_storage, is_locked


def test_storage_that_works_is_ok_and_is_left_as_it_was(tmp_path):
    (finding,) = check_storage("run.directory", tmp_path / "runs" / "new")
    assert finding.status == "ok" and f"tried in {tmp_path}" in finding.found
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_a_problem(tmp_path):
    (tmp_path / "file").write_text("")
    (finding,) = check_storage("run.directory", tmp_path / "file" / "run")
    assert finding.status == "problem" and f"{tmp_path}/file is not a directory" in finding.found


def test_a_full_disk_is_a_problem(small_disk):
    (finding,) = check_storage("run.directory", small_disk)
    assert finding.status == "problem" and "writing a file failed: No space left on device" in finding.found
    assert not list(small_disk.iterdir())


def test_a_disk_that_cannot_be_written_to_is_a_problem(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    (finding,) = check_storage("run.directory", small_disk)
    assert finding.status == "problem" and "Read-only file system" in finding.found


def test_a_disk_too_small_for_the_checkpoints_is_a_problem(tmp_path):
    (finding,) = check_storage("run.directory", tmp_path, required=10**18)
    assert finding.status == "problem" and "checkpoints take 1000000000.0 GB" in finding.found
    assert "training.keep_checkpoints" in finding.fix


@pytest.mark.parametrize("skew", [-60, 60])
def test_clocks_that_differ_are_a_warning(tmp_path, skew):
    (finding,) = check_storage("run.directory", tmp_path, clock=lambda: time.time() + skew)
    assert finding.status == "warning" and "differ by 60 s" in finding.found


@pytest.mark.parametrize(
    ("path", "said"), [("runs/x", "is relative"), ("/tmp/x", "looks like storage of one node"),
                       ("/no-such-mount/runs", "nothing of /no-such-mount/runs exists")],
)  # fmt: skip
def test_paths_of_one_node_are_a_warning_where_several_are_meant(tmp_path, monkeypatch, path, said):
    monkeypatch.chdir(tmp_path)
    if not os.access("/", os.W_OK) and path.startswith("/no-such"):
        pytest.skip("the root directory cannot be written to")
    (finding,) = check_storage("run.directory", Path(path), several_nodes=True)
    assert finding.status == "warning" and said in finding.found
    assert [f.status for f in check_storage("run.directory", Path(path))] == ["ok"]


def test_a_lock_keeps_others_out_until_it_is_given_back(tmp_path):
    with FileLock(tmp_path / "lock"):
        assert is_locked(tmp_path / "lock")
    assert not is_locked(tmp_path / "lock")
