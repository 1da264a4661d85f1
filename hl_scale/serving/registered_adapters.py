"""Task adapters that the operator of a server registers by name; clients can ask for the names alone."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hl_scale.base.loading import base_reference
from hl_scale.config import Config, ConfigError
from hl_scale.data.peft_directory import AdapterError
from hl_scale.data.validation import validate_adapter

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,63}")


@dataclass(frozen=True)
class RegisteredAdapter:
    """A task adapter as it was when the server started.

    Attributes:
        directory: of PEFT, absolute.
        fingerprint: see `AdapterFacts.fingerprint`.
        rank: of its factors.
    """

    directory: Path
    fingerprint: str
    rank: int

    def request(self) -> dict[str, str]:
        """What the generator process is told."""
        return {"directory": str(self.directory), "fingerprint": self.fingerprint}


class RegisteredAdapters:
    """Task adapters by name, read through once.

    Args:
        directories: name -> PEFT directory.
        config: of the run that they are added to.
        served: another name of its base, if it is served under one.
        base_fingerprint: of its base.

    Raises:
        ConfigError: a name that clients could not send, or an adapter that is damaged, no plain LoRA, or of another
            base; whether it fits the layers is found out by the generator process.
    """

    def __init__(
        self, directories: Mapping[str, Path], config: Config, served: str | None, base_fingerprint: str
    ) -> None:
        self._known: dict[str, RegisteredAdapter] = {}
        for name, directory in directories.items():
            if not _NAME.fullmatch(name) or name != name.strip():
                raise ConfigError(
                    f"HL_SCALE_SERVE_TASK_ADAPTERS: {name[:80]!r} cannot be asked for\n"
                    "  fix: a name starts with a letter or digit and has at most 64 letters, digits, inner spaces, "
                    "'.', '_' and '-'"
                )
            bases = [base_reference(config.base), config.base.model, *([] if served is None else [served])]
            try:
                facts = validate_adapter(directory, base_model_name_or_path=bases, base_fingerprint=base_fingerprint)
                fingerprint = facts.fingerprint(facts.read())
            except AdapterError as error:
                raise ConfigError(f"HL_SCALE_SERVE_TASK_ADAPTERS, {name}: {error}") from None
            self._known[name] = RegisteredAdapter(Path(directory).resolve(), fingerprint, facts.rank)

    @property
    def largest_rank(self) -> int:
        """0 where none is registered."""
        return max((known.rank for known in self._known.values()), default=0)

    def find(self, name: str) -> RegisteredAdapter:
        """The one of this name.

        Raises:
            LookupError: there is none; names those that are close.
        """
        if name not in self._known:
            near = difflib.get_close_matches(name, self._known, n=3, cutoff=0.4)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise LookupError(f"no task adapter {name!r} is registered here{hint}")
        return self._known[name]
