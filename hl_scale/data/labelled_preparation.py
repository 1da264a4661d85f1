"""From a labelled source to a set on disk: split, transform test and annotated examples, write.

Varieties that are done are kept beside the set until the whole set is, so an interrupted preparation goes on where it
was, and another variety can be added to a finished set.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hl_scale.conditions import typology
from hl_scale.config import LabelledDataConfig
from hl_scale.data.dialects import approximate_rules, engine_versions, unavailable_rules
from hl_scale.data.durable import hash_file, write_text
from hl_scale.data.generation import SENTENCE_SCHEMA, PlannedRow, counter, ray_session, transform_sentences
from hl_scale.data.labelled import (
    DIALECT_SCHEMA,
    EXAMPLE_SCHEMA,
    SPLITS,
    LabelledSet,
    corpus_texts,
    load_labelled,
    split_rows,
)
from hl_scale.data.labelled_sources import LabelledError, Row, read_labelled
from hl_scale.data.resources import ResourceError, ensure_resources, resource_directory
from hl_scale.data.sentences import digest_texts
from hl_scale.data.shards import FORMAT_VERSION, ShardWriter, replaced_directory, write_manifest
from hl_scale.progress import counting_bar

logger = logging.getLogger(__name__)

_NOT_IN_FINGERPRINT = {"directory", "num_workers", "varieties", "apart_from"}
_VARIETIES_AT_ONCE = 8  # one start of the workers and one parse of a sentence for so many


@dataclass(frozen=True)
class PreparedLabelled:
    """What `prepare_labelled` made or found: the set, and the varieties that were transformed now."""

    labelled: LabelledSet
    transformed: tuple[str, ...]
    reused: bool


@dataclass(frozen=True)
class _VarietiesPlan:
    """A row for each sentence and variety: its form there. Sentences come first, so that each is parsed once."""

    vectors: dict[str, npt.NDArray[np.float32]]
    seed: int

    def rows(self, split: str, index: int, text: str) -> list[PlannedRow]:
        """See `generation.Plan`."""
        first = index * len(self.vectors)
        return [
            PlannedRow(first + place, variety, vector, counter(self.seed, "labelled", text, variety))
            for place, (variety, vector) in enumerate(self.vectors.items())
        ]


@dataclass(frozen=True)
class _Example:
    example_id: int
    split: str
    row: Row


def prepare_labelled(data: LabelledDataConfig, *, force: bool = False) -> PreparedLabelled:
    """Build a labelled set, or what is missing of it.

    Args:
        data: the `labelled` section.
        force: build all of it anew.

    Raises:
        LabelledError: the source cannot be read or is too small.
        UnknownVarietyError: a variety that eWAVE does not know.
        ResourceError: an archive cannot be had, or the dialect engine cannot run here.
        CorpusError: a corpus of `apart_from` is missing, the folder holds something else, or a worker failed. A set
            that is there then stays as it was.
    """
    directory = Path(data.directory)
    names = dict.fromkeys(typology.resolve(name) for name in data.varieties)
    names.pop(typology.STANDARD, None)
    resources = ensure_resources()
    missing = [found.detail for found in resources.values() if found.required and not found.available]
    if names and missing:
        raise ResourceError("\n".join(missing))
    lacking = unavailable_rules(resources) if names else {}
    examples, facts = _examples(data)
    facts |= {"versions": engine_versions(resources) if names else {}, "unavailable_rules": lacking}
    facts["approximate_rules"] = approximate_rules() if names else {}
    # Without dialects, nothing of the dialect engine counts.
    core = {key: value for key, value in facts.items() if key not in ("versions", "unavailable_rules")}
    fingerprint = _digest(core)
    existing = None if force else _existing(directory, fingerprint)
    there = existing.varieties if existing is not None else ()
    prints = {
        name: _digest([fingerprint, facts["versions"], lacking, name, *_vector(name)]) for name in (*names, *there)
    }
    if existing is not None and all(_entry(existing, name, prints[name]) for name in names):
        return PreparedLabelled(existing, (), reused=True)
    # What is there already stays, unless another version of the engine made it.
    prints = {name: value for name, value in prints.items() if name in names or _entry(existing, name, value)}
    partial = directory.parent / f".{directory.name}.partial"
    if force:
        shutil.rmtree(partial, ignore_errors=True)
    entries, made = _transform_missing(data, examples, prints, lacking, existing, partial)
    with replaced_directory(directory) as fresh:
        writer = ShardWriter(fresh, "examples", EXAMPLE_SCHEMA, data.rows_per_shard)
        writer.add(_example_table(examples))
        shards = {"examples": writer.close()}
        for entry in entries.values():
            shards[entry["shards"]] = entry.pop("files")
            for file in shards[entry["shards"]]:
                shutil.copyfile(partial / file["file"], fresh / file["file"])
        manifest = {
            "format_version": FORMAT_VERSION, "holds": "labelled", "fingerprint": fingerprint, **facts,
            "varieties": entries, "shards": shards,
        }  # fmt: skip
        write_manifest(fresh, manifest)
    shutil.rmtree(partial, ignore_errors=True)
    return PreparedLabelled(load_labelled(directory), tuple(made), reused=False)


def _examples(data: LabelledDataConfig) -> tuple[list[_Example], dict[str, Any]]:
    """Numbered examples of all splits, and what the manifest says of them."""
    source = read_labelled(data)
    barred: set[str] = set()
    apart = []
    for corpus in data.apart_from:
        texts, record = corpus_texts(corpus)
        barred |= texts
        apart.append(record)
    sizes = {
        "train": data.training_sentences,
        "validation": data.validation_sentences,
        "test": data.test_sentences,
    }
    splits, left_out = split_rows(source.rows, source.test, sizes, data.seed, barred)
    examples: list[_Example] = []
    for split in SPLITS:
        examples += [_Example(len(examples) + number, split, row) for number, row in enumerate(splits[split])]
    name = str(data.name) if data.task == "glue" else data.task
    facts = {
        "seed": data.seed,
        "config": data.model_dump(mode="json", exclude=_NOT_IN_FINGERPRINT),
        "task": {"name": name, "kind": source.kind, "labels": list(source.labels)},
        "source": source.facts,
        "apart_from": apart,
        "left_out": {**source.left_out, **left_out},
        "splits": {split: _split_facts(rows, source.labels) for split, rows in splits.items()},
    }
    return examples, facts


def _split_facts(rows: Sequence[Row], labels: Sequence[str]) -> dict[str, Any]:
    counts = Counter(row.label for row in rows)
    facts: dict[str, Any] = {
        "examples": len(rows),
        "sha256": digest_texts(f"{row.label!r}\t" + "\t".join(row.texts) for row in rows),
    }
    if labels:
        facts["labels"] = {name: counts[float(index)] for index, name in enumerate(labels)}
    else:
        values = [row.label for row in rows]
        facts |= {"mean": float(np.mean(values)), "standard_deviation": float(np.std(values))}
    return facts


def _existing(directory: Path, fingerprint: str) -> LabelledSet | None:
    """The set that is there, if it is whole and has these examples; a log line says why not."""
    if not directory.exists():
        return None
    try:
        found = load_labelled(directory)
    except LabelledError as error:
        logger.warning("building the set anew: %s", str(error).splitlines()[0])
        return None
    if found.manifest["fingerprint"] != fingerprint:
        logger.info("building the set anew: %s was prepared from other settings or sources", directory)
        return None
    return found


def _entry(existing: LabelledSet | None, name: str, fingerprint: str) -> dict[str, Any] | None:
    entry = None if existing is None else existing.manifest["varieties"].get(name)
    return entry if entry is not None and entry["fingerprint"] == fingerprint else None


def _transform_missing(
    data: LabelledDataConfig,
    examples: Sequence[_Example],
    prints: Mapping[str, str],
    lacking: dict[str, str],
    existing: LabelledSet | None,
    partial: Path,
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Manifest entry of every variety, whose files are then in `partial`, and the names of those made now."""
    partial.mkdir(parents=True, exist_ok=True)
    entries: dict[str, dict[str, Any]] = {}
    missing = []
    for name, fingerprint in prints.items():
        found = _entry(existing, name, fingerprint)
        if found is not None and existing is not None:
            files = existing.manifest["shards"][found["shards"]]
            for file in files:
                shutil.copyfile(existing.directory / file["file"], partial / file["file"])
            entries[name] = {**found, "files": files}
        elif (kept := _kept(partial, name, fingerprint)) is not None:
            entries[name] = kept
        else:
            missing.append(name)
    chosen = [e for e in examples if e.split == "test"]
    chosen += [e for e in examples if e.split == "train"][: data.annotated_sentences]
    texts = list(dict.fromkeys(text for example in chosen for text in example.row.texts))
    if missing:
        total = len(texts) * len(missing)
        with ray_session(data.num_workers), counting_bar("transforming", total, True, unit="sentences") as bar:
            for start in range(0, len(missing), _VARIETIES_AT_ONCE):
                names = missing[start : start + _VARIETIES_AT_ONCE]
                bar.say(f"transforming, {' and '.join(names[:2])}{' and others' if len(names) > 2 else ''}")
                forms: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in names}
                for form in _transform(texts, names, data, lacking):
                    forms[form["variety"]][texts[form["sentence_id"]]] = form
                    bar(1)
                for name in names:
                    entries[name] = _write_variety(
                        partial, name, prints[name], chosen, forms[name], data.rows_per_shard
                    )  # fmt: skip
    return {name: entries[name] for name in prints}, missing


def _transform(
    texts: Sequence[str], names: Sequence[str], data: LabelledDataConfig, lacking: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """Place, variety, dialect form, rules and error of each text in each variety."""
    rows = [
        {"sentence_id": i, "split": "heldout", "index": i, "source": 0, "text": text} for i, text in enumerate(texts)
    ]
    plan = _VarietiesPlan({name: _vector(name) for name in names}, data.seed)
    table = pa.Table.from_pylist(rows, schema=SENTENCE_SCHEMA)
    for part in transform_sentences(
        table, plan, num_workers=data.num_workers, directory=str(resource_directory()), unavailable=lacking
    ):
        yield from part.select(["sentence_id", "variety", "dialect", "rules", "error"]).to_pylist()


def _write_variety(
    partial: Path,
    name: str,
    fingerprint: str,
    examples: Sequence[_Example],
    forms: Mapping[str, dict[str, Any]],
    rows_per_shard: int,
) -> dict[str, Any]:
    """Write the shards of a variety, and last its entry, which makes them count."""
    rows, counts, rules = [], {"test": Counter[str](), "train": Counter[str]()}, Counter[str]()
    for example in examples:
        parts = [forms[text] for text in example.row.texts]
        error = next((part["error"] for part in parts if part["error"] is not None), None)
        texts = [part["dialect"] for part in parts]
        fired = sorted({rule for part in parts for rule in part["rules"]})
        rows.append(
            {"example_id": example.example_id, "split": example.split, "texts": texts, "rules": fired, "error": error}
        )
        tally = counts[example.split]
        tally["failed"] += error is not None
        if error is None:
            tally["examples"] += 1
            tally["changed"] += texts != list(example.row.texts)
            rules.update(fired)
    if not counts["test"]["examples"]:
        raise LabelledError(f"every test example failed in {name}; first: {rows[0]['error']}\n  fix: check the source")
    slug = f"dialect-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}"
    for old in partial.glob(f"{slug}-*.parquet"):
        old.unlink()
    writer = ShardWriter(partial, slug, DIALECT_SCHEMA, rows_per_shard)
    writer.add(pa.Table.from_pylist(rows, schema=DIALECT_SCHEMA))
    entry: dict[str, Any] = {"fingerprint": fingerprint, "shards": slug}
    for split, tally in counts.items():
        share = tally["changed"] / tally["examples"] if tally["examples"] else 0.0
        entry[split] = {key: tally[key] for key in ("examples", "changed", "failed")} | {"changed_share": share}
    entry |= {"rules": dict(rules.most_common()), "files": writer.close()}
    write_text(partial / f"{slug}.json", json.dumps({name: entry}))
    return entry


def _kept(partial: Path, name: str, fingerprint: str) -> dict[str, Any] | None:
    """Entry of a variety that an interrupted preparation finished."""
    for path in partial.glob("dialect-*.json"):
        entry = json.loads(path.read_text(encoding="utf-8")).get(name)
        if entry is not None and entry["fingerprint"] == fingerprint:
            files = [(partial / file["file"], file["sha256"]) for file in entry["files"]]
            if all(path.is_file() and hash_file(path) == digest for path, digest in files):
                return dict(entry)
    return None


def _example_table(examples: Sequence[_Example]) -> pa.Table:
    rows = [
        {"example_id": e.example_id, "split": e.split, "texts": list(e.row.texts), "label": e.row.label}
        for e in examples
    ]
    return pa.Table.from_pylist(rows, schema=EXAMPLE_SCHEMA)


def _vector(name: str) -> npt.NDArray[np.float32]:
    return typology.vector(name)


def _digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=float).encode()).hexdigest()
