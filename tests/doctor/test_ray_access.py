"""Who may submit work to Ray: its token, and a dashboard that must refuse strangers."""

from __future__ import annotations

import http.server
import json
import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hl_scale.doctor import ray_access


def test_a_token_others_can_read_is_a_problem(token):
    token.chmod(0o644)
    finding = ray_access.check_ray_token(False)
    assert finding.status == "problem" and "mode 644" in finding.found and finding.fix == f"chmod 600 {token}"
    token.parent.chmod(0o700)
    assert ray_access.check_ray_token(False).status == "ok"
    token.parent.chmod(0o755)
    token.chmod(0o600)
    assert ray_access.check_ray_token(False).status == "ok"


def test_the_fix_makes_a_token_for_this_user_alone(token, monkeypatch):
    """`ray get-auth-token --generate` itself obeys the umask, which usually lets others read."""
    token.unlink()
    binary = str(Path(sys.executable).parent)
    command = ray_access._GENERATE.replace("ray get-auth-token", f"{binary}/ray get-auth-token")
    subprocess.run(["bash", "-c", command], check=True, capture_output=True)
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert ray_access.check_ray_token(True).status == "ok"


@pytest.mark.parametrize("several", [False, True])
def test_without_a_token_only_a_cluster_is_in_danger(several):
    assert ray_access.check_ray_token(several).status == ("warning" if several else "ok")


@pytest.mark.parametrize(
    ("variables", "several", "status", "said"),
    [
        ({"RAY_AUTH_MODE": "token"}, False, "problem", "No such file"),
        ({"RAY_AUTH_MODE": "tokens"}, False, "problem", "unknown"),
        ({"RAY_AUTH_MODE": "disabled"}, False, "warning", "runs whatever"),
        ({"RAY_AUTH_MODE": "disabled"}, True, "problem", "runs whatever"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "secret"}, True, "ok", "in RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_TOKEN": " "}, True, "problem", "empty"),
        ({"RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, False, "problem", "/nowhere/token cannot be read"),
        ({"RAY_AUTH_TOKEN": "secret"}, False, "ok", "in RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_TOKEN": "secret"}, True, "warning", "RAY_AUTH_MODE is not set"),
        ({"RAY_AUTH_TOKEN_PATH": "/dev/null"}, False, "problem", "is empty"),
        ({"RAY_AUTH_TOKEN_PATH": "/"}, False, "problem", "cannot be read"),
    ],
)
def test_the_ways_to_give_ray_a_token(monkeypatch, variables, several, status, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    finding = ray_access.check_ray_token(several)
    assert finding.status == status and said in finding.found


@pytest.fixture
def dashboard(monkeypatch):
    """dashboard(status, body, address) starts an HTTP server that answers every request so, as Ray's dashboard."""
    servers = []

    def start(status, body="", address="127.0.0.1"):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *arguments):
                pass

        server = http.server.ThreadingHTTPServer((address, 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{server.server_port}/")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


VERSION = json.dumps({"version": "4", "ray_version": "2.60.0"})


@pytest.mark.parametrize(
    ("status", "body", "address", "expected", "said"),
    [
        (200, VERSION, "127.0.0.1", "problem", "obeys without a token"),
        (200, VERSION, "0.0.0.0", "problem", "to everybody who reaches 0.0.0.0:"),
        (401, "", "127.0.0.1", "ok", "refuses requests without a token"),
        (401, "", "0.0.0.0", "warning", "travels unencrypted"),
        (200, "<html>", "127.0.0.1", "warning", "is no Ray dashboard"),
        (200, "17", "127.0.0.1", "warning", "is no Ray dashboard"),
        (500, "", "127.0.0.1", "warning", "is no Ray dashboard"),
    ],
)
def test_a_dashboard_must_refuse_strangers(dashboard, status, body, address, expected, said):
    dashboard(status, body, address)
    finding = ray_access.check_dashboard()
    assert finding.status == expected and said in finding.found


def test_a_dashboard_that_does_not_answer_is_a_warning_where_one_was_named(monkeypatch, free_port):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{free_port()}")
    assert ray_access.check_dashboard().status == "warning"
    monkeypatch.setattr(ray_access, "DEFAULT_DASHBOARD", os.environ["RAY_API_SERVER_ADDRESS"])
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    assert ray_access.check_dashboard().status == "ok"


def test_a_server_that_speaks_no_http_is_no_dashboard(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{server.getsockname()[1]}")

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert ray_access.check_dashboard().status == "warning"
        thread.join()


@pytest.mark.parametrize("address", ["head:8265", "file:///etc/passwd", "http://", "http://head:port"])
def test_an_address_that_is_none_of_a_dashboard_is_a_problem(monkeypatch, address):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)
    assert ray_access.check_dashboard().status == "problem"
