"""One training over two hosts, by every launcher the documentation names, and what happens where one of them fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.faults
ROOT = Path(__file__).resolve().parents[3]
SCRIPT = str(ROOT / "launch" / "train.py")
PORT = 29500  # hosts of their own: nothing else listens there
TIMEOUT = 300


@pytest.fixture
def on_hosts(process_environment, tmp_path):
    """on_hosts(launcher, hosts, *arguments of the script) -> the processes started, by hand one on each host."""
    hostfile, variables = tmp_path / "hostfile", tmp_path / "deepspeed_env"
    hostfile.write_text("node-1 slots=1\nnode-2 slots=1\n")
    variables.write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\nTOKENIZERS_PARALLELISM=false\n")
    deepspeed = ["deepspeed", "--hostfile", str(hostfile)]
    torchrun = ["torchrun", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "1"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"node-1:{PORT}"]

    def command(launcher, rank):
        if launcher == "deepspeed":
            return deepspeed, {"DS_ENV_FILE": str(variables), "PDSH_SSH_ARGS_APPEND": "-oServerAliveInterval=10"}
        if launcher == "deepspeed --no_ssh":
            return [*deepspeed, "--no_ssh", "--node_rank", str(rank), "--master_addr", "node-1"], {}
        if launcher == "torchrun":
            return torchrun, {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        assert launcher == "variables"
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "node-1", "MASTER_PORT": str(PORT)}
        return ["python"], group | {"RANK": str(rank), "LOCAL_RANK": "0"}

    def start(launcher, hosts, *arguments):
        processes = []
        for rank, host in enumerate(hosts[:1] if launcher == "deepspeed" else hosts):
            program, more = command(launcher, rank)
            environment = process_environment | more
            processes.append(host.start(*program, SCRIPT, *arguments, cwd=ROOT, environment=environment))
        return processes

    return start


def outputs_of(processes):
    return [process.communicate(timeout=TIMEOUT)[0] for process in processes]


def wait_for_steps(directory, count, processes):
    """Until metrics.jsonl has `count` lines, while all processes run."""
    metrics, deadline = directory / "metrics.jsonl", time.monotonic() + TIMEOUT
    while not (metrics.is_file() and metrics.read_text().count("\n") >= count):
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.05)  # between looks, not instead of them


def world_size_of(directory, step):
    return json.loads((directory / "checkpoints" / f"step-{step:06d}" / "manifest.json").read_text())["world_size"]


@pytest.mark.parametrize("launcher", ["deepspeed", "deepspeed --no_ssh", "torchrun", "variables"])
def test_two_hosts_give_the_losses_of_two_ranks_on_one(
    launcher, two_hosts, on_hosts, deepspeed_run, tiny_config, write_yaml, losses_of, tmp_path
):
    directory = tmp_path / "run"
    config = write_yaml(tiny_config(directory), tmp_path / "config.yaml")
    with two_hosts() as hosts:
        processes = on_hosts(launcher, hosts, "--config", str(config))
        outputs = outputs_of(processes)
        received = [host.received_bytes() for host in hosts]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    assert "done: step 6" in outputs[0]
    assert losses_of(directory) == losses_of(deepspeed_run)
    assert world_size_of(directory, 6) == 2
    # Gradients and parameters of 6 steps: starting over ssh takes 20 kB.
    assert min(received) > 1_000_000


def test_a_host_with_a_setting_of_its_own_is_named(two_hosts, on_hosts, tiny_config, write_yaml, tmp_path):
    config = write_yaml(tiny_config(tmp_path / "run"), tmp_path / "config.yaml")
    with two_hosts(variables_of_second={"HL_SCALE_TRAINING__LEARNING_RATE": "0.5"}) as hosts:
        (process,) = on_hosts("deepspeed", hosts, "--config", str(config))
        (output,) = outputs_of([process])
    assert process.returncode == 2
    assert output.count("error: rank 1 has another configuration than rank 0") == 1 and "fix:" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_ctrl_c_on_the_launching_host_saves_what_both_have(two_hosts, on_hosts, tiny_config, write_yaml, tmp_path):
    """As a terminal does it: SIGINT to the whole foreground process group, where no rank is."""
    directory = tmp_path / "run"
    settings = {"training.steps": 100_000, "training.save_every": 100_000}
    config = write_yaml(tiny_config(directory, settings), tmp_path / "config.yaml")
    with two_hosts() as hosts:
        processes = on_hosts("deepspeed", hosts, "--config", str(config))
        wait_for_steps(directory, 4, processes)
        os.killpg(processes[0].pid, signal.SIGINT)
        outputs_of(processes)
        deadline = time.monotonic() + TIMEOUT
        while any(host.ranks(SCRIPT) for host in hosts):
            assert time.monotonic() < deadline
            time.sleep(0.05)  # between looks, not instead of them
    (saved,) = (directory / "checkpoints").glob("step-*")
    step = int(saved.name.removeprefix("step-"))
    assert step >= 4 and world_size_of(directory, step) == 2
    assert (directory / "metrics.jsonl").read_text().count("\n") == step


def test_a_rank_killed_under_torchrun_is_started_again_and_the_run_goes_on(
    two_hosts, on_hosts, deepspeed_run, tiny_config, write_yaml, losses_of, tmp_path
):
    directory = tmp_path / "run"
    config = write_yaml(tiny_config(directory, {"training.steps": 60}), tmp_path / "config.yaml")
    with two_hosts() as hosts:
        processes = on_hosts("torchrun", hosts, "--config", str(config))
        wait_for_steps(directory, 4, processes)
        (rank,) = hosts[1].ranks(SCRIPT)
        os.kill(rank, signal.SIGKILL)
        outputs = outputs_of(processes)
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0].count("resuming from step ") == 1 and "done: step 60" in outputs[0]
    assert len(losses_of(directory)) == 60


def test_a_rank_killed_under_deepspeed_ends_the_run_on_both_hosts(
    two_hosts, on_hosts, tiny_config, write_yaml, tmp_path
):
    directory = tmp_path / "run"
    settings = {"training.steps": 100_000, "training.keep_checkpoints": 2}
    config = write_yaml(tiny_config(directory, settings), tmp_path / "config.yaml")
    with two_hosts() as hosts:
        processes = on_hosts("deepspeed", hosts, "--config", str(config))
        wait_for_steps(directory, 4, processes)
        (rank,) = hosts[1].ranks(SCRIPT)
        os.kill(rank, signal.SIGKILL)
        outputs_of(processes)
        assert processes[0].returncode not in (0, None)
        assert not any(host.ranks(SCRIPT) for host in hosts)


def test_a_host_that_vanishes_ends_the_run_after_the_timeout(two_hosts, on_hosts, tiny_config, write_yaml, tmp_path):
    """Without a word: its cable is pulled, so that no connection is closed."""
    directory = tmp_path / "run"
    settings = {"training.steps": 100_000, "training.keep_checkpoints": 2}
    config = write_yaml(tiny_config(directory, settings), tmp_path / "config.yaml")
    with (tmp_path / "deepspeed_env").open("a") as variables:
        variables.write("DEEPSPEED_TIMEOUT=1\n")
    with two_hosts() as hosts:
        processes = on_hosts("deepspeed", hosts, "--config", str(config))
        wait_for_steps(directory, 4, processes)
        hosts[1].disconnect()
        (output,) = outputs_of(processes)
        assert processes[0].returncode not in (0, None)
        assert "Timed out waiting 60000ms" in output
        assert not hosts[0].ranks(SCRIPT)


def test_hosts_leave_nothing_behind(two_hosts):
    with two_hosts() as hosts:
        held = [host.pid for host in hosts]
        for host in hosts:
            other = {"node-1": "node-2", "node-2": "node-1"}[host.name]
            process = host.start("ssh", other, "hostname", cwd=ROOT, environment=os.environ)
            assert outputs_of([process]) == [f"{other}\n"]
    assert not any(Path(f"/proc/{pid}").exists() for pid in held)
    links = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout
    assert "veth" not in links
