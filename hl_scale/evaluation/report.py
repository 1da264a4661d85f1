"""report.html: one self-contained page about a run, readable without a server and without the network."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment

from hl_scale.data.durable import write_text
from hl_scale.engine.progress import read_metrics
from hl_scale.evaluation import steering_charts, steering_tables, tables
from hl_scale.evaluation.charts import dialect_chart, to_svg, training_curves
from hl_scale.evaluation.measurement import EvaluationError

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }} - hl_scale report</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; margin: .5rem 0 1.2rem; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e4e4e4; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tbody tr:hover { background: #f5f8fb; }
img { max-width: 100%; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 12.5px; }
.notice { background: #fff6df; border-left: 4px solid #e0a400; padding: .5rem .8rem; }
</style>
</head>
<body>
<h1>{{ name }}</h1>
{% for notice in notices %}<p class="notice">{{ notice }}</p>
{% endfor %}
{% if shown %}
<h2>{{ shown.heading }}</h2>
<p>{{ shown.legend }}</p>
{% for alternative, image in shown.charts %}<img alt="{{ alternative }}" src="{{ image }}">
{% endfor %}{% for line in shown.lines %}<p>{{ line }}</p>
{% endfor %}
{% for table in shown.tables %}
<div class="scroll"><table>
<caption>{{ table.caption }}</caption>
<thead><tr>{% for cell in table.header %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
{% endfor %}
<h2>{{ shown.meanings_heading }}</h2>
<ul>
{% for name, text in shown.meanings.items() %}<li><b>{{ name }}</b>: {{ text }}</li>
{% endfor %}</ul>
<h2>What these numbers do not say</h2>
<ul>{% for caveat in evaluation.caveats %}<li>{{ caveat }}</li>{% endfor %}</ul>
{% endif %}
{% if curves %}
<h2>Training</h2>
<p>{{ training }}</p>
<img alt="Loss, learning rate, gradient norm and tokens per second by step" src="{{ curves }}">
{% endif %}
{% if evaluation %}
<h2>Provenance of the evaluation</h2>
<pre>{{ provenance }}</pre>
{% endif %}
<h2>Configuration</h2>
<pre>{{ configuration }}</pre>
{% if run_environment %}
<h2>Environment of the training</h2>
<pre>{{ run_environment }}</pre>
{% endif %}
</body>
</html>
"""


def write_report(run_directory: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` from config.yaml, metrics.jsonl, environment.json and evaluation.json of a run.

    Args:
        run_directory: a run directory. What is not there yet (metrics, evaluation) is named on the page as missing.

    Returns:
        Path of the page.

    Raises:
        EvaluationError: not a run directory, or evaluation.json cannot be read.
    """
    directory = Path(run_directory)
    if not (directory / "config.yaml").is_file():
        raise EvaluationError(
            f"{directory} is not a run directory (no config.yaml)\n  fix: pass the directory of a run"
        )
    metrics = read_metrics(directory / "metrics.jsonl")
    evaluation = _read_evaluation(directory / "evaluation.json")
    environment = directory / "environment.json"
    text = render_page(
        name=directory.resolve().name,
        notices=_notices(metrics, evaluation),
        evaluation=evaluation,
        shown=_SHOWN[evaluation["evaluation"]](evaluation) if evaluation else None,
        provenance=json.dumps(evaluation["provenance"], indent=1) if evaluation else "",
        curves=image(to_svg(training_curves(metrics))) if metrics else None,
        training=_training_line(metrics) if metrics else "",
        configuration=(directory / "config.yaml").read_text(encoding="utf-8"),
        run_environment=environment.read_text(encoding="utf-8") if environment.is_file() else None,
    )
    write_text(directory / "report.html", text)
    return directory / "report.html"


def render_page(**values: Any) -> str:
    """The page with its parts filled in; None leaves a part out."""
    page = Environment(autoescape=True, trim_blocks=True).from_string(_PAGE)
    return page.render(**values)


def image(svg: str) -> str:
    """An SVG document as the address of an image that a page carries in itself."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _dialects(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    own = {"own vector": "the dialect's eWAVE attestation values"}
    controls = {name.replace("_", " "): text for name, text in evaluation["controls"].items()}
    return {
        "heading": "Dialects",
        "legend": tables.LEGEND,
        "charts": [("Divergence ratio per dialect and condition", image(to_svg(dialect_chart(evaluation))))],
        "lines": tables.standard_lines(evaluation),
        "tables": tables.tables(evaluation),
        "meanings_heading": "Conditions",
        "meanings": own | controls,
    }


def _tasks(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    charts = {
        "Exact match by group and arm": steering_charts.exact_chart,
        "Margin by group and arm": steering_charts.margin_chart,
        "Exact match by task and arm": steering_charts.task_chart,
    }
    return {
        "heading": "Tasks",
        "legend": steering_tables.LEGEND,
        "charts": [(name, image(to_svg(draw(evaluation)))) for name, draw in charts.items()],
        "lines": steering_tables.lines(evaluation),
        "tables": steering_tables.tables(evaluation),
        "meanings_heading": "Arms and groups",
        "meanings": {**evaluation["arms"], **evaluation["group_meanings"]},
    }


_SHOWN: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {"dialects": _dialects, "tasks": _tasks}


def _read_evaluation(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{path} is not valid JSON ({error})\n  fix: run `hl-scale evaluate` again") from None
    if not isinstance(result, dict) or result.get("evaluation") not in _SHOWN or result.get("format") != 1:
        raise EvaluationError(
            f"{path} is not an evaluation of {' or '.join(_SHOWN)} of format 1\n  fix: run `hl-scale evaluate` again"
        )
    return result


def _notices(metrics: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any] | None) -> list[str]:
    notices = []
    if evaluation is None:
        notices.append("This run has not been evaluated yet: run hl-scale evaluate.")
    elif evaluation["reduced"]:
        notices.append(f"Reduced evaluation: {'; '.join(evaluation['reduced'])}.")
    notices += evaluation.get("warnings", []) if evaluation else []
    if not metrics:
        notices.append("There are no training metrics (metrics.jsonl is missing or empty).")
    return notices


def _training_line(metrics: Sequence[Mapping[str, Any]]) -> str:
    last = metrics[-1]
    seconds = sum(line.get("seconds", 0.0) for line in metrics)
    line = f"{last['step']} steps, last loss {last['loss']:.4f}, {seconds / 60:.1f} minutes in the logged steps"
    skipped = last.get("skipped_steps", 0)
    return f"{line}, {skipped:.0f} steps skipped because a gradient was not finite." if skipped else f"{line}."
