"""Sentence sources: reading, filters, order, errors."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hl_scale.config import DialectDataConfig, SentenceSource
from hl_scale.data.resources import ResourceError
from hl_scale.data.sentences import SentenceError, digest_texts, in_order, load_sentences


def numbered(count: int, words: int = 9) -> list[str]:
    return [f"sentence number {number} " + "word " * (words - 3) for number in range(count)]


def config(
    *sources: SentenceSource, training: int = 4, heldout: int = 2, seed: int = 0, **fields: object
) -> DialectDataConfig:
    return DialectDataConfig(
        directory="unused",
        sources=sources,
        training_sentences=training,
        heldout_sentences=heldout,
        seed=seed,
        **fields,
    )


def texts(pool) -> list[str]:
    return [sentence.text for sentence in (*pool.heldout, *pool.training)]


def test_text_jsonl_parquet_and_hub_sources_give_the_same_sentences(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    lines = numbered(8)
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n\n")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": line, "id": 1}) + "\n" for line in lines))
    pq.write_table(pa.table({"body": lines}), tmp_path / "a.parquet")
    hub = tmp_path / "hub"
    hub.mkdir()
    pq.write_table(pa.table({"body": lines}), hub / "train.parquet")
    sources = [
        SentenceSource(kind="text", path=str(tmp_path / "a.txt")),
        SentenceSource(kind="jsonl", path=str(tmp_path / "a.jsonl"), column="body"),
        SentenceSource(kind="parquet", path=str(tmp_path / "*.parquet"), column="body"),
        SentenceSource(kind="hub", path=str(hub), column="body"),
    ]
    found = [texts(load_sentences(config(source))) for source in sources]
    assert found[0] == found[1] == found[2] == found[3]
    assert set(found[0]) < {" ".join(line.split()) for line in lines}


def test_whitespace_is_normalised_duplicates_and_other_lengths_are_dropped(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a b  c\td\n a b c d \na b c\n a b c d e f\nw x y z\n\n")
    pool = load_sentences(
        config(SentenceSource(kind="text", path=str(path)), training=1, heldout=1, minimum_words=4, maximum_words=5)
    )
    assert sorted(texts(pool)) == ["a b c d", "w x y z"]


def test_order_and_limit_depend_on_seed_and_text_and_not_on_file_order(tmp_path) -> None:
    lines = numbered(30)
    forward, backward = tmp_path / "f.txt", tmp_path / "b.txt"
    forward.write_text("\n".join(lines))
    backward.write_text("\n".join(reversed(lines)))
    pools = [
        load_sentences(config(SentenceSource(kind="text", path=str(path), limit=10), seed=seed))
        for path, seed in ((forward, 0), (backward, 0), (forward, 1))
    ]
    assert texts(pools[0]) == texts(pools[1])
    assert texts(pools[0]) != texts(pools[2])
    assert pools[0].sources[0]["sentences"] == 10


def test_held_out_and_training_sentences_are_disjoint_and_numbered_from_zero(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(numbered(9)))
    pool = load_sentences(config(SentenceSource(kind="text", path=str(path)), training=6, heldout=3))
    assert len(set(texts(pool))) == 9
    assert [sentence.sentence_id for sentence in (*pool.heldout, *pool.training)] == list(range(9))


def test_a_larger_training_set_keeps_the_smaller_one_and_its_held_out_sentences(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(numbered(20)))
    source = SentenceSource(kind="text", path=str(path))
    small, large = load_sentences(config(source)), load_sentences(config(source, training=12))
    assert small.heldout == large.heldout
    assert small.training == large.training[: len(small.training)]


def test_a_sentence_in_two_sources_is_kept_once(tmp_path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("\n".join(numbered(6)))
    sources = [SentenceSource(kind="text", path=str(tmp_path / name)) for name in ("a.txt", "b.txt")]
    pool = load_sentences(config(*sources))
    assert len(set(texts(pool))) == 6 and {sentence.source for sentence in pool.training} == {0}


def test_too_few_sentences_says_how_many_there_are(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(numbered(5)))
    with pytest.raises(SentenceError, match=r"4 training \+ 2 held-out[\s\S]*5 distinct[\s\S]*fix: lower"):
        load_sentences(config(SentenceSource(kind="text", path=str(path))))


def test_a_source_without_usable_sentences_is_refused(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("too short\n\n")
    with pytest.raises(SentenceError, match=r"no usable sentence: 2 were read, none has 8 to 30 words"):
        load_sentences(config(SentenceSource(kind="text", path=str(path))))


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("jsonl", b'{"body": "x"}\n', "line 1 has no column 'text'[\\s\\S]*there: body"),
        ("jsonl", b'{"text": "x"}\n{"text"\n', "line 2 is not JSON"),
        ("jsonl", b'{"text": 3}\n', "holds a int; expected text"),
        ("jsonl", b"[1]\n", "there: a list"),
        ("parquet", b"PAR1 this is not it PAR1", "not a readable Parquet file"),
        ("text", b"caf\xe9\n", "not UTF-8"),
    ],
)
def test_a_malformed_file_is_named_with_its_fault(tmp_path, kind: str, content: bytes, message: str) -> None:
    path = tmp_path / "bad"
    path.write_bytes(content)
    with pytest.raises(SentenceError, match=message):
        load_sentences(config(SentenceSource(kind=kind, path=str(path))))


def test_a_parquet_file_without_the_column_lists_its_columns(tmp_path) -> None:
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(SentenceError, match=r"no column 'text'[\s\S]*there: body"):
        load_sentences(config(SentenceSource(kind="parquet", path=str(tmp_path / "a.parquet"))))


def test_a_missing_file_names_the_path(tmp_path) -> None:
    with pytest.raises(SentenceError, match="no file matches"):
        load_sentences(config(SentenceSource(kind="text", path=str(tmp_path / "*.txt"))))


def test_an_unreachable_hub_dataset_is_an_error_with_its_name(tmp_path) -> None:
    with pytest.raises(SentenceError, match="could not load hub"):
        load_sentences(config(SentenceSource(kind="hub", path=str(tmp_path / "nothing-here"))))


def test_a_wrong_vader_archive_is_refused_before_it_is_opened(tmp_path) -> None:
    path = tmp_path / "vaderSentiment-3.3.2.tar.gz"
    path.write_bytes(b"something else")
    with pytest.raises(ResourceError, match="expected sha256 5d7c06e0"):
        load_sentences(config(SentenceSource(kind="vader", name="movie", path=str(path))))


def test_the_digest_separates_texts() -> None:
    assert digest_texts(["a", "b"]) != digest_texts(["ab"]) != digest_texts(["b", "a"])


def test_order_is_a_permutation() -> None:
    assert sorted(in_order(["x", "y", "z"], seed=3)) == ["x", "y", "z"]
