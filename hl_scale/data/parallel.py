"""Pairs that exist already: sentences of Standard English beside their forms in varieties, or in other languages.

They come from JSON lines, or from compiled gettext catalogues, which many programs ship with their messages in dozens
of languages. As everywhere the split is by sentence, before anything else: no sentence is trained on in one variety and
held out in another.
"""

from __future__ import annotations

import gettext
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hl_scale.conditions.sources import Typology, source
from hl_scale.conditions.typology import UnknownVarietyError
from hl_scale.config import DialectDataConfig, PairSource
from hl_scale.data.generation import STANDARD, row_table
from hl_scale.data.sentences import (
    Sentence,
    SentenceError,
    SentencePool,
    digest_texts,
    matching_files,
    read_json_lines,
    split_sentences,
)
from hl_scale.data.shards import CorpusError

logger = logging.getLogger(__name__)

_SENTENCES_PER_TABLE = 256
# Messages with places to fill in, tags or keys: their form is not that of a sentence.
_NO_SENTENCE = re.compile(r"[%{}<>|\x04\x00]|&\w")

Entry = tuple[str, str, str]
"""Standard sentence, variety, form."""


@dataclass(frozen=True)
class ParallelPool:
    """Pairs of a configuration.

    Attributes:
        sentences: the split.
        forms: standard sentence -> variety -> its form there.
        training_varieties, evaluation_varieties: full names.
        vectors: of varieties.
        identities: copies of each training sentence paired with itself.
    """

    sentences: SentencePool
    forms: dict[str, dict[str, str]]
    training_varieties: tuple[str, ...]
    evaluation_varieties: tuple[str, ...]
    vectors: Typology
    identities: int

    @property
    def planned(self) -> int:
        """Rows of all tables of `tables`."""
        return sum(len(self._forms(split, sentence)) for split, sentence in self._sentences())

    def tables(self) -> Iterator[pa.Table]:
        """Rows as `generation.row_table` makes them, training pairs first."""
        rows: list[tuple[Any, ...]] = []
        vectors: list[np.ndarray] = []
        number = 0
        for place, (split, sentence) in enumerate(self._sentences(), start=1):
            for variety, form in self._forms(split, sentence):
                rows.append((number, sentence.sentence_id, variety, sentence.text, form, [], split, None))
                vectors.append(self.vectors.vector(self.vectors.STANDARD if variety == STANDARD else variety))
                number += 1
            if place % _SENTENCES_PER_TABLE == 0:
                yield row_table(rows, vectors, self.vectors.NUM_FEATURES)
                rows, vectors = [], []
        yield row_table(rows, vectors, self.vectors.NUM_FEATURES)

    def _sentences(self) -> Iterator[tuple[str, Sentence]]:
        for split, sentences in (("train", self.sentences.training), ("heldout", self.sentences.heldout)):
            yield from ((split, sentence) for sentence in sentences)

    def _forms(self, split: str, sentence: Sentence) -> list[tuple[str, str]]:
        forms = self.forms[sentence.text]
        wanted = self.training_varieties if split == "train" else self.evaluation_varieties
        identities = self.identities if split == "train" else 0
        return [(name, forms[name]) for name in wanted if name in forms] + [(STANDARD, sentence.text)] * identities


def load_pairs(data: DialectDataConfig) -> ParallelPool:
    """Read all sources of pairs, and split their sentences.

    Raises:
        SentenceError: a source cannot be read, or there are fewer sentences than asked for.
        UnknownVarietyError: a variety of the configuration that has no vector.
        CorpusError: a variety of the configuration of which no pair is left.
    """
    vectors = source(data.vectors)
    forms: dict[str, dict[str, str]] = defaultdict(dict)
    places: dict[str, int] = {}
    fingerprints = []
    for place, pairs in enumerate(data.pairs):
        entries = [entry for entry in _read(pairs, vectors) if _is_kept(entry, data)]
        lines = sorted("\t".join(entry) for entry in entries)
        description = f"{pairs.kind} {pairs.path}"
        fingerprints.append({"description": description, "pairs": len(entries), "sha256": digest_texts(lines)})
        for standard, variety, form in entries:
            forms[standard].setdefault(variety, form)
            places.setdefault(standard, place)
    evaluation = tuple(dict.fromkeys(vectors.resolve(name) for name in data.evaluation_varieties))
    chosen = tuple(dict.fromkeys(vectors.resolve(name) for name in data.training_varieties))
    if not chosen:
        chosen = tuple(sorted({name for each in forms.values() for name in each} - set(evaluation)))
    wanted = {*chosen, *evaluation}
    usable = {text: places[text] for text, each in forms.items() if wanted & each.keys()}
    counts = "\n".join(f"    {entry['pairs']:>8} pairs of {entry['description']}" for entry in fingerprints)
    found = f"the pairs have {len(usable)} distinct ones\n{counts}"
    sentences = split_sentences(usable, fingerprints, data, found, "add a source")
    pool = ParallelPool(sentences, dict(forms), chosen, evaluation, vectors, data.identity_per_sentence)
    _check_varieties(pool)
    return pool


def _check_varieties(pool: ParallelPool) -> None:
    found = {"train": Counter[str](), "heldout": Counter[str]()}
    for split, sentence in pool._sentences():
        found[split].update(name for name, _ in pool._forms(split, sentence))
    for split, names in (("train", pool.training_varieties), ("heldout", pool.evaluation_varieties)):
        lacking = [name for name in names if not found[split][name]]
        if lacking:
            raise CorpusError(
                f"no {'training' if split == 'train' else 'held-out'} sentence has a form in {', '.join(lacking)}\n"
                "  fix: take them out of data.training_varieties and data.evaluation_varieties, or add pairs"
            )


def _is_kept(entry: Entry, data: DialectDataConfig) -> bool:
    return data.minimum_words <= len(entry[0].split()) <= data.maximum_words and bool(entry[2])


def _read(pairs: PairSource, vectors: Typology) -> Iterator[Entry]:
    files = matching_files(pairs, "data.pairs")
    if pairs.kind == "gettext":
        return _read_catalogues(files, vectors)
    return (entry for path in files for entry in _read_jsonl(path, pairs, vectors))


def _read_jsonl(path: Path, pairs: PairSource, vectors: Typology) -> Iterator[Entry]:
    columns = (pairs.standard, pairs.variety, pairs.dialect)
    for number, row in read_json_lines(path):
        values = [row.get(name) if isinstance(row, dict) else None for name in columns]
        if not all(isinstance(value, str) and value.strip() for value in values):
            raise SentenceError(
                f"{path} line {number} lacks text in one of {', '.join(columns)}\n  fix: set the columns of the source"
            )
        standard, variety, form = (" ".join(str(value).split()) for value in values)
        try:
            yield standard, vectors.resolve(variety), form
        except UnknownVarietyError as error:
            raise SentenceError(f"{path} line {number}: {error}") from None


def _read_catalogues(files: list[Path], vectors: Typology) -> Iterator[Entry]:
    """Messages that are sentences, and were translated. Catalogues of languages without a vector are passed over, and
    of several of one language (other regions, other scripts) the one with the shortest name counts."""
    by_folder: dict[tuple[Path, str, str], list[tuple[int, str, Path]]] = defaultdict(list)
    unknown: Counter[str] = Counter()
    for path in files:
        locale = path.parent.parent.name
        try:
            language = vectors.resolve(re.split(r"[_@.-]", locale)[0])
        except UnknownVarietyError:
            unknown[locale] += 1
            continue
        if language != vectors.STANDARD:
            by_folder[path.parents[2], path.name, language].append((len(locale), locale, path))
    if unknown:
        logger.info("catalogues without a vector, passed over: %s", ", ".join(sorted(unknown)))
    for (_, _, language), found in sorted(by_folder.items()):
        path = min(found)[-1]
        for message, translation in _messages(path):
            standard, form = " ".join(message.split()), " ".join(translation.split())
            if form != standard and not _NO_SENTENCE.search(message + translation):
                yield standard, language, form


def _messages(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with path.open("rb") as file:
            catalogue: dict[Any, str] = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
    except (OSError, ValueError, UnicodeError) as error:
        raise SentenceError(
            f"{path} is no compiled gettext catalogue: {error}\n  fix: make it with msgfmt, or narrow the glob"
        ) from None
    for message, translation in catalogue.items():
        if isinstance(message, str) and message:  # the empty one is the header; plural forms are tuples
            yield message, translation
