"""The nodes of a Ray cluster: whether it answers, storage and versions as each node sees them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from filelock import FileLock

from hl_scale.doctor import ray_access, ray_nodes
from hl_scale.doctor.findings import Finding


def test_a_cluster_that_is_not_there_is_found_out_at_once(monkeypatch, free_port):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    (finding,) = ray_nodes.check_nodes({})
    assert finding.status == "problem" and "does not answer" in finding.found


def test_a_node_that_sees_another_directory_or_no_lock_has_a_problem(tmp_path):
    def summary(marker):
        seen = ray_nodes.examine_node([("run.directory", str(tmp_path), str(marker))])
        findings = [Finding(**finding) for finding in seen["findings"]]
        return ray_nodes.summarize_node("node a", findings)

    assert "another directory on this node" in summary(tmp_path / "marker").found
    (tmp_path / "marker").mkdir()
    (tmp_path / "marker" / "lock").write_text("")
    finding = summary(tmp_path / "marker")
    assert finding.status == "problem" and "a lock of another node does not hold here" in finding.found
    with FileLock(tmp_path / "marker" / "lock"):
        finding = summary(tmp_path / "marker")
    assert finding.status == "ok" and finding.found == "packages and run.directory are ok"


def test_versions_that_differ_between_nodes_are_named():
    same = {"here": {"python": "3.11.7", "torch": "2.13.0"}, "a": {"python": "3.11.7", "torch": "2.13.0"}}
    assert ray_nodes.compare_versions(same).status == "ok"
    finding = ray_nodes.compare_versions({**same, "b": {"python": "3.11.7", "torch": "2.12.0"}, "c": {}})
    assert finding.status == "problem"
    assert "torch: 2.13.0 (here, a) but 2.12.0 (b) but not installed (c)" in finding.found


@pytest.fixture
def ray_head(tmp_path, monkeypatch, free_port):
    """ray_head(mode) starts a head node with its dashboard on 127.0.0.1, and points the variables at it."""
    directory = tempfile.mkdtemp(dir="/tmp")  # Ray's sockets need short paths
    processes = []

    def start(mode):
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        port, board = free_port(), free_port()
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--port", str(port)]
        command += ["--dashboard-port", str(board), "--temp-dir", directory, "--num-cpus", "1", "--disable-usage-stats"]
        log = tmp_path / "ray.log"
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        processes.append(process)
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{board}")
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        deadline = time.monotonic() + 120
        while "does not answer" in ray_access.check_dashboard().found:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)  # between looks

    yield start
    for process in processes:
        process.terminate()  # the head ends what it started
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.slow
def test_a_real_cluster_with_a_token_is_ok(ray_head, token, tmp_path):
    token.chmod(0o600)
    ray_head("token")
    assert ray_access.check_dashboard().status == "ok"
    node, versions = ray_nodes.check_nodes({"run.directory": tmp_path / "run"})
    assert (node.status, versions.status) == ("ok", "ok"), (node, versions)
    assert "run.directory" in node.found and not list(tmp_path.glob(".hl-scale-doctor*"))


@pytest.mark.slow
def test_a_real_dashboard_without_a_token_is_open(ray_head):
    ray_head("disabled")
    finding = ray_access.check_dashboard()
    assert finding.status == "problem" and "obeys without a token" in finding.found


@pytest.mark.slow
def test_each_node_of_a_cluster_gets_a_row(tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        findings = ray_nodes.check_nodes({"run.directory": tmp_path})
    finally:
        cluster.shutdown()
    assert [finding.status for finding in findings] == ["ok"] * 3, findings
    assert "the same on 2 nodes and here" in findings[-1].found
