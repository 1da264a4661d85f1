"""Refuse a bad adapter with a reason, before an engine sees it.

Engines load what they are given: some answer with the wrong base's adapter, some die of a damaged one. This reads a
PEFT directory of anyone, in the order of what it costs: JSON, the header of the tensor file, its hash, its numbers.
It needs torch and safetensors alone, so that it runs inside a server.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from hl_scale.data.durable import hash_file
from hl_scale.data.peft_directory import WEIGHTS_FILE, AdapterError, AdapterFacts, read_adapter

__all__ = ["AdapterError", "AdapterFacts", "validate_adapter"]


def validate_adapter(
    directory: str | os.PathLike[str],
    *,
    base_model_name_or_path: str | Sequence[str] | None = None,
    base_fingerprint: str | None = None,
) -> AdapterFacts:
    """Check that a directory holds a whole, finite, plain LoRA for a base.

    Args:
        directory: a PEFT directory, of whatever origin.
        base_model_name_or_path: the base that it must be for: the same name, or another path to the same directory; one
            of several names if a sequence is given.
        base_fingerprint: the same by what the base is; decides alone where the adapter has a fingerprint.

    Returns:
        What the adapter is. Its numbers were read once and are not kept.

    Raises:
        AdapterError: it is not; says everything that is wrong with it.
    """
    try:
        facts = read_adapter(directory)
    except AdapterError as error:
        raise _refusal(directory, [str(error)]) from None
    names = [base_model_name_or_path] if isinstance(base_model_name_or_path, str) else base_model_name_or_path or []
    problems = [
        *_other_base(facts, names, base_fingerprint),
        *_other_targets(facts),
        *_other_contents(facts),
    ]
    try:
        facts.read()
    except AdapterError as error:
        problems.append(str(error))
    if problems:
        raise _refusal(directory, problems)
    return facts


def _refusal(directory: str | os.PathLike[str], problems: list[str]) -> AdapterError:
    return AdapterError(
        f"{os.fspath(directory)} is refused: {'; '.join(problems)}\n  fix: generate or fetch the adapter again"
    )


def _other_base(facts: AdapterFacts, names: Sequence[str], fingerprint: str | None) -> list[str]:
    if fingerprint is not None and facts.base_fingerprint is not None:
        if facts.base_fingerprint == fingerprint:
            return []
        return [f"it was made for base {facts.base_fingerprint[:12]}, not {fingerprint[:12]}"]
    if names:
        same = any(facts.base_model == name or _same_directory(facts.base_model, name) for name in names)
        return [] if same else [f"it was made for base {facts.base_model}, not {names[0]}"]
    return [] if fingerprint is None else [f"it does not say whether its base is {fingerprint[:12]}"]


def _same_directory(first: str | None, second: str) -> bool:
    return first is not None and os.path.isdir(first) and os.path.isdir(second) and os.path.samefile(first, second)


def _other_targets(facts: AdapterFacts) -> list[str]:
    """Lists of names only: a pattern from outside is not run, and the defaults of PEFT are not known here."""
    targets = facts.config.get("target_modules")
    if not isinstance(targets, list):
        return []
    named = set(map(str, targets))
    matched = {slot.path: named.intersection(_ends(slot.path)) for slot in facts.slots}
    unknown = [path for path, own in matched.items() if not own]
    missing = sorted(named.difference(*matched.values()))
    problems = [f"it has factors of {unknown[0]}, which target_modules does not name"] if unknown else []
    return problems + ([f"it has no factors of {missing[0]}, which target_modules names"] if missing else [])


def _ends(path: str) -> list[str]:
    """a.b.c, b.c, c: by one of these PEFT names a module."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _other_contents(facts: AdapterFacts) -> list[str]:
    """Against the sha256 that was noted when the file was written."""
    files = facts.provenance.get("files")
    entry = files.get(WEIGHTS_FILE) if isinstance(files, dict) else None
    noted = entry.get("sha256") if isinstance(entry, dict) else None
    if noted is None:
        return []
    found = hash_file(Path(facts.directory) / WEIGHTS_FILE)
    return [] if found == noted else [f"the sha256 of {WEIGHTS_FILE} is not the one in its provenance"]
