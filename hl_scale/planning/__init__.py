"""What a run will need, worked out before anything runs and without weights."""

from hl_scale.planning.memory import checkpoint_bytes, plan_memory
from hl_scale.planning.phases import MemoryPlan, Phase
from hl_scale.planning.process import measure_process
from hl_scale.planning.report import (
    as_dict,
    conclusions,
    gigabytes,
    parse_rate,
    parse_size,
    render_plan,
    render_wire,
    step_conclusions,
)
from hl_scale.planning.step_time import StepPlan, measure_matmul, plan_step
from hl_scale.planning.wire import WirePlan, plan_wire

__all__ = [
    "MemoryPlan",
    "Phase",
    "StepPlan",
    "WirePlan",
    "as_dict",
    "checkpoint_bytes",
    "conclusions",
    "gigabytes",
    "measure_matmul",
    "measure_process",
    "parse_rate",
    "parse_size",
    "plan_memory",
    "plan_step",
    "plan_wire",
    "render_plan",
    "render_wire",
    "step_conclusions",
]
