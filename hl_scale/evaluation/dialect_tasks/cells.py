"""Cells: what a suite has trained or measured, each in a directory that is there whole or not at all.

    cells/lora-seed0-1f2e3d4c5b6a/cell.json  adaptation.json  adaptation-<sha256>.safetensors

The last part of a name is a hash of the cell's key: everything that its content depends on (settings, fingerprints of
base and data, the keys of cells that it is made from), and nothing of the code. A cell whose files are what cell.json
says is read; any other is made again.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hl_scale.data.durable import hash_file, write_text
from hl_scale.evaluation.provenance import content_hash
from hl_scale.serving.staging import OutputError, staged_directory

CELL_FILE = "cell.json"
Build = Callable[[Path], Mapping[str, Any]]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cell:
    """A finished cell.

    Attributes:
        directory: where it lies.
        key: what its content depends on.
        facts: what was found when it was made.
    """

    directory: Path
    key: Mapping[str, Any]
    facts: Mapping[str, Any]


@dataclass
class CellStore:
    """The cells of a folder.

    Attributes:
        directory: the folder.
        told: called with the name of a cell before it is made.
        made, read: names of the cells that were made and read so far.
    """

    directory: Path
    told: Callable[[str], None] = lambda name: None
    made: list[str] = field(default_factory=list)
    read: list[str] = field(default_factory=list)

    def get(self, name: str, key: Mapping[str, Any], build: Build, *, resumable: bool = False) -> Cell:
        """A cell, read if it is whole and made otherwise.

        Args:
            name: for people; letters other than a-z and digits become hyphens.
            key: a JSON-like tree; a change of anything in it is another cell.
            build: fills a directory and returns facts, a JSON-like tree.
            resumable: `build` goes on by itself with what it left in the cell's own directory when it was cut off;
                otherwise it fills a directory beside it that is renamed at the end.

        Raises:
            Whatever `build` raises; the cell is then not there.
        """
        directory = self.directory / f"{slug(name)}-{content_hash(key)[:12]}"
        found = self._read(directory, key)
        if found is not None:
            return found
        self.told(name)
        if resumable:
            directory.mkdir(parents=True, exist_ok=True)
            facts = dict(build(directory))
            _finish(directory, key, facts)
        else:
            shutil.rmtree(directory, ignore_errors=True)
            try:
                with staged_directory(directory) as staging:
                    facts = dict(build(staging))
                    _finish(staging, key, facts)
            except OutputError:
                found = self._read(directory, key)  # another process may have made it meanwhile
                if found is None:
                    raise
                return found
        self.made.append(directory.name)
        return Cell(directory, key, facts)

    def name_of(self, directory: Path | None) -> str | None:
        """How rows name a directory: a cell by its name, one from elsewhere by its path."""
        if directory is None:
            return None
        return directory.name if directory.parent == self.directory else str(directory)

    def _read(self, directory: Path, key: Mapping[str, Any]) -> Cell | None:
        """The cell if it is whole; what is damaged is removed, and a log line says why."""
        path = directory / CELL_FILE
        if not path.exists():
            return None
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            damaged = [name for name, digest in tree["files"].items() if hash_file(directory / name) != digest]
            if content_hash(tree["key"]) != content_hash(key):
                raise ValueError("another key")
            if damaged:
                raise ValueError(f"{', '.join(damaged[:3])} changed since")
            facts = dict(tree["facts"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("cell %s is damaged and made again: %s", directory.name, error)
            shutil.rmtree(directory)
            return None
        self.read.append(directory.name)
        return Cell(directory, key, facts)


def slug(name: str) -> str:
    """A name for directories."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def _finish(directory: Path, key: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write cell.json, which makes the other files count."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != CELL_FILE]
    files = {str(path.relative_to(directory)): hash_file(path) for path in paths}
    write_text(directory / CELL_FILE, json.dumps({"key": key, "facts": facts, "files": files}, indent=1) + "\n")
