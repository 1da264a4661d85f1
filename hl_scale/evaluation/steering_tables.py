"""The task evaluation as a terminal table and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from hl_scale.evaluation.arms import OTHER, OWN
from hl_scale.evaluation.tables import TextTable

Result = Mapping[str, Any]

LEGEND = (
    "Exact match in percent, [95% interval over tasks and their examples]. Margin: loss of the right answer under an "
    "arm minus that under the own adapter, in nats per answer token; above 0 the own adapter is better. open: tasks "
    "with free answers; choice: tasks with at most three labels, which may be guessed."
)
_GUESS = "most frequent answer"


def columns(result: Result) -> list[tuple[str, str]]:
    """Group and kind of answers, as far as there are tasks."""
    return [(group, kind) for group, kinds in result["groups"].items() for kind in kinds]


def render_table(result: Result) -> Group:
    """For a terminal: exact match and margins by arm, what was copied, how updates depend on tasks, warnings."""
    title = "Exact match (%)"
    if result["reduced"]:
        title += f"\nREDUCED EVALUATION: {'; '.join(result['reduced'])}"
    shown = [_terminal(_exact_table(result), title), _terminal(_margin_table(result), "Margin (nats per answer token)")]
    shown += [_terminal(table, "Share of the gain of each task's own LoRA (%)") for table in _recovered_tables(result)]
    warnings = [Text(text, style="bold yellow") for text in result["warnings"]]
    return Group(*shown, *(Text(line, style="dim") for line in (LEGEND, *lines(result))), *warnings)


def _terminal(table: TextTable, title: str) -> Table:
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for index, heading in enumerate(table.header):
        shown.add_column(heading.replace(", ", "\n"), justify="right" if index else "left", no_wrap=not index)
    for row in table.rows:
        shown.add_row(row[0], *(cell.replace(", ", ",") for cell in row[1:]))
    return shown


def markdown_table(result: Result) -> str:
    """Every number of the result that belongs in a document."""
    parts = [f"**Reduced evaluation**: {'; '.join(result['reduced'])}."] if result["reduced"] else []
    parts += [f"**{warning}**" for warning in result["warnings"]]
    parts += [LEGEND, *(table.to_markdown() for table in tables(result)), *lines(result)]
    parts.append("\n".join(f"- {caveat}" for caveat in result["caveats"]))
    return "\n\n".join(parts) + "\n"


def tables(result: Result) -> list[TextTable]:
    """Exact match, differences, margins, losses, every task, copied answers, a few outputs."""
    return [
        _exact_table(result),
        _by_arm(result, "difference", "Exact match of the own adapter minus that of an arm, percentage points", 100),
        _margin_table(result),
        *_recovered_tables(result),
        _by_arm(result, "loss", "Loss of the right answer, nats per token", 1),
        _task_table(result),
        _copy_table(result),
        _output_table(result),
    ]


def _exact_table(result: Result) -> TextTable:
    table = _by_arm(result, "exact", "Exact match (%)", 100)
    guesses = [_cell(result["groups"][group][kind]["most_frequent_answer"], 100) for group, kind in columns(result)]
    sizes = [result["groups"][group][kind] for group, kind in columns(result)]
    table.rows.append([_GUESS, *guesses])
    table.rows.append(["tasks / answers", *(f"{size['tasks']} / {size['examples']}" for size in sizes)])
    return table


def _margin_table(result: Result) -> TextTable:
    return _by_arm(result, "margin", "Margin over the own adapter, nats per answer token", 1)


def _recovered_tables(result: Result) -> list[TextTable]:
    """Nothing where there is no library."""
    found = columns(result)
    parts = [result["groups"][group][kind].get("recovered") for group, kind in found]
    if not parts or parts[0] is None:
        return []
    rows = [
        [label, *("-" if part[key] is None else _cell(part[key], 100) for part in parts)]
        for key, label in (("exact", "exact match"), ("loss", "loss"))
    ]
    caption = "Gain over the base of each task's own LoRA, mean over tasks, that the generated adapter recovers (%)"
    return [TextTable(caption, ["gain in", *(f"{group}, {kind}" for group, kind in found)], rows)]


def _by_arm(result: Result, key: str, caption: str, factor: int) -> TextTable:
    found = columns(result)
    parts = [result["groups"][group][kind][key] for group, kind in found]
    rows = [[arm, *(_cell(part[arm], factor) for part in parts)] for arm in result["arms"] if arm in parts[0]]
    return TextTable(caption, ["arm", *(f"{group}, {kind}" for group, kind in found)], rows)


def _task_table(result: Result) -> TextTable:
    arms = list(result["arms"])
    rows = [
        [
            row["task"], row["group"], row["answers"], *(f"{100 * row['exact'][arm]:.0f}" for arm in arms),
            f"{row['loss'][OWN]:.2f}", f"{row['margin'][OTHER]:+.2f}" if OTHER in row["margin"] else "-",
            f"{100 * row['share_where_other_agrees']:.0f}",
        ]
        for row in result["tasks"]
    ]  # fmt: skip
    header = ["task", "group", "answers", *arms, "loss own", "margin other", "other agrees"]
    return TextTable("Exact match (%) by task; other agrees: both tasks have the same answer", header, rows)


def _copy_table(result: Result) -> TextTable:
    rows = [
        [
            part["task"], kind, str(part["wrong"]), str(part["copied"]),
            ", ".join(f"{copied['task']} ({copied['times']})" for copied in part["most_often"]) or "-",
        ]
        for kind, found in result["copied_answers"].items()
        for part in found["tasks"]
    ]  # fmt: skip
    header = ["held-out task", "answers", "wrong", "a seen task's answer", "whose, most often"]
    return TextTable("Wrong answers on held-out tasks that a seen task over the same inputs would give", header, rows)


def _output_table(result: Result) -> TextTable:
    rows = [
        [row["task"], row["group"], *(_one_line(shown[key]) for key in ("input", "answer", "own"))]
        for row in result["tasks"]
        for shown in row["outputs"][:1]
    ]
    return TextTable("One answer of each task", ["task", "group", "input", "right", "own adapter"], rows)


def lines(result: Result) -> list[str]:
    """What was copied, and how updates depend on tasks, in sentences."""
    found = []
    for kind, part in result["copied_answers"].items():
        if part["wrong"]:
            found.append(
                f"Held-out tasks with {kind} answers: {part['copied']} of {part['wrong']} wrong outputs are what a "
                "seen task over the same inputs would answer."
            )
    updates = result["updates"]
    variance, ratio = updates["relative_variance"], updates["wordings_over_tasks"]
    found.append(
        f"Generated updates of {updates['tasks']} tasks: variance across tasks "
        f"{'undefined' if variance is None else f'{variance:.2e}'} of the squared norm of their mean, effective rank "
        f"{updates['effective_rank']:.1f} ({updates['effective_rank_centred']:.1f} around the mean); squared distance "
        f"between wordings of one task {'undefined' if ratio is None else f'{ratio:.2f}'} of that between tasks."
    )
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")


def _cell(estimate: Mapping[str, float], factor: int) -> str:
    digits = 0 if factor == 100 else 2
    value, low, high = (f"{factor * estimate[key] + 0.0:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
