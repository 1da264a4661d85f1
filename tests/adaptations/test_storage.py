"""Saved adaptations come back exactly, or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hl_scale.adaptations import (
    KINDS,
    Adaptation,
    AdaptationError,
    build_adaptation,
    load_adaptation,
    save_adaptation,
)
from hl_scale.base import AdaptedModel

MakeBase = Callable[..., AdaptedModel]
C = 5
SETTINGS: dict[str, dict[str, Any]] = {
    "hyper_adapter": {"hidden_width": 8, "width": 3},
    "lora": {"rank": 3, "scale": 0.7},
}


def trained(kind: str, base: AdaptedModel, seed: int = 0) -> Adaptation:
    adaptation = build_adaptation(kind, base, SETTINGS.get(kind), C)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adaptation.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return adaptation


def weights(directory: Path) -> Path:
    (path,) = directory.glob("*.safetensors")
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_adaptation_is_the_saved_one_bit_for_bit(
    make_base: MakeBase, batch: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, kind: str
) -> None:
    base, conditions = make_base(), torch.rand(3, C)
    saved = trained(kind, base)
    save_adaptation(saved, tmp_path / "new" / "directory")
    loaded = load_adaptation(tmp_path / "new" / "directory", base, kind)
    assert type(loaded) is type(saved) and loaded.settings == saved.settings
    assert loaded.parameter_count == saved.parameter_count
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), saved.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    found = []
    for adaptation in (saved, loaded):
        with torch.no_grad(), adaptation.attached(base, conditions):
            found.append(base.hidden_states(*batch))
    assert torch.equal(*found)


def test_another_base_or_kind_is_refused(make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base()
    save_adaptation(trained("bottleneck", base), tmp_path)
    with pytest.raises(AdaptationError, match=r"trained on the base tiny, not on other\n  fix: "):
        load_adaptation(tmp_path, make_base(fingerprint="other"))
    with pytest.raises(AdaptationError, match=r"holds a bottleneck adaptation, not lora\n  fix: "):
        load_adaptation(tmp_path, base, "lora")


def test_a_save_that_is_cut_off_leaves_the_old_adaptation(make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base()
    old, new = trained("prefix", base), trained("prefix", base, seed=1)
    save_adaptation(old, tmp_path / "old")
    save_adaptation(new, tmp_path / "new")
    shutil.copy(weights(tmp_path / "new"), tmp_path / "old")  # its numbers are there, its description is not
    found = load_adaptation(tmp_path / "old", base)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), old.parameters(), strict=True))
    save_adaptation(new, tmp_path / "old")
    found = load_adaptation(tmp_path / "old", base)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), new.parameters(), strict=True))
    assert len(list((tmp_path / "old").iterdir())) == 2


def _flip(directory: Path) -> None:
    content = bytearray(weights(directory).read_bytes())
    content[-1] ^= 1
    weights(directory).write_bytes(content)


def _rewrite(directory: Path, **changes: Any) -> None:
    path = directory / "adaptation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "flipped bit": ("do not match their sha256", _flip),
    "no weights": ("is missing", lambda directory: weights(directory).unlink()),
    "no description": ("is missing", lambda directory: (directory / "adaptation.json").unlink()),
    "no JSON": ("is damaged", lambda directory: (directory / "adaptation.json").write_text("{")),
    "a list": ("not an object", lambda directory: (directory / "adaptation.json").write_text("[]")),
    "a path for a hash": ("names no sha256", lambda directory: _rewrite(directory, sha256="../../secret")),
    "another size": ("does not fit", lambda directory: _rewrite(directory, settings={"width": 17})),
    "another kind": ("settings of a lora", lambda directory: _rewrite(directory, kind="lora")),
    "no kind": ("unknown kind", lambda directory: _rewrite(directory, kind=None)),
    "a later format": ("format version 2", lambda directory: _rewrite(directory, format_version=2)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_with_a_way_out(make_base: MakeBase, tmp_path: Path, damage: str) -> None:
    base = make_base()
    save_adaptation(trained("bottleneck", base), tmp_path)
    message, harm = DAMAGE[damage]
    harm(tmp_path)
    with pytest.raises(AdaptationError, match=message) as caught:
        load_adaptation(tmp_path, base)
    assert str(tmp_path) in str(caught.value) or damage in ("another kind", "no kind")
    assert "\n  fix: " in str(caught.value)


def test_nan_is_neither_saved_nor_loaded(make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base()
    adaptation = trained("bottleneck", base)
    save_adaptation(adaptation, tmp_path)
    tensors = load_file(weights(tmp_path))
    tensors["attention.0.up.bias"][3] = torch.nan
    weights(tmp_path).unlink()
    save_file(tensors, tmp_path / "changed")
    import hashlib

    digest = hashlib.sha256((tmp_path / "changed").read_bytes()).hexdigest()
    (tmp_path / "changed").rename(tmp_path / f"adaptation-{digest[:16]}.safetensors")
    _rewrite(tmp_path, sha256=digest)
    with pytest.raises(AdaptationError, match="NaN"):
        load_adaptation(tmp_path, base)
    with torch.no_grad():
        adaptation.attention[0].up.bias[3] = torch.inf
    with pytest.raises(AdaptationError, match=r"first in attention\.0\.up\.bias"):
        save_adaptation(adaptation, tmp_path / "other")
    assert not (tmp_path / "other").exists()
