"""What an experiment of the suite leaves behind: results.json, tables as CSV and Markdown, and report.html."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hl_scale.data.durable import write_text
from hl_scale.evaluation.dialect_tasks import charts, tables
from hl_scale.evaluation.report import image, render_page


def write_suite_report(result: Mapping[str, Any], directory: Path, settings: str) -> Path:
    """Write all files of an experiment, and return the path of the page.

    Args:
        result: see `hl_scale.evaluation.dialect_tasks.suite`.
        directory: created where missing; files of an earlier call are replaced.
        settings: the resolved recipe as text.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / "results.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_text(directory / "tables.md", tables.markdown(result))
    for name, text in {"cells.csv": tables.cells_csv(result), **tables.tables_csv(result)}.items():
        write_text(directory / name, text)
    page = render_page(
        name=f"dialect-tasks: {result['experiment'].replace('_', ' ')}",
        notices=[],
        evaluation={"caveats": result["caveats"]},
        shown=_shown(result),
        provenance=json.dumps(result["provenance"], indent=1),
        curves=None,
        training="",
        configuration=settings,
        run_environment=None,
    )
    write_text(directory / "report.html", page)
    return directory / "report.html"


def _shown(result: Mapping[str, Any]) -> dict[str, Any]:
    drawn = []
    for name, task in result["tasks"].items():
        measured = f"{name}: {task['metric']}"
        drawn.append((f"{measured} of every method, mean of dialects", image(charts.method_chart(task))))
        if "curves" in task:
            drawn.append((f"{measured} by sentences of the dialect", image(charts.annotation_chart(task))))
        if "correlations" in task:
            drawn.append((f"{name}: coverage and gain", image(charts.coverage_chart(task))))
    return {
        "heading": "Labelled tasks in dialects",
        "legend": tables.LEGEND,
        "charts": drawn,
        "lines": tables.lines(result),
        "tables": [*tables.tables(result), tables.cells_table(result)],
        "meanings_heading": "Methods",
        "meanings": result["methods"],
    }
