"""The charts of a task evaluation: exact match and margins of each arm, and every task under every arm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hl_scale.evaluation.arms import (
    BASE,
    DESCRIBED,
    EXAMPLES,
    LIBRARY,
    LORA,
    OTHER,
    OWN,
    PROMPTED,
    RANDOM,
    SHUFFLED,
)
from hl_scale.evaluation.trials import HELDOUT, NEW

Result = Mapping[str, Any]

# Okabe and Ito's colours, told apart by colour-blind readers; greys for the bare base.
_COLOURS = {
    OWN: "#0072B2", OTHER: "#D55E00", RANDOM: "#E69F00", SHUFFLED: "#CC79A7", BASE: "#bbbbbb", DESCRIBED: "#888888",
    EXAMPLES: "#555555", LORA: "#F0E442", PROMPTED: "#56B4E9", LIBRARY: "#009E73",
}  # fmt: skip


def exact_chart(result: Result) -> Figure:
    """Exact match of every arm and group, open and choice answers apart, with 95% intervals."""
    return _bars(result, "exact", 100, "exact match (%)")


def margin_chart(result: Result) -> Figure:
    """Margins of every arm over the own adapter."""
    return _bars(result, "margin", 1, "loss minus that of own\n(nats per answer token)")


def _bars(result: Result, key: str, factor: float, label: str) -> Figure:
    kinds = [kind for kind in ("open", "choice") if any(kind in group for group in result["groups"].values())]
    figure = Figure(figsize=(11, 2.9 * len(kinds) + 0.6), layout="constrained")
    panels = figure.subplots(len(kinds), 1, squeeze=False)[:, 0]
    for axes, kind in zip(panels, kinds, strict=True):
        groups = {name: kinds_of[kind] for name, kinds_of in result["groups"].items() if kind in kinds_of}
        arms = [arm for arm in result["arms"] if arm in next(iter(groups.values()))[key]]
        for place, arm in enumerate(arms):
            _arm_bars(axes, [group[key][arm] for group in groups.values()], arm, place, len(arms), factor)
        axes.axhline(0, color="#444444", linewidth=0.8)
        axes.set_xticks(range(len(groups)), [f"{name}\n{g['tasks']} tasks" for name, g in groups.items()])
        axes.set_title(f"{kind} answers", loc="left", fontsize=10)
        axes.set_ylabel(label)
        axes.grid(axis="y", alpha=0.3)
        if key == "exact":
            axes.set_ylim(0, 104)
            _guess_lines(axes, groups)
    handles, texts = panels[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=6, frameon=False)
    return figure


def _arm_bars(
    axes: Axes, estimates: list[Mapping[str, float]], arm: str, place: int, count: int, factor: float
) -> None:
    values = factor * np.array([[e["value"], e["low"], e["high"]] for e in estimates])
    width = 0.86 / count
    axes.bar(
        np.arange(len(values)) + (place - (count - 1) / 2) * width,
        values[:, 0],
        width * 0.92,
        yerr=np.abs(values[:, 1:].T - values[:, 0]),
        color=_COLOURS[arm],
        label=arm,
        error_kw={"elinewidth": 0.9, "ecolor": "#222222"},
    )


def _guess_lines(axes: Axes, groups: Mapping[str, Any]) -> None:
    for place, group in enumerate(groups.values()):
        guess = 100 * group["most_frequent_answer"]["value"]
        label = "most frequent answer" if place == 0 else None
        axes.plot([place - 0.46, place + 0.46], [guess, guess], color="#000000", linestyle=":", label=label)


def task_chart(result: Result) -> Figure:
    """Heat map of exact match, tasks by arms: seen tasks under new wordings (where there are any) and held-out ones."""
    shown = {HELDOUT, NEW} if NEW in result["groups"] else set(result["groups"])
    rows = [row for row in result["tasks"] if row["group"] in shown]
    arms = list(result["arms"])
    values = np.array([[row["exact"][arm] for arm in arms] for row in rows])
    figure = Figure(figsize=(3.4 + 0.75 * len(arms), 1.4 + 0.19 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(100 * values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(arms)), arms, rotation=35, ha="left", fontsize=8)
    axes.xaxis.tick_top()
    names = [f"{row['task']} *" if row["group"] == HELDOUT else row["task"] for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    others = f"; others: {NEW}" if NEW in shown else ""
    axes.set_xlabel(f"exact match (%); *: {HELDOUT}{others}", fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.5)
    return figure
