"""The dialect evaluation as a terminal table and as Markdown.

In both, a control's ratio carries `+` where the control is worse than the dialect's own vector and `-` where it is
better, if the whole interval of the paired difference lies on that side of 0; without a sign they are not told apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from hl_scale.evaluation.controls import OWN, PLAIN

Result = Mapping[str, Any]

HEADINGS = {
    OWN: "own vector",
    "zero": "zero",
    "mean_named": "mean of named",
    "mean_training": "mean of training",
    "shuffled": "shuffled",
    "wrong": "wrong dialect",
    PLAIN: "plain LoRA",
}
_SHORT_HEADINGS = {
    OWN: "own\nvector",
    "zero": "zero",
    "mean_named": "mean\nnamed",
    "mean_training": "mean\ntrain",
    "shuffled": "shuf-\nfled",
    "wrong": "wrong",
    PLAIN: "plain\nLoRA",
}
LEGEND = (
    "Ratio = mean divergence adapted / base on held-out sentences, [95% interval over sentences]; below 1 is closer to "
    "Standard English. + / - : worse / better than the own vector with the paired interval clear of 0."
)


def conditions(result: Result) -> list[str]:
    """The conditions of a result in the order of the columns."""
    return [name for name in HEADINGS if any(name in row["ratio"] for row in result["dialects"])]


def render_table(result: Result) -> Group:
    """For a terminal of 80 columns: ratios, changed and unchanged sentences apart, what Standard English loses."""
    title = "Divergence to Standard English, adapted / base"
    if result["reduced"]:
        title += f"\nREDUCED EVALUATION: {'; '.join(result['reduced'])}"
    columns = "seen: in training; cov.: share of the dialect's features that training conditions attest."
    lines = [f"{LEGEND} {columns}", *standard_lines(result), _retrieval_line(result)]
    return Group(_terminal_ratios(result, title), _terminal_parts(result), *(Text(line, style="dim") for line in lines))


def _terminal_ratios(result: Result, title: str) -> Table:
    names = conditions(result)
    table = _terminal_table(title, ["dialect", "seen", "cov.", *(_SHORT_HEADINGS[name] for name in names)])
    for row in result["dialects"]:
        cells = [_terminal_name(row), "yes" if row["seen"] else "no", f"{row['coverage']['binary']:.2f}"]
        table.add_row(*cells, *(_terminal_cell(row, name) for name in names))
    for label, average in _averages(result):
        table.add_row(label, "", "", *(_terminal_cell(average, name) for name in names), style="bold")
    return table


def _terminal_parts(result: Result) -> Table:
    names = [name for name in conditions(result) if name in (OWN, "zero", PLAIN)]
    headings = [_SHORT_HEADINGS[name] for name in names]
    title = "Ratio on the changed sentences | divergence added on the unchanged ones"
    table = _terminal_table(title, ["dialect", "changed", *headings, "| same", *headings])
    for row in result["dialects"]:
        changed, unchanged = row["changed"], row["unchanged"]
        cells = [_terminal_name(row), str(changed["sentences"]), *(_terminal_cell(changed, name) for name in names)]
        added = unchanged["added_divergence"]
        cells.append(f"| {unchanged['sentences']:4d}")
        table.add_row(*cells, *(_short(added[name]["value"]) if name in added else "-" for name in names))
    return table


def _terminal_table(title: str, headings: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=index > 0)
    return table


def _terminal_name(row: Mapping[str, Any]) -> str:
    return str(row["variety"]).replace(" English", "")


def _terminal_cell(part: Mapping[str, Any], name: str) -> str:
    ratio = part["ratio"].get(name)
    if ratio is None:
        return "-"
    if name == OWN:
        return f"{_short(ratio['value'])} [{_short(ratio['low'])},{_short(ratio['high'])}]"
    return _short(ratio["value"]) + (_sign(part, name) or " ")


def _short(value: float) -> str:
    """Three decimals without the zero before the point."""
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.2f}"


@dataclass(frozen=True)
class TextTable:
    """A table of finished cells with a caption above it."""

    caption: str
    header: list[str]
    rows: list[list[str]]

    def to_markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join([f"{self.caption}:", "", *("| " + " | ".join(cells) + " |" for cells in lines)])


def markdown_table(result: Result) -> str:
    """Every number of the result that belongs in a document: tables, what Standard English loses, and caveats."""
    parts = [f"**Reduced evaluation**: {'; '.join(result['reduced'])}."] if result["reduced"] else []
    parts += [LEGEND, *(table.to_markdown() for table in tables(result))]
    parts += [*standard_lines(result), "\n".join(f"- {caveat}" for caveat in result["caveats"])]
    return "\n\n".join(parts) + "\n"


def tables(result: Result) -> list[TextTable]:
    """Ratios, paired differences, changed and unchanged sentences apart, coverage, generated updates."""
    return [
        _ratio_table(result),
        _difference_table(result),
        _changed_table(result),
        _unchanged_table(result),
        _coverage_table(result),
        _adapter_table(result),
        _retrieval_table(result),
    ]


def _ratio_table(result: Result) -> TextTable:
    names = conditions(result)
    rows = [
        [f"{row['variety']} ({_seen(row)})", *(_cell(row, name, interval=True) for name in names)]
        for row in result["dialects"]
    ]
    rows += [[label, *(_cell(average, name, interval=True) for name in names)] for label, average in _averages(result)]
    return TextTable("Divergence ratio adapted / base", ["dialect", *(HEADINGS[name] for name in names)], rows)


def _difference_table(result: Result) -> TextTable:
    names = [name for name in conditions(result) if name != OWN]
    rows = [
        [f"{row['variety']} (wrong: {row['wrong']})", *(_signed(row["difference"].get(name)) for name in names)]
        for row in result["dialects"]
    ]
    rows += [
        [label, *(_signed(average["difference"].get(name)) for name in names)] for label, average in _averages(result)
    ]
    caption = "Paired difference of ratios, control minus own vector (positive: the own vector is better)"
    return TextTable(caption, ["dialect", *(HEADINGS[name] for name in names)], rows)


def _changed_table(result: Result) -> TextTable:
    names = conditions(result)
    rows = [
        [
            row["variety"],
            f"{row['changed']['sentences']} of {row['sentences']}",
            *(_cell(row["changed"], name, interval=True) for name in names),
        ]
        for row in result["dialects"]
    ]
    caption = "Ratio on the sentences that the dialect changes"
    return TextTable(caption, ["dialect", "changed", *(HEADINGS[name] for name in names)], rows)


def _unchanged_table(result: Result) -> TextTable:
    names = conditions(result)
    rows = []
    for row in result["dialects"]:
        added = row["unchanged"]["added_divergence"]
        cells = [_signed(added.get(name)) for name in names]
        rows.append([row["variety"], f"{row['unchanged']['sentences']} of {row['sentences']}", *cells])
    caption = "Divergence added on the sentences that the dialect leaves unchanged (the base's own is 0 there)"
    return TextTable(caption, ["dialect", "unchanged", *(HEADINGS[name] for name in names)], rows)


_COVERAGE = {"attestation": "by attestation"}


def _coverage_table(result: Result) -> TextTable:
    weightings = list(result["dialects"][0]["coverage"])
    named = [_COVERAGE.get(weighting, weighting) for weighting in weightings]
    header = ["dialect", "in training", *named, "sentences", "base divergence"]
    header += ["share made worse by own", "nearest in training"]
    rows = [
        [
            row["variety"],
            _seen(row),
            *(f"{row['coverage'][weighting]:.2f}" for weighting in weightings),
            str(row["sentences"]),
            _interval(row["base_divergence"]),
            f"{row['share_made_worse']:.2f}",
            f"{near['variety']} ({near['distance']:.2f})" if (near := row.get("nearest")) else "",
        ]
        for row in result["dialects"]
    ]
    return TextTable("Share of the dialect's features that training conditions attest, and the base", header, rows)


def _adapter_table(result: Result) -> TextTable:
    adapters = result["adapters"]
    order = adapters["conditions"]
    header = ["dialect", "norm of delta W", "cosine to the other dialects", "variance within sentences, own (base)"]
    header.append("variance between sentences, own (base)")
    rows = []
    for row in result["dialects"]:
        index = order.index(row["variety"])
        others = [
            value
            for other, value in zip(order, adapters["delta_cosine"][index], strict=True)
            if other not in (row["variety"], "zero") and value is not None
        ]
        spread = f"{min(others):.2f} to {max(others):.2f}" if others else "-"
        own, base = row["token_variance"][OWN], row["token_variance"]["base"]
        variances = [f"{_plain(own[kind])} ({_plain(base[kind])})" for kind in ("within", "between")]
        rows.append([row["variety"], f"{adapters['delta_norm'][index]:.2f}", spread, *variances])
    rows.append(["zero vector", f"{adapters['delta_norm'][order.index('zero')]:.2f}", "", "", ""])
    return TextTable(
        "Generated updates, and token variance relative to Standard English (collapse shows here)", header, rows
    )


def _retrieval_table(result: Result) -> TextTable:
    conditions = list(result["dialects"][0]["retrieval"])
    rows = [
        [row["variety"], f"{1 / row['sentences']:.3f}", *(_interval(row["retrieval"][name]) for name in conditions)]
        for row in result["dialects"]
    ]
    title = "Share of sentences whose nearest held-out original, by mean state, is their own"
    return TextTable(title, ["dialect", "chance", *(HEADINGS.get(name, name) for name in conditions)], rows)


def _retrieval_line(result: Result) -> str:
    shares = {
        HEADINGS.get(name, name): np.mean([row["retrieval"][name]["value"] for row in result["dialects"]])
        for name in result["dialects"][0]["retrieval"]
    }
    found = ", ".join(f"{name} {100 * share:.1f}%" for name, share in shares.items())
    return f"Sentences whose nearest held-out original is their own, mean of the rows: {found}."


def standard_lines(result: Result) -> list[str]:
    """The damage done to Standard English in at most two sentences."""
    damage = result["standard_english"]
    zero, plain = damage["divergence"]["zero"], damage["divergence"].get(PLAIN)
    line = f"Standard English: the zero vector adds divergence {zero['value']:.3f} (largest {zero['maximum']:.3f})"
    if plain is not None:
        line += f", the plain LoRA {plain['value']:.3f} (largest {plain['maximum']:.3f})"
        if "zero_over_plain_lora" in damage:
            line += f": {_interval(damage['zero_over_plain_lora'])} times as much"
    lines = [line + "."]
    loss = damage["language_model_loss"]
    if loss is not None:
        added = [f"{HEADINGS[name]} {_signed(value, digits=4)}" for name, value in loss["added"].items()]
        lines.append(
            f"Standard English language-model loss: base {loss['loss']['base']['value']:.3f} nats per token; "
            f"added by {', by '.join(added)}."
        )
    return lines


def _averages(result: Result) -> list[tuple[str, Mapping[str, Any]]]:
    return [
        (f"average of {len(average['dialects'])} {group}", average)
        for group, average in result["averages"].items()
        if average is not None
    ]


def _seen(row: Mapping[str, Any]) -> str:
    return "seen" if row["seen"] else "unseen"


def _cell(part: Mapping[str, Any], name: str, interval: bool) -> str:
    ratio = part["ratio"].get(name)
    if ratio is None:
        return "-"
    text = _interval(ratio) if interval else f"{ratio['value']:.3f}"
    return f"{text} {_sign(part, name)}".rstrip()


def _sign(part: Mapping[str, Any], name: str) -> str:
    difference = part["difference"].get(name)
    if difference is None:
        return ""
    return "+" if difference["low"] > 0 else "-" if difference["high"] < 0 else ""


def _interval(estimate: Mapping[str, float]) -> str:
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _signed(estimate: Mapping[str, float] | None, digits: int = 3) -> str:
    if estimate is None:
        return "-"
    low, high = f"{estimate['low']:+.{digits}f}", f"{estimate['high']:+.{digits}f}"
    return f"{estimate['value']:+.{digits}f} [{low}, {high}]"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
