"""Ray Train around the same loop: workers, elasticity and resuming after failures.

The driver stays light: torch and DeepSpeed are imported in workers only. Every worker calls `engine.loop.train`, which
resumes from the newest checkpoint of the run directory, so a group restarted at another size just goes on.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hl_scale.cluster.session import ray_session, refuse_job_paths, with_absolute_paths, worker_environment
from hl_scale.config import Config, ConfigError, parse_config

_PREEMPTION_CHECK_SECONDS = 5.0


def train_on_ray(config: Config) -> dict[str, Any]:
    """Run a training as a Ray Train job and wait for it.

    Args:
        config: `cluster` says how many workers; paths are made absolute, so on several nodes they must be shared.

    Returns:
        How far rank 0 got: step, loss, newest checkpoint, and whether it was interrupted.

    Raises:
        ConfigError: more than one node and no shared storage, or a worker met something the user has to mend, which no
            retry would.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    with ray_session():
        cluster = config.cluster
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(cluster.start_timeout_seconds)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        if len(nodes) > 1 and cluster.storage_path is None:
            raise ConfigError(
                f"this Ray cluster has {len(nodes)} nodes but cluster.storage_path is not set\n"
                "  fix: set cluster.storage_path, run.directory and data.directory to storage that every node mounts"
            )
        paths = {"run.directory": config.run.directory, "data.directory": config.data.directory}
        if config.objective.kind == "reconstruction":
            paths["objective.library"] = config.objective.library
        if config.lora.task_adapter is not None:
            paths["lora.task_adapter"] = config.lora.task_adapter
        refuse_job_paths(paths)
        config = with_absolute_paths(config)
        storage = cluster.storage_path or str(Path(config.run.directory).parent)
        trainer = TorchTrainer(
            _worker,  # type: ignore[arg-type]  # Ray's annotation predates return values
            train_loop_config=config.model_dump(mode="json"),
            torch_config=TorchConfig(backend="nccl" if cluster.use_gpu else "gloo"),
            scaling_config=ScalingConfig(  # type: ignore[call-arg]
                num_workers=cluster.num_workers,  # type: ignore[arg-type]
                use_gpu=cluster.use_gpu,
                resources_per_worker={"CPU": cluster.cpus_per_worker, **({"GPU": 1} if cluster.use_gpu else {})},
                elastic_resize_monitor_interval_s=cluster.resize_interval_seconds,
            ),
            run_config=RunConfig(  # type: ignore[call-arg]
                name=Path(config.run.directory).name + ".ray",
                storage_path=str(Path(storage).absolute()),
                failure_config=FailureConfig(max_failures=cluster.maximum_failures),
                worker_runtime_env={"env_vars": worker_environment(config)},
            ),
        )
        outcome: dict[str, Any] = trainer.fit().return_value  # type: ignore[attr-defined]  # of rank 0
        if "error" in outcome:
            raise ConfigError(outcome["error"])
        return outcome


def _worker(tree: dict[str, Any]) -> dict[str, Any]:
    """One Ray Train worker; Ray has set RANK, WORLD_SIZE and MASTER_* and started the process group.

    What it returns reaches the driver; metrics reported without a Ray checkpoint do not.
    """
    import ray.train

    from hl_scale.engine.checkpoint import CheckpointError
    from hl_scale.engine.health import TrainingAborted
    from hl_scale.engine.loop import Hooks, train
    from hl_scale.engine.run_lock import RunInUse
    from hl_scale.engine.zero3 import is_on_all_ranks

    def report(step: int, directory: Path, metrics: dict[str, float]) -> None:
        ray.train.report({"step": step, "loss": metrics["loss"], "checkpoint": str(directory)})

    config = parse_config(tree)
    try:
        result = train(config, hooks=Hooks(on_step=_Preemption(), on_checkpoint=report))
    except Exception as error:
        # What all workers know of is for the user to mend: raised, it would make Ray try again. A run directory that is
        # still held, as by a process of a lost node whose lease has not run out, is worth another try.
        if isinstance(error, RunInUse) or not (
            is_on_all_ranks(error) or isinstance(error, ConfigError | CheckpointError | TrainingAborted)
        ):
            raise
        return {"error": str(error)}
    return {
        "step": result.step,
        "loss": result.loss,
        "checkpoint": str(result.checkpoint),
        "interrupted": result.interrupted,
    }


class _Preemption:
    """Asks for one checkpoint when Ray announces that a node will go.

    Ray's question is a barrier: it is asked after the same steps everywhere, about as often as Ray itself looks.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._announced = False

    def __call__(self, step: int, metrics: dict[str, float]) -> bool:
        import ray.train

        self._seconds += metrics["seconds"]  # of the slowest rank, so the same on all
        if self._seconds < _PREEMPTION_CHECK_SECONDS:
            return False
        self._seconds = 0.0
        before, self._announced = self._announced, ray.train.get_preemption_info() is not None
        return self._announced and not before
