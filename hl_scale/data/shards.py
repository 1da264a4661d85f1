"""The corpus on disk: Parquet shards (zstd), a manifest with their sha256 written last, a folder swapped into place.

A folder is a corpus when `manifest.json` is in it and every file it lists has the listed size and hash. Nothing else
is ever read, and a folder that is not a corpus is never replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hl_scale.data.durable import hash_file

MANIFEST = "manifest.json"
_OWN_FILE = re.compile(
    r"manifest\.json|(sentences|train|heldout|failures|tasks|examples|dialect-[a-z0-9-]+)-\d{5,}\.parquet"
)
FORMAT_VERSION = 1


class CorpusError(ValueError):
    """A corpus that is missing, damaged or cannot be built; the message names the file and the fix."""


class ShardWriter:
    """Cuts rows into `<name>-00000.parquet`, ... of `rows_per_shard` rows in the order they are added.

    Args:
        directory: existing folder.
        name: prefix of the files.
        schema: columns.
        rows_per_shard: rows of every file but the last.
    """

    def __init__(self, directory: Path, name: str, schema: pa.Schema, rows_per_shard: int) -> None:
        self._directory = directory
        self._name = name
        self._schema = schema
        self._rows_per_shard = rows_per_shard
        self._pending: list[pa.Table] = []
        self._pending_rows = 0
        self.files: list[dict[str, Any]] = []

    def add(self, table: pa.Table) -> None:
        """Append rows; full shards are written at once."""
        self._pending.append(table.select(self._schema.names).cast(self._schema))
        self._pending_rows += table.num_rows
        while self._pending_rows >= self._rows_per_shard:
            self._write(self._rows_per_shard)

    def close(self) -> list[dict[str, Any]]:
        """Write what is left; returns file, rows, bytes and sha256 of every shard."""
        if self._pending_rows:
            self._write(self._pending_rows)
        return self.files

    def _write(self, rows: int) -> None:
        table = pa.concat_tables(self._pending).combine_chunks()
        path = self._directory / f"{self._name}-{len(self.files):05d}.parquet"
        pq.write_table(table.slice(0, rows), path, compression="zstd")
        self.files.append(
            {"file": path.name, "rows": rows, "bytes": path.stat().st_size, "sha256": hash_file(path)},
        )
        self._pending = [table.slice(rows)]
        self._pending_rows = table.num_rows - rows


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Write `manifest.json`, synced to disk; the last file of a corpus."""
    with (directory / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a corpus folder.

    Raises:
        CorpusError: no folder, no manifest, not JSON, or another format version.
    """
    path = directory / MANIFEST
    if not path.is_file():
        state = "has no manifest.json" if directory.is_dir() else "does not exist"
        raise CorpusError(
            f"no corpus at {directory}: it {state}\n  fix: hl-scale prepare CONFIG, or correct data.directory"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError):
        raise CorpusError(f"{path} is damaged (not a manifest)\n  fix: hl-scale prepare CONFIG --force") from None
    if version != FORMAT_VERSION:
        raise CorpusError(
            f"{path} has format version {version}; this version of hl_scale reads {FORMAT_VERSION}\n"
            "  fix: hl-scale prepare CONFIG --force"
        )
    return dict(manifest)


def verify_shards(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Check size and sha256 of every file of the manifest.

    Raises:
        CorpusError: lists every file that is missing or differs.
    """
    wrong = []
    for shard in (shard for shards in manifest["shards"].values() for shard in shards):
        path = directory / shard["file"]
        if not path.is_file():
            wrong.append(f"{path}: missing")
        elif path.stat().st_size != shard["bytes"]:
            wrong.append(f"{path}: {path.stat().st_size} bytes, expected {shard['bytes']}")
        elif hash_file(path) != shard["sha256"]:
            wrong.append(f"{path}: its sha256 differs from the manifest's")
    if wrong:
        raise CorpusError(
            "the corpus is damaged:\n  " + "\n  ".join(wrong) + "\n  fix: hl-scale prepare CONFIG --force"
        )


def read_shards(directory: Path, manifest: Mapping[str, Any], name: str, schema: pa.Schema) -> pa.Table:
    """All rows of the shards called `name`, in order (an empty table if there are none)."""
    tables = [pq.read_table(directory / shard["file"]) for shard in manifest["shards"][name]]
    return pa.concat_tables(tables).combine_chunks() if tables else schema.empty_table()


@contextlib.contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place if the block succeeds, and vanishes if it does not.

    Raises:
        CorpusError: `target` exists and holds anything that is not part of a corpus: it is not touched.
    """
    if target.exists() and not (target.is_dir() and all(_OWN_FILE.fullmatch(path.name) for path in target.iterdir())):
        raise CorpusError(
            f"{target} exists and holds other files than a corpus; it is left alone\n"
            "  fix: set data.directory to a new or empty folder"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        fresh = temporary / "new"
        fresh.mkdir()
        yield fresh
        if not target.exists():
            os.replace(fresh, target)
            return
        os.replace(target, temporary / "old")
        try:
            os.replace(fresh, target)
        except BaseException:
            os.replace(temporary / "old", target)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
