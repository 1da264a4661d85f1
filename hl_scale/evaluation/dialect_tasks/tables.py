"""The suite's numbers as tables: for Markdown, for the page, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from hl_scale.evaluation.tables import TextTable

Result = Mapping[str, Any]
_QUALITIES = ("accuracy", "pearson", "divergence_removed")
LEGEND = (
    "Accuracy in %, Pearson's correlation x 100 where labels are scores, or the share in % of the divergence from "
    "Standard English originals that an adapter removes; mean over seeds, [95% interval over sentences]. Differences "
    "are in points (hundredths), on the same sentences; positive: the own adapter is better. "
    "* : trained on text of that dialect."
)


def tables(result: Result) -> list[TextTable]:
    """All tables of an experiment, task by task."""
    found = []
    for name, task in result["tasks"].items():
        found += [_quality_table(name, task), _difference_table(name, task)]
        if "standard_damage" in task:
            found.append(_damage_table(name, task))
        if "curves" in task:
            found.append(_curve_table(name, task))
        if "correlations" in task:
            found += [_correlation_table(name, task), _coverage_table(name, task)]
    return found


def lines(result: Result) -> list[str]:
    """The headline of each task in words."""
    said = []
    for name, task in result["tasks"].items():
        if "standard_damage" in task:
            said.append(f"{name}: {_aligned(task)}")
        elif task["headline"] is not None:
            said.append(f"{name}: {_headline(task['headline'])}")
        else:
            means = {found["second"]: found["mean"] for found in task["differences"]}
            text = f"own adapters minus the task adapter alone, mean of dialects: {points(means['none'])}"
            if "own (seen)" in means:
                text += f"; minus own adapters of a hypernetwork trained on all of them: {points(means['own (seen)'])}"
            said.append(f"{name}: {text}.")
        if task.get("over_one_hot") is not None:
            found = task["over_one_hot"]
            where = ", ".join(found["dialects"])
            text = f"features minus one-hot vectors in dialects that neither network was trained on ({where})"
            said.append(f"{name}: {text}: {points(found['mean'])}.")
        for kind, curve in task.get("curves", {}).items():
            said.append(f"{name}: {_worth(kind, curve)} (By means alone.)")
    return said


def cells_csv(result: Result) -> str:
    """A line for every measured cell."""
    rows = result["cells"]
    names = list(dict.fromkeys(key for row in rows for key in row))
    return _csv(names, [[row.get(name) for name in names] for row in rows])


def cells_table(result: Result) -> TextTable:
    """Every measured cell with the directories that it is made of."""
    names = ["task", "method", "count", "variant", "variety", "seed", "quality", "cell", "adapter", "task_adapter"]
    rows = []
    for row in result["cells"]:
        quality = next((row[key] for key in _QUALITIES if row.get(key) is not None), None)
        shown = {**row, "quality": "-" if quality is None else f"{100 * quality:.1f}"}
        rows.append(["" if shown[name] is None else str(shown[name]) for name in names])
    return TextTable("Cells: a directory for each row", [name.replace("_", " ") for name in names], rows)


def tables_csv(result: Result) -> dict[str, str]:
    """File name -> CSV with plain numbers, of qualities and of differences."""
    qualities, differences = [], []
    for name, task in result["tasks"].items():
        for method in task["methods"]:
            places = {"(mean)": method["mean"], "Standard American English": method["standard"], **method["dialects"]}
            qualities += [
                [name, task["metric"], method["method"], place, *_numbers(part), part.get("seen"), _cells(part)]
                for place, part in places.items()
                if part is not None
            ]
        for found in task["differences"]:
            places = {"(mean)": found["mean"], **found["dialects"]}
            for place, part in places.items():
                p = " ".join(f"{value:.4g}" for value in part.get("p") or ())
                differences.append([name, found["first"], found["second"], place, *_numbers(part), p])
    columns = ["value", "low", "high"]
    return {
        "quality.csv": _csv(["task", "metric", "method", "variety", *columns, "seen", "cells"], qualities),
        "differences.csv": _csv(["task", "first", "second", "variety", *columns, "mcnemar_p"], differences),
    }


def markdown(result: Result) -> str:
    """Headline, tables and caveats."""
    parts = [f"# dialect-tasks: {result['experiment'].replace('_', ' ')}", *lines(result), LEGEND]
    parts += [table.to_markdown() for table in tables(result)]
    parts += ["\n".join(f"- {name}: {text}" for name, text in result["methods"].items())]
    parts += ["\n".join(f"- {caveat}" for caveat in result["caveats"])]
    return "\n\n".join(parts) + "\n"


def _headline(headline: Mapping[str, Any]) -> str:
    count = len(headline["varieties"])
    text = (
        f"in {count} unseen dialect{'s' if count > 1 else ''} the task adapter alone loses "
        f"{interval(headline['lost'], 100, 2)} points against Standard English; with the own adapters it regains "
        f"{points(headline['regained'])}"
    )
    if headline["share"] is not None:
        text += f", {interval(headline['share'], 100, 0)} % of what is lost"
    if headline["over_best"] is None:
        return text + "."
    best = f"the best baseline of equal budget, {headline['best_baseline']}"
    return f"{text}. Own adapter minus {best}: {points(headline['over_best'])}."


def _aligned(task: Mapping[str, Any]) -> str:
    own = next(method["mean"] for method in task["methods"] if method["method"] == "own")
    text = f"own adapters remove {interval(own)} % of the divergence, mean of dialects."
    if task["best_baseline"] is None:
        return text
    return f"{text} Minus the best baseline of equal budget, {task['best_baseline']}: {points(task['over_best'])}."


def _damage_table(name: str, task: Mapping[str, Any]) -> TextTable:
    rows = [[method, interval(part, 1, 4)] for method, part in task["standard_damage"].items()]
    return TextTable(
        f"{name}: divergence of Standard English sentences to themselves", ["method", "mean divergence"], rows
    )


def _worth(kind: str, curve: Mapping[str, Any]) -> str:
    what = f"sentences of the dialect, {kind}"
    first, last, worth = curve["counts"][0], curve["counts"][-1], curve["worth"]
    if worth is None:
        return f"the generated adapter is worth more than {last} {what}: no LoRA trained on so many reaches it."
    if worth <= first:
        return f"the generated adapter is worth {first} {what}, or fewer."
    return f"the generated adapter is worth about {worth:.0f} {what}."


def _quality_table(name: str, task: Mapping[str, Any]) -> TextTable:
    dialects = list(dict.fromkeys(place for method in task["methods"] for place in method["dialects"]))
    shown = dialects if len(dialects) <= 12 else []
    header = ["method", "mean of dialects", "spread over seeds", "Standard English", *shown]
    rows = []
    for method in task["methods"]:
        spread = "-" if method["spread"] is None else f"{100 * method['spread']:.1f}"
        row = [method["method"], interval(method["mean"]), spread]
        row.append("-" if method["standard"] is None else f"{100 * method['standard']['value']:.1f}")
        for place in shown:
            part = method["dialects"].get(place)
            row.append("-" if part is None else f"{100 * part['value']:.1f}{'*' if part['seen'] else ''}")
        rows.append([*row, f"{method['carried']:,}", f"{method['trained']:,}", f"{method['pairs']:,}"])
    header += ["parameters a dialect carries", "trained", "sentence pairs"]
    return TextTable(f"{name}: {task['metric']}", header, rows)


def _difference_table(name: str, task: Mapping[str, Any]) -> TextTable:
    dialects = list(dict.fromkeys(place for found in task["differences"] for place in found["dialects"]))
    shown = dialects if len(dialects) <= 12 else []
    rows = []
    for found in task["differences"]:
        row = [f"{found['first']} - {found['second']}", points(found["mean"])]
        for place in shown:
            part = found["dialects"].get(place)
            row.append("-" if part is None else f"{_signed(part['value'])}{_p(part['p'])}")
        rows.append(row)
    tested = ", with McNemar's p (of several seeds the largest)" if task["metric"] == "accuracy" else ""
    caption = f"{name}: paired differences in points{tested}"
    return TextTable(caption, ["difference", "mean of dialects", *shown], rows)


def _curve_table(name: str, task: Mapping[str, Any]) -> TextTable:
    rows = [
        [kind, str(count), interval(value), points(less)]
        for kind, curve in task["curves"].items()
        for count, value, less in zip(curve["counts"], curve["quality"], curve["own_minus"], strict=True)
    ]
    header = ["trained by", "sentences of the dialect", task["metric"], "own minus this"]
    return TextTable(f"{name}: LoRAs of a dialect by how many of its sentences they are trained on", header, rows)


def _correlation_table(name: str, task: Mapping[str, Any]) -> TextTable:
    rows = []
    for weighting, found in task["correlations"].items():
        cells = ["-", "-"] if found is None else [interval(found[key], 1, 2) for key in ("pearson", "spearman")]
        rows.append([weighting, *cells])
    caption = f"{name}: coverage against gain over {task['points']} unseen dialects (-: coverage does not vary)"
    return TextTable(caption, ["coverage", "Pearson", "Spearman"], rows)


def _coverage_table(name: str, task: Mapping[str, Any]) -> TextTable:
    rows = [
        [
            variety,
            "seen" if part["seen"] else "unseen",
            *(f"{part['coverage'][key]:.2f}" for key in ("binary", "attestation", "implementable")),
            points(part["gain"]),
        ]
        for variety, part in task["coverage"].items()
    ]
    return TextTable(
        f"{name}: coverage and gain", ["variety", "", "binary", "attestation", "implementable", "gain"], rows
    )


def interval(part: Mapping[str, Any], times: float = 100, digits: int = 1) -> str:
    """value [low, high]."""
    value, low, high = (f"{times * part[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def points(part: Mapping[str, Any]) -> str:
    """A difference of qualities, in points with its sign."""
    value, low, high = (_signed(part[key]) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _signed(difference: float) -> str:
    text = f"{100 * difference:+.2f}"
    return "+0.00" if text == "-0.00" else text


def _p(values: Sequence[float] | None) -> str:
    """In brackets, or nothing."""
    if values is None:
        return ""
    worst = max(values)
    return " (p <0.001)" if worst < 0.001 else f" (p {worst:.3f})"


def _numbers(part: Mapping[str, Any]) -> list[float]:
    return [part["value"], part["low"], part["high"]]


def _cells(part: Mapping[str, Any]) -> str:
    return " ".join(part.get("cells", ()))


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()
