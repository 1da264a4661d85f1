"""What a run will need, worked out before anything runs and without weights."""

from hl_scale.planning.memory import plan_memory
from hl_scale.planning.phases import MemoryPlan, Phase
from hl_scale.planning.process import measure_process
from hl_scale.planning.report import as_dict, conclusions, gigabytes, parse_size, render_plan

__all__ = [
    "MemoryPlan",
    "Phase",
    "as_dict",
    "conclusions",
    "gigabytes",
    "measure_process",
    "parse_size",
    "plan_memory",
    "render_plan",
]
