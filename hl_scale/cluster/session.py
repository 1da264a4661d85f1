"""What drivers of Ray jobs share: connecting, paths that hold on every node, and the environment of workers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hl_scale.config import Config, ConfigError, parse_config


@contextmanager
def ray_session(log_to_driver: bool = True) -> Iterator[None]:
    """The cluster of RAY_ADDRESS, or a Ray of this machine; left at the end, unless this process was connected before.

    Args:
        log_to_driver: print what workers print.
    """
    import ray

    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if "RAY_ADDRESS" in os.environ:
            ray.init(log_to_driver=log_to_driver)
        else:
            ray.init(include_dashboard=False, log_to_driver=log_to_driver)
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def with_absolute_paths(config: Config) -> Config:
    """Workers run in other directories: make every path that this driver resolves absolute."""
    tree = config.model_dump(mode="json")
    always = [
        ("run", "directory"), ("data", "directory"), ("base", "cache_directory"), ("objective", "library"),
        ("lora", "task_adapter"),
    ]  # fmt: skip
    if_there = [("base", "model"), ("conditions", "encoder")]  # else the id of a hub, or of a package
    for section, key in (*always, *if_there):
        path = Path(tree[section].get(key) or "")
        if path.parts and ((section, key) in always or path.is_dir()):
            tree[section][key] = str(path.absolute())
    return parse_config(tree)


def refuse_job_paths(paths: Mapping[str, str]) -> None:
    """A submitted job runs in a temporary copy of its working directory: relative paths would vanish with it.

    Args:
        paths: what the user calls each path -> the path.

    Raises:
        ConfigError: this is such a job, and a path is relative.
    """
    relative = [name for name, path in paths.items() if not Path(path).is_absolute()]
    if relative and "working_dir_files" in Path.cwd().parts:
        raise ConfigError(
            f"{' and '.join(relative)} would lie in Ray's temporary copy of the working directory ({Path.cwd()})\n"
            "  fix: give absolute paths on storage that every node mounts"
        )


def worker_environment(config: Config) -> dict[str, str]:
    """Variables each worker starts with: this package's location, threads per CPU worker."""
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    if not config.cluster.use_gpu:
        environment |= {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, int(config.cluster.cpus_per_worker)))),
            "DS_ACCELERATOR": "cpu",
        }
    return environment
