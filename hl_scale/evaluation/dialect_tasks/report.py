"""What an experiment of the suite leaves behind: results.json, tables as CSV and Markdown, charts, report.html."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hl_scale.data.durable import write_text
from hl_scale.evaluation.charts import to_svg
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
    drawn = _charts(result)
    for name, (_, svg) in drawn.items():
        write_text(directory / f"{name}.svg", svg)
    page = render_page(
        name=f"dialect-tasks: {result['experiment'].replace('_', ' ')}",
        notices=[],
        evaluation={"caveats": result["caveats"]},
        shown=_shown(result, [(alternative, image(svg)) for alternative, svg in drawn.values()]),
        provenance=json.dumps(result["provenance"], indent=1),
        curves=None,
        training="",
        configuration=settings,
        run_environment=None,
    )
    write_text(directory / "report.html", page)
    return directory / "report.html"


def _charts(result: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Name of the file -> what it shows, and the SVG."""
    drawn = {}
    for name, task in result["tasks"].items():
        measured = f"{name}: {task['metric']}"
        drawn[f"{name}-methods"] = f"{measured} of every method, mean of dialects", charts.method_chart(task)
        drawn[f"{name}-gains"] = f"{measured}, own adapter minus others by dialect", charts.gain_chart(task)
        if "curves" in task:
            drawn[f"{name}-annotations"] = f"{measured} by sentences of the dialect", charts.annotation_chart(task)
        if "correlations" in task:
            drawn[f"{name}-coverage"] = f"{name}: coverage and gain", charts.coverage_chart(task)
    return {name: (alternative, to_svg(figure)) for name, (alternative, figure) in drawn.items()}


def _shown(result: Mapping[str, Any], drawn: list[tuple[str, str]]) -> dict[str, Any]:
    return {
        "heading": "Labelled tasks in dialects",
        "legend": tables.LEGEND,
        "charts": drawn,
        "lines": tables.lines(result),
        "tables": [*tables.tables(result), tables.cells_table(result)],
        "meanings_heading": "Methods",
        "meanings": result["methods"],
    }
