"""A library of trained LoRAs: a folder of PEFT directories, one per task, named as the task.

    LIBRARY/TASK/adapter_config.json
    LIBRARY/TASK/adapter_model.safetensors

Opening it reads configurations and the headers of tensor files, so that everything that does not fit is known before
anything runs; numbers are read when they are asked for, one adapter at a time. Nothing is ever unpickled.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hl_scale.lora import LoraFactors, Slot, lora_scale
from hl_scale.lora_algebra import canonical as singular_form
from hl_scale.lora_algebra import delta_inner

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PROVENANCE_FILE = "hl_provenance.json"

_KEY = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")
_ALTERS_BASE = re.compile("pissa.*|olora|corda|loftq|lora_ga")
_SHOWN = 5
_FIX = (
    "train these adapters with PEFT, alike and for the layers that lora.target_modules names in this base, or move "
    "their directories out of the library"
)


class LibraryError(ValueError):
    """A library of adapters that cannot be used; names the directories and says why."""


@dataclass(frozen=True)
class LibraryStatistics:
    """Of the adapters of some tasks.

    Attributes:
        mean, std: of every entry of A (1, r, in) and B (1, out, r), float32; std over the tasks as a population.
        mean_square_norm: mean over tasks of |s B A|^2, summed over slots.
    """

    mean: LoraFactors
    std: LoraFactors
    mean_square_norm: float


@dataclass(frozen=True)
class _Entry:
    """One directory: what must agree with the others, and where its tensors are."""

    directory: Path
    rank: int
    scale: float
    base_model: str
    base_fingerprint: str | None
    keys: dict[tuple[str, str], str]
    """(path, "A" or "B") -> key in the file."""


class Library:
    """Adapters by the name of their task.

    Args:
        directory: the library.
        slots: the slots that every adapter must have factors for, and no others.
        names: tasks that are needed; every PEFT directory there if None.

    Attributes:
        names: the tasks, sorted.
        rank, scale: of all adapters.
        base_model, base_fingerprint: what all of them were trained on, as far as they say; the fingerprint is None
            unless all have one.

    Raises:
        LibraryError: no adapters, or any that is missing, damaged, not plain LoRA, or unlike the others or the slots.
            One message for all directories.
    """

    def __init__(
        self, directory: str | os.PathLike[str], slots: Sequence[Slot], names: Collection[str] | None = None
    ) -> None:
        self.directory = Path(directory)
        self.slots = tuple(slots)
        entries: dict[str, _Entry] = {}
        problems: list[str] = []
        for name in _find(self.directory) if names is None else sorted(set(names)):
            try:
                entries[name] = _inspect(self.directory / name, self.slots)
            except LibraryError as error:
                problems.append(f"{self.directory / name}: {error}")
        if not entries and not problems:
            raise LibraryError(
                f"no adapters in {self.directory}: no directory there holds {CONFIG_FILE} or {WEIGHTS_FILE}\n"
                "  fix: correct objective.library; it is the folder that holds a PEFT directory for each task"
            )
        problems += _disagreements(list(entries.values()))
        self._refuse(problems)
        self._entries = entries
        self.names = tuple(entries)
        first = next(iter(entries.values()))
        self.rank, self.scale = first.rank, first.scale
        self.base_model, self.base_fingerprint = first.base_model, first.base_fingerprint
        if any(entry.base_fingerprint is None for entry in entries.values()):
            self.base_fingerprint = None

    def read(self, name: str, *, canonical: bool = False) -> LoraFactors:
        """Factors of one task (E = 1), float32 on the CPU; in singular form if `canonical`.

        Raises:
            LibraryError: no such task, or numbers that are not finite or cannot be read.
        """
        entry = self._entry(name)
        sides: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
        try:
            with safe_open(entry.directory / WEIGHTS_FILE, framework="pt") as file:
                for (path, side), key in entry.keys.items():
                    sides[side][path] = file.get_tensor(key).float()
        except (OSError, SafetensorError) as error:
            raise LibraryError(f"{entry.directory / WEIGHTS_FILE} cannot be read: {error}\n  fix: {_FIX}") from None
        broken = [
            path for side in sides.values() for path, tensor in side.items() if not bool(torch.isfinite(tensor).all())
        ]
        if broken:
            raise LibraryError(
                f"{entry.directory} holds NaN or infinity in {len(broken)} of {len(entry.keys)} tensors, first of "
                f"{broken[0]}\n  fix: {_FIX}"
            )
        a, b = {}, {}
        for slot in self.slots:
            pair = sides["A"][slot.path], sides["B"][slot.path]
            pair = singular_form(*pair) if canonical else pair
            a[slot.path], b[slot.path] = pair[0][None], pair[1][None]
        return LoraFactors(self.slots, a, b, entry.scale)

    def read_all(self, names: Iterable[str], *, canonical: bool = False) -> LoraFactors:
        """Factors of several tasks (E of them, in this order, repeats allowed); see `read`."""
        each = [self.read(name, canonical=canonical) for name in names]
        return LoraFactors(
            self.slots,
            {slot.path: torch.cat([factors.a[slot.path] for factors in each]) for slot in self.slots},
            {slot.path: torch.cat([factors.b[slot.path] for factors in each]) for slot in self.slots},
            self.scale,
        )

    def statistics(self, names: Iterable[str], *, canonical: bool = False) -> LibraryStatistics:
        """Mean and standard deviation of every entry, and the size of the updates; adapters are read one by one.

        Raises:
            LibraryError: adapters that cannot be read, all of them in one message; or no names.
        """
        problems: list[str] = []
        count, square_norm = 0, 0.0
        means: dict[tuple[str, str], Tensor] = {}
        squares: dict[tuple[str, str], Tensor] = {}
        for name in names:
            try:
                factors = self.read(name, canonical=canonical)
            except LibraryError as error:
                problems.append(str(error).partition("\n")[0])
                continue
            count += 1
            for slot in self.slots:
                a, b = factors.a[slot.path].double(), factors.b[slot.path].double()
                square_norm += factors.scale**2 * float(delta_inner(a, b, a, b))
                for key, value in (((slot.path, "A"), a), ((slot.path, "B"), b)):
                    # Welford: no difference of two large sums.
                    mean = means.setdefault(key, torch.zeros_like(value))
                    deviation = value - mean
                    mean.add_(deviation / count)
                    squares.setdefault(key, torch.zeros_like(value)).addcmul_(deviation, value - mean)
        self._refuse(problems)
        if not count:
            raise LibraryError(
                f"no adapters of {self.directory} to take statistics of\n"
                "  fix: name at least one training task that the library holds"
            )
        std = {key: (square / count).sqrt() for key, square in squares.items()}
        return LibraryStatistics(self._factors(means), self._factors(std), square_norm / count)

    def _factors(self, tensors: Mapping[tuple[str, str], Tensor]) -> LoraFactors:
        a, b = ({slot.path: tensors[slot.path, side].float() for slot in self.slots} for side in "AB")
        return LoraFactors(self.slots, a, b, self.scale)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            near = difflib.get_close_matches(name, self.names, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise LibraryError(
                f"{self.directory} has no adapter for task {name!r}\n"
                f"  fix: {hint}train one and put its PEFT directory there under that name"
            )
        return self._entries[name]

    def _refuse(self, problems: list[str]) -> None:
        if not problems:
            return
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        lines = "\n  ".join([*problems[:_SHOWN], *more])
        raise LibraryError(f"the library {self.directory} cannot be used:\n  {lines}\n  fix: {_FIX}")


def _find(directory: Path) -> list[str]:
    if not directory.is_dir():
        return []
    visible = [path for path in directory.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted(path.name for path in visible if any(path.glob("adapter_*")))


def _inspect(directory: Path, slots: Sequence[Slot]) -> _Entry:
    """Check one directory for itself; messages of its errors do not name it."""
    if not directory.is_dir():
        raise LibraryError("there is no such directory")
    config = _read_json(directory / CONFIG_FILE)
    _refuse_unlike_lora(config)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not (type(rank) is int and rank > 0 and isinstance(alpha, int | float) and math.isfinite(alpha)):
        raise LibraryError(f"{CONFIG_FILE} has r = {rank!r} and lora_alpha = {alpha!r}, expected numbers")
    convention = "alpha_over_sqrt_rank" if config.get("use_rslora") else "alpha_over_rank"
    least = min(min(slot.in_features, slot.out_features) for slot in slots)
    if rank > least:
        raise LibraryError(f"rank {rank} exceeds the smallest layer's {least} features")
    keys = _read_keys(directory, slots, rank)
    provenance = _read_json(directory / PROVENANCE_FILE) if (directory / PROVENANCE_FILE).exists() else {}
    fingerprint = provenance.get("base_fingerprint")
    return _Entry(
        directory=directory,
        rank=rank,
        scale=lora_scale(convention, float(alpha), rank),
        base_model=str(config.get("base_model_name_or_path")),
        base_fingerprint=None if fingerprint is None else str(fingerprint),
        keys=keys,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LibraryError(f"{path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise LibraryError(f"{path.name} is damaged ({error})") from None
    if not isinstance(tree, dict):
        raise LibraryError(f"{path.name} is damaged (not an object)")
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
        raise LibraryError("; ".join(found))


def _read_keys(directory: Path, slots: Sequence[Slot], rank: int) -> dict[tuple[str, str], str]:
    """Key of each slot's A and B in the tensor file, from its header."""
    if not (directory / WEIGHTS_FILE).exists():
        if (directory / "adapter_model.bin").exists():
            raise LibraryError(
                "adapter_model.bin is a pickle, which is never read; save it again with safe_serialization=True"
            )
        raise LibraryError(f"{WEIGHTS_FILE} is missing")
    try:
        with safe_open(directory / WEIGHTS_FILE, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise LibraryError(f"{WEIGHTS_FILE} is damaged ({error})") from None
    expected = {(slot.path, "A"): (rank, slot.in_features) for slot in slots}
    expected |= {(slot.path, "B"): (slot.out_features, rank) for slot in slots}
    keys: dict[tuple[str, str], str] = {}
    strangers = []
    for key in shapes:
        match = _KEY.fullmatch(key)
        place = (match["path"], match["side"]) if match else ("", "")
        if place not in expected or place in keys:
            strangers.append(key)
        else:
            keys[place] = key
    missing = [f"lora_{side} of {path}" for path, side in expected if (path, side) not in keys]
    problems = [f"has no {_some(missing)}"] if missing else []
    problems += [f"has {_some(strangers)}, which are no factors of lora.target_modules"] if strangers else []
    problems += [
        f"lora_{place[1]} of {place[0]} is {shapes[key]}, expected {expected[place]} (out or in features, and r)"
        for place, key in keys.items()
        if shapes[key] != expected[place]
    ][:1]
    if problems:
        raise LibraryError("; ".join(problems))
    return keys


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:2]) + (f" and {len(items) - 2} more" if len(items) > 2 else "")


def _disagreements(entries: Sequence[_Entry]) -> list[str]:
    """Directories whose rank, scale or base is not the most frequent one."""
    if not entries:
        return []
    known = all(entry.base_fingerprint is not None for entry in entries)
    problems = []
    for what, values in (
        ("rank", [entry.rank for entry in entries]),
        ("scale", [round(entry.scale, 9) for entry in entries]),
        ("base", [entry.base_fingerprint if known else entry.base_model for entry in entries]),
    ):
        usual, count = Counter[Any](values).most_common(1)[0]
        problems += [
            f"{entry.directory}: {what} {value}, where {count} of {len(entries)} have {usual}"
            for entry, value in zip(entries, values, strict=True)
            if value != usual
        ]
    return problems
