"""A machine without Ray's variables, small disks, free ports and tokens."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch, tmp_path_factory):
    """No variable of Ray, Gloo or DeepSpeed, and a home of its own without a token."""
    for name in list(os.environ):
        if name.startswith(("RAY_", "GLOO_", "NCCL_", "DS_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def small_disk():
    """A file system of 256 kB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    with tempfile.TemporaryDirectory() as directory:
        mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", directory]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("a tmpfs cannot be mounted here")
        try:
            yield Path(directory)
        finally:
            subprocess.run(["umount", directory], check=True)


@pytest.fixture
def free_port():
    """free_port() -> a port of 127.0.0.1 that nobody listens at."""

    def find():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    return find


@pytest.fixture
def token():
    """A token in ~/.ray where every directory above it is open to others."""
    with tempfile.TemporaryDirectory(dir="/tmp") as home, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", home)
        Path(home).chmod(0o755)
        path = Path(home) / ".ray" / "auth_token"
        path.parent.mkdir(mode=0o755)
        path.write_text("secret")
        yield path
