"""The target cache: right, computed once, never mixed up, and mended when damaged."""

from __future__ import annotations

import pytest
import torch

from hl_scale.base import load_base
from hl_scale.config import AlignmentConfig
from hl_scale.engine import targets
from hl_scale.engine.targets import TargetCache, tokenize
from hl_scale.engine.zero3 import World
from hl_scale.objectives.alignment import AlignmentObjective

ALONE = World(0, 1, torch.device("cpu"))
TEXTS = ["the old man", "nobody asked them to leave before it rained again", "she said that", "the old man"]


@pytest.fixture(scope="module")
def base(tiny_config, tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("unused"))
    return load_base(config.base, config.lora)


@pytest.fixture
def make_cache(base, tmp_path):
    def make(**objective):
        return TargetCache(tmp_path / "targets", base, AlignmentObjective(AlignmentConfig(**objective)))

    return make


def written(cache, monkeypatch, texts=TEXTS):
    """Texts that `prepare` computes."""
    computed = []
    write = TargetCache._write
    with monkeypatch.context() as patch:
        patch.setattr(
            TargetCache, "_write", lambda self, chunk, device: (computed.extend(chunk), write(self, chunk, device))
        )
        cache.prepare(texts, ALONE)
    return sorted(computed)


def test_a_target_is_the_bare_base_s_own_state_without_the_first_token(make_cache, base):
    cache = make_cache()
    cache.prepare(TEXTS, ALONE)
    for text in TEXTS:
        input_ids, mask = tokenize(base, [text])
        with torch.no_grad():
            fresh = base.hidden_states(input_ids, mask)[0, 1:] / base.hidden_size**0.5
        assert cache.get(text).shape == fresh.shape
        torch.testing.assert_close(cache.get(text), fresh, rtol=1e-5, atol=1e-6)


def test_targets_are_computed_once(make_cache, monkeypatch):
    assert written(make_cache(), monkeypatch) == sorted(set(TEXTS))
    assert written(make_cache(), monkeypatch) == []
    assert written(make_cache(), monkeypatch, [*TEXTS, "a new one"]) == ["a new one"]


@pytest.mark.parametrize("other", [{"normalization": "l2"}, {"skip_first_token": False}])
def test_another_normalisation_never_reads_these_targets(make_cache, monkeypatch, other):
    make_cache().prepare(TEXTS, ALONE)
    assert written(make_cache(**other), monkeypatch) == sorted(set(TEXTS))


def test_another_base_never_reads_these_targets(make_cache, monkeypatch, base):
    make_cache().prepare(TEXTS, ALONE)
    monkeypatch.setattr(base, "fingerprint", "0" * 64)
    assert written(make_cache(), monkeypatch) == sorted(set(TEXTS))


def test_a_truncated_chunk_is_computed_again_and_the_others_are_kept(make_cache, monkeypatch):
    monkeypatch.setattr(targets, "TEXTS_PER_CHUNK", 1)
    cache = make_cache()
    cache.prepare(TEXTS, ALONE)
    expected = {text: cache.get(text).clone() for text in TEXTS}  # of the bytes of the file, which change below
    damaged = cache._found[targets.text_key(TEXTS[1])]
    damaged.write_bytes(damaged.read_bytes()[:-7])
    again = make_cache()
    assert written(again, monkeypatch) == [TEXTS[1]]
    assert all(again.get(text).equal(cloud) for text, cloud in expected.items())


def test_a_failed_write_leaves_no_chunk_behind(make_cache, monkeypatch):
    def half(clouds, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    cache = make_cache()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(targets, "save_file", half)
        cache.prepare(TEXTS, ALONE)
    assert list(cache.directory.iterdir()) == []
    assert written(make_cache(), monkeypatch) == sorted(set(TEXTS))
