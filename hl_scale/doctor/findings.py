"""What a check found, and all of it as a table or as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

Status = Literal["ok", "warning", "problem"]
_STYLES: dict[Status, str] = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: what was looked at.
        status: "problem" where a run would fail or be open to strangers, "warning" where it may.
        found: what is there.
        fix: how to mend it; empty where nothing is wrong.
    """

    check: str
    status: Status
    found: str
    fix: str = ""

    def __post_init__(self) -> None:
        assert bool(self.fix) == (self.status != "ok"), self


def ok(check: str, found: str) -> Finding:
    """Nothing is wrong."""
    return Finding(check, "ok", found)


def warning(check: str, found: str, fix: str) -> Finding:
    """A run may fail, be slow, or be less safe than it could be."""
    return Finding(check, "warning", found, fix)


def problem(check: str, found: str, fix: str) -> Finding:
    """A run would fail, or anybody could take the machine over."""
    return Finding(check, "problem", found, fix)


def worst(findings: Iterable[Finding]) -> Status:
    """The most serious status among them."""
    statuses = {finding.status for finding in findings}
    return "problem" if "problem" in statuses else "warning" if "warning" in statuses else "ok"


def render_findings(findings: Sequence[Finding]) -> Table:
    """One row a check; how to mend it stands below what was found."""
    table = Table(show_lines=False)
    table.add_column("check", style="bold")
    table.add_column("status")
    table.add_column("found", overflow="fold")
    for finding in findings:
        found = Text(finding.found)
        if finding.fix:
            found.append(f"\nfix: {finding.fix}", style="italic")
        table.add_row(Text(finding.check), Text(finding.status, style=_STYLES[finding.status]), found)
    return table


def conclusion(findings: Sequence[Finding]) -> str:
    """One line: how many problems and warnings."""
    problems = sum(finding.status == "problem" for finding in findings)
    warnings = sum(finding.status == "warning" for finding in findings)
    if not problems and not warnings:
        return f"all {len(findings)} checks are ok"
    counts = [
        f"{count} {name}{'s' if count > 1 else ''}"
        for count, name in ((problems, "problem"), (warnings, "warning"))
        if count
    ]
    return f"{' and '.join(counts)} in {len(findings)} checks"


def findings_as_dict(findings: Sequence[Finding]) -> dict[str, Any]:
    """For programs: the worst status, and every check."""
    return {"status": worst(findings), "checks": [asdict(finding) for finding in findings]}
