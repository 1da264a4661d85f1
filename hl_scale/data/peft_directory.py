"""A LoRA in the form of PEFT, as it is found on disk.

    DIRECTORY/adapter_config.json  adapter_model.safetensors  hl_provenance.json (of adapters that hl_scale wrote)

Such a directory is data from outside. What is read is JSON and the header of the tensor file, which says everything but
the numbers; nothing is ever unpickled. Needs torch and safetensors alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hl_scale.lora import Slot, lora_scale

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PROVENANCE_FILE = "hl_provenance.json"

_KEY = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_ALTERS_BASE = re.compile("pissa.*|olora|corda|loftq|lora_ga")
_FLOATING = {"F64", "F32", "F16", "BF16"}
_LARGEST_JSON = 4 * 2**20
_LARGEST_HEADER = 32 * 2**20
_LONGEST_KEY = 1000


class AdapterError(ValueError):
    """An adapter that cannot be used."""


@dataclass(frozen=True)
class AdapterFacts:
    """What a directory says of its adapter; its numbers are still on disk.

    Attributes:
        directory: where it is.
        config: adapter_config.json.
        provenance: hl_provenance.json, empty if there is none.
        header: the strings in the header of the tensor file.
        slots: the layers that have factors, with their sizes.
        rank, scale: r and s of y = W x + s B (A x).
        base_model: what it names as its base, if anything.
        base_fingerprint: of the base it was made for, as far as it says.
        keys: (path, "A" or "B") -> key in the tensor file.
    """

    directory: Path
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    header: Mapping[str, str]
    slots: tuple[Slot, ...]
    rank: int
    scale: float
    base_model: str | None
    base_fingerprint: str | None
    keys: Mapping[tuple[str, str], str]

    def fingerprint(self, tensors: Mapping[tuple[str, str], Tensor]) -> str:
        """sha256 of the update itself: scale, and names, types, shapes and bytes of the factors that `read` gives."""
        digest = hashlib.sha256(json.dumps([self.scale, self.rank]).encode())
        for place, tensor in sorted(tensors.items()):
            digest.update(json.dumps([*place, str(tensor.dtype), list(tensor.shape)]).encode())
            digest.update(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
        return digest.hexdigest()

    def read(self, path: str | None = None) -> dict[tuple[str, str], Tensor]:
        """The factors, of all layers unless one is given: (path, side) -> A (r, in) or B (out, r) in the dtype of the
        file, on the CPU.

        Raises:
            AdapterError: the file cannot be read, or holds NaN or infinity.
        """
        try:
            with safe_open(self.directory / WEIGHTS_FILE, framework="pt") as file:
                tensors = {place: file.get_tensor(key) for place, key in self.keys.items() if path in (None, place[0])}
        except (OSError, SafetensorError) as error:
            raise AdapterError(f"{WEIGHTS_FILE} cannot be read: {error}") from None
        broken = [place[0] for place, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
        if broken:
            raise AdapterError(
                f"holds NaN or infinity in {len(broken)} of {len(tensors)} tensors, first of {broken[0]}"
            )
        return tensors


def read_adapter(directory: str | os.PathLike[str], slots: Sequence[Slot] | None = None) -> AdapterFacts:
    """Read the configuration and the header of one directory.

    Args:
        directory: a PEFT directory.
        slots: the layers that must have factors, and no others; whichever are there unless given.

    Raises:
        AdapterError: something is missing or damaged, it is no plain LoRA, or tensors do not fit the configuration or
            the slots. The message does not name the directory.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise AdapterError("there is no such directory")
    config = read_json(directory / CONFIG_FILE)
    _refuse_unlike_lora(config)
    rank, scale = _rank_and_scale(config)
    if slots is not None and rank > (least := min(min(slot.in_features, slot.out_features) for slot in slots)):
        raise AdapterError(f"rank {rank} exceeds the smallest layer's {least} features")
    shapes, header = _read_header(directory)
    keys = _keys(shapes, slots, rank)
    provenance = read_json(directory / PROVENANCE_FILE) if (directory / PROVENANCE_FILE).exists() else {}
    base_model = config.get("base_model_name_or_path")
    return AdapterFacts(
        directory=directory,
        config=config,
        provenance=provenance,
        header=header,
        slots=_slots_of(keys, shapes) if slots is None else tuple(slots),
        rank=rank,
        scale=scale,
        base_model=None if base_model is None else str(base_model),
        base_fingerprint=_base_fingerprint(provenance, header),
        keys=keys,
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of reasonable size.

    Raises:
        AdapterError: missing, too large, or damaged.
    """
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise AdapterError(f"{path.name} is larger than {_LARGEST_JSON} bytes")
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{path.name} is missing") from None
    except AdapterError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path.name} is damaged ({error})") from None
    if not isinstance(tree, dict):
        raise AdapterError(f"{path.name} is damaged (not an object)")
    return tree


def _refuse_unlike_lora(config: Mapping[str, Any]) -> None:
    """Adapters that are more, or other, than one A and B per layer on the base as it is."""
    kind = str(config.get("peft_type")).upper()
    initialization = config.get("init_lora_weights")
    alters_base = isinstance(initialization, str) and _ALTERS_BASE.fullmatch(initialization.lower())
    extras = {
        f"it is of PEFT type {kind}, not LORA": kind != "LORA",
        "it trains biases (bias, lora_bias)": config.get("bias", "none") != "none" or config.get("lora_bias"),
        "it is a DoRA (use_dora)": config.get("use_dora"),
        "it replaces whole modules (modules_to_save)": config.get("modules_to_save"),
        "rank or alpha differs between layers (rank_pattern, alpha_pattern)": (
            config.get("rank_pattern") or config.get("alpha_pattern")
        ),
        f"it also changes the base's weights (init_lora_weights = {initialization!r})": alters_base,
    }
    found = [what for what, present in extras.items() if present]
    if found:
        raise AdapterError("; ".join(found))


def _rank_and_scale(config: Mapping[str, Any]) -> tuple[int, float]:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    convention = "alpha_over_sqrt_rank" if config.get("use_rslora") else "alpha_over_rank"
    try:
        number = isinstance(alpha, int | float) and not isinstance(alpha, bool) and math.isfinite(alpha)
        if type(rank) is int and rank > 0 and number:
            return rank, lora_scale(convention, float(alpha), rank)  # type: ignore[arg-type]
    except OverflowError:  # integers that no float can hold
        pass
    raise AdapterError(f"{CONFIG_FILE} has r = {rank!r} and lora_alpha = {alpha!r}, expected numbers")


def _read_header(directory: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shape of each tensor of the file, and the strings of its header."""
    if not (directory / WEIGHTS_FILE).exists():
        if (directory / "adapter_model.bin").exists():
            raise AdapterError(
                "adapter_model.bin is a pickle, which is never read; save it again with safe_serialization=True"
            )
        raise AdapterError(f"{WEIGHTS_FILE} is missing")
    try:
        with (directory / WEIGHTS_FILE).open("rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
        if size > _LARGEST_HEADER:
            raise AdapterError(f"{WEIGHTS_FILE} is damaged (a header of {size} bytes, more than {_LARGEST_HEADER})")
        with safe_open(directory / WEIGHTS_FILE, framework="pt") as file:
            header = dict(file.metadata() or {})
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
            odd = sorted({part.get_dtype() for part in slices.values()} - _FLOATING)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{WEIGHTS_FILE} is damaged ({error})") from None
    if odd:
        raise AdapterError(
            f"{WEIGHTS_FILE} holds tensors of type {', '.join(odd)}, which are no floating-point numbers"
        )
    return shapes, header


def _keys(shapes: Mapping[str, tuple[int, ...]], slots: Sequence[Slot] | None, rank: int) -> dict[tuple[str, str], str]:
    """Key of each slot's A and B."""
    keys: dict[tuple[str, str], str] = {}
    strangers = []
    known = None if slots is None else {slot.path for slot in slots}
    for key in shapes:
        match = _KEY.fullmatch(key) if len(key) <= _LONGEST_KEY else None
        place = (match["path"], match["side"]) if match else ("", "")
        if match is None or place in keys or (known is not None and place[0] not in known):
            strangers.append(key[:_LONGEST_KEY])
        else:
            keys[place] = key
    if slots is None:
        expected = {
            (path, side): _fitting(shapes.get(keys.get((path, side), "")), side, rank) for path, side in _both(keys)
        }
    else:
        expected = {(slot.path, "A"): (rank, slot.in_features) for slot in slots}
        expected |= {(slot.path, "B"): (slot.out_features, rank) for slot in slots}
    missing = [f"lora_{side} of {path}" for path, side in expected if (path, side) not in keys]
    problems = [f"has no {_some(missing)}"] if missing else []
    whose = "a LoRA" if slots is None else "lora.target_modules"
    problems += [f"has {_some(strangers)}, which are no factors of {whose}"] if strangers else []
    problems += [
        f"lora_{place[1]} of {place[0]} is {shapes[key]}, expected {expected[place]} (out or in features, and r)"
        for place, key in keys.items()
        if shapes[key] != expected[place]
    ][:1]
    if not shapes:
        problems.append(f"{WEIGHTS_FILE} holds no tensors")
    if problems:
        raise AdapterError("; ".join(problems))
    return keys


def _both(keys: Mapping[tuple[str, str], str]) -> list[tuple[str, str]]:
    return [(path, side) for path in dict.fromkeys(path for path, _ in keys) for side in "AB"]


def _fitting(shape: tuple[int, ...] | None, side: str, rank: int) -> tuple[int, ...]:
    """What a factor of this shape must be for `rank`: its other size is free."""
    if shape is None or len(shape) != 2 or 0 in shape:
        return (rank, -1) if side == "A" else (-1, rank)
    return (rank, shape[1]) if side == "A" else (shape[0], rank)


def _slots_of(keys: Mapping[tuple[str, str], str], shapes: Mapping[str, tuple[int, ...]]) -> tuple[Slot, ...]:
    slots = []
    for path in dict.fromkeys(path for path, _ in keys):
        layer = _LAYER.search(path)
        inputs, outputs = shapes[keys[path, "A"]][1], shapes[keys[path, "B"]][0]
        slots.append(Slot(int(layer[1]) if layer else 0, path.rsplit(".", 1)[-1], path, inputs, outputs))
    return tuple(sorted(slots, key=lambda slot: slot.layer))


def _base_fingerprint(provenance: Mapping[str, Any], header: Mapping[str, str]) -> str | None:
    """Written twice, as people copy the tensors without the rest."""
    found = {str(known) for known in (provenance.get("base_fingerprint"), header.get("base_fingerprint")) if known}
    if len(found) > 1:
        raise AdapterError(f"{PROVENANCE_FILE} and {WEIGHTS_FILE} name different bases: the files are of two adapters")
    return found.pop() if found else None


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:2]) + (f" and {len(items) - 2} more" if len(items) > 2 else "")
