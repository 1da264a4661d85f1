"""The parallel corpus: Standard English sentences beside their dialect forms, prepared once, read back verified.

`prepare_corpus` splits by sentence before anything else, has the rows transformed by Ray Data (`generation.py`), and
writes Parquet shards with a manifest: seeds, splits, hashes, what each variety changed, which rules fired, which
cannot fire here, and which rows failed and why. `load_corpus` checks the hashes and hands out pairs.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hl_scale.conditions import typology
from hl_scale.conditions.sources import Typology, source
from hl_scale.config import DialectDataConfig
from hl_scale.data.dialects import approximate_rules, engine_versions, unavailable_rules
from hl_scale.data.generation import (
    SENTENCE_SCHEMA,
    STANDARD,
    RowPlan,
    pair_schema,
    transform_sentences,
)
from hl_scale.data.parallel import load_pairs
from hl_scale.data.resources import ResourceError, ensure_resources, resource_directory
from hl_scale.data.sentences import Sentence, SentencePool, digest_texts, load_sentences
from hl_scale.data.shards import (
    FORMAT_VERSION,
    CorpusError,
    ShardWriter,
    read_manifest,
    read_shards,
    replaced_directory,
    verify_shards,
    write_manifest,
)
from hl_scale.progress import counting_bar

logger = logging.getLogger(__name__)

_FAILURE_SCHEMA = pa.schema(
    {name: pa.string() if name in ("variety", "standard", "error") else pa.int64() for name in
     ("pair_id", "sentence_id", "variety", "standard", "error")}
)  # fmt: skip
_FAILURES_IN_MANIFEST = 100
# Settings that decide nothing about the rows.
_NOT_IN_FINGERPRINT = {"kind", "directory", "num_workers", "maximum_tokens", "sources", "pairs"}


@dataclass(frozen=True)
class Pair:
    """A Standard English sentence and its dialect form.

    `variety` is `virtual`, `standard` (an identity pair) or a full name, `vector` (C,) float32 the condition; `rules`
    changed the text. `pair_id` is the row's number in the plan, with gaps where rows failed.
    """

    pair_id: int
    sentence_id: int
    variety: str
    vector: npt.NDArray[np.float32]
    standard: str
    dialect: str
    rules: tuple[str, ...]

    @property
    def changed(self) -> bool:
        """Whether the dialect text differs from the standard text."""
        return self.dialect != self.standard


@dataclass(frozen=True)
class PreparedCorpus:
    """What `prepare_corpus` made or found: its folder, its manifest, and whether an existing corpus was kept."""

    directory: Path
    manifest: dict[str, Any]
    reused: bool


class Corpus:
    """A verified corpus on disk; shards are read when first asked for.

    Attributes:
        directory: its folder.
        manifest: the content of manifest.json.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.manifest = manifest

    @cached_property
    def train(self) -> list[Pair]:
        """Training pairs by pair_id: random mixtures or named varieties, and identity pairs."""
        return self._read("train")

    @cached_property
    def source(self) -> Typology:
        """Where the vectors of its varieties come from."""
        return source(self.manifest.get("config", {}).get("vectors", "ewave"))

    @property
    def heldout_varieties(self) -> tuple[str, ...]:
        """Full names of the varieties with held-out pairs, in the configuration's order (`standard` is implied)."""
        return tuple(self.manifest["evaluation_varieties"])

    def heldout(self, variety: str) -> list[Pair]:
        """Pairs of the held-out sentences in one variety, or their identity pairs for `standard`, by sentence_id.

        Raises:
            UnknownVarietyError: no such variety.
            CorpusError: the corpus holds no held-out sentence in it.
        """
        name = self.source.resolve(variety)
        if name == self.source.STANDARD:
            return self._heldout_standard
        if name not in self._heldout:
            there = "; ".join((STANDARD, *self.heldout_varieties))
            raise CorpusError(
                f"{self.directory} has no held-out sentences in {name}\n  there: {there}\n"
                "  fix: add it to data.evaluation_varieties and run hl-scale prepare CONFIG"
            )
        return self._heldout[name]

    @cached_property
    def _heldout(self) -> dict[str, list[Pair]]:
        found = defaultdict(list)
        for pair in self._read("heldout"):
            found[pair.variety].append(pair)
        return dict(found)

    @cached_property
    def _heldout_standard(self) -> list[Pair]:
        table = read_shards(self.directory, self.manifest, "sentences", SENTENCE_SCHEMA)
        rows = table.filter(pc.field("split") == "heldout").to_pylist()
        zeros = self.source.vector(self.source.STANDARD)
        first = self.manifest["rows"]["planned"]
        return [
            Pair(first + number, row["sentence_id"], STANDARD, zeros, row["text"], row["text"], ())
            for number, row in enumerate(rows)
        ]

    def _read(self, split: str) -> list[Pair]:
        width = self.source.NUM_FEATURES
        return _pairs(read_shards(self.directory, self.manifest, split, pair_schema(width)), width)


def load_corpus(directory: str | Path) -> Corpus:
    """Open a prepared corpus.

    Raises:
        CorpusError: there is none, or a file is missing or differs from its recorded sha256 (each is named).
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    verify_shards(directory, manifest)
    return Corpus(directory, manifest)


def prepare_corpus(data: DialectDataConfig, *, force: bool = False) -> PreparedCorpus:
    """Build the corpus of a configuration, or keep the one there if it was built from the same settings and data.

    Args:
        data: the `data` section.
        force: build even if a matching, intact corpus exists.

    Raises:
        SentenceError: sources cannot be read or hold too few sentences.
        UnknownVarietyError: a variety that eWAVE does not know.
        ResourceError: the dialect engine cannot run here.
        CorpusError: the folder holds something else, a worker failed, or no row came out. An existing corpus then
        stays as it was.
    """
    directory = Path(data.directory)
    material = _parallel(data) if data.mode == "parallel" else _transformed(data)
    settings = material.settings
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    if not force:
        existing = _intact(directory, fingerprint)
        if existing is not None:
            return PreparedCorpus(directory, existing, reused=True)
    with replaced_directory(directory) as fresh:
        body = _write_rows(fresh, data, material)
        manifest = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint, **settings, **body}
        write_manifest(fresh, manifest)
    return PreparedCorpus(directory, manifest, reused=False)


@dataclass(frozen=True)
class _Material:
    """What a corpus is written from. `settings` decide the rows: their hash tells whether an existing corpus is the one
    asked for. `tables` has columns of `row_schema(width)`, `planned` rows in all."""

    settings: dict[str, Any]
    pool: SentencePool
    planned: int
    tables: Callable[[], Iterator[pa.Table]]
    width: int


def _transformed(data: DialectDataConfig) -> _Material:
    """Rows that the dialect engine makes."""
    plan, pool = RowPlan.from_config(data), load_sentences(data)
    resources = ensure_resources()
    missing = [found.detail for found in resources.values() if found.required and not found.available]
    if missing:
        raise ResourceError("\n".join(missing))
    lacking = unavailable_rules(resources)
    for rule, reason in lacking.items():
        logger.info("rule %s cannot fire: %s", rule, reason)
    planned = len(pool.training) * plan.rows_per_training_sentence + len(pool.heldout) * len(plan.evaluation_varieties)
    settings = {
        **_settings(data, pool, plan.training_varieties, plan.evaluation_varieties),
        "versions": engine_versions(resources),
        "unavailable_rules": lacking,
        "approximate_rules": approximate_rules(),
    }

    def tables() -> Iterator[pa.Table]:
        return transform_sentences(
            _sentence_table(pool),
            plan,
            num_workers=data.num_workers,
            directory=str(resource_directory()),
            unavailable=lacking,
        )

    return _Material(settings, pool, planned, tables, typology.NUM_FEATURES)


def _parallel(data: DialectDataConfig) -> _Material:
    """Rows that are there already."""
    pairs = load_pairs(data)
    settings = {
        **_settings(data, pairs.sentences, pairs.training_varieties, pairs.evaluation_varieties),
        "versions": {name: version(name) for name in (["lang2vec"] if data.vectors == "lang2vec" else ["value-nlp"])},
        "unavailable_rules": {},
        "approximate_rules": {},
    }
    return _Material(settings, pairs.sentences, pairs.planned, pairs.tables, pairs.vectors.NUM_FEATURES)


def _settings(
    data: DialectDataConfig, pool: SentencePool, training: Sequence[str], evaluation: Sequence[str]
) -> dict[str, Any]:
    of_pairs = set() if data.mode == "parallel" else {"vectors"}
    return {
        "seed": data.seed,
        "config": data.model_dump(mode="json", exclude=_NOT_IN_FINGERPRINT | of_pairs),
        "training_varieties": list(training),
        "evaluation_varieties": list(evaluation),
        "sources": list(pool.sources),
        "splits": {"train": _split(pool.training), "heldout": _split(pool.heldout)},
    }


def _split(sentences: tuple[Sentence, ...]) -> dict[str, Any]:
    return {
        "sentences": len(sentences),
        "first_sentence_id": sentences[0].sentence_id,
        "last_sentence_id": sentences[-1].sentence_id,
        "sha256": digest_texts(sentence.text for sentence in sentences),
    }


def _intact(directory: Path, fingerprint: str) -> dict[str, Any] | None:
    """The manifest of an undamaged corpus with this fingerprint; else None, and a log line says why."""
    if not directory.exists():
        return None
    try:
        manifest = load_corpus(directory).manifest
    except CorpusError as error:
        logger.warning("building the corpus anew: %s", str(error).splitlines()[0])
        return None
    if manifest["fingerprint"] != fingerprint:
        logger.info("building the corpus anew: %s was prepared from other settings or sources", directory)
        return None
    return manifest


def _write_rows(directory: Path, data: DialectDataConfig, material: _Material) -> dict[str, Any]:
    """Make all rows, write their shards, and return the part of the manifest that describes the result."""
    pairs = pair_schema(material.width)
    writers = {
        name: ShardWriter(directory, name, schema, data.rows_per_shard)
        for name, schema in (
            *(("sentences", SENTENCE_SCHEMA), ("train", pairs)),
            *(("heldout", pairs), ("failures", _FAILURE_SCHEMA)),
        )
    }
    writers["sentences"].add(_sentence_table(material.pool))
    tally = _Tally()
    with counting_bar("writing pairs", material.planned, True) as advance:
        for rows in material.tables():
            tally.add(rows)
            failed = pc.is_valid(rows["error"])
            writers["failures"].add(rows.filter(failed))
            good = rows.filter(pc.invert(failed))
            for split in ("train", "heldout"):
                writers[split].add(good.filter(pc.equal(good["split"], split)))
            advance(rows.num_rows)
    shards = {name: writer.close() for name, writer in writers.items()}
    tally.check(material.planned)
    return {**tally.summary(material.planned), "shards": shards}


def _sentence_table(pool: SentencePool) -> pa.Table:
    """Training sentences, then held-out ones, in the order in which their rows are numbered."""
    rows = [
        (sentence.sentence_id, split, index, sentence.source, sentence.text)
        for split, sentences in (("train", pool.training), ("heldout", pool.heldout))
        for index, sentence in enumerate(sentences)
    ]
    return pa.table(list(map(list, zip(*rows, strict=True))), schema=SENTENCE_SCHEMA)


class _Tally:
    """Counts for the manifest, gathered batch by batch."""

    def __init__(self) -> None:
        self.varieties: dict[str, dict[str, Counter[str]]] = {"train": {}, "heldout": {}}
        self.rules: dict[str, Counter[str]] = {"train": Counter(), "heldout": Counter()}
        self.reasons: Counter[str] = Counter()
        self.failed: list[dict[str, Any]] = []

    def add(self, rows: pa.Table) -> None:
        for row in rows.drop_columns(["vector"]).to_pylist():
            counts = self.varieties[row["split"]].setdefault(row["variety"], Counter())
            if row["error"] is not None:
                counts["failed"] += 1
                self.reasons[row["error"]] += 1
                if len(self.failed) < _FAILURES_IN_MANIFEST:
                    self.failed.append({name: row[name] for name in ("pair_id", "sentence_id", "variety", "error")})
                continue
            counts["pairs"] += 1
            counts["changed"] += row["dialect"] != row["standard"]
            counts["rules_fired"] += len(row["rules"])
            self.rules[row["split"]].update(row["rules"])

    def check(self, planned: int) -> None:
        """Raise `CorpusError` if rows were lost or a variety has none left."""
        seen = sum(counts["pairs"] + counts["failed"] for split in self.varieties.values() for counts in split.values())
        assert seen == planned, f"{planned} rows were planned, {seen} came back"
        empty = [name for split in self.varieties.values() for name, counts in split.items() if not counts["pairs"]]
        if empty:
            reason = self.reasons.most_common(1)[0][0]
            raise CorpusError(
                f"every row of {', '.join(empty)} failed; most often: {reason}\n"
                "  fix: check the sources, then the versions of value-nlp, spacy and nltk"
            )

    def summary(self, planned: int) -> dict[str, Any]:
        failed = sum(self.reasons.values())
        return {
            "rows": {"planned": planned, "written": planned - failed, "failed": failed},
            "varieties": {
                split: {
                    name: {key: counts[key] for key in ("pairs", "changed", "rules_fired", "failed")}
                    for name, counts in varieties.items()
                }
                for split, varieties in self.varieties.items()
            },
            "rules": {split: dict(counts.most_common()) for split, counts in self.rules.items()},
            "failures": {
                "reasons": dict(self.reasons.most_common()),
                "first": self.failed,
                "note": "all failed rows are in the shards named failures",
            },
        }


def _pairs(table: pa.Table, width: int) -> list[Pair]:
    """Rows as pairs; their vectors are read-only views of one array."""
    if not table.num_rows:
        return []
    vectors = np.concatenate([chunk.flatten().to_numpy() for chunk in table["vector"].chunks])
    vectors = vectors.reshape(table.num_rows, width)
    vectors.setflags(write=False)
    columns = ("pair_id", "sentence_id", "variety", "standard", "dialect", "rules")
    rows = zip(*(table[name].to_pylist() for name in columns), strict=True)
    return [
        Pair(pair_id, sentence_id, variety, vector, standard, dialect, tuple(rules))
        for (pair_id, sentence_id, variety, standard, dialect, rules), vector in zip(rows, vectors, strict=True)
    ]
