"""Generated adapters on disk, for one server: bounded in bytes, the least recently used go first.

    CACHE/owner.lock       held by the server that owns the cache
    CACHE/<key>/           one PEFT directory for each adapter; its name is a hash, never what a client wrote

When an adapter was used last is the modification time of its hl_provenance.json, so the order survives a restart.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from hl_scale.data.validation import validate_adapter
from hl_scale.serving.staging import PROVENANCE_FILE

_KEY = re.compile(r"[0-9a-f]{64}")
_STAGED = re.compile(r"\.[0-9a-f]{64}-.*\.(tmp|old)")


class CacheError(OSError):
    """A cache directory that cannot be used; the message says how to mend it."""


class BadAdapterError(ValueError):
    """A cached adapter that must not be handed to an engine, and why."""


class AdapterCache:
    """The adapters of one server. Not for several threads, but for `verify`, which changes nothing.

    Args:
        directory: created where missing.
        maximum_bytes: bound on the sum of all files; `make_room` keeps it.

    Raises:
        CacheError: another server owns the directory.
    """

    def __init__(self, directory: str | os.PathLike[str], maximum_bytes: int) -> None:
        self.directory = Path(directory).expanduser().resolve()
        self.directory.mkdir(parents=True, exist_ok=True)
        self.maximum_bytes = maximum_bytes
        self._lock = (self.directory / "owner.lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given back when this process ends, however it does
        except OSError:
            self._lock.close()
            raise CacheError(
                f"another server uses the adapter cache {self.directory}\n"
                "  fix: stop it, or give each server a directory of its own by HL_SCALE_SERVE_CACHE; a server has one "
                "API process (--api-server-count 1)"
            ) from None
        self._sizes: dict[str, int] = {}
        self._scan()

    def close(self) -> None:
        """Let another server have the directory."""
        self._lock.close()

    def __contains__(self, key: str) -> bool:
        return key in self._sizes

    @property
    def keys(self) -> list[str]:
        """Of all adapters, the least recently used first."""
        return list(self._sizes)

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(self._sizes.values())

    def path(self, key: str) -> Path:
        """Where the adapter of a key is, or would be.

        Raises:
            ValueError: not a key: 64 hexadecimal digits.
        """
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no key of an adapter")
        return self.directory / key

    def verify(self, key: str, base_model: str) -> None:
        """Read a cached adapter through, see `validate_adapter`.

        Raises:
            BadAdapterError: missing, damaged, leading out of the cache, of another base or condition.
        """
        directory = self.path(key)
        for path in (directory, *directory.glob("*")):
            if path.is_symlink():
                raise BadAdapterError(f"{path} is a symbolic link")
        try:
            facts = validate_adapter(directory, base_model_name_or_path=base_model)
        except (OSError, ValueError) as error:
            raise BadAdapterError(str(error)) from None
        if facts.provenance.get("cache_key") != key:
            raise BadAdapterError(f"{directory} holds another adapter")

    def add(self, key: str) -> None:
        """Count an adapter that was written to `path(key)`, as the most recently used one."""
        self._sizes.pop(key, None)
        self._sizes[key] = _size(self.path(key))

    def touch(self, key: str) -> None:
        """Mark an adapter as the most recently used one."""
        if key in self._sizes:
            self._sizes[key] = self._sizes.pop(key)
            os.utime(self.path(key) / PROVENANCE_FILE)

    def remove(self, key: str) -> None:
        """Delete an adapter, if it is there."""
        path = self.path(key)
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)
        self._sizes.pop(key, None)

    def victims(self, needed_by: Collection[str]) -> list[str]:
        """Keys to remove so that the bound holds, the least recently used first; none of those in `needed_by`.

        Where these leave too little to remove, the bound does not hold after removing them.
        """
        surplus, found = self.bytes - self.maximum_bytes, []
        for key, size in self._sizes.items():
            if surplus <= 0:
                break
            if key not in needed_by:
                found.append(key)
                surplus -= size
        return found

    def _scan(self) -> None:
        """Take over what an earlier server left: whole adapters are kept, those it was writing are deleted."""
        known = []
        for path in self.directory.iterdir():
            if _STAGED.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
            elif _KEY.fullmatch(path.name):
                if path.is_symlink() or not (path / PROVENANCE_FILE).is_file():
                    self.remove(path.name)
                else:
                    known.append(((path / PROVENANCE_FILE).stat().st_mtime_ns, path.name))
        self._sizes = {key: _size(self.path(key)) for _, key in sorted(known)}


def adapter_key(*parts: str) -> str:
    """64 hexadecimal digits that stand for these texts, in this order."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def adapter_id(key: str, taken: dict[int, str]) -> int:
    """Positive number of an adapter, the same in every process; `taken` (id -> key) is kept up to date.

    It has 31 bits, for vLLM keeps ids as int32; where two keys would share a number, the later one gets another.
    """
    attempt = 0
    while True:
        digest = hashlib.sha256(f"{key} {attempt}".encode()).digest()
        number = int.from_bytes(digest[:4], "big") >> 1
        if number and taken.setdefault(number, key) == key:
            return number
        attempt += 1


def _size(directory: Path) -> int:
    return sum(path.lstat().st_size for path in directory.rglob("*"))
