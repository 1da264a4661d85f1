"""Hosts of a hostfile: how it is read, names that do not resolve, and hosts that refuse this user."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hl_scale.doctor import hosts

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("node-1 slots=8\nnode-2 8\n", ":2: 'node-2 8' names no host and slots"),
        ("node-1 slots=8\nnode-1 slots=8\n", "node-1 is named twice"),
        ("# nothing\n\n", "names no host"),
        (None, "cannot be read"),
    ],
)
def test_a_hostfile_that_the_launcher_would_refuse_is_a_problem(tmp_path, text, said):
    if text is not None:
        (tmp_path / "hostfile").write_text(text)
    (finding,) = hosts.check_hostfile(tmp_path / "hostfile")
    assert finding.status == "problem" and said in finding.found


def test_the_example_is_read_as_the_launcher_reads_it():
    from deepspeed.launcher.runner import fetch_hostfile

    path = ROOT / "hostfile.example"
    assert hosts.read_hostfile(path) == fetch_hostfile(str(path)) == {"node-1": 8, "node-2": 8}


@pytest.fixture
def ssh(tmp_path, monkeypatch, free_port):
    """An sshd on 127.0.0.1 to which `ssh open` gets and `ssh closed` does not; PATH has ssh alone."""
    sshd, client = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin"), shutil.which("ssh")
    if not sshd or not client or os.geteuid() != 0:
        pytest.skip("needs root, sshd and ssh")
    for name in ("host", "key", "stranger"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)]
        subprocess.run(command, check=True)
    port = free_port()
    Path("/run/sshd").mkdir(exist_ok=True)
    (tmp_path / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/key.pub\n"
        "StrictModes no\nPasswordAuthentication no\nUsePAM no\nPidFile none\n"
    )
    common = (
        f"HostName 127.0.0.1\nPort {port}\nUser {getpass.getuser()}\nStrictHostKeyChecking no\nIdentitiesOnly yes\n"
    )
    common += f"UserKnownHostsFile {tmp_path}/known\n"
    (tmp_path / "ssh_config").write_text(
        f"Host open\n{common}IdentityFile {tmp_path}/key\nHost localhost\n{common}IdentityFile {tmp_path}/stranger\n"
    )
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    (bin_directory / "ssh").write_text(f'#!/bin/sh\nexec {client} -F {tmp_path}/ssh_config "$@"\n')
    (bin_directory / "ssh").chmod(0o755)
    server = subprocess.Popen(
        [sshd, "-D", "-e", "-f", str(tmp_path / "sshd_config")], stderr=subprocess.PIPE, text=True
    )
    try:
        assert "Server listening" in server.stderr.readline()
        monkeypatch.setenv("PATH", str(bin_directory))
        yield bin_directory
    finally:
        server.terminate()
        server.wait()
        server.stderr.close()


def test_each_host_must_resolve_and_let_this_user_in(ssh, tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("open slots=2\nlocalhost slots=2\nnowhere.invalid slots=2\n")
    (ssh / "pdsh").write_text("")
    (ssh / "pdsh").chmod(0o755)
    findings = {finding.check: finding for finding in hosts.check_hostfile(path)}
    assert findings["hostfile"].found == "3 hosts, 6 slots"
    assert findings["pdsh"].status == findings["host open"].status == "ok"
    refused, unknown = findings["host localhost"], findings["host nowhere.invalid"]
    assert refused.status == "problem" and "Permission denied" in refused.found and "ssh-copy-id" in refused.fix
    assert unknown.status == "problem" and "does not resolve" in unknown.found


def test_without_pdsh_other_launchers_are_named(ssh, tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("open slots=2\n")
    findings = {finding.check: finding for finding in hosts.check_hostfile(path)}
    assert findings["pdsh"].status == "problem" and "--launcher" in findings["pdsh"].fix
    (ssh / "ssh").unlink()
    assert [f.status for f in hosts.check_hostfile(path) if f.check == "ssh"] == ["problem"]
