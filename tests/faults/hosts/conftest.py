"""Hosts made of Linux namespaces: own addresses, host names, processes and shared memory, one file system.

Each host runs an sshd; its /etc/hosts and /etc/ssh name the others and hold throwaway keys, so that a plain
`ssh node-2` works inside it and nothing outside is read or written. A host lives as long as the shell that holds its
namespaces, and that shell as long as its standard input is open: hosts cannot outlive the process that made them.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

NAMES = ("node-1", "node-2")
ADDRESSES = ("10.11.12.1", "10.11.12.2")
PROGRAMS = {
    "ip": "iproute2", "nsenter": "util-linux", "pdsh": "pdsh", "ssh": "openssh-client", "ssh-keygen": "openssh-client",
    "sshd": "openssh-server", "unshare": "util-linux",
}  # fmt: skip
"""What is called, and the Debian package it is in."""
SEARCH_PATH = os.pathsep.join(
    [str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"]
)


@pytest.fixture
def two_hosts(tmp_path: Path) -> Callable[..., AbstractContextManager[tuple[Host, Host]]]:
    """two_hosts(variables_of_second={...}) -> a block with two hosts; skips where they cannot be made."""
    _skip_unless_hosts_can_be_made()

    def make(variables_of_second: Mapping[str, str] | None = None) -> AbstractContextManager[tuple[Host, Host]]:
        return _two_hosts(tmp_path / "hosts", variables_of_second or {})

    return make


@dataclass(frozen=True)
class Host:
    """One host: its name, its address, and the id of the process that holds its namespaces."""

    name: str
    address: str
    pid: int

    def start(self, *command: str, cwd: Path, environment: Mapping[str, str]) -> subprocess.Popen[str]:
        """Start `command` on this host in a process group of its own; its stderr is part of its stdout."""
        enter = ["nsenter", f"--target={self.pid}", "--net", "--uts", "--ipc", "--mount", "--pid", f"--wd={cwd}"]
        return subprocess.Popen(
            [*enter, *command], env={**environment, "PATH": SEARCH_PATH}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def ranks(self, script: str) -> list[int]:
        """Ids, as the tests see them, of this host's processes that run `script` as `python -u script`."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                command = (entry / "cmdline").read_text().split("\0")
                here = os.readlink(entry / "ns/pid") == os.readlink(f"/proc/{self.pid}/ns/pid")
            except OSError:  # it has ended meanwhile
                continue
            if here and command[1:3] == ["-u", script]:
                found.append(int(entry.name))
        return found

    def disconnect(self) -> None:
        """Take this host's interface down: packets are lost, connections stay as they are."""
        command = ["nsenter", f"--target={self.pid}", "--net", "ip", "link", "set", "eth0", "down"]
        subprocess.run(command, env={"PATH": SEARCH_PATH}, check=True)

    def received_bytes(self) -> int:
        """Bytes that reached this host over the network since it exists."""
        for line in Path(f"/proc/{self.pid}/net/dev").read_text().splitlines():
            name, _, counters = line.partition(":")
            if name.strip() == "eth0":
                return int(counters.split()[0])
        raise OSError(f"{self.name} has no eth0")


def _skip_unless_hosts_can_be_made() -> None:
    """Skip the test, saying what to install, where namespaces or a program are missing."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=SEARCH_PATH) is None]
    if missing:
        packages = " ".join(sorted({PROGRAMS[name] for name in missing}))
        pytest.skip(f"needs {', '.join(missing)}: apt-get install {packages}")
    tried = subprocess.run(["unshare", "--net", "--uts", "--ipc", "--mount", "true"], capture_output=True, text=True)
    if os.geteuid() != 0 or tried.returncode != 0:
        pytest.skip(f"needs root and the right to make namespaces: {tried.stderr.strip() or 'not root'}")


@contextmanager
def _two_hosts(directory: Path, variables_of_second: Mapping[str, str]) -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other as node-1 and node-2, and nothing else.

    Args:
        directory: for keys and settings, empty.
        variables_of_second: environment of every ssh session on node-2.
    """
    _write_settings(directory, variables_of_second)
    with ExitStack() as stack:
        first, second = (stack.enter_context(_host(directory, *pair)) for pair in zip(NAMES, ADDRESSES, strict=True))
        commands = [f"ip link add eth0 netns {first.pid} type veth peer name eth0 netns {second.pid}"]
        for host in (first, second):
            setup = f"ip address add {host.address}/24 dev eth0 && ip link set eth0 up && ip link set lo up"
            commands.append(f"nsenter --target={host.pid} --net sh -ec '{setup}'")
        subprocess.run(["sh", "-ec", "\n".join(commands)], env={"PATH": SEARCH_PATH}, check=True)
        yield first, second


def _write_settings(directory: Path, variables_of_second: Mapping[str, str]) -> None:
    """Keys and settings of ssh for both hosts, and the names of the hosts."""
    directory.mkdir(parents=True)
    table = zip(ADDRESSES, NAMES, strict=True)
    (directory / "hosts").write_text(
        "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for address, name in table)
    )
    ssh = directory / "ssh"  # becomes /etc/ssh
    ssh.mkdir()
    for key in ("host_key", "user_key"):
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(ssh / key)]
        subprocess.run(keygen, check=True)
    user_key = (ssh / "user_key.pub").read_text()
    for name in NAMES:
        variables = variables_of_second if name == NAMES[1] else {}
        options = ",".join(f'environment="{key}={value}"' for key, value in variables.items())
        (ssh / f"authorized_keys.{name}").write_text(f"{options} {user_key}".lstrip())
    (ssh / "known_hosts").write_text(f"node-* {(ssh / 'host_key.pub').read_text()}")
    (ssh / "ssh_config").write_text(
        "Host node-*\n  IdentityFile /etc/ssh/user_key\n  GlobalKnownHostsFile /etc/ssh/known_hosts\n"
        "  UserKnownHostsFile /dev/null\n  StrictHostKeyChecking yes\n"
    )
    (ssh / "sshd_config").write_text(
        "HostKey /etc/ssh/host_key\nPidFile none\nUsePAM no\nStrictModes no\nPasswordAuthentication no\n"
        "PermitRootLogin prohibit-password\nPermitUserEnvironment yes\n"
    )


@contextmanager
def _host(directory: Path, name: str, address: str) -> Iterator[Host]:
    """Namespaces with a running sshd; everything in them ends with the block."""
    keys = f"AuthorizedKeysFile=/etc/ssh/authorized_keys.{name}"
    setup = [
        f"hostname {name}",
        "mount -t tmpfs tmpfs /dev/shm",
        "mount -t tmpfs tmpfs /run",
        "mkdir /run/sshd",
        f"mount --bind {shlex.quote(str(directory / 'hosts'))} /etc/hosts",
        f"mount --bind {shlex.quote(str(directory / 'ssh'))} /etc/ssh",
        f"{shutil.which('sshd', path=SEARCH_PATH)} -o {keys} -E {shlex.quote(str(directory / name))}.log",
        "echo ready",
        "exec cat",  # until standard input is closed; as the first process of its namespace it takes all others along
    ]
    namespaces = ["--net", "--uts", "--ipc", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child"]
    process = subprocess.Popen(
        ["unshare", *namespaces, "sh", "-ec", "\n".join(setup)], env={"PATH": SEARCH_PATH}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise OSError(f"{name} did not start: {process.wait()}")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield Host(name, address, int(children[0]))
    finally:
        process.communicate()  # closes its input and waits
