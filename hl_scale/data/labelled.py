"""Labelled sentences in Standard English and in dialects: split once, read back verified.

    DIRECTORY/manifest.json  examples-00000.parquet  dialect-nigerian-english-00000.parquet ...

Test, validation and training examples are set apart before anything is transformed. Two texts that differ only in
case, spacing or punctuation count as the same, and one text is in one split alone. A set that is prepared apart from a
parallel corpus tests on no sentence that the corpus trains on; `LabelledSet.apart_from` does the same afterwards.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from hl_scale.conditions import typology
from hl_scale.data.corpus import load_corpus
from hl_scale.data.generation import SENTENCE_SCHEMA, STANDARD
from hl_scale.data.labelled_sources import LabelledError, Row
from hl_scale.data.sentences import in_order
from hl_scale.data.shards import CorpusError, read_manifest, read_shards, verify_shards

SPLITS = ("train", "validation", "test")
EXAMPLE_SCHEMA = pa.schema(
    {"example_id": pa.int64(), "split": pa.string(), "texts": pa.list_(pa.string()), "label": pa.float64()}
)
DIALECT_SCHEMA = pa.schema(
    {
        "example_id": pa.int64(),
        "split": pa.string(),
        "texts": pa.list_(pa.string()),
        "rules": pa.list_(pa.string()),
        "error": pa.string(),
    }
)
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class TaskFacts:
    """What is predicted.

    Attributes:
        name: of the task.
        kind: classification, or regression on a score.
        labels: names of the classes by index; empty for a regression.
    """

    name: str
    kind: Literal["classification", "regression"]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class LabelledExample:
    """One or two texts with a label (class index, or score); `standard` are the Standard English texts they come from.

    `example_id` is the same in all varieties.
    """

    example_id: int
    texts: tuple[str, ...]
    label: float
    standard: tuple[str, ...]


class LabelledSet:
    """A verified labelled set on disk; shards are read when first asked for.

    Attributes:
        directory: its folder.
        manifest: the content of manifest.json.
        removed: ids of test and validation examples that are left out of this view; see `apart_from`.
        apart: what `apart_from` found, corpus by corpus.
    """

    def __init__(
        self,
        directory: Path,
        manifest: dict[str, Any],
        removed: frozenset[int] = frozenset(),
        apart: tuple[dict[str, Any], ...] = (),
    ) -> None:
        self.directory, self.manifest, self.removed, self.apart = directory, manifest, removed, apart

    @property
    def task(self) -> TaskFacts:
        task = self.manifest["task"]
        return TaskFacts(task["name"], task["kind"], tuple(task["labels"]))

    @property
    def varieties(self) -> tuple[str, ...]:
        """Full names of the varieties it was transformed into (`standard` is implied)."""
        return tuple(self.manifest["varieties"])

    def examples(self, split: str, variety: str = STANDARD) -> list[LabelledExample]:
        """Examples of a split, in order.

        Args:
            split: train, validation or test.
            variety: of dialects there are test examples, and the first training examples; those that the dialect
                engine failed on are missing, as the manifest says.

        Raises:
            LabelledError: no such split, or it is not there in this variety.
            UnknownVarietyError: no such variety.
        """
        name = typology.resolve(variety)
        if split not in SPLITS or (split == "validation" and name != typology.STANDARD):
            raise LabelledError(
                f"{self.directory} has no split {split!r} in {variety}\n  fix: use one of {', '.join(SPLITS)}, of "
                "which validation is in Standard English alone"
            )
        standard = [row for row in self._standard.get(split, []) if row.example_id not in self.removed]
        if name == typology.STANDARD:
            return standard
        texts = self._transformed(name)
        return [replace(row, texts=texts[row.example_id]) for row in standard if row.example_id in texts]

    def annotated(self, variety: str, count: int) -> list[LabelledExample]:
        """The first `count` training examples in a variety: those of a smaller count are among those of a larger.

        Raises:
            LabelledError: the set has fewer of them in this variety.
        """
        found = self.examples("train", variety)
        if len(found) < count:
            raise LabelledError(
                f"{self.directory} has {len(found)} annotated examples in {variety}, {count} are asked for\n"
                "  fix: raise labelled.annotated_sentences and run hl-scale prepare-labelled"
            )
        return found[:count]

    def apart_from(self, corpus: str | Path) -> LabelledSet:
        """This set without the test and validation examples that a parallel corpus trains on.

        Args:
            corpus: a prepared corpus.

        Returns:
            A view, with one more record in `apart`: name and fingerprint of the corpus, examples removed per split.

        Raises:
            CorpusError: the corpus is missing or damaged.
            LabelledError: nothing is left to test on.
        """
        seen, record = corpus_texts(corpus)
        removed: dict[str, list[int]] = {
            split: [row.example_id for row in self.examples(split) if any(normal_form(t) in seen for t in row.texts)]
            for split in ("test", "validation")
        }
        record["removed"] = {split: len(ids) for split, ids in removed.items()}
        ids = self.removed.union(*removed.values())
        view = LabelledSet(self.directory, self.manifest, ids, (*self.apart, record))
        if not view.examples("test"):
            raise LabelledError(f"every test example of {self.directory} is a training sentence of {corpus}")
        return view

    @cached_property
    def _standard(self) -> dict[str, list[LabelledExample]]:
        found: dict[str, list[LabelledExample]] = {}
        for row in read_shards(self.directory, self.manifest, "examples", EXAMPLE_SCHEMA).to_pylist():
            texts = tuple(row["texts"])
            found.setdefault(row["split"], []).append(LabelledExample(row["example_id"], texts, row["label"], texts))
        return found

    def _transformed(self, name: str) -> dict[int, tuple[str, ...]]:
        entry = self.manifest["varieties"].get(name)
        if entry is None:
            raise LabelledError(
                f"{self.directory} is not transformed into {name}\n  there: {'; '.join(self.varieties) or 'none'}\n"
                "  fix: add it to labelled.varieties and run hl-scale prepare-labelled"
            )
        table = read_shards(self.directory, self.manifest, entry["shards"], DIALECT_SCHEMA)
        rows = table.filter(pc.is_null(table["error"])).to_pylist()
        return {row["example_id"]: tuple(row["texts"]) for row in rows}


def load_labelled(directory: str | Path) -> LabelledSet:
    """Open a prepared labelled set.

    Raises:
        LabelledError: there is none, it is something else, or a file differs from its recorded sha256.
    """
    directory = Path(directory)
    try:
        manifest = read_manifest(directory)
        if manifest.get("holds") != "labelled":
            raise CorpusError(f"{directory} holds no labelled set")
        verify_shards(directory, manifest)
    except CorpusError as error:
        said = str(error).partition("\n  fix:")[0]
        raise LabelledError(f"{said}\n  fix: hl-scale prepare-labelled CONFIG, or correct the directory") from None
    return LabelledSet(directory, manifest)


def normal_form(text: str) -> str:
    """Words in lower case without punctuation: texts with the same form count as the same text."""
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold())) or text


def corpus_texts(directory: str | Path) -> tuple[frozenset[str], dict[str, Any]]:
    """Normal forms of the Standard English sentences that a parallel corpus trains on, and a record of the corpus.

    Raises:
        CorpusError: see `load_corpus`.
    """
    corpus = load_corpus(directory)
    table = read_shards(corpus.directory, corpus.manifest, "sentences", SENTENCE_SCHEMA)
    texts = table.filter(pc.field("split") == "train")["text"].to_pylist()
    record = {
        "corpus": corpus.directory.resolve().name,
        "fingerprint": corpus.manifest["fingerprint"],
        "training_sentences": len(texts),
    }
    return frozenset(map(normal_form, texts)), record


def split_rows(
    rows: Sequence[Row],
    test_rows: Sequence[Row] | None,
    sizes: Mapping[str, int | None],
    seed: int,
    barred: Collection[str] = frozenset(),
) -> tuple[dict[str, list[Row]], Counter[str]]:
    """Set test, then validation, then training examples apart.

    Args:
        rows: examples; of several with the same normal form one is kept, none if their classes differ.
        test_rows: what test examples are taken from, if not from `rows`.
        sizes: examples of each split; None for all that are left.
        seed: of the order that each split takes its examples from.
        barred: normal forms of texts that may be in training examples alone.

    Returns:
        Examples of each split, and how many were left out for which reason.

    Raises:
        LabelledError: too few examples for a split.
    """
    left_out: Counter[str] = Counter()
    pools = {"test": _distinct(rows if test_rows is None else test_rows, seed, left_out)}
    pools["train"] = pools["test"] if test_rows is None else _distinct(rows, seed, left_out)
    pools["validation"] = pools["train"]
    taken: set[str] = set()
    splits: dict[str, list[Row]] = {}
    for split in ("test", "validation", "train"):
        found: list[tuple[Row, tuple[str, ...]]] = []
        for row, forms in pools[split]:
            if sizes[split] is not None and len(found) == sizes[split]:
                break
            if any(form in taken for form in forms):
                continue
            if split != "train" and any(form in barred for form in forms):
                continue
            found.append((row, forms))
        if not found or len(found) < (sizes[split] or 0):
            raise LabelledError(
                f"{sizes[split] or 'some'} {split} examples are asked for, {len(found)} are left; left out: "
                f"{dict(left_out)}\n  fix: lower labelled.{_SIZE_KEYS[split]}, or widen what is taken in"
            )
        taken.update(form for _, forms in found for form in forms)
        splits[split] = [row for row, _ in found]
    return {split: splits[split] for split in SPLITS}, left_out


_SIZE_KEYS = {"train": "training_sentences", "validation": "validation_sentences", "test": "test_sentences"}


def _distinct(rows: Iterable[Row], seed: int, left_out: Counter[str]) -> list[tuple[Row, tuple[str, ...]]]:
    """One row of each normal form, in an order that depends on the seed and the texts alone; with the form."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(map(normal_form, row.texts)), []).append(row)
    kept: dict[str, tuple[Row, tuple[str, ...]]] = {}
    for forms, same in groups.items():
        contradictory = len({row.label for row in same}) > 1
        left_out["contradictory" if contradictory else "duplicate"] += len(same) - (not contradictory)
        if not contradictory:
            row = min(same, key=lambda row: row.texts)
            kept["\n".join(row.texts)] = row, forms
    return [kept[text] for text in in_order(kept, seed)]
