"""The charts of the report, as SVG: training curves, and the dialects with their controls."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hl_scale.evaluation.controls import OWN, PLAIN
from hl_scale.evaluation.tables import HEADINGS, conditions

# Okabe and Ito's colours, told apart by colour-blind readers; marks differ too.
_STYLES = {
    OWN: ("#0072B2", "o"),
    "wrong": ("#D55E00", "X"),
    "mean_named": ("#009E73", "s"),
    "mean_training": ("#56B4E9", "D"),
    "shuffled": ("#CC79A7", "^"),
    "zero": ("#999999", "v"),
    PLAIN: ("#000000", "P"),
}
_CURVES = {
    "loss": "loss (mean divergence)",
    "learning_rate": "learning rate",
    "gradient_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
    "trunk_gradient_norm": "gradient norm of the trunk",
    "dead_unit_share": "share of dead hidden units",
}
_LOGARITHMIC = ("gradient_norm", "trunk_gradient_norm")


def training_curves(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss (with a running mean), learning rate, gradient norms, throughput, dead units by step, as far as logged."""
    steps = np.array([line["step"] for line in metrics], dtype=np.float64)
    curves = {key: np.array([_number(line.get(key)) for line in metrics]) for key in _CURVES}
    curves = {key: values for key, values in curves.items() if np.isfinite(values).any()}
    height = (len(curves) + 1) // 2
    figure = Figure(figsize=(10, 2.8 * max(height, 1)), layout="constrained")
    panels = figure.subplots(max(height, 1), 2, squeeze=False).flat
    for axes, (key, values) in zip(panels, curves.items(), strict=False):
        _curve(axes, steps, values, smooth=key == "loss")
        if key in _LOGARITHMIC and np.nanmax(values) > 0:
            axes.set_yscale("log")
        elif key == "dead_unit_share":
            axes.set_ylim(-0.02, 1.02)
        elif key != "learning_rate":
            axes.set_ylim(bottom=0)
        axes.set(xlabel="step", ylabel=_CURVES[key])
        axes.grid(alpha=0.3)
    for axes in list(figure.axes)[len(curves) :]:
        axes.set_visible(False)
    return figure


def dialect_chart(result: Mapping[str, Any]) -> Figure:
    """Left: ratio of every condition, per dialect, with 95% intervals. Right: paired differences to the own vector."""
    rows = [row for row in result["dialects"] if row["ratio"]]
    names = conditions(result)
    figure = Figure(figsize=(11, 1.6 + 0.16 * len(names) * max(len(rows), 1)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for axes, key, shown in ((left, "ratio", names), (right, "difference", [n for n in names if n != OWN])):
        for name in shown:
            _forest(axes, rows, key, name, names.index(name), len(names))
        axes.grid(axis="x", alpha=0.3)
        for boundary in range(1, len(rows)):
            axes.axhline(boundary - 0.5, color="#cccccc", linewidth=0.8)
    left.axvline(1.0, color="#444444", linewidth=1, linestyle="--")
    right.axvline(0.0, color="#444444", linewidth=1, linestyle="--")
    labels = [textwrap.fill(f"{row['variety']} ({'seen' if row['seen'] else 'unseen'})", 26) for row in rows]
    left.set_yticks(range(len(rows)), labels)
    left.set_ylim(len(rows) - 0.5, -0.5)
    left.set_xlabel("divergence ratio adapted / base (1: no effect)")
    right.set_xlabel("control minus own vector\n(right of 0: the own vector is better)")
    handles, texts = left.get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=min(len(names), 7), frameon=False)
    return figure


def to_svg(figure: Figure) -> str:
    """The figure as an SVG document, the same text for the same data."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "hl_scale"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _curve(axes: Axes, steps: np.ndarray[Any, Any], values: np.ndarray[Any, Any], smooth: bool) -> None:
    window = max(1, len(values) // 25)
    if not smooth or window == 1:
        axes.plot(steps, values, color="#0072B2", linewidth=1.2, marker="o" if len(values) == 1 else None)
        return
    axes.plot(steps, values, color="#0072B2", linewidth=0.7, alpha=0.35)
    finite = np.isfinite(values)
    sums = np.cumsum(np.where(finite, values, 0.0))
    counts = np.cumsum(finite)
    sums[window:], counts[window:] = sums[window:] - sums[:-window], counts[window:] - counts[:-window]
    axes.plot(steps, sums / np.maximum(counts, 1), color="#0072B2", linewidth=1.8, label=f"mean of {window} steps")
    axes.legend(frameon=False)


def _forest(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, name: str, position: int, count: int) -> None:
    """Points with intervals of one condition, each dialect one unit high."""
    present = [(index, row[key][name]) for index, row in enumerate(rows) if name in row[key]]
    if not present:
        return
    colour, marker = _STYLES[name]
    offset = (position - (count - 1) / 2) * 0.8 / count
    values = np.array([[part["value"], part["low"], part["high"]] for _, part in present])
    axes.errorbar(
        values[:, 0],
        [index + offset for index, _ in present],
        xerr=np.abs(values[:, 1:].T - values[:, 0]),
        fmt=marker,
        color=colour,
        label=HEADINGS[name],
        markersize=6.5 if name == OWN else 5,
        elinewidth=1.8 if name == OWN else 1.1,
        linestyle="none",
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
