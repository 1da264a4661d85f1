"""The nodes of a running Ray cluster: a task pinned to each looks at versions and storage from there.

This process leaves a marker in each directory and keeps a file in it locked: a node that does not see the marker has
another directory by that name, and one that gets the lock could train into a run directory that is in use.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from hl_scale.doctor.findings import Finding, ok, problem, worst
from hl_scale.doctor.machine import check_packages, installed_versions
from hl_scale.doctor.storage import check_storage, is_locked, nearest_directory

DEADLINE = 120.0
"""Seconds for all nodes to answer; a fresh worker imports torch first."""
_CONNECT_SECONDS = 5
_START = "start Ray (docs/clusters.md), and export RAY_ADDRESS=HEAD:6379 here"
_CONNECT = "export RAY_AUTH_MODE=token, with the head node's token in ~/.ray/auth_token; `ray status` must then answer"


def check_nodes(storage: Mapping[str, Path], deadline: float = DEADLINE) -> list[Finding]:
    """One finding for each node of the cluster at RAY_ADDRESS (or of this machine), one for their versions.

    Args:
        storage: what is kept there -> directory, which this process can write to.
        deadline: seconds.
    """
    check, address = "Ray cluster", os.environ.get("RAY_ADDRESS") or "auto"
    unreachable = _unreachable(address)
    if unreachable is not None:
        return [problem(check, f"{address} does not answer: {unreachable}", _START)]
    import ray

    root = str(Path(__file__).resolve().parents[2])
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}},
        )
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError) as error:
        return [problem(check, f"{address}: {_last_line(error)}", _START if address == "auto" else _CONNECT)]
    try:
        with ExitStack() as stack:
            marked = [(name, str(path), stack.enter_context(_marker(path))) for name, path in storage.items()]
            return _ask(marked, deadline)
    finally:
        ray.shutdown()


def _unreachable(address: str) -> str | None:
    """Why nothing listens at HOST:PORT; Ray itself takes minutes to find out."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return None
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        return str(error)
    return None


@contextmanager
def _marker(path: Path) -> Iterator[str]:
    """A directory on the storage with a locked file in it; yields its path."""
    own = Path(tempfile.mkdtemp(prefix=".hl-scale-doctor-", dir=nearest_directory(path)))
    try:
        with FileLock(own / "lock"):
            yield str(own)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _ask(marked: list[tuple[str, str, str]], deadline: float) -> list[Finding]:
    """Run `examine_node` everywhere and sum up."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    task = ray.remote(num_cpus=0, max_retries=0)(examine_node)
    pending = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(marked)
        for node in nodes
    ]
    ray.wait(pending, num_returns=len(pending), timeout=deadline)
    findings, versions = [], {}
    for node, reference in zip(nodes, pending, strict=True):
        name = f"node {node['NodeManagerHostname']} ({node['NodeID'][:8]})"
        try:
            seen = ray.get(reference, timeout=0)
        except ray.exceptions.RayError as error:
            root = str(Path(__file__).resolve().parents[2])
            fix = f"install this project there at {root}, in a virtual environment like this one (docs/clusters.md)"
            findings.append(problem(name, f"gives no answer: {_last_line(error)}", fix))
            continue
        versions[name] = seen["versions"]
        findings.append(summarize_node(name, [Finding(**finding) for finding in seen["findings"]]))
    return [*findings, compare_versions({"here": installed_versions()} | versions)]


def examine_node(marked: list[tuple[str, str, str]]) -> dict[str, Any]:
    """Versions and storage as this node sees them; runs as a Ray task.

    Args:
        marked: name, directory and marker of each storage.
    """
    findings = check_packages()
    for name, path, marker in marked:
        fix = f"mount the same storage on every node, and set {name} to it"
        lock = Path(marker) / "lock"
        if not lock.is_file():
            findings.append(problem(f"storage: {name}", f"{path} is another directory on this node", fix))
            continue
        if not is_locked(lock):
            fix = "mount it with locks that hold across nodes (Lustre: -o flock; NFS: version 4, not nolock)"
            findings.append(problem(f"storage: {name}", f"{path}: a lock of another node does not hold here", fix))
        findings += check_storage(name, Path(path))
    return {"versions": installed_versions(), "findings": [vars(finding) for finding in findings]}


def summarize_node(name: str, findings: list[Finding]) -> Finding:
    """One finding of a node's many."""
    wrong = [finding for finding in findings if finding.fix]
    if not wrong:
        checked = [finding.check.removeprefix("storage: ") for finding in findings if "storage: " in finding.check]
        return ok(name, f"packages and {', '.join(checked) or 'no storage'} are ok")
    found = "; ".join(f"{finding.check}: {finding.found}" for finding in wrong)
    fixes = "; ".join(dict.fromkeys(finding.fix for finding in wrong))
    return Finding(name, worst(wrong), found, fixes)


def compare_versions(versions: Mapping[str, Mapping[str, str]]) -> Finding:
    """Whether every node has the same packages.

    Args:
        versions: node -> package -> version.
    """
    check = "versions across nodes"
    packages = sorted({package for node in versions.values() for package in node})
    differing = []
    for package in packages:
        there: dict[str, list[str]] = {}
        for name, node in versions.items():
            there.setdefault(node.get(package, "not installed"), []).append(name)
        if len(there) > 1:
            parts = (f"{version} ({', '.join(names)})" for version, names in there.items())
            differing.append(f"{package}: {' but '.join(parts)}")
    if differing:
        fix = "install the same versions on every node: pip install -c constraints.txt -e . in the clone"
        return problem(check, "; ".join(differing), fix)
    return ok(check, f"the same on {len(versions) - 1} nodes and here")


def _last_line(error: BaseException) -> str:
    """The line that says what happened, in an error that may carry a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or [''])[-1][:300]}"
