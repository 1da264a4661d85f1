"""The dialect evaluation as a terminal table and as Markdown.

In both, a control's ratio carries `+` where the control is worse than the dialect's own vector and `-` where it is
better, if the whole interval of the paired difference lies on that side of 0; without a sign the two are not told apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

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
LEGEND = (
    "Ratio = mean divergence adapted / base on held-out sentences, [95% interval over sentences]; below 1 is closer to "
    "Standard English. + / - : worse / better than the own vector with the paired interval clear of 0."
)


def conditions(result: Result) -> list[str]:
    """The conditions of a result in the order of the columns."""
    present = result["dialects"][0]["ratio"] if result["dialects"] else {}
    return [name for name in HEADINGS if name in present]


def render_table(result: Result) -> Table:
    """One screen: a row per dialect, then averages, then the damage to Standard English as caption."""
    title = "Dialect evaluation"
    if result["reduced"]:
        title += f" - REDUCED: {'; '.join(result['reduced'])}"
    table = Table(title=title, caption="\n".join([LEGEND, *standard_lines(result)]), caption_justify="left")
    table.add_column("dialect", min_width=12)
    table.add_column("seen")
    table.add_column("cov.", justify="right")
    table.add_column("changed", justify="right")
    names = conditions(result)
    for name in names:
        table.add_column(HEADINGS[name], justify="right", no_wrap=name != OWN)
    for row in result["dialects"]:
        cells = [row["variety"], _seen(row), f"{row['coverage']['binary']:.2f}"]
        cells.append(f"{row['changed']['sentences']}/{row['sentences']}")
        table.add_row(*cells, *(_cell(row, name, interval=name == OWN) for name in names))
    for label, average in _averages(result):
        table.add_row(label, "", "", "", *(_cell(average, name, interval=name == OWN) for name in names), style="bold")
    return table


def markdown_table(result: Result) -> str:
    """Every number of the result that belongs in a document: five Markdown tables with their legends."""
    parts = []
    if result["reduced"]:
        parts.append(f"**Reduced evaluation**: {'; '.join(result['reduced'])}.")
    parts += [LEGEND, ratio_markdown(result), "Paired difference of ratios, control minus own vector:"]
    parts.append(difference_markdown(result))
    parts.append("Changed sentences (ratio) and unchanged sentences (divergence added, where the base's own is 0):")
    parts += [changed_markdown(result), *standard_lines(result)]
    parts += ["Generated updates and token variances (relative to Standard English):", adapter_markdown(result)]
    parts.append("\n".join(f"- {caveat}" for caveat in result["caveats"]))
    return "\n\n".join(parts) + "\n"


def ratio_markdown(result: Result) -> str:
    """Ratios with intervals, one row per dialect and per average."""
    names = conditions(result)
    rows = [
        [
            row["variety"],
            _seen(row),
            "{binary:.2f} / {attestation:.2f} / {implementable:.2f}".format(**row["coverage"]),
            str(row["sentences"]),
            f"{row['base_divergence']['value']:.3f}",
            *(_cell(row, name, interval=True) for name in names),
        ]
        for row in result["dialects"]
    ]
    for label, average in _averages(result):
        rows.append([f"**{label}**", "", "", "", "", *(_cell(average, name, interval=True) for name in names)])
    header = ["dialect", "seen", "coverage: binary / attested / implementable", "sentences", "base divergence"]
    return _markdown([*header, *(HEADINGS[name] for name in names)], rows)


def difference_markdown(result: Result) -> str:
    """Paired differences to the own vector with intervals."""
    names = [name for name in conditions(result) if name != OWN]
    rows = []
    for row in result["dialects"]:
        wrong = f"{row['variety']} (wrong: {row['wrong']})"
        rows.append([wrong, *(_signed(row["difference"].get(name)) for name in names)])
    for label, average in _averages(result):
        rows.append([f"**{label}**", *(_signed(average["difference"].get(name)) for name in names)])
    return _markdown(["dialect", *(HEADINGS[name] for name in names)], rows)


def changed_markdown(result: Result) -> str:
    """Changed and unchanged sentences apart."""
    names = conditions(result)
    header = ["dialect", "changed", *(f"{HEADINGS[name]}: ratio" for name in names), "unchanged"]
    header += [f"{HEADINGS[name]}: added" for name in names]
    rows = []
    for row in result["dialects"]:
        changed, unchanged = row["changed"], row["unchanged"]
        cells = [row["variety"], str(changed["sentences"])]
        cells += [_cell(changed, name, interval=name == OWN) for name in names]
        cells.append(str(unchanged["sentences"]))
        added = unchanged["added_divergence"]
        cells += [f"{added[name]['value']:.3f}" if name in added else "-" for name in names]
        rows.append(cells)
    return _markdown(header, rows)


def adapter_markdown(result: Result) -> str:
    """Norm of delta W, its cosine to the other dialects' and the token variances, per dialect."""
    adapters = result["adapters"]
    order = adapters["conditions"]
    header = ["dialect", "norm of delta W", "cosine to the other dialects", "within-sentence variance, own (base)"]
    header.append("between-sentence variance, own (base)")
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
    return _markdown(header, rows)


def standard_lines(result: Result) -> list[str]:
    """The damage done to Standard English in at most two sentences."""
    damage = result["standard_english"]
    zero, plain = damage["divergence"]["zero"], damage["divergence"].get(PLAIN)
    line = f"Standard English: the zero vector adds divergence {zero['value']:.3f} (largest {zero['maximum']:.3f})"
    if plain is not None:
        line += f", the plain LoRA {plain['value']:.3f} (largest {plain['maximum']:.3f})"
        if "zero_over_plain_lora" in damage:
            line += f"; {_interval(damage['zero_over_plain_lora'])} of it"
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
    difference = part["difference"].get(name)
    if difference is None:
        return text
    sign = "+" if difference["low"] > 0 else "-" if difference["high"] < 0 else ""
    return f"{text} {sign}".rstrip()


def _interval(estimate: Mapping[str, float]) -> str:
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _signed(estimate: Mapping[str, float] | None, digits: int = 3) -> str:
    if estimate is None:
        return "-"
    low, high = f"{estimate['low']:+.{digits}f}", f"{estimate['high']:+.{digits}f}"
    return f"{estimate['value']:+.{digits}f} [{low}, {high}]"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
