"""Who may submit work to Ray: the token, who can read it, and whether a dashboard answers strangers.

Whoever reaches a dashboard that asks for no token runs what they like on the cluster (CVE-2023-48022).
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import socket
import stat
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from hl_scale.doctor.findings import Finding, ok, problem, warning

DEFAULT_DASHBOARD = "http://127.0.0.1:8265"
_GENERATE = "export RAY_AUTH_MODE=token; (umask 077; ray get-auth-token --generate)"
_SECONDS = 5


def check_ray_token(several_nodes: bool) -> Finding:
    """Whether Ray would ask for a token, where it is, and whether others on this machine can read it.

    Args:
        several_nodes: a cluster is meant, not Ray within one machine, which makes a token for itself.
    """
    check, mode = "Ray token", os.environ.get("RAY_AUTH_MODE", "").lower()
    if mode not in ("", "token", "disabled"):
        return problem(check, f"RAY_AUTH_MODE={mode!r} is unknown to Ray", "export RAY_AUTH_MODE=token")
    if mode == "disabled":
        found = "RAY_AUTH_MODE=disabled: Ray started from here runs whatever is submitted to it"
        return (problem if several_nodes else warning)(check, found, _GENERATE)
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    if "RAY_AUTH_TOKEN" not in os.environ and not path.exists() and not named and not mode:
        if several_nodes:
            return warning(check, f"none: `ray start` would ask nobody for one ({path} is not there)", _GENERATE)
        return ok(check, "none yet; Ray within this machine makes its own")
    finding = _examine_token(check, path)
    if finding.status == "ok" and several_nodes and not mode:
        found = (
            f"{finding.found}; but RAY_AUTH_MODE is not set, so it is not sent to RAY_ADDRESS, nor by ray job submit"
        )
        return warning(check, found, "export RAY_AUTH_MODE=token")
    return finding


def _examine_token(check: str, path: Path) -> Finding:
    """The token that Ray takes: that of RAY_AUTH_TOKEN, else the one in this file."""
    if "RAY_AUTH_TOKEN" in os.environ:
        if os.environ["RAY_AUTH_TOKEN"].strip():
            return ok(check, "in RAY_AUTH_TOKEN")
        return problem(check, "RAY_AUTH_TOKEN is empty", f"unset RAY_AUTH_TOKEN; {_GENERATE}")
    try:
        empty = not path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        return problem(check, f"{path} cannot be read: {getattr(error, 'strerror', error)}", _GENERATE)
    if empty:
        return problem(check, f"{path} is empty", _GENERATE)
    if _readable_by_others(path):
        permissions = stat.S_IMODE(path.stat().st_mode)
        return problem(check, f"other users can read {path} (mode {permissions:03o})", f"chmod 600 {path}")
    return ok(check, f"in {path}, for this user alone")


def _readable_by_others(path: Path) -> bool:
    """Whether the group or everybody may read the file and pass through every directory above it."""
    resolved = path.resolve()
    above = [parent.stat().st_mode for parent in resolved.parents]
    return any(
        resolved.stat().st_mode & read and all(mode & search for mode in above)
        for read, search in ((stat.S_IRGRP, stat.S_IXGRP), (stat.S_IROTH, stat.S_IXOTH))
    )


def check_dashboard() -> Finding:
    """Ask the dashboard of RAY_API_SERVER_ADDRESS (or of this machine) for its version, as a stranger would."""
    check, named = "Ray dashboard", os.environ.get("RAY_API_SERVER_ADDRESS")
    address = (named or DEFAULT_DASHBOARD).rstrip("/")
    url = urlsplit(address)
    try:
        port = url.port or {"http": 80, "https": 443}.get(url.scheme)
    except ValueError:
        port = None
    if port is None or not url.hostname:
        fix = "export RAY_API_SERVER_ADDRESS=http://HEAD:8265"
        return problem(check, f"RAY_API_SERVER_ADDRESS={address!r} is not the address of a dashboard", fix)
    status, body = _get(f"{address}/api/version")
    if status is None:
        if named:
            fix = "start Ray there, open the port to this machine, or correct RAY_API_SERVER_ADDRESS"
            return warning(check, f"{address} does not answer: {body}", fix)
        return ok(check, f"none answers at {address}")
    seen = _seen_beyond(url.hostname, port)
    reach = f", to everybody who reaches {seen}" if seen else ""
    if status == 200 and _is_ray(body):
        fix = f"stop Ray; {_GENERATE}; ray start --head"
        return problem(check, f"{address} obeys without a token{reach}", fix)
    if status not in (401, 403):
        fix = "set RAY_API_SERVER_ADDRESS to the dashboard of the cluster"
        return warning(check, f"what answers at {address} (status {status}) is no Ray dashboard", fix)
    if seen:
        found = f"{address} asks for a token, which travels unencrypted{reach}"
        fix = "let a firewall admit the cluster alone, or use --dashboard-host 127.0.0.1 and an ssh tunnel"
        return warning(check, found, fix)
    return ok(check, f"{address} refuses requests without a token, and other machines do not reach it")


def _get(url: str) -> tuple[int | None, str]:
    """Status and beginning of the body; None and the reason where nothing answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_SECONDS) as answer:
            return answer.status, answer.read(4096).decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, ""
    except (OSError, http.client.HTTPException) as error:
        return None, str(getattr(error, "reason", error))


def _is_ray(body: str) -> bool:
    try:
        return "ray_version" in json.loads(body)
    except (ValueError, TypeError):
        return False


def _seen_beyond(host: str, port: int) -> str | None:
    """The address, other than loopback, at which a dashboard is reached; None if there is none.

    Args:
        host, port: where it answered.
    """
    address = str(socket.getaddrinfo(host, None)[0][4][0])
    if not ipaddress.ip_address(address).is_loopback:
        return f"{address}:{port}"
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
            listening = connection.laddr.ip
            if not ipaddress.ip_address(listening).is_loopback:
                return f"{listening}:{port}"
    return None
