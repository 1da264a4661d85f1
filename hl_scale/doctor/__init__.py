"""Whether this machine and this cluster can run it, and how to mend what is not as it should be."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hl_scale.doctor.findings import Finding, conclusion, findings_as_dict, render_findings, worst

if TYPE_CHECKING:
    from hl_scale.config import Config

__all__ = ["Finding", "conclusion", "examine", "findings_as_dict", "render_findings", "worst"]


def examine(
    config: Config | None = None,
    *,
    storage: Sequence[Path] = (),
    hostfile: Path | None = None,
    cluster: bool = False,
) -> Iterator[Finding]:
    """Run every check that applies, one after the other; nothing is left behind.

    Args:
        config: also checks what this configuration needs, and the storage it names.
        storage: further directories to check.
        hostfile: of the DeepSpeed launcher, whose hosts are then tried.
        cluster: also looks from every node of the Ray cluster at RAY_ADDRESS.
    """
    from hl_scale.doctor import backends, machine, ray_access, recipe
    from hl_scale.doctor.storage import check_storage
    from hl_scale.engine.zero3 import default_device

    device = default_device()
    several = cluster or hostfile is not None or "RAY_ADDRESS" in os.environ
    several = several or (config is not None and recipe.exceeds_machine(config))
    yield from machine.check_packages()
    yield from machine.check_devices()
    yield machine.check_shared_memory(recipe.local_ranks(config) if device == "cpu" else 0)
    yield machine.check_hostname(several)
    yield backends.check_nf4(device)
    yield backends.check_sinkhorn(device)
    yield backends.check_bitsandbytes()
    yield backends.check_all_reduce()
    yield ray_access.check_ray_token(several)
    yield ray_access.check_dashboard()
    required, paths = 0, {f"--storage {path}": path for path in storage}
    if config is not None:
        base, size = recipe.check_base(config)
        yield from (base, recipe.check_remote_code(config), recipe.check_corpus(config))
        yield from recipe.check_encoder(config)
        yield from recipe.check_library(config)
        yield recipe.check_run(config)
        required = (config.training.keep_checkpoints + 1) * (size or 0)
        paths |= recipe.storage_paths(config)
    usable = {}
    for name, path in paths.items():
        findings = check_storage(
            name, path, several_nodes=several, required=required if name == recipe.CHECKPOINTS else 0
        )
        yield from findings
        if worst(findings) != "problem":
            usable[name] = path.absolute()
    if hostfile is not None:
        from hl_scale.doctor.hosts import check_hostfile

        yield from check_hostfile(hostfile)
    if cluster:
        from hl_scale.doctor.ray_nodes import check_nodes

        yield from check_nodes(usable)
