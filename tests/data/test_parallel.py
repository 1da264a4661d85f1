"""Pairs that exist already: read, split by sentence, and refused where they cannot be used."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hl_scale.conditions import languages, typology
from hl_scale.conditions.typology import UnknownVarietyError
from hl_scale.config import Config, DialectDataConfig
from hl_scale.data.corpus import load_corpus, prepare_corpus
from hl_scale.data.sentences import SentenceError
from hl_scale.data.shards import CorpusError
from hl_scale.engine.loop import train
from hl_scale.engine.run import load_run
from hl_scale.evaluation import evaluate_dialects
from hl_scale.evaluation.tables import markdown_table

STANDARD = [f"the old man said that film number {number} is good" for number in range(12)]
WORDS = {
    "de": "der alte Mann",
    "nl": "de oude man",
    "cy": "yr hen ddyn",
    "ja": "rojin",
    "pt_BR": "o velho",
    "pt": "o idoso",
}


def write_catalogue(path: Path, messages: Mapping[str, str]) -> None:
    """A .mo file, by the format's description: counts, a table of lengths and offsets for each side, then the texts."""
    entries = sorted({"": "Content-Type: text/plain; charset=UTF-8\n", **messages}.items())
    texts = [part.encode() for entry in (0, 1) for part in (pair[entry] for pair in entries)]
    offset, table = 28 + 8 * len(texts), b""
    for text in texts:
        table += struct.pack("<II", len(text), offset)
        offset += len(text) + 1
    header = struct.pack("<7I", 0x950412DE, 0, len(entries), 28, 28 + 8 * len(entries), 0, offset)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + table + b"".join(text + b"\0" for text in texts))


@pytest.fixture
def catalogues(tmp_path: Path) -> Path:
    folder = tmp_path / "locale"
    for locale, words in WORDS.items():
        messages = {text: f"{words} {number}" for number, text in enumerate(STANDARD)}
        messages |= {"the man said %(name)s was here": words, "too short": words, STANDARD[3] + " ": STANDARD[3] + " "}
        write_catalogue(folder / locale / "LC_MESSAGES" / "django.mo", messages)
    write_catalogue(folder / "xx_unknown" / "LC_MESSAGES" / "django.mo", {STANDARD[0]: "?"})
    return folder


@pytest.fixture
def settings(tmp_path: Path, catalogues: Path) -> Callable[..., DialectDataConfig]:
    def make(**changes: Any) -> DialectDataConfig:
        tree = {
            "directory": str(tmp_path / "corpus"),
            "mode": "parallel",
            "vectors": "lang2vec",
            "pairs": [{"kind": "gettext", "path": f"{catalogues}/*/LC_MESSAGES/*.mo"}],
            "evaluation_varieties": ["ja", "cym"],
            "training_sentences": 8,
            "heldout_sentences": 4,
            "minimum_words": 4,
        }
        return DialectDataConfig.model_validate(tree | changes)

    return make


def test_catalogues_become_pairs_with_vectors_of_their_languages_split_by_sentence(
    settings: Callable[..., DialectDataConfig],
) -> None:
    made = prepare_corpus(settings())
    corpus = load_corpus(made.directory)
    forms = {pair.variety for pair in corpus.train}
    assert forms == {"deu", "nld", "por", "standard"} and corpus.heldout_varieties == ("jpn", "cym")
    heldout = {pair.standard for name in ("ja", "cym", "standard") for pair in corpus.heldout(name)}
    trained = {pair.standard for pair in corpus.train}
    assert len(trained) == 8 and len(heldout) == 4 and trained | heldout == set(STANDARD)
    for pair in corpus.train:
        expected = "eng" if pair.variety == "standard" else pair.variety
        np.testing.assert_array_equal(pair.vector, languages.vector(expected))
    for pair in corpus.heldout("cy"):
        assert pair.dialect == f"{WORDS['cy']} {STANDARD.index(pair.standard)}"
    # Of two catalogues of Portuguese the one with the shorter name counts.
    assert {pair.dialect[:8] for pair in corpus.train if pair.variety == "por"} == {"o idoso "}
    assert prepare_corpus(settings()).reused and not prepare_corpus(settings(seed=1)).reused


def test_lines_of_json_hold_pairs_in_varieties_of_english(settings: Any, tmp_path: Path) -> None:
    rows = [{"en": text, "text": text.replace("is", "dey"), "who": who} for text in STANDARD for who in ("NgE", "AAVE")]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    pairs = {"kind": "jsonl", "path": str(path), "standard": "en", "dialect": "text", "variety": "who"}
    corpus = load_corpus(
        prepare_corpus(settings(pairs=[pairs], vectors="ewave", evaluation_varieties=["AAVE"])).directory
    )
    assert {pair.variety for pair in corpus.train} == {"Nigerian English", "standard"}
    (first, *_) = corpus.heldout("AAVE")
    assert "dey" in first.dialect and (first.vector == typology.vector("AAVE")).all()
    path.write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[1] | {"who": "Martian"}), encoding="utf-8")
    with pytest.raises(SentenceError, match="line 2: unknown variety 'Martian'"):
        prepare_corpus(settings(pairs=[pairs], vectors="ewave"))
    path.write_text(json.dumps({"en": "the only one", "who": "NgE"}), encoding="utf-8")
    with pytest.raises(SentenceError, match="line 1 lacks text in one of en, who, text"):
        prepare_corpus(settings(pairs=[pairs], vectors="ewave"))


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"training_sentences": 9}, SentenceError, "9 training \\+ 4 held-out .* the pairs have 12 distinct"),
        ({"evaluation_varieties": ["fi"]}, CorpusError, "no held-out sentence has a form in fin"),
        ({"training_varieties": ["de", "fi"]}, CorpusError, "no training sentence has a form in fin"),
        ({"evaluation_varieties": ["Martian"]}, UnknownVarietyError, "unknown language"),
        ({"pairs": [{"kind": "gettext", "path": "nowhere/*.mo"}]}, SentenceError, "no file matches 'nowhere"),
    ],
)
def test_what_cannot_be_prepared_is_refused_and_nothing_is_written(
    settings: Any, changes: dict[str, Any], error: type[Exception], reason: str
) -> None:
    data = settings(**changes)
    with pytest.raises(error, match=reason):
        prepare_corpus(data)
    assert not Path(data.directory).exists()


def test_a_damaged_catalogue_is_named(settings: Any, catalogues: Path) -> None:
    (catalogues / "de" / "LC_MESSAGES" / "django.mo").write_bytes(b"PO, not MO")
    with pytest.raises(SentenceError, match=r"de/LC_MESSAGES/django.mo is no compiled gettext catalogue"):
        prepare_corpus(settings())


def test_settings_of_pairs_and_of_sentences_do_not_mix(settings: Any) -> None:
    for changes in ({"pairs": []}, {"sources": [{"kind": "text", "path": "a.txt"}]}, {"mode": "virtual"}):
        with pytest.raises(ValueError, match=r"needs data\.(pairs|sources)"):
            settings(**changes)


def test_a_run_on_languages_trains_and_is_evaluated_on_languages_it_has_not_seen(
    settings: Any, tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    data = settings().model_dump(mode="json")
    prepare_corpus(settings())
    config = tiny_config(tmp_path / "run", {"data": data, "evaluation.bootstrap_samples": 100})
    assert train(config).step == 6
    run = load_run(tmp_path / "run")
    assert run.hypernetwork is not None and run.conditions.size == languages.NUM_FEATURES
    np.testing.assert_array_equal(run.conditions.parse("dialect:cy").vector, languages.vector("cym"))
    result = evaluate_dialects(run, load_corpus(data["directory"]), progress=False)
    (japanese, welsh) = result["dialects"]
    assert (japanese["variety"], welsh["wrong"], welsh["seen"]) == ("jpn", "jpn", False)
    nearest = min(("deu", "nld", "por"), key=lambda code: languages.distance("cym", code))
    assert welsh["nearest"] == {"variety": nearest, "distance": pytest.approx(languages.distance("cy", nearest))}
    assert list(welsh["coverage"]) == ["binary"]
    assert f"{nearest} ({welsh['nearest']['distance']:.2f})" in markdown_table(result)
