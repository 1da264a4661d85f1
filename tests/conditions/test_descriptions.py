"""Descriptions become vectors of length sqrt(width), once, and what cannot be encoded is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hl_scale.conditions import descriptions
from hl_scale.conditions.descriptions import EncoderError, SentenceEncoder, Vectors, embed
from hl_scale.config import ConditionsConfig

TEXTS = ["Give the last word of the list.", "Name the final item.", "Is the review kind or unkind?"]


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return SentenceEncoder(ConditionsConfig())


def test_embeddings_have_length_sqrt_of_their_width_and_like_meanings_lie_close(encoder: SentenceEncoder) -> None:
    found = encoder.encode(TEXTS)
    assert found.shape == (3, 384) and found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.sqrt(384), rtol=1e-5)
    cosine = found @ found.T / 384
    assert cosine[0, 1] > 0.5 > cosine[0, 2]


def test_a_text_is_encoded_the_same_alone_and_among_others(encoder: SentenceEncoder) -> None:
    together, alone = encoder.encode(TEXTS), encoder.encode(TEXTS[1:2])
    np.testing.assert_allclose(together[1:2], alone, atol=1e-4)


def test_embeddings_are_computed_once_and_anew_if_their_file_is_damaged(
    tmp_path: Path, encoder: SentenceEncoder
) -> None:
    first = embed(TEXTS, encoder, tmp_path)
    (file,) = tmp_path.iterdir()
    stamp = file.stat().st_mtime_ns
    np.testing.assert_array_equal(embed(TEXTS, encoder, tmp_path), first)
    assert file.stat().st_mtime_ns == stamp
    file.write_bytes(b"damaged")
    np.testing.assert_array_equal(embed(TEXTS, encoder, tmp_path), first)
    embed(TEXTS[:2], encoder, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_an_interrupted_embedding_goes_on_with_the_parts_that_are_missing(
    tmp_path: Path, encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Exception):
        pass

    def encode(texts: list[str]) -> Vectors:
        asked.append(list(texts))
        if "stop" in texts and len(asked) < 3:
            raise Interrupted
        return plain(texts)

    asked: list[list[str]] = []
    plain = encoder.encode
    texts = [*TEXTS, "stop"]
    expected = plain(texts)
    monkeypatch.setattr(descriptions, "TEXTS_PER_PART", 3)
    monkeypatch.setattr(encoder, "encode", encode)
    with pytest.raises(Interrupted):
        embed(texts, encoder, tmp_path)
    found = embed(texts, encoder, tmp_path)
    assert asked == [TEXTS, ["stop"], ["stop"]]
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(("text", "reason"), [(" ", "is empty"), ("word " * 400, "tokens, more than 256")])
def test_an_empty_or_overlong_description_is_refused(encoder: SentenceEncoder, text: str, reason: str) -> None:
    with pytest.raises(EncoderError, match=reason):
        encoder.encode([*TEXTS, text])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("package:no-such-encoder", "use one of package:all-minilm-l6-v2"),
        ("/no/such/directory", "cannot be loaded"),
    ],
)
def test_an_encoder_that_cannot_be_loaded_says_what_can(
    name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(EncoderError, match=reason):
        SentenceEncoder(ConditionsConfig(encoder=name))
