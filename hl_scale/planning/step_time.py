"""Bounds on the time of a step from two ceilings: the rate of matrix products, and the bandwidth of a rank.

Floating-point operations are counted on the real pass, run without data: products of weights and low-rank factors
forward and backward, what is recomputed, attention over whole (padded) texts. Element-wise work, the Sinkhorn
divergence and the optimizer are not products and are not counted, nor are frozen targets, which are computed once, nor
the logits of answers: a configuration does not say how many tokens answers have.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from hl_scale.config import Config
from hl_scale.data.sampling import plan_batches
from hl_scale.planning.jobs import Job

_MEASURED = 1536
_GROUPS = 2


@dataclass(frozen=True)
class StepPlan:
    """Operations of a step and what bounds its time.

    Attributes:
        flops: floating-point operations of a rank in a step.
        tokens: that the base reads on all ranks in a step, padding included.
        sent: bytes that a rank sends in a step.
        matmul: operations a second that a rank reaches on large products, or None.
        measured: whether `matmul` was measured here.
        network: bytes a second that a rank sends, or None.
    """

    flops: int
    tokens: int
    sent: int
    matmul: float | None = None
    measured: bool = False
    network: float | None = None

    @property
    def compute_seconds(self) -> float | None:
        return None if self.matmul is None else self.flops / self.matmul

    @property
    def wire_seconds(self) -> float | None:
        return None if self.network is None else self.sent / self.network

    @property
    def step_seconds(self) -> tuple[float, float] | None:
        """Of a step whose communication is hidden behind products as far as it can be, and of one that hides none."""
        if self.compute_seconds is None or self.wire_seconds is None:
            return None
        return max(self.compute_seconds, self.wire_seconds), self.compute_seconds + self.wire_seconds

    @property
    def tokens_per_second(self) -> tuple[float, float] | None:
        """Over all ranks, for either of `step_seconds`."""
        return None if self.step_seconds is None else tuple(self.tokens / s for s in self.step_seconds)  # type: ignore[return-value]


def plan_step(
    config: Config,
    world_size: int,
    sent: int,
    *,
    tokens: int | None = None,
    matmul: float | None = None,
    measured: bool = False,
    network: float | None = None,
) -> StepPlan:
    """Count a step's operations; `sent` is `WirePlan.total`, other arguments as for `plan_memory` and `StepPlan`."""
    batch = plan_batches(config.training.global_batch_size, config.training.micro_batch_size, world_size)
    job = Job(config)
    length, counted = job.length(tokens), _GROUPS * job.group
    flops = count_flops(lambda: job.trace(counted, length))
    samples = batch.accumulation * batch.micro_batch
    total = config.training.global_batch_size * length
    return StepPlan(flops * samples // counted, total, sent, matmul, measured, network)


def count_flops(run: Callable[[], Any]) -> int:
    """Operations of the products (a multiplication and an addition are two) that a call makes."""
    aten: Any = torch.ops.aten
    more = {
        aten.addmm_: _addmm_flops,
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v)
        ),
    }
    counter = FlopCounterMode(display=False, custom_mapping=more)
    with counter:
        run()
    return counter.get_total_flops()


def _addmm_flops(total: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(a) * b[1]


def measure_matmul(seconds: float = 1.0) -> float:
    """Operations a second of a square float32 product on this CPU with this process's threads: the best of some."""
    a, b = torch.ones(_MEASURED, _MEASURED), torch.ones(_MEASURED, _MEASURED)
    out = torch.empty_like(a)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - started)
    return 2 * _MEASURED**3 / best
