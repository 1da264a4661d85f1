"""One training on a Ray cluster of three nodes on this machine, to which something happens.

Arguments: configuration, what happens (elastic, kill, stop, preempt), and a file for the answer: JSON with
what training returned and a list of [event, step at that time, seconds since the start].
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil

from hl_scale.cluster.ray_train import train_on_ray
from hl_scale.config import load_config

DEADLINE = 240
RAY = str(Path(sys.executable).parent / "ray")


class Events:
    """What happens, when."""

    def __init__(self, directory: Path, cluster: Any, nodes: list[Any]) -> None:
        self.metrics, self.lock = directory / "metrics.jsonl", directory / ".lock.json"
        self.cluster, self.nodes = cluster, nodes
        self.log: list[tuple[str, int, float]] = []
        self.error: str | None = None

    def step(self) -> int:
        """Last whole step logged; rewritten when a run resumes."""
        lines = self.metrics.read_text().split("\n")[:-1] if self.metrics.is_file() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError("it never happened")
            time.sleep(0.02)  # between looks

    def note(self, event: str) -> None:
        self.log.append((event, self.step(), time.monotonic()))

    def main_process(self) -> int | None:
        """The process of rank 0, once it holds the run directory."""
        return json.loads(self.lock.read_text())["process"] if self.lock.is_file() else None

    def disturbed(self, event: str, act: Callable[[], None]) -> None:
        """Do it, and wait until another group of workers trains."""
        before = self.main_process()
        self.note(event)
        act()
        self.until(lambda: self.main_process() != before)
        metrics = self.metrics.stat()
        self.until(lambda: self.metrics.stat().st_mtime_ns > metrics.st_mtime_ns + 1)
        mark = self.step()
        self.until(lambda: self.step() > mark)
        self.note(f"trains again after: {event}")

    def other_worker(self) -> int:
        """Process of a training worker that is not rank 0."""
        for process in psutil.Process().children(recursive=True) + list(psutil.process_iter()):
            if "RayTrainWorker" in " ".join(process.cmdline()[:1]) and process.pid != self.main_process():
                return process.pid
        raise LookupError("no second worker")

    def remove_node(self) -> None:
        self.cluster.remove_node(self.nodes.pop())

    def add_node(self) -> None:
        """As on another machine: `ray start`, until this process group ends."""
        command = [RAY, "start", "--address", self.cluster.address, "--num-cpus", "1", "--block"]
        subprocess.Popen(command)

    def elastic(self) -> None:
        self.until(lambda: self.step() >= 30)
        self.disturbed("node removed", self.remove_node)
        self.until(lambda: self.step() >= 60)
        self.disturbed("node added", self.add_node)

    def kill(self) -> None:
        self.until(lambda: self.step() >= 30)
        self.disturbed("rank 0 killed", lambda: os.kill(self.main_process(), signal.SIGKILL))

    def stop(self) -> None:
        self.until(lambda: self.step() >= 30)
        self.disturbed("rank 1 stopped", lambda: os.kill(self.other_worker(), signal.SIGSTOP))

    def preempt(self) -> None:
        """As a cloud does it: the node is announced to go, and goes when the time is up."""
        self.until(lambda: self.step() >= 10)
        drain = [
            RAY, "drain-node", "--address", self.cluster.address,
            "--node-id", self.nodes[-1].node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message", "spot", "--deadline-remaining-seconds", "20",
        ]  # fmt: skip
        self.disturbed("preemption announced", lambda: subprocess.run(drain, check=True))


def main() -> None:
    from ray.cluster_utils import Cluster

    config, what, answer = load_config(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(3 if what == "elastic" else 2)]
    cluster.wait_for_nodes()
    os.environ["RAY_ADDRESS"] = cluster.address
    events = Events(Path(config.run.directory), cluster, nodes)

    def happen() -> None:
        try:
            getattr(events, what)()
        except Exception:
            events.error = traceback.format_exc()

    thread = threading.Thread(target=happen, daemon=True)
    thread.start()
    outcome = train_on_ray(config)
    assert "deepspeed" not in sys.modules, "the driver imported deepspeed"
    answer.write_text(json.dumps({"outcome": outcome, "events": events.log, "error": events.error}))
    for node in nodes:  # the extra nodes before the head
        cluster.remove_node(node)
    cluster.shutdown()


if __name__ == "__main__":
    main()
