"""`hl-scale doctor`: what it prints, its exit status, and what it does not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hl_scale import cli
from hl_scale.doctor import conclusion, findings_as_dict
from hl_scale.doctor.findings import ok, problem, warning, worst

ROOT = Path(__file__).resolve().parents[2]
GPUS = torch.cuda.device_count()
DEVICE = "cuda" if GPUS else "cpu"


def test_a_problem_outweighs_warnings_and_both_are_counted():
    findings = [ok("a", "x"), warning("b", "x", "y"), problem("c", "x", "y"), warning("d", "x", "y")]
    assert [worst(findings[:length]) for length in (0, 1, 2, 3)] == ["ok", "ok", "warning", "problem"]
    assert conclusion(findings) == "1 problem and 2 warnings in 4 checks"
    assert conclusion(findings[:1]) == "all 1 checks are ok"
    assert findings_as_dict(findings[2:3]) == {
        "status": "problem", "checks": [{"check": "c", "status": "problem", "found": "x", "fix": "y"}]
    }  # fmt: skip


@pytest.fixture
def doctor(monkeypatch, capsys):
    """doctor(*arguments) -> exit status and stdout."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["hl-scale", "doctor", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr().out

    return call


def test_a_machine_that_can_run_a_configuration_gets_status_0(
    doctor, tiny_config, write_yaml, tmp_path, monkeypatch, free_port
):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{free_port()}")
    path = write_yaml(tiny_config(tmp_path / "runs" / "x", {"cluster.num_workers": 1}), tmp_path / "config.yaml")
    status, out = doctor(path, "--json", "--storage", tmp_path)
    result = json.loads(out)
    checks = {check["check"]: check["status"] for check in result["checks"]}
    assert status == 0 and "problem" not in checks.values(), out
    backend = "nccl" if GPUS > 1 else "gloo"
    for name in (
        *(f"all-reduce ({backend})", "bitsandbytes", f"NF4 on {DEVICE}", f"Sinkhorn on {DEVICE}", "packages"),
        *(
            "base model",
            "corpus",
            "run",
            "trust_remote_code",
            "storage: run.directory",
            f"storage: --storage {tmp_path}",
        ),
    ):
        assert checks[name] == "ok", name
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["config.yaml"]


@pytest.mark.skipif(GPUS > 1, reason="Gloo is not what would be used")
def test_problems_are_named_with_a_fix_and_give_status_1(doctor, tiny_config, write_yaml, tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    wide = {"hypernetwork.hidden_width": 10**7}
    path = write_yaml(tiny_config(tmp_path / "run", wide), tmp_path / "config.yaml")
    status, out = doctor(path, "data.directory=/nowhere/at/all")
    text = " ".join(out.split())
    assert status == 1 and "problems" in out.splitlines()[-1]
    assert "nosuch0" in text and "GLOO_SOCKET_IFNAME to an interface" in text
    assert "no corpus at /nowhere/at/all" in text and "checkpoints take" in text


def test_a_wrong_configuration_is_refused_like_everywhere(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["hl-scale", "doctor", str(tmp_path / "absent.yaml")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "configuration file not found" in capsys.readouterr().err


def test_neither_ray_nor_deepspeed_is_imported_by_importing_the_checks():
    code = "from hl_scale.doctor import backends, hosts, machine, ray_access, ray_nodes, recipe\nimport sys\n"
    code += "print([name for name in ('ray', 'deepspeed') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == "[]", run.stderr
