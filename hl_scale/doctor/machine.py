"""The machine itself: package versions, devices, shared memory, and its name.

The ranges of packages are those of the installed distribution's metadata, which come from pyproject.toml.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
from collections.abc import Collection, Iterator
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from hl_scale.doctor.findings import Finding, ok, problem, warning
from hl_scale.kernels.available import has_triton

DISTRIBUTION = "hl_scale"
KNOWN_TROUBLES = {
    "torch": ("<2.6", "CVE-2025-32434: torch.load runs code from a file even with weights_only=True"),
    "ray": ("<2.54", "CVE-2026-27482: the dashboard obeys DELETE requests without authentication"),
}
"""Distribution -> versions that must not be used, and why."""
_FOR_DEVELOPERS = "dev"
_DEEPSPEED_BUFFER = 69_000_000  # bytes of shared memory for each rank on CPUs
_RAY_STORE_SHARE, _RAY_STORE_CAP = 0.3, 10_000_000_000  # of available memory; Ray moves to /tmp where less is free


def check_packages() -> list[Finding]:
    """Python and every required package against its range; packages of an extra of which some are there."""
    try:
        metadata = importlib.metadata.metadata(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        found = f"no metadata of {DISTRIBUTION}, so the versions it needs are unknown"
        return [warning("packages", found, "install it, for example by pip install -e . in the clone")]
    findings = []
    wanted, python = metadata["Requires-Python"], platform.python_version()
    if wanted and not SpecifierSet(wanted).contains(python, prereleases=True):
        findings.append(problem("Python", f"{python}, needs {wanted}", f"make a virtual environment with {wanted}"))
    for requirement in _requirements(DISTRIBUTION, [""]):
        findings += _package(requirement)
    if not findings:
        versions = ", ".join(f"{name} {version}" for name, version in installed_versions().items())
        findings.append(ok("packages", versions))
    return findings + list(_extras(metadata.get_all("Provides-Extra") or []))


def installed_versions() -> dict[str, str]:
    """Python and each required package that is installed: name -> version."""
    try:
        required = _requirements(DISTRIBUTION, [""])
    except importlib.metadata.PackageNotFoundError:
        required = []
    versions = {requirement.name: _version(requirement.name) for requirement in required}
    return {"python": platform.python_version()} | {name: v for name, v in versions.items() if v is not None}


def _requirements(distribution: str, extras: Collection[str]) -> list[Requirement]:
    """What a distribution requires under any of these extras; "" is none."""
    found = [Requirement(text) for text in importlib.metadata.requires(distribution) or ()]
    return [r for r in found if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in extras)]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _fault(requirement: Requirement) -> str | None:
    """What is wrong with an installed package, or None."""
    version = _version(requirement.name)
    if version is None:
        return f"not installed, needs {requirement}"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{version}, needs {requirement.specifier}"
    return None


def _package(requirement: Requirement) -> Iterator[Finding]:
    """Problems of a required package, and of what its extras require."""
    fault, version = _fault(requirement), _version(requirement.name)
    versions, why = KNOWN_TROUBLES.get(requirement.name, ("<0", ""))
    troubled = version is not None and SpecifierSet(versions).contains(version, prereleases=True)
    if fault or troubled:
        found = "; ".join(part for part in (fault or version, why if troubled else None) if part)
        yield problem(requirement.name, found, f'pip install --upgrade "{requirement}"')
        return
    if not requirement.extras:
        return
    plain = {str(part) for part in _requirements(requirement.name, [""])}
    parts = [part for part in _requirements(requirement.name, requirement.extras) if str(part) not in plain]
    lacking = [f"{part.name}: {fault}" for part in parts if (fault := _fault(part))]
    if lacking:
        extras = ",".join(sorted(requirement.extras))
        yield problem(f"{requirement.name}[{extras}]", "; ".join(lacking), f'pip install --upgrade "{requirement}"')


def _extras(names: list[str]) -> Iterator[Finding]:
    """An extra that is not there at all was not asked for; one that is there in part was."""
    absent = []
    plain = {str(requirement) for requirement in _requirements(DISTRIBUTION, [""])}
    for name in names:
        if name == _FOR_DEVELOPERS:
            continue
        parts = [part for part in _requirements(DISTRIBUTION, [name]) if str(part) not in plain]
        faults = {part.name: fault for part in parts if (fault := _fault(part))}
        if parts and not any(_version(part.name) for part in parts):
            absent.append(f"{name} ({', '.join(faults)})")
        elif faults:
            found = "; ".join(f"{part}: {fault}" for part, fault in faults.items())
            yield warning(f"extra {name}", found, f'pip install "{DISTRIBUTION}[{name}]"')
    if absent:
        yield ok("extras", f"not installed: {', '.join(absent)}")


def check_devices(driver: Path = Path("/proc/driver/nvidia/version")) -> list[Finding]:
    """GPUs, or the CPU; whether PyTorch and DeepSpeed would use them.

    Args:
        driver: file that exists where NVIDIA's kernel module is loaded.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    findings = [ok("devices", _gpus(gpus) if gpus else _processors())]
    if gpus and not has_triton():
        found = "not installed: kernels for GPUs fall back to plain PyTorch, which is slower"
        findings.append(warning("triton", found, "pip install triton"))
    if not gpus and driver.exists():
        built = torch.version.cuda or "no CUDA"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        found = f"an NVIDIA driver is loaded, but PyTorch {torch.__version__} (built for {built}) sees no GPU"
        found += "" if visible is None else f"; CUDA_VISIBLE_DEVICES={visible!r}"
        fix = "install a CUDA build of torch that this driver can run, and do not hide the GPUs"
        findings.append(warning("GPUs", found, fix))
    return findings + _accelerator(gpus)


def _gpus(count: int) -> str:
    sizes = []
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        sizes.append(f"{torch.cuda.get_device_name(index)} ({free / 1e9:.1f} of {total / 1e9:.1f} GB free)")
    return f"{count} GPU{'s' if count > 1 else ''}: {', '.join(sizes)}"


def _processors() -> str:
    memory, cores = psutil.virtual_memory(), len(os.sched_getaffinity(0))
    sizes = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB memory available"
    return f"CPU: cores: {cores}, {sizes}, threads of a process: {torch.get_num_threads()}"


def _accelerator(gpus: int) -> list[Finding]:
    """Whether DS_ACCELERATOR fits the devices."""
    wanted = os.environ.get("DS_ACCELERATOR")
    if wanted not in (None, "cpu", "cuda"):
        return [problem("DS_ACCELERATOR", f"{wanted!r} is not supported", "unset it, or set it to cpu or cuda")]
    if wanted == "cuda" and not gpus:
        fix = "unset DS_ACCELERATOR, or set it to cpu"
        return [problem("DS_ACCELERATOR", "'cuda', but PyTorch sees no GPU", fix)]
    if wanted == "cpu" and gpus:
        return [warning("DS_ACCELERATOR", f"'cpu', so {gpus} GPUs stay idle", "unset DS_ACCELERATOR")]
    return []


def check_shared_memory(ranks: int, directory: Path = Path("/dev/shm")) -> Finding:
    """Room for DeepSpeed's buffers on CPUs and for Ray's object store.

    Args:
        ranks: processes on this machine that train on its CPU; 0 if they train on GPUs.
        directory: where shared memory is mounted.
    """
    name = str(directory)
    if not directory.is_dir():
        return problem(name, "is not there", "mount a tmpfs on it")
    free, needed = shutil.disk_usage(directory).free, ranks * _DEEPSPEED_BUFFER
    larger = f"mount -o remount,size=8G {directory}; in a container: docker run --shm-size=8g"
    if free < needed:
        found = f"{free / 1e6:.0f} MB free; DeepSpeed's buffers for {ranks} ranks take {needed / 1e6:.0f} MB"
        return problem(name, found, larger)
    store = min(_RAY_STORE_SHARE * psutil.virtual_memory().available, _RAY_STORE_CAP)
    if free < store:
        found = f"{free / 1e9:.1f} GB free; Ray's object store asks for {store / 1e9:.1f} GB and falls back to disk"
        return warning(name, found, larger)
    return ok(name, f"{free / 1e9:.1f} GB free")


def check_hostname(several_nodes: bool) -> Finding:
    """Whether this machine's name leads to an address at which other nodes reach it, as Gloo takes it to do."""
    name = socket.gethostname()
    fix = f"give {name} its address on the network in /etc/hosts, or set GLOO_SOCKET_IFNAME to that interface"
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        return warning("hostname", f"{name} does not resolve ({error}): Gloo then takes the loopback address", fix)
    if several_nodes and address.startswith("127.") and "GLOO_SOCKET_IFNAME" not in os.environ:
        return warning("hostname", f"{name} resolves to {address}, where no other node reaches it", fix)
    return ok("hostname", f"{name} resolves to {address}")
