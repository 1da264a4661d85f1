"""Tasks with labels: an adapter and a classification head trained on Standard English, measured in any variety."""

from hl_scale.evaluation.labelled.fitting import fit_task_adapter
from hl_scale.evaluation.labelled.head import ClassifierHead
from hl_scale.evaluation.labelled.measuring import Measurement, load_measurement, measure
from hl_scale.evaluation.labelled.task_adapter import TaskAdapter, TaskAdapterError, load_task_adapter

__all__ = [
    "ClassifierHead",
    "Measurement",
    "TaskAdapter",
    "TaskAdapterError",
    "fit_task_adapter",
    "load_measurement",
    "load_task_adapter",
    "measure",
]
