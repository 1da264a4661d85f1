"""The adapters of a server on disk."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

from hl_scale.config import LoraConfig
from hl_scale.lora import LoraFactors, Slot
from hl_scale.serving import adapter_cache
from hl_scale.serving.adapter_cache import AdapterCache, BadAdapterError, CacheError, adapter_id, adapter_key
from hl_scale.serving.export import write_peft_adapter

KEYS = [adapter_key("run", str(number)) for number in range(4)]
BASE = "/models/base"


def write(cache: AdapterCache, key: str) -> None:
    slot = Slot(0, "q_proj", "model.layers.0.q_proj", 8, 8)
    factors = LoraFactors((slot,), {slot.path: torch.ones(1, 2, 8)}, {slot.path: torch.ones(1, 8, 2)}, 1.0)
    lora = LoraConfig(rank=2, alpha=2.0, target_modules=["q_proj"])
    write_peft_adapter(
        factors, cache.path(key), base_model_name_or_path=BASE, lora=lora, task_type="CAUSAL_LM",
        provenance={"cache_key": key}, force=True,
    )  # fmt: skip
    cache.add(key)


@pytest.fixture
def cache(tmp_path):
    made = AdapterCache(tmp_path / "cache", 10**6)
    yield made
    made.close()


def test_a_written_adapter_verifies(cache):
    write(cache, KEYS[0])
    cache.verify(KEYS[0], BASE)
    assert KEYS[0] in cache and cache.bytes == sum(path.stat().st_size for path in cache.path(KEYS[0]).iterdir())


def _truncate(directory):
    weights = directory / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])


def _claim_another_key(directory):
    path = directory / "hl_provenance.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cache_key": KEYS[1]}))


def _lead_out(directory):
    weights = directory / "adapter_model.safetensors"
    outside = shutil.move(weights, directory.parent.parent / "outside")
    weights.symlink_to(outside)


@pytest.mark.parametrize(
    "damage",
    [
        _truncate, _claim_another_key, _lead_out,
        lambda directory: (directory / "adapter_model.safetensors").unlink(),
        lambda directory: (directory / "adapter_config.json").write_text("{"),
        lambda directory: (directory / "hl_provenance.json").write_text("[]"),
    ],
)  # fmt: skip
def test_a_damaged_adapter_does_not_verify(cache, damage):
    write(cache, KEYS[0])
    damage(cache.path(KEYS[0]))
    with pytest.raises(BadAdapterError):
        cache.verify(KEYS[0], BASE)


def test_an_adapter_of_another_base_does_not_verify(cache):
    write(cache, KEYS[0])
    with pytest.raises(BadAdapterError, match="made for base /models/base, not /models/other"):
        cache.verify(KEYS[0], "/models/other")


@pytest.mark.parametrize("key", ["", "../outside", "/etc", KEYS[0] + "/..", KEYS[0].upper(), "0" * 63])
def test_only_hashes_name_directories(cache, key):
    with pytest.raises(ValueError, match="no key"):
        cache.path(key)


def test_the_least_recently_used_make_room(cache):
    for key in KEYS[:3]:
        write(cache, key)
    cache.touch(KEYS[0])
    cache.maximum_bytes = cache.bytes - 1
    assert cache.victims(needed_by=()) == [KEYS[1]]
    assert cache.victims(needed_by=(KEYS[1],)) == [KEYS[2]]
    cache.maximum_bytes = 1
    assert cache.victims(needed_by=()) == [KEYS[1], KEYS[2], KEYS[0]]


def test_a_removed_adapter_is_gone(cache):
    write(cache, KEYS[0])
    cache.remove(KEYS[0])
    assert KEYS[0] not in cache and cache.bytes == 0 and not cache.path(KEYS[0]).exists()


def test_adapters_and_their_order_survive_a_restart(cache):
    for age, key in enumerate(KEYS):
        write(cache, key)
        os.utime(cache.path(key) / "hl_provenance.json", (1000 - age, 1000 - age))
    before = cache.bytes
    cache.close()
    again = AdapterCache(cache.directory, 10**6)
    assert again.keys == KEYS[::-1] and again.bytes == before
    again.close()


def test_what_a_killed_server_left_half_done_is_deleted_and_foreign_files_are_kept(cache):
    write(cache, KEYS[0])
    (cache.directory / f".{KEYS[1]}-abc.tmp").mkdir()
    (cache.directory / KEYS[2]).mkdir()
    (cache.directory / "notes").mkdir()
    cache.close()
    again = AdapterCache(cache.directory, 10**6)
    assert sorted(path.name for path in cache.directory.iterdir()) == sorted([KEYS[0], "notes", "owner.lock"])
    again.close()


def test_a_linked_directory_is_unlinked_and_its_target_kept(cache, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "hl_provenance.json").write_text("{}")
    cache.path(KEYS[0]).symlink_to(tmp_path / "elsewhere")
    cache.remove(KEYS[0])
    assert not cache.path(KEYS[0]).is_symlink() and (tmp_path / "elsewhere" / "hl_provenance.json").is_file()


def test_two_servers_cannot_share_a_cache(cache):
    with pytest.raises(CacheError, match="another server"):
        AdapterCache(cache.directory, 10**6)


def test_keys_and_ids_are_the_same_in_every_process():
    assert KEYS[0] == "1ad82f400ed613ed78fa43ff9cfd7b7067dca29af05d773a2571aeeab9963868"
    assert adapter_id(KEYS[0], {}) == 1764678396 < 2**31


def test_keys_that_would_share_an_id_get_different_ones(monkeypatch):
    def two_bits(text):  # only the attempt counts, and there are four numbers, of which 0 is none
        attempt = int(text.split()[1])
        return type("Digest", (), {"digest": lambda self: bytes([0, 0, 0, 2 * (attempt % 4)])})()

    monkeypatch.setattr(adapter_cache.hashlib, "sha256", two_bits)
    taken: dict[int, str] = {}
    numbers = [adapter_id(key, taken) for key in KEYS[:3]]
    assert sorted(numbers) == [1, 2, 3]
    assert [adapter_id(key, taken) for key in KEYS[:3]] == numbers
