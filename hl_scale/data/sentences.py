"""Standard English sentences from files, the hub, or the demo archive: cleaned, deduplicated, in an order of their own.

Every sentence gets a place in a pseudo-random order that depends on the seed and on its text alone, never on file
names, file order or which other sentences there are. Subsampling and the split into held-out and training sentences
take prefixes of that order, so they are reproducible and a larger corpus contains the smaller one.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hl_scale.config import DialectDataConfig, PairSource, SentenceSource
from hl_scale.data.resources import ensure_vader_archive, verify_vader_archive

_VADER_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_VADER_FILES = {
    "movie": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "news": "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
    "product": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
    "tweets": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
}


class SentenceError(ValueError):
    """Sentences cannot be read, or there are too few; the message says where and how to fix it."""


@dataclass(frozen=True)
class Sentence:
    """A Standard English sentence: `sentence_id` is its place in the pooled order, `source` the index of its source."""

    sentence_id: int
    text: str
    source: int


@dataclass(frozen=True)
class SentencePool:
    """The split, made before anything else, and a fingerprint of each source (description, count, sha256)."""

    heldout: tuple[Sentence, ...]
    training: tuple[Sentence, ...]
    sources: tuple[dict[str, Any], ...]


def load_sentences(data: DialectDataConfig) -> SentencePool:
    """Read all sources of `data`, pool them, and set the held-out sentences apart.

    Returns:
        `heldout_sentences` and then `training_sentences` sentences from the head of the pooled order; sentence ids
        count on.

    Raises:
        SentenceError: a source cannot be read or is empty, or there are fewer sentences than asked for.
    """
    pooled: dict[str, int] = {}
    fingerprints = []
    for position, source in enumerate(data.sources):
        texts = _selected(source, position, data)
        fingerprints.append(
            {
                "description": describe(source),
                "sentences": len(texts),
                "sha256": digest_texts(sorted(texts)),
            }
        )
        for text in texts:
            pooled.setdefault(text, position)
    counts = "\n".join(f"    {entry['sentences']:>8} {entry['description']}" for entry in fingerprints)
    found = f"{len(pooled)} distinct ones are there after filtering\n{counts}"
    return split_sentences(pooled, fingerprints, data, found, "raise a limit, add a source")


def split_sentences(
    pooled: Mapping[str, int],
    fingerprints: Sequence[dict[str, Any]],
    data: DialectDataConfig,
    found: str,
    remedy: str,
) -> SentencePool:
    """Held-out sentences and then training sentences, from the head of the order that `in_order` gives.

    Args:
        pooled: sentences, each with the index of its source.
        fingerprints: of the sources.
        data: how many sentences of either.
        found, remedy: what an error says there is, and what would add to it.

    Raises:
        SentenceError: there are fewer than asked for.
    """
    wanted = data.heldout_sentences + data.training_sentences
    if len(pooled) < wanted:
        raise SentenceError(
            f"data: {data.training_sentences} training + {data.heldout_sentences} held-out sentences are asked for, "
            f"{found}\n"
            f"  fix: lower data.training_sentences or data.heldout_sentences, {remedy}, or widen "
            f"data.minimum_words..maximum_words (now {data.minimum_words}..{data.maximum_words})"
        )
    order = in_order(pooled, data.seed)[:wanted]
    sentences = tuple(Sentence(number, text, pooled[text]) for number, text in enumerate(order))
    return SentencePool(sentences[: data.heldout_sentences], sentences[data.heldout_sentences :], tuple(fingerprints))


def in_order(texts: Iterable[str], seed: int) -> list[str]:
    """Texts sorted by a hash of (seed, text): a shuffle that depends on nothing else."""
    prefix = f"{seed}|".encode()
    return sorted(texts, key=lambda text: (hashlib.blake2b(prefix + text.encode(), digest_size=16).digest(), text))


def digest_texts(texts: Iterable[str]) -> str:
    """sha256 over the texts, one a line (texts hold no line breaks)."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()


def describe(source: SentenceSource) -> str:
    """One line that names a source in messages and in the manifest."""
    parts = [source.kind, source.path or "", source.name or ""]
    if source.kind == "hub":
        parts += [source.split, source.revision or ""]
    if source.kind in ("jsonl", "parquet", "hub"):
        parts.append(f"column {source.column}")
    return " ".join(part for part in parts if part)


def _selected(source: SentenceSource, position: int, data: DialectDataConfig) -> list[str]:
    """Distinct sentences of one source that pass the filters, at most `source.limit` of them."""
    raw = 0
    kept: set[str] = set()
    for text in _read(source):
        raw += 1
        text = " ".join(text.split())
        if source.kind == "vader" and not text.isascii():
            continue
        if data.minimum_words <= text.count(" ") + 1 <= data.maximum_words and text:
            kept.add(text)
    if not kept:
        raise SentenceError(
            f"data.sources[{position}] ({describe(source)}) has no usable sentence: {raw} were read, none has "
            f"{data.minimum_words} to {data.maximum_words} words\n"
            "  fix: check the path and the column, or widen data.minimum_words..maximum_words"
        )
    return in_order(kept, data.seed)[: source.limit]


def _read(source: SentenceSource) -> Iterator[str]:
    if source.kind == "vader":
        return _read_vader(source)
    if source.kind == "hub":
        return _read_hub(source)
    readers = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}
    return (
        text for path in matching_files(source, "data.sources") for text in readers[source.kind](path, source.column)
    )


def matching_files(source: SentenceSource | PairSource, setting: str) -> list[Path]:
    """Files of a source in the order of their names; a SentenceError, which names the setting, if there are none."""
    paths = sorted(Path(name) for name in glob.glob(str(source.path), recursive=True))
    files = [path for path in paths if path.is_file()]
    if not files:
        raise SentenceError(
            f"no file matches {source.path!r} (a {source.kind} source, looked for from {Path.cwd()})\n"
            f"  fix: correct the path or glob in {setting}"
        )
    return files


def _read_text(path: Path, _: str) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise SentenceError(f"{path} is not UTF-8 text: {error}\n  fix: convert it to UTF-8") from None


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Number and content of the lines that are not empty; a SentenceError for one that is not JSON."""
    for number, line in enumerate(_read_text(path, ""), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise SentenceError(f"{path} line {number} is not JSON: {error}\n  fix: one JSON object a line") from None
        yield number, row


def _read_jsonl(path: Path, column: str) -> Iterator[str]:
    for number, row in read_json_lines(path):
        if not isinstance(row, dict) or column not in row:
            there = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}"
            raise SentenceError(
                f"{path} line {number} has no column {column!r}\n  there: {there}\n  fix: set the source's column"
            )
        yield _as_text(row[column], f"{path} line {number} column {column!r}")


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise SentenceError(f"{path} is not a readable Parquet file: {error}\n  fix: write it again") from None
    with file:
        if column not in file.schema_arrow.names:
            there = ", ".join(file.schema_arrow.names)
            raise SentenceError(f"{path} has no column {column!r}\n  there: {there}\n  fix: set the source's column")
        for batch in file.iter_batches(columns=[column]):
            yield from (_as_text(value, f"{path} column {column!r}") for value in batch.column(0).to_pylist())


def _read_hub(source: SentenceSource) -> Iterator[str]:
    import datasets

    try:
        rows = datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:  # scripts: RuntimeError
        raise SentenceError(
            f"could not load {describe(source)} with `datasets`: {error}\n"
            "  fix: check path, name, split and revision, that the hub can be reached, or point path at local files"
        ) from None
    if source.column not in rows.column_names:
        there = ", ".join(rows.column_names)
        raise SentenceError(f"{describe(source)}: no such column\n  there: {there}\n  fix: set the source's column")
    return (_as_text(value, describe(source)) for value in rows[source.column])


def _as_text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise SentenceError(f"{where} holds a {type(value).__name__}; expected text\n  fix: name a column of sentences")
    return value


def read_scored_vader(name: str, archive: Path | None = None) -> Iterator[tuple[float, str]]:
    """Lines `id <tab> mean score <tab> text` of a subset: the mean human rating, -4 (negative) to 4, and the raw text.

    They are read inside the archives: nothing is unpacked to disk.

    Args:
        name: movie, news, product or tweets.
        archive: a verified source archive of vaderSentiment; downloaded unless given.
    """
    with tarfile.open(archive or ensure_vader_archive()) as outer:
        inner = _member(outer, _VADER_INNER)
    with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
        content = _member(tar, _VADER_FILES[name]).decode("utf-8-sig")
    for line in content.splitlines():
        fields = line.split("\t", maxsplit=2)
        if len(fields) == 3:
            yield float(fields[1]), fields[2]


def _read_vader(source: SentenceSource) -> Iterator[str]:
    archive = None
    if source.path is not None:
        archive = Path(source.path)
        if not archive.is_file():
            raise SentenceError(
                f"no vaderSentiment archive at {archive}\n  fix: leave path out to have it downloaded, or correct it"
            )
        verify_vader_archive(archive)
    return (text for _, text in read_scored_vader(str(source.name), archive))


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None, f"{name} is a regular file of an archive whose hash was checked"
    return file.read()
