"""Cells: made once, read afterwards, and made again where they are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hl_scale.evaluation.dialect_tasks.cells import CellStore

KEY = {"kind": "test", "settings": {"rank": 4, "modules": ["q", "v"]}, "base": "f" * 8}


class Builder:
    """Writes one file, and counts how often it was asked to."""

    def __init__(self, fails: bool = False) -> None:
        self.calls, self.fails = 0, fails

    def __call__(self, directory: Path) -> dict[str, Any]:
        self.calls += 1
        (directory / "part").mkdir(exist_ok=True)
        (directory / "part" / "weights").write_bytes(bytes(range(100)))
        if self.fails:
            raise RuntimeError("cut off")
        return {"accuracy": 0.5}


def test_a_cell_is_made_once_and_read_by_every_later_store(tmp_path) -> None:
    build = Builder()
    first = CellStore(tmp_path).get("LoRA, seed 0", KEY, build)
    later = CellStore(tmp_path)
    again = later.get("LoRA, seed 0", KEY, build)
    assert build.calls == 1 and first == again and again.facts == {"accuracy": 0.5}
    assert (later.made, later.read) == ([], [first.directory.name])
    assert first.directory.name.startswith("lora-seed-0-")


def test_two_processes_that_make_the_same_cell_end_with_one(tmp_path) -> None:
    first, second, build = CellStore(tmp_path), CellStore(tmp_path), Builder()

    def slower(directory: Path) -> dict[str, Any]:
        first.get("a", KEY, build)  # the other is done while this one is at it
        return {**build(directory), "accuracy": 0.25}

    found = second.get("a", KEY, slower)
    assert found == first.get("a", KEY, build) and found.facts == {"accuracy": 0.5}
    assert (first.made, second.made, second.read) == ([found.directory.name], [], [found.directory.name])
    assert [path.name for path in tmp_path.iterdir()] == [found.directory.name]


def test_the_order_of_a_keys_entries_plays_no_part_and_their_values_do(tmp_path) -> None:
    store, build = CellStore(tmp_path), Builder()
    first = store.get("a", KEY, build)
    assert store.get("a", dict(reversed(KEY.items())), build).directory == first.directory
    for change in ({"base": "0" * 8}, {"settings": {"rank": 8, "modules": ["q", "v"]}}, {"more": None}):
        assert store.get("a", {**KEY, **change}, build).directory != first.directory
    assert build.calls == 4


def test_a_cell_that_is_cut_off_is_not_there(tmp_path) -> None:
    with pytest.raises(RuntimeError, match="cut off"):
        CellStore(tmp_path).get("a", KEY, Builder(fails=True))
    assert list(tmp_path.iterdir()) == []
    assert CellStore(tmp_path).get("a", KEY, Builder()).facts == {"accuracy": 0.5}


def test_a_resumable_cell_keeps_what_was_made_and_counts_only_when_finished(tmp_path) -> None:
    store = CellStore(tmp_path)
    with pytest.raises(RuntimeError):
        store.get("run", KEY, Builder(fails=True), resumable=True)
    (left,) = tmp_path.iterdir()
    assert not (left / "cell.json").exists()

    def goes_on(directory: Path) -> dict[str, Any]:
        return {"found": len((directory / "part" / "weights").read_bytes())}

    assert store.get("run", KEY, goes_on, resumable=True).facts == {"found": 100}


@pytest.mark.parametrize("damage", ["byte", "missing", "key", "json", "list"])
def test_a_damaged_cell_is_made_again_and_says_so(tmp_path, damage, caplog) -> None:
    build = Builder()
    cell = CellStore(tmp_path).get("a", KEY, build)
    weights, described = cell.directory / "part" / "weights", cell.directory / "cell.json"
    if damage == "byte":
        weights.write_bytes(b"?" + weights.read_bytes()[1:])
    elif damage == "missing":
        weights.unlink()
    elif damage == "key":
        described.write_text(json.dumps({**json.loads(described.read_text()), "key": {}}))
    else:
        described.write_text("[]" if damage == "list" else "{")
    store = CellStore(tmp_path)
    again = store.get("a", KEY, build)
    assert build.calls == 2 and store.made == [again.directory.name] and "is damaged and made again" in caplog.text
    assert weights.read_bytes() == bytes(range(100)) and CellStore(tmp_path).get("a", KEY, build) == again
    assert build.calls == 2
