"""Hosts of a DeepSpeed hostfile: do their names resolve, does ssh work without a password, is pdsh there."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hl_scale.doctor.findings import Finding, ok, problem

_ENTRY = re.compile(r"(\S+)\s+slots=(\d+)\b")
_AT_A_TIME = 32
_CONNECT_SECONDS, _SSH_SECONDS = 5, 15


def read_hostfile(path: Path) -> dict[str, int]:
    """Host -> processes (slots), in the order of the file.

    Raises:
        ValueError: no such file, a line that is not `HOST slots=N`, a host named twice, or no host at all.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"hostfile {path} cannot be read: {error}\n  fix: cp hostfile.example {path}") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        match = _ENTRY.match(line)
        if not match or int(match[2]) < 1:
            raise ValueError(f"{path}:{number}: {line!r} names no host and slots\n  fix: write HOST slots=N")
        if match[1] in hosts:
            raise ValueError(f"{path}:{number}: {match[1]} is named twice\n  fix: one line with all of its slots")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise ValueError(f"{path} names no host\n  fix: write a line HOST slots=N for each")
    return hosts


def check_hostfile(path: Path) -> Iterator[Finding]:
    """The file, the launcher, and each host in it."""
    check = "hostfile"
    try:
        hosts = read_hostfile(path)
    except ValueError as error:
        found, _, fix = str(error).partition("\n  fix: ")
        yield problem(check, found, fix)
        return
    yield ok(check, f"{len(hosts)} hosts, {sum(hosts.values())} slots")
    if shutil.which("pdsh"):
        yield ok("pdsh", "installed")
    else:
        fix = "apt-get install pdsh; or deepspeed --launcher openmpi, mpich, impi, mvapich or slurm, where one is there"
        yield problem("pdsh", "not installed; it is how the deepspeed command starts other hosts", fix)
    if not shutil.which("ssh"):
        yield problem("ssh", "not installed", "apt-get install openssh-client")
        return
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        yield from pool.map(check_host, hosts)


def check_host(host: str) -> Finding:
    """Whether a command runs on a host without a question; a name may be an alias that ssh alone knows."""
    check = f"host {host}"
    fix = f"ssh-keygen where there is no key yet, then ssh-copy-id {host}; `ssh {host} true` must ask for nothing"
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_SECONDS}"]
    try:
        done = subprocess.run(
            ["ssh", *options, "--", host, "true"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SSH_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return problem(check, f"ssh did not end within {_SSH_SECONDS} s", fix)
    if not done.returncode:
        return ok(check, "ssh works")
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError) as error:
        fix = "correct the hostfile, or add the name to /etc/hosts or DNS"
        return problem(check, f"does not resolve: {error}", fix)
    reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    return problem(check, f"ssh failed: {reason}", fix)
