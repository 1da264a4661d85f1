"""A library of trained LoRAs: a folder of PEFT directories, one per task, named as the task.

    LIBRARY/TASK/adapter_config.json
    LIBRARY/TASK/adapter_model.safetensors

Opening it reads configurations and the headers of tensor files, so that everything that does not fit is known before
anything runs; numbers are read when they are asked for, one adapter at a time. Nothing is ever unpickled.
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hl_scale.data.peft_directory import CONFIG_FILE, WEIGHTS_FILE, AdapterError, AdapterFacts, read_adapter
from hl_scale.lora import LoraFactors, Slot
from hl_scale.lora_algebra import canonical as singular_form
from hl_scale.lora_algebra import delta_inner

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


class Library:
    """Adapters by the name of their task.

    Args:
        directory: the library.
        slots: the slots that every adapter must have factors for, and no others; those of the first adapter if None.
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
        self, directory: str | os.PathLike[str], slots: Sequence[Slot] | None, names: Collection[str] | None = None
    ) -> None:
        self.directory = Path(directory)
        entries: dict[str, AdapterFacts] = {}
        problems: list[str] = []
        for name in _find(self.directory) if names is None else sorted(set(names)):
            try:
                entries[name] = read_adapter(self.directory / name, slots)
                slots = entries[name].slots
            except AdapterError as error:
                problems.append(f"{self.directory / name}: {error}")
        if not entries and not problems:
            raise LibraryError(
                f"no adapters in {self.directory}: no directory there holds {CONFIG_FILE} or {WEIGHTS_FILE}\n"
                "  fix: correct objective.library; it is the folder that holds a PEFT directory for each task"
            )
        problems += _disagreements(list(entries.values()))
        self._refuse(problems)
        self._entries = entries
        self.slots = next(iter(entries.values())).slots
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
        entry = self.facts(name)
        try:
            tensors = entry.read()
        except AdapterError as error:
            raise LibraryError(f"{entry.directory}: {error}\n  fix: {_FIX}") from None
        a, b = {}, {}
        for slot in self.slots:
            pair = tensors[slot.path, "A"].float(), tensors[slot.path, "B"].float()
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

    def read_slot(self, slot: Slot) -> tuple[Tensor, Tensor]:
        """A (n, r, in) and B (n, out, r) of one slot in all n adapters, in the order of `names`; see `read`."""
        a, b = [], []
        for name in self.names:
            try:
                tensors = self.facts(name).read(slot.path)
            except AdapterError as error:
                raise LibraryError(f"{self.directory / name}: {error}\n  fix: {_FIX}") from None
            a.append(tensors[slot.path, "A"].float())
            b.append(tensors[slot.path, "B"].float())
        return torch.stack(a), torch.stack(b)

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

    def facts(self, name: str) -> AdapterFacts:
        """What the directory of a task says; LibraryError if there is no such task."""
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


def _disagreements(entries: Sequence[AdapterFacts]) -> list[str]:
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
