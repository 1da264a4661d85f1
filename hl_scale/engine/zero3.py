"""Everything DeepSpeed: process group, configuration, engine construction, and the partitions of master weights.

DeepSpeed is imported inside functions, because importing it probes accelerators: a driver without one must not do so.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hl_scale.config import BaseModelConfig, ConfigError, TrainingConfig, Zero3Config
from hl_scale.data.sampling import BatchPlan
from hl_scale.engine.clipping import clip_by_group, parameter_groups
from hl_scale.engine.memory import keep_blocks, return_freed, share_one_heap

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class World:
    """This process among all: global rank, number of processes, device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def default_device() -> str:
    """ "cuda" where there is a GPU and DS_ACCELERATOR does not ask for the CPU."""
    return "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"


def join_world() -> World:
    """Join the process group a launcher described by RANK, WORLD_SIZE and MASTER_*, or start a group of one."""
    has_gpu = default_device() == "cuda"
    if not has_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "RANK" not in os.environ:
        _refuse_lone_tasks()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    # DeepSpeed calls collectives torch has renamed, and cannot look into our factors dataclass; neither is the user's.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

    if has_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        share_one_heap()
        # An all-reduce in shared memory that only tensor-parallel inference calls. It would be compiled at the first
        # start, which needs ninja and a C++ compiler, and every later start waits for one that was killed meanwhile.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if has_gpu else "gloo", verbose=False)
    device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
    return World(dist.get_rank(), dist.get_world_size(), device)


def _refuse_lone_tasks() -> None:
    """Tasks that srun or mpirun started without RANK would each train alone, all into one run directory."""
    for count, rank, local in (
        ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ):
        if rank in os.environ and os.environ.get(count, "1") != "1":
            raise ConfigError(
                f"{os.environ[count]} tasks were started ({count}), but RANK is not set, so each would train alone\n"
                f"  fix: export MASTER_ADDR and MASTER_PORT and start each task with bash -c 'RANK=${rank} "
                f"LOCAL_RANK=${local} WORLD_SIZE=${count} python launch/train.py --config ...'"
            )


class RankError(ValueError):
    """Another rank failed; the message is that rank's."""

    on_all_ranks = True


def is_on_all_ranks(error: Exception) -> bool:
    """Whether every rank knows of this error, so that none waits for another."""
    return getattr(error, "on_all_ranks", False)


@contextmanager
def together(world: World) -> Iterator[None]:
    """A block that fails on every rank if it fails on one, so that nobody waits for a rank that has left; collective.

    The block itself must not hold collectives.

    Raises:
        RankError: another rank failed and this one did not.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    messages = gather_objects(None if error is None else str(error) or repr(error), world)
    if error is not None:
        error.on_all_ranks = True  # type: ignore[attr-defined]
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            raise RankError(f"rank {rank}: {message}")


def gather_objects(value: Any, world: World) -> list[Any]:
    """Every rank's value, in the order of ranks; collective. For small values between processes that trust each other:
    they are pickled on the way."""
    values = [value]
    if world.size > 1:
        values = [None] * world.size
        dist.all_gather_object(values, value)
    return values


def deepspeed_config(
    base: BaseModelConfig, training: TrainingConfig, zero3: Zero3Config, plan: BatchPlan
) -> dict[str, Any]:
    """The DeepSpeed JSON; every number is concrete, none is "auto"."""
    optimization: dict[str, Any] = {
        "stage": 3,
        "overlap_comm": zero3.overlap_communication,
        "contiguous_gradients": True,
        "reduce_bucket_size": zero3.reduce_bucket_size,
        "stage3_prefetch_bucket_size": zero3.prefetch_bucket_size,
        "stage3_param_persistence_threshold": zero3.parameter_persistence_threshold,
        "stage3_max_reuse_distance": zero3.maximum_reuse_distance,
        "stage3_gather_16bit_weights_on_model_save": False,
    }
    if zero3.offload == "cpu":
        optimization["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_batch_size": plan.micro_batch * plan.accumulation * plan.world_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": training.gradient_clipping,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": base.compute_dtype == "bfloat16"},
        "zero_optimization": optimization,
        "comms_logger": {"enabled": zero3.log_communication, "prof_all": True, "verbose": False},
        "steps_per_print": 10**9,
    }


def build_engine(
    module: nn.Module, base: BaseModelConfig, training: TrainingConfig, zero3: Zero3Config, plan: BatchPlan
) -> Any:
    """Hand the module's trainable parameters to a ZeRO-3 engine with torch's AdamW.

    What loading and partitioning have freed goes back to the system, for the steps need the room.
    """
    import deepspeed

    return_freed()

    optimizer = torch.optim.AdamW(
        parameter_groups(module, training),
        lr=training.learning_rate,
        betas=training.betas,
        eps=training.adam_epsilon,
        weight_decay=training.weight_decay,
    )
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=deepspeed_config(base, training, zero3, plan)
    )
    clip_by_group(engine, training)
    return_freed()
    if base.placement == "replicated":
        keep_blocks()
    return engine


def gather_at_once(modules: Iterable[nn.Module]) -> None:
    """Let ZeRO-3 gather all parameters of each module when it is called, and know nothing of what happens inside.

    For modules that call their children a varying number of times: the engine requires that all ranks call the same
    modules in the same order, and ends with an error if they do not. Before the engine is built.
    """
    from deepspeed.utils import set_z3_leaf_module

    for module in modules:
        set_z3_leaf_module(module, True)


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    for group in engine.optimizer.optimizer.param_groups:
        group["lr"] = learning_rate * group["rate_ratio"]


def gradient_norm(engine: Any) -> float:
    """Global gradient norm of the last step, before clipping."""
    norm = engine.get_global_grad_norm()
    return float("nan") if norm is None else float(norm)


def communication() -> dict[str, dict[str, float]]:
    """What DeepSpeed's collectives have sent so far; empty unless `zero3.log_communication` is on.

    Returns:
        name -> count, bytes that this rank sends at least (in a ring), and seconds. A gathering that is not waited for
        at once has the seconds of its start alone.
    """
    from deepspeed.comm.comm import comms_logger

    world = dist.get_world_size()
    ring = {"all_gather_into_tensor": world - 1, "reduce_scatter_tensor": (world - 1) / world,
            "all_reduce": 2 * (world - 1) / world}  # fmt: skip
    found = {}
    for name, by_size in comms_logger.comms_dict.items():
        found[name] = {
            "count": float(sum(record[0] for record in by_size.values())),
            "bytes": ring.get(name, 0.0) * sum(size * record[0] for size, record in by_size.items()),
            # Its timer is never reset: each latency is the sum of all so far, in milliseconds.
            "seconds": max(record[1][-1] for record in by_size.values()) / 1000,
        }
    return found


def communication_metrics(before: dict[str, dict[str, float]], world: World) -> dict[str, float]:
    """Bytes and seconds (largest of all ranks) since an earlier `communication()`; collective if there are any."""
    now = communication()
    if not now:
        return {}
    sums = {
        key: sum(entry[key] - before.get(name, {}).get(key, 0.0) for name, entry in now.items())
        for key in ("bytes", "seconds")
    }
    return dict(zip((f"communication_{key}" for key in sums), reduce_max(list(sums.values()), world), strict=True))


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def local_partitions(engine: Any) -> dict[str, dict[str, Tensor]]:
    """This rank's flat float32 partition of every trainable parameter: master weight and Adam moments.

    The moments are zero while no step was applied, for the optimizer creates them with its first one.
    """
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    untouched = not engine.optimizer.optimizer.state
    partitions = {}
    for name, parameter in trainable_parameters(engine.module).items():
        entry = {"master": safe_get_local_fp32_param(parameter)}
        for moment in MOMENTS:
            empty = torch.zeros_like(entry["master"]) if untouched else None
            entry[moment] = safe_get_local_optimizer_state(parameter, moment) if empty is None else empty
        partitions[name] = {kind: tensor.detach().cpu().clone() for kind, tensor in entry.items()}
    return partitions


def full_shapes(module: nn.Module) -> dict[str, list[int]]:
    """Unpartitioned shape of every trainable parameter."""
    return {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in trainable_parameters(module).items()
    }


def replica_checksums(engine: Any) -> dict[str, int]:
    """CRC-32 of every trainable parameter that this rank holds whole because it is small: equal on all ranks."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    checksums = {}
    for name, parameter in trainable_parameters(engine.module).items():
        status, whole = parameter.ds_status, ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]
        if parameter.ds_persist and status == whole:  # type: ignore[attr-defined]
            values = parameter.detach().contiguous().cpu().flatten().view(torch.uint8)
            checksums[name] = zlib.crc32(values.numpy())
    return checksums


def restore_partitions(engine: Any, read: Callable[[str, str, int, int], Tensor], updates: int, world: World) -> None:
    """Set master weights, moments and Adam's count of updates, whatever world size wrote them.

    The module's own values must already be the same weights (they are loaded before the engine is built).

    Args:
        engine: ZeRO-3 engine.
        read: read(parameter, kind, start, stop) gives those elements of the flat whole; fewer at its end.
        updates: steps that Adam has applied.
        world: this process.
    """
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    optimizer = engine.optimizer
    for flat in optimizer.fp32_partitioned_groups_flat:
        optimizer.optimizer.state[flat] = {
            "step": torch.tensor(float(updates)),
            **{moment: torch.zeros_like(flat) for moment in MOMENTS},
        }
    for name, parameter in trainable_parameters(engine.module).items():
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        for kind in ("master", *MOMENTS):
            part = torch.zeros(size, dtype=torch.float32)
            values = read(name, kind, world.rank * size, (world.rank + 1) * size)
            part[: values.numel()] = values
            part = part.to(world.device)
            if kind == "master":
                safe_set_local_fp32_param(parameter, part)
            else:
                safe_set_local_optimizer_state(parameter, part, kind)


def reduce_max(values: list[float], world: World) -> list[float]:
    """Largest of plain floats over all ranks, each for itself."""
    tensor = torch.tensor(values, dtype=torch.float64).to(world.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [float(value) for value in tensor.tolist()]


def reduce_sum(values: list[float], world: World) -> list[float]:
    """Sum of plain floats over all ranks."""
    tensor = torch.tensor(values, dtype=torch.float64 if world.device.type == "cpu" else torch.float32)
    tensor = tensor.to(world.device)
    dist.all_reduce(tensor)
    return [float(value) for value in tensor.tolist()]
