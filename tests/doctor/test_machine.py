"""Packages, devices, shared memory and the machine's name: what passes, and what is found."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hl_scale.doctor import machine

ROOT = Path(__file__).resolve().parents[2]
GPUS = torch.cuda.device_count()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install(name, version, *requirements, extras=(), python="") puts a distribution before all installed ones."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name, version, *requirements, extras=(), python=">=3.11"):
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", f"Requires-Python: {python}"]
        lines += [f"Provides-Extra: {extra}" for extra in extras] + [f"Requires-Dist: {r}" for r in requirements]
        directory = tmp_path / f"{name}-{version}.dist-info"
        directory.mkdir()
        (directory / "METADATA").write_text("\n".join(lines) + "\n")

    return write


def test_the_packages_of_this_environment_are_in_the_ranges_of_the_project():
    findings = {finding.check: finding for finding in machine.check_packages()}
    assert findings["packages"].status == "ok"
    assert f"torch {torch.__version__}" in findings["packages"].found


@pytest.mark.parametrize(
    ("name", "version", "wanted", "why"),
    [("torch", "2.5.1", "torch>=2.8", "CVE-2025-32434"), ("ray", "2.53.0", "ray>=2.60", "CVE-2026-27482")],
)
def test_a_version_out_of_range_is_a_problem_and_known_trouble_is_named(install, name, version, wanted, why):
    install("hl_scale", "0.1.0", wanted, "numpy>=1.26")
    install(name, version)
    (finding,) = machine.check_packages()
    assert (finding.check, finding.status) == (name, "problem")
    assert version in finding.found and wanted.removeprefix(name) in finding.found and why in finding.found
    assert wanted in finding.fix


def test_known_trouble_is_a_problem_within_the_range_too(install):
    install("hl_scale", "0.1.0", "torch>=2.0")
    install("torch", "2.5.1")
    (finding,) = machine.check_packages()
    assert finding.status == "problem" and "CVE-2025-32434" in finding.found


def test_a_missing_package_is_a_problem(install):
    install("hl_scale", "0.1.0", "no-such-package>=3")
    (finding,) = machine.check_packages()
    assert (finding.check, finding.status) == ("no-such-package", "problem")
    assert "not installed" in finding.found
    assert finding.fix == 'pip install --upgrade "no-such-package>=3"'


def test_what_an_extra_of_a_required_package_needs_is_looked_at(install):
    install("hl_scale", "0.1.0", "ray[default]>=2.60")
    install(
        "ray", "2.60.0", "numpy", "no-such-dashboard; extra == 'default'", "other; extra == 'x'", extras=["default"]
    )
    (finding,) = machine.check_packages()
    assert (finding.check, finding.status) == ("ray[default]", "problem")
    assert "no-such-dashboard: not installed" in finding.found and "other" not in finding.found


def test_an_extra_that_is_there_in_part_is_a_warning_and_one_that_is_not_there_is_none(install):
    needs = ["numpy", "numpy; extra == 'half'", "no-such-part>=2; extra == 'half'", "no-such-whole; extra == 'absent'"]
    install("hl_scale", "0.1.0", *needs, extras=["half", "absent", "dev"])
    found = {finding.check: finding for finding in machine.check_packages()}
    assert {check: finding.status for check, finding in found.items()} == {
        "packages": "ok", "extra half": "warning", "extras": "ok"
    }  # fmt: skip
    assert "no-such-part" in found["extra half"].found and "numpy" not in found["extra half"].found
    assert "absent (no-such-whole)" in found["extras"].found


def test_another_python_is_a_problem(install):
    install("hl_scale", "0.1.0", python=">=99")
    assert [(f.check, f.status) for f in machine.check_packages()] == [("Python", "problem")]


def test_without_metadata_of_the_project_the_versions_it_needs_are_unknown(monkeypatch):
    monkeypatch.setattr(machine, "DISTRIBUTION", "hl-scale-that-is-not-installed")
    (finding,) = machine.check_packages()
    assert finding.status == "warning" and "pip install -e" in finding.fix
    assert list(machine.installed_versions()) == ["python"]


def test_the_devices_of_this_machine_are_described(tmp_path):
    finding = machine.check_devices(driver=tmp_path / "none")[0]
    assert finding.status == "ok" and "GB" in finding.found
    assert torch.cuda.get_device_name(0) in finding.found if GPUS else "cores: " in finding.found


@pytest.mark.skipif(GPUS > 0, reason="there is a GPU")
@pytest.mark.parametrize(("value", "status"), [("cuda", "problem"), ("xpu", "problem"), ("cpu", None), (None, None)])
def test_an_accelerator_that_is_not_there_is_a_problem(monkeypatch, tmp_path, value, status):
    if value is not None:
        monkeypatch.setenv("DS_ACCELERATOR", value)
    findings = [f for f in machine.check_devices(tmp_path / "none") if f.check == "DS_ACCELERATOR"]
    assert [finding.status for finding in findings] == ([] if status is None else [status])


@pytest.mark.gpu
def test_an_idle_gpu_is_a_warning(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert "warning" in [f.status for f in machine.check_devices() if f.check == "DS_ACCELERATOR"]


@pytest.mark.skipif(GPUS > 0, reason="there is a GPU")
def test_a_driver_without_a_gpu_for_pytorch_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "version").write_text("NVRM version")
    (finding,) = [f for f in machine.check_devices(tmp_path / "version") if f.check == "GPUs"]
    assert finding.status == "warning" and torch.__version__ in finding.found
    assert "CUDA_VISIBLE_DEVICES=''" in finding.found


def test_shared_memory_too_small_for_the_ranks_is_a_problem_and_for_ray_a_warning(small_disk):
    for_ranks, for_ray = machine.check_shared_memory(2, small_disk), machine.check_shared_memory(0, small_disk)
    assert for_ranks.status == "problem" and "138 MB" in for_ranks.found and "--shm-size" in for_ranks.fix
    assert for_ray.status == "warning" and "object store" in for_ray.found


def test_missing_shared_memory_is_a_problem(tmp_path):
    assert machine.check_shared_memory(1, tmp_path / "shm").status == "problem"


def test_free_space_is_enough_for_shared_memory(tmp_path):
    if shutil.disk_usage(tmp_path).free < 11e9:
        pytest.skip("less than 11 GB free")
    assert machine.check_shared_memory(2, tmp_path).status == "ok"


def test_a_name_without_an_address_or_with_the_loopback_address_is_a_warning():
    code = """if True:
        import socket
        from hl_scale.doctor.machine import check_hostname
        for name, several in (("nowhere.invalid", False), ("localhost", True), ("localhost", False)):
            socket.sethostname(name)
            print(check_hostname(several).status)
    """
    run = subprocess.run(["unshare", "--uts", sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    if "unshare" in run.stderr:
        pytest.skip("a namespace for the hostname needs root")
    assert run.stdout.split() == ["warning", "warning", "ok"], run.stderr
