"""Adapters of many conditions: one pass of the hypernetwork for as many as fit in memory, one PEFT directory for each.

Directories appear whole, some dozens at a time: the files of a pass are flushed together before the first of its
directories gets its name. A call that was cut short is repeated; what is there already, whole and with the same
provenance, is kept.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hl_scale.conditions import typology
from hl_scale.data.durable import hash_file
from hl_scale.lora import LoraFactors, Slot
from hl_scale.progress import counting_bar
from hl_scale.serving.export import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    ExportError,
    Profile,
    base_arguments,
    check_factors,
    condition_facts,
    factors_of,
    peft_config,
    run_provenance,
    scale_facts,
    write_adapter_files,
)
from hl_scale.serving.staging import PROVENANCE_FILE, OutputError, check_replaceable, publish, staging_area

if TYPE_CHECKING:
    from hl_scale.base import TaskAdapter
    from hl_scale.engine.run import LoadedRun

PASS_BYTES = 256 * 2**20
"""Memory of one pass: factors as heads emit them, as they are assembled, and as they are written."""

LONGEST_LINE = 64 * 2**10
"""Bytes of a line in a file of conditions."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NAME_RULE = "a name starts with a letter or digit and has at most 128 letters, digits, '.', '_' and '-'"
_SHOWN = 20


class RequestError(ValueError):
    """Adapters that were asked for and cannot be made; all of them in one message."""


@dataclass(frozen=True)
class Request:
    """An adapter to make: the name of its directory, and its condition."""

    name: str
    condition: typology.Condition


@dataclass(frozen=True)
class Generated:
    """What `generate_adapters` wrote, and what was there already; names in the order of the requests."""

    directory: Path
    written: tuple[str, ...]
    kept: tuple[str, ...]


def generate_adapters(
    run: LoadedRun,
    requests: Sequence[Request],
    directory: str | os.PathLike[str],
    *,
    profile: Profile = "plain",
    with_adapter: TaskAdapter | None = None,
    force: bool = False,
    progress: bool = True,
) -> Generated:
    """Generate the adapters of many conditions as PEFT directories below one folder.

    Factors equal those of `generate_adapter` up to the rounding of matrix products, whose order of summation depends on
    how many conditions are in a pass.

    Args:
        run: the trained hypernetwork with its base.
        requests: names and conditions, see `read_requests` and `all_dialects`.
        directory: DIRECTORY/NAME is written for each; created where missing.
        profile: see `write_peft_adapter`.
        with_adapter: a task adapter to add to each: directories then hold sums, of summed rank.
        force: replace directories that hl_scale wrote earlier and that are damaged or of another provenance.
        progress: show a progress bar on a terminal.

    Raises:
        RequestError: names that are not allowed or not unique, or directories in the way, all of them; nothing was
            written.
        ExportError: factors that are not finite; adapters of earlier passes are there.
    """
    directory = Path(os.path.abspath(directory))
    places = [(request.name, f"request {number}") for number, request in enumerate(requests, start=1)]
    _refuse("these adapters cannot be generated, nothing was written", _problems_of_names(places))
    if not requests:
        return Generated(directory, (), ())
    slots, lora, factor = run.base.slots, run.config.lora, run.hypernetwork.scale
    if with_adapter is not None:
        example, lora = factors_of(run, torch.tensor(requests[0].condition.vector), with_adapter)
        slots, factor = example.slots, example.scale
    config = peft_config(slots, lora, **base_arguments(run), profile=profile)
    shared = {**run_provenance(run, requests[0].condition, with_adapter), **scale_facts(lora, factor, profile)}

    def facts_of(request: Request) -> dict[str, Any]:
        return {**shared, **condition_facts(request.condition)}

    kept = _kept(requests, directory, config, facts_of, force)
    due = [request for request in requests if request.name not in kept]
    per_pass = conditions_per_pass(slots, lora.rank)
    with counting_bar("generating", len(due), progress) as advance:
        for start in range(0, len(due), per_pass):
            some = due[start : start + per_pass]
            with staging_area(directory) as staging:
                for request, factors in zip(some, _factors(run, some, with_adapter), strict=True):
                    (staging / request.name).mkdir()
                    write_adapter_files(staging / request.name, factors, config, facts_of(request))
                names = [request.name for request in some]
                publish([staging / name for name in names], [directory / name for name in names], force=force)
            advance(len(some))
    return Generated(directory, tuple(request.name for request in due), tuple(kept))


def conditions_per_pass(slots: Iterable[Slot], rank: int, memory: int = PASS_BYTES) -> int:
    """How many adapters to generate at a time so that a pass takes about ``memory`` bytes; at most 256, at least 1."""
    adapter = sum(4 * rank * (slot.in_features + slot.out_features) for slot in slots)
    return max(1, min(256, memory // (4 * adapter)))


def all_dialects(run: LoadedRun) -> list[Request]:
    """All varieties of eWAVE, in directories named as they are, in lower case with hyphens.

    Raises:
        RequestError: the run's conditions are not dialects of English.
    """
    if run.config.data.kind != "dialects" or run.config.dialects.vectors != "ewave":
        trained = "tasks" if run.config.data.kind != "dialects" else "languages"
        raise RequestError(f"this run was trained on {trained}, not on dialects\n  fix: list conditions in a file")
    return [Request(_slug(name), run.conditions.parse(f"dialect:{name}")) for name in typology.varieties()]


def read_requests(path: str | os.PathLike[str], parse: Callable[[str], typology.Condition]) -> list[Request]:
    """Read a file of conditions, a JSON object a line: {"name": "a-name", "condition": "dialect:Nigerian English"}.

    The file is not trusted: names cannot leave the folder that adapters are written to, and "features:FILE.json" reads
    files below the folder of ``path`` alone, relative to it.

    Args:
        path: the file, UTF-8; empty lines are skipped.
        parse: what reads a condition of the run, and raises ValueError.

    Raises:
        RequestError: lines that are not of this form, names that are not allowed or not unique, conditions that are
            not understood: all of them in one message, each with its line.
    """
    path = Path(path)
    requests: list[Request] = []
    places: list[tuple[str, str]] = []
    problems: list[str] = []
    for number, line in _lines(path):
        try:
            name, text = _read_line(line)
            places.append((name, f"line {number}"))
            requests.append(Request(name, parse(_contained(text, path.parent))))
        except (ValueError, OSError, RecursionError) as error:
            problems.append(f"line {number}: {str(error).splitlines()[0]}")
    problems += _problems_of_names(places)
    if not problems and not requests:
        problems.append('no line {"name": ..., "condition": ...}')
    _refuse(f"{path} cannot be used, nothing was generated", problems)
    return requests


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise RequestError(
                    f"{path}, line {number} is longer than {LONGEST_LINE} bytes\n"
                    '  fix: write one JSON object {"name": ..., "condition": ...} per line'
                )
            if line.strip():
                yield number, line


def _read_line(line: bytes) -> tuple[str, str]:
    tree = json.loads(line)
    if not isinstance(tree, dict) or tree.keys() != {"name", "condition"}:
        raise ValueError('it is no object {"name": ..., "condition": ...}')
    if not isinstance(tree["name"], str) or not isinstance(tree["condition"], str):
        raise ValueError("name and condition must be strings")
    return tree["name"], tree["condition"]


def _contained(condition: str, folder: Path) -> str:
    """The condition, with the path of a feature file taken from ``folder`` and kept inside it."""
    kind, _, value = condition.strip().partition(":")
    if kind != "features":
        return condition
    path = (folder / value.strip()).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{value.strip()!r} leads out of the folder of the file of conditions")
    return f"features:{path}"


def _problems_of_names(places: Iterable[tuple[str, str]]) -> list[str]:
    """Of (name, where it stands). Case does not tell names apart: some file systems ignore it."""
    problems = []
    first: dict[str, str] = {}
    for name, place in places:
        if not _NAME.fullmatch(name):
            problems.append(f"{place}: {name[:140]!r} cannot name a directory ({_NAME_RULE})")
        elif first.setdefault(name.casefold(), place) != place:
            problems.append(f"{place}: the name {name!r} is taken by {first[name.casefold()]}")
    return problems


def _refuse(what: str, problems: Sequence[str]) -> None:
    if not problems:
        return
    shown = "\n  ".join(problems[:_SHOWN])
    more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise RequestError(f"{what}:\n  {shown}{more}")


def _kept(
    requests: Sequence[Request],
    directory: Path,
    config: dict[str, Any],
    facts_of: Callable[[Request], dict[str, Any]],
    force: bool,
) -> dict[str, None]:
    """Names whose directories are as they would be written; refuses others that may not be replaced."""
    kept: dict[str, None] = {}
    problems = []
    for request in requests:
        target = directory / request.name
        if not os.path.lexists(target):
            continue
        difference = _difference(target, config, facts_of(request))
        if difference is None:
            kept[request.name] = None
            continue
        try:
            check_replaceable(target, force=force)
        except OutputError as error:
            problems.append(str(error).splitlines()[0] + ("" if force else f", and {difference}"))
    fix = "choose another folder, or remove them yourself" if force else "choose another folder, or ask for replacement"
    _refuse(f"directories are in the way, nothing was written (fix: {fix})", problems)
    return kept


def _difference(directory: Path, config: dict[str, Any], facts: dict[str, Any]) -> str | None:
    """Why a directory is not the adapter that would be written there; None if it is."""
    try:
        found = json.loads((directory / PROVENANCE_FILE).read_text(encoding="utf-8"))
        digest = found["files"][WEIGHTS_FILE]["sha256"]
        whole = hash_file(directory / WEIGHTS_FILE) == digest
        same_config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8")) == config
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "it is no whole adapter"
    if not whole:
        return "its weights are damaged"
    ignored = {"created", "files"}
    different = sorted(key for key in (found.keys() | facts) - ignored if found.get(key) != facts.get(key))
    if different or not same_config:
        return f"it differs in {', '.join(different) or CONFIG_FILE}"
    return None


def _factors(run: LoadedRun, requests: Sequence[Request], with_adapter: TaskAdapter | None) -> Iterator[LoraFactors]:
    """Factors of each (E = 1), from one pass."""
    vectors = torch.stack([torch.tensor(request.condition.vector) for request in requests])
    factors, lora = factors_of(run, vectors, with_adapter)
    for number, request in enumerate(requests):
        one = factors.select(min(number, factors.conditions - 1))  # a plain LoRA has one for all conditions
        try:
            check_factors(one, lora)
        except ExportError as error:
            raise ExportError(f"{request.name}: {error}") from None
        yield one


def _slug(name: str) -> str:
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_name).strip("-")
