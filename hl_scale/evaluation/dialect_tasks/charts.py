"""Charts of the suite: methods, gains by dialect, the curve over annotations, coverage against gain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hl_scale.evaluation.controls import OWN

# Okabe and Ito's colours.
_OWN, _OTHER = "#0072B2", "#999999"
_CURVES = {"aligned": ("#D55E00", "o"), "annotated": ("#009E73", "s")}


def method_chart(task: Mapping[str, Any]) -> Figure:
    """Bars with 95% intervals: quality of every method, mean over dialects; beside it the own adapter minus each."""
    methods, found = task["methods"], {each["second"]: each["mean"] for each in task["differences"]}
    figure = Figure(figsize=(11, 1.2 + 0.34 * len(methods)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for place, method in enumerate(methods):
        value, low, high = _percent(method["mean"])
        colour = _OWN if method["method"].split(" ")[0] == OWN else _OTHER
        left.barh(place, value, color=colour, height=0.7, alpha=0.85)
        left.errorbar(value, place, xerr=[[value - low], [high - value]], color="#222222", capsize=2)
        if method["method"] in found:
            value, low, high = _percent(found[method["method"]])
            right.errorbar(value, place, xerr=[[value - low], [high - value]], fmt="o", color=_OWN, capsize=2)
    values = [_percent(method["mean"]) for method in methods]
    span = [min(low for _, low, _ in values), max(high for _, _, high in values)]
    left.set_xlim(max(0.0, span[0] - 3), min(100.0, span[1] + 1))
    left.set_yticks(range(len(methods)), [method["method"] for method in methods])
    left.invert_yaxis()
    left.set_xlabel(f"{_scaled(task)}, mean of dialects (axis does not begin at 0)")
    right.axvline(0, color="#444444", linewidth=1, linestyle="--")
    right.set_xlabel("own adapter minus this, points")
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
    return figure


def gain_chart(task: Mapping[str, Any]) -> Figure:
    """Points with 95% intervals for each dialect and their mean: the own adapter minus none, and minus the best
    baseline of the headline where there is one."""
    best = task.get("best_baseline") or (task["headline"] or {}).get("best_baseline")
    against = {"none": (_OWN, "o"), **({best: ("#D55E00", "s")} if best else {})}
    found = {each["second"]: each for each in task["differences"] if each["second"] in against}
    places = list(found["none"]["dialects"])
    figure = Figure(figsize=(9, 1.6 + 0.36 * len(places)), layout="constrained")
    axes = figure.subplots()
    for index, (name, (colour, marker)) in enumerate(against.items()):
        parts = [*(found[name]["dialects"].get(place) for place in places), found[name]["mean"]]
        there = [(place, _percent(part)) for place, part in enumerate(parts) if part is not None]
        values = np.array([value for _, value in there])
        axes.errorbar(
            values[:, 0], [place + 0.24 * (index - 0.5) for place, _ in there],
            xerr=[values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]],
            fmt=marker, color=colour, capsize=2, linestyle="none", label=f"own adapter minus {name}",
        )  # fmt: skip
    axes.axvline(0, color="#444444", linewidth=1, linestyle="--")
    axes.axhline(len(places) - 0.5, color="#cccccc", linewidth=0.8)
    axes.set_yticks(range(len(places) + 1), [*places, "mean of dialects"])
    axes.invert_yaxis()
    axes.set_xlabel(f"{_scaled(task)}, difference in points\n(right of 0: the own adapter is better)")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def annotation_chart(task: Mapping[str, Any]) -> Figure:
    """Quality by the number of sentences of the dialect, and the level of the generated adapter."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for kind, curve in task["curves"].items():
        colour, marker = _CURVES[kind]
        values = np.array([_percent(point) for point in curve["quality"]])
        axes.plot(curve["counts"], values[:, 0], color=colour, marker=marker, label=f"LoRA of the dialect, {kind}")
        axes.fill_between(curve["counts"], values[:, 1], values[:, 2], color=colour, alpha=0.15, linewidth=0)
    levels = {method["method"]: method["mean"] for method in task["methods"]}
    for name, colour in ((OWN, _OWN), ("none", _OTHER)):
        axes.axhline(_percent(levels[name])[0], color=colour, linestyle="--", label=name)
    axes.set(xscale="log", xlabel="sentences of the dialect", ylabel=f"{_scaled(task)}, mean of dialects")
    counts = sorted({count for curve in task["curves"].values() for count in curve["counts"]})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def coverage_chart(task: Mapping[str, Any]) -> Figure:
    """A point for each dialect: coverage of its features, and points gained."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, weighting in zip(figure.subplots(1, 2, sharey=True), ("binary", "attestation"), strict=True):
        for seen, colour, marker in ((False, _OWN, "o"), (True, "#D55E00", "X")):
            parts = [part for part in task["coverage"].values() if part["seen"] is seen]
            if parts:
                axes.scatter(
                    [part["coverage"][weighting] for part in parts], [100 * part["gain"]["value"] for part in parts],
                    color=colour, marker=marker, label="seen in training" if seen else "unseen",
                )  # fmt: skip
        axes.axhline(0, color="#444444", linewidth=1, linestyle="--")
        axes.set(xlabel=f"coverage ({weighting})", ylabel="points gained by the own adapter")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure


def _scaled(task: Mapping[str, Any]) -> str:
    return f"{task['metric']} x 100" if "correlation" in task["metric"] else f"{task['metric']} in %"


def _percent(part: Mapping[str, Any]) -> tuple[float, float, float]:
    return 100 * part["value"], 100 * part["low"], 100 * part["high"]
