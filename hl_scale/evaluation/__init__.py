"""Evaluation of a run: dialects or tasks against their controls, tables and the report."""

from hl_scale.evaluation.command import evaluate_run
from hl_scale.evaluation.dialects import evaluate_dialects, save
from hl_scale.evaluation.measurement import EvaluationError
from hl_scale.evaluation.report import write_report
from hl_scale.evaluation.steering import evaluate_tasks
from hl_scale.evaluation.tables import markdown_table, render_table

__all__ = [
    "EvaluationError",
    "evaluate_dialects",
    "evaluate_run",
    "evaluate_tasks",
    "markdown_table",
    "render_table",
    "save",
    "write_report",
]
