"""What a run will need, worked out before anything runs and without weights."""

from hl_scale.planning.memory import plan_memory
from hl_scale.planning.phases import MemoryPlan, Phase
from hl_scale.planning.report import as_dict, conclusions, gigabytes, parse_size, render_plan

__all__ = [
    "MemoryPlan",
    "Phase",
    "as_dict",
    "conclusions",
    "gigabytes",
    "parse_size",
    "plan_memory",
    "render_plan",
]
