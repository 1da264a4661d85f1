"""Adaptations on disk: numbers in safetensors, what they are in JSON. Nothing is ever unpickled.

    DIRECTORY/adaptation.json  adaptation-<sha256>.safetensors

The JSON names the tensor file by its hash and is replaced last, in one operation: whenever a save is cut off, the
directory holds the whole of the old adaptation or the whole of the new one.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hl_scale.adaptations.adaptation import Adaptation, AdaptationError
from hl_scale.adaptations.building import kind_of, settings_of
from hl_scale.base import AdaptedModel
from hl_scale.data.durable import flush, hash_file, write_text

DESCRIPTION_FILE = "adaptation.json"
FORMAT_VERSION = 1
_LARGEST_JSON = 1 << 20


def save_adaptation(adaptation: Adaptation, directory: str | os.PathLike[str]) -> None:
    """Write an adaptation, in place of one that may be there.

    Raises:
        AdaptationError: it holds NaN or infinity.
        OSError: the directory cannot be written.
    """
    directory = Path(directory)
    tensors = {name: value.detach().cpu().contiguous() for name, value in adaptation.state_dict().items()}
    broken = [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise AdaptationError(
            f"the adaptation holds NaN or infinity, first in {broken[0]}, and is not saved\n"
            "  fix: train it with a smaller learning rate"
        )
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".weights.{os.getpid()}"
    try:
        save_file(tensors, temporary)
        flush(temporary)
        digest = hash_file(temporary)
        os.replace(temporary, _weights(directory, digest))
    finally:
        temporary.unlink(missing_ok=True)
    flush(directory)
    description = {
        "format_version": FORMAT_VERSION, "kind": adaptation.kind, "settings": adaptation.settings.model_dump(),
        "condition_size": adaptation.condition_size, "base_fingerprint": adaptation.base_fingerprint,
        "parameters": adaptation.parameter_count, "sha256": digest,
    }  # fmt: skip
    write_text(directory / DESCRIPTION_FILE, json.dumps(description, indent=1) + "\n")
    flush(directory)
    for old in directory.glob("adaptation-*.safetensors"):
        if old != _weights(directory, digest):
            old.unlink(missing_ok=True)


def load_adaptation(directory: str | os.PathLike[str], base: AdaptedModel, kind: str | None = None) -> Adaptation:
    """Read an adaptation, on the device of the base.

    Args:
        directory: where it was saved.
        base: the base it was trained on.
        kind: the kind it must be of; any unless given.

    Raises:
        AdaptationError: it is of another kind or for another base, something is missing or damaged, or tensors do not
            fit their description.
    """
    directory = Path(directory)
    description = _read_description(directory)
    found = str(description.get("kind"))
    if kind is not None and found != kind:
        raise AdaptationError(f"{directory} holds a {found} adaptation, not {kind}\n  fix: give another directory")
    if description.get("base_fingerprint") != base.fingerprint:
        raise AdaptationError(
            f"{directory} was trained on the base {str(description.get('base_fingerprint'))[:12]}, not on "
            f"{base.fingerprint[:12]}\n  fix: load that base, with the same quantisation and compute type"
        )
    settings = description.get("settings")
    checked = settings_of(found, settings if isinstance(settings, dict) else {})
    size = description.get("condition_size")
    with torch.device("meta"):
        adaptation = kind_of(found).adaptation(base, checked, size if isinstance(size, int) else None)
    _fill(adaptation, directory, str(description.get("sha256")))
    return adaptation.to(next(base.parameters()).device)


def _fill(adaptation: Adaptation, directory: Path, digest: str) -> None:
    """Give an adaptation without values those of its tensor file."""
    again = "fix: save the adaptation again"
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise AdaptationError(f"{directory / DESCRIPTION_FILE} is damaged: it names no sha256\n  {again}")
    path = _weights(directory, digest)
    try:
        if hash_file(path) != digest:
            raise AdaptationError(f"{path} is damaged: its bytes do not match their sha256\n  {again}")
        tensors = load_file(path)
    except FileNotFoundError:
        raise AdaptationError(f"{path} is missing\n  {again}") from None
    except (OSError, SafetensorError) as error:
        raise AdaptationError(f"{path} cannot be read: {error}\n  {again}") from None
    expected = {name: tuple(value.shape) for name, value in adaptation.state_dict().items()}
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    if shapes != expected:
        odd = sorted(name for name in {*shapes, *expected} if shapes.get(name) != expected.get(name))
        raise AdaptationError(
            f"{path} does not fit its description: {odd[0]} is {shapes.get(odd[0])}, expected {expected.get(odd[0])}"
            f"\n  {again}"
        )
    if not all(value.is_floating_point() and bool(torch.isfinite(value).all()) for value in tensors.values()):
        raise AdaptationError(f"{path} holds NaN, infinity or no floating-point numbers\n  {again}")
    adaptation.load_state_dict(tensors, assign=True)


def _read_description(directory: Path) -> dict[str, Any]:
    path = directory / DESCRIPTION_FILE
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"larger than {_LARGEST_JSON} bytes")
        tree = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        raise AdaptationError(f"{path} is missing\n  fix: give a directory that holds a saved adaptation") from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdaptationError(f"{path} is damaged: {error}\n  fix: save the adaptation again") from None
    if tree.get("format_version") != FORMAT_VERSION:
        raise AdaptationError(
            f"{path} has format version {tree.get('format_version')}, this hl_scale reads {FORMAT_VERSION}\n"
            "  fix: use the hl_scale that wrote it"
        )
    return tree


def _weights(directory: Path, digest: str) -> Path:
    return directory / f"adaptation-{digest[:16]}.safetensors"
