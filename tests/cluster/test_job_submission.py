"""`ray job submit` to a head of its own with a token: who may submit, and what a submitted training does."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(sys.executable).parent
DEMO = ROOT / "configs" / "demo_gemma270m_cpu.yaml"
TIMEOUT = 1200


@dataclass(frozen=True)
class Head:
    """A running head: address of its dashboard, environment that names its token, and where the token lies."""

    address: str
    environment: dict[str, str]
    token: Path

    def submit(self, *entrypoint: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """`ray job submit` as the documentation writes it, waiting for the job; stderr is part of stdout."""
        command = [str(PROGRAMS / "ray"), "job", "submit", "--address", self.address, "--working-dir", ".", "--"]
        return subprocess.run(
            [*command, *entrypoint], cwd=ROOT, env=environment or self.environment, text=True, timeout=TIMEOUT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip

    def jobs(self, token: str | None) -> tuple[int, list[dict]]:
        """Status of `GET /api/jobs/` under a token, and the jobs it lists."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        try:
            with urllib.request.urlopen(urllib.request.Request(f"{self.address}/api/jobs/", headers=headers)) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, []


def processes_with(variable: str) -> list[int]:
    """Ids of processes that were started with this `NAME=value` in their environment: the head and what it started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"{variable}\0".encode() in (entry / "environ").read_bytes() and (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()


@pytest.fixture(scope="module")
def head(process_environment):
    """A head with two CPUs and its dashboard on 127.0.0.1; afterwards nothing that it started is left."""
    directory = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # unix sockets have short paths
    token = directory / "token"
    token.write_text(secrets.token_hex(32))
    inherited = {key: value for key, value in process_environment.items() if not key.startswith("RAY_")}
    environment = inherited | {
        "PATH": os.pathsep.join([str(PROGRAMS), process_environment["PATH"]]),  # as an activated environment does it
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    dashboard, agent, agent_rpc, metrics = free_ports(4)
    command = [
        str(PROGRAMS / "ray"), "start", "--head", "--block", "--num-cpus=2", "--port=0", f"--temp-dir={directory}",
        "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_rpc}",
        f"--metrics-export-port={metrics}", "--object-store-memory=200000000",
    ]  # fmt: skip
    log = directory / "head.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    head = Head(f"http://127.0.0.1:{dashboard}", environment, token)
    try:
        deadline = time.monotonic() + 120
        while not is_up(head):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)  # between looks, not instead of them
        yield head
    finally:
        stop(process, f"RAY_AUTH_TOKEN_PATH={token}")
        shutil.rmtree(directory)


def is_up(head: Head) -> bool:
    try:
        return head.jobs(head.token.read_text())[0] == 200
    except OSError:  # nobody listens yet
        return False


def stop(process: subprocess.Popen, variable: str) -> None:
    """End this head, not every Ray of the machine as `ray stop` would, and see that nothing of it is left."""
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=120)
    deadline = time.monotonic() + 30
    while processes_with(variable) and time.monotonic() < deadline:
        time.sleep(0.2)  # between looks, not instead of them
    left = processes_with(variable)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("0" * 64, 403)])
def test_only_holders_of_the_token_submit(head, token, status, tmp_path):
    environment = {key: value for key, value in head.environment.items() if not key.startswith("RAY_AUTH")}
    if token is None:
        environment |= {"RAY_AUTH_MODE": "disabled"}
    else:
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    before = head.jobs(head.token.read_text())[1]
    done = head.submit("touch", str(tmp_path / "here"), environment=environment)
    assert done.returncode != 0
    assert "token" in done.stdout
    assert head.jobs(token) == (status, [])
    assert head.jobs(head.token.read_text()) == (200, before)
    assert not (tmp_path / "here").exists()


@pytest.mark.slow
def test_a_submitted_training_gives_the_losses_of_the_deepspeed_launcher(
    head, deepspeed_run, tiny_config, write_yaml, losses_of, tmp_path
):
    config = write_yaml(tiny_config(tmp_path / "run"), tmp_path / "config.yaml")
    done = head.submit("python", "launch/ray_train.py", "--config", str(config))
    assert done.returncode == 0, done.stdout[-4000:]
    assert "done: step 6" in done.stdout
    assert losses_of(tmp_path / "run") == losses_of(deepspeed_run)


@pytest.mark.slow
def test_a_job_with_relative_paths_is_refused(head, tiny_config, write_yaml, tmp_path):
    config = write_yaml(tiny_config(Path("runs/lost")), tmp_path / "config.yaml")
    done = head.submit("python", "launch/ray_train.py", "--config", str(config))
    assert done.returncode != 0
    assert "error: run.directory would lie in Ray's temporary copy" in done.stdout and "fix:" in done.stdout


@pytest.mark.slow
def test_the_demo_runs_to_its_end_as_a_submitted_job(head, losses_of, tmp_path):
    """With the Makefile's settings: 4-bit Gemma 3 270M on two workers."""
    demo = re.search(r"^DEMO := data\.directory=(\S+) (.*)$", (ROOT / "Makefile").read_text(), re.M)
    data, settings = f"data.directory={ROOT / demo[1]}", demo[2].split()
    steps = int(re.search(r"training\.steps=(\d+)", demo[2])[1])
    subprocess.run(
        [sys.executable, "-m", "hl_scale.cli", "prepare", str(DEMO), data, *settings],
        cwd=ROOT,
        env=head.environment,
        check=True,
    )
    models = f"base.cache_directory={ROOT / '.cache' / 'models'}"
    run = f"run.directory={tmp_path / 'run'}"
    job = ["python", "launch/ray_train.py", "--config", str(DEMO.relative_to(ROOT))]
    done = head.submit(*job, data, *settings, run, models, "cluster.num_workers=2")
    assert done.returncode == 0, done.stdout[-4000:]
    assert f"done: step {steps}" in done.stdout
    losses = losses_of(tmp_path / "run")
    assert len(losses) == steps and sum(losses[-10:]) < sum(losses[:10])
    manifest = json.loads((tmp_path / "run" / "checkpoints" / f"step-{steps:06d}" / "manifest.json").read_text())
    assert manifest["world_size"] == 2
