"""Bad adapters are refused with a reason; good ones of any origin are let through."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hl_scale.config import LoraConfig
from hl_scale.lora import LoraFactors, Slot
from hl_scale.serving import AdapterError, validate_adapter, write_peft_adapter

SLOTS = (
    Slot(0, "q_proj", "model.layers.0.self_attn.q_proj", 7, 6),
    Slot(0, "v_proj", "model.layers.0.self_attn.v_proj", 7, 5),
    Slot(1, "q_proj", "model.layers.1.self_attn.q_proj", 7, 6),
    Slot(1, "v_proj", "model.layers.1.self_attn.v_proj", 7, 5),
)
NAME, FINGERPRINT = "example/base", "f" * 64


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    a = {s.path: torch.randn(1, 3, s.in_features, generator=generator) for s in SLOTS}
    b = {s.path: torch.randn(1, s.out_features, 3, generator=generator) for s in SLOTS}
    return write_peft_adapter(
        LoraFactors(SLOTS, a, b, 2.0),
        tmp_path / "adapter",
        base_model_name_or_path=NAME,
        lora=LoraConfig(rank=3, alpha=6.0),
        task_type="CAUSAL_LM",
        provenance={"base_fingerprint": FINGERPRINT},
        module_paths=[slot.path for slot in SLOTS],
    )


def edit_config(directory: Path, **fields: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Also as if the hash had been taken afterwards: what is wrong with the tensors must be seen in them."""
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    (directory / "hl_provenance.json").write_text(json.dumps({"base_fingerprint": FINGERPRINT}))


def flip_bit(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def truncate(directory: Path, keep: float) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


def pickled(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()
    (directory / "adapter_model.bin").write_bytes(pickle.dumps(Explosive()))


class Explosive:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("unpickled",))


KEY = "base_model.model.model.layers.1.self_attn.v_proj"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no directory": (shutil.rmtree, "there is no such directory"),
    "no tensors": (lambda d: (d / "adapter_model.safetensors").unlink(), "safetensors is missing"),
    "no config": (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "pickle": (pickled, "pickle, which is never read"),
    "truncated data": (lambda d: truncate(d, 0.99), "adapter_model.safetensors is damaged"),
    "truncated header": (lambda d: truncate(d, 0.1), "adapter_model.safetensors is damaged"),
    "empty file": (lambda d: truncate(d, 0), "adapter_model.safetensors is damaged"),
    "flipped bit": (flip_bit, "sha256 of adapter_model.safetensors is not the one in its provenance"),
    "nan": (lambda d: edit_tensors(d, lambda t: t[f"{KEY}.lora_B.weight"].fill_(float("nan"))), "NaN or infinity in 1"),
    "infinity": (lambda d: edit_tensors(d, lambda t: t[f"{KEY}.lora_A.weight"].fill_(float("inf"))), "NaN or infinity"),
    "wrong rank": (lambda d: edit_config(d, r=4), r"lora_A of \S+ is \(3, 7\), expected \(4, 7\)"),
    "rank of one layer": (
        lambda d: edit_tensors(d, lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(2, 7)})),
        r"lora_A of \S+1.self_attn.v_proj is \(2, 7\), expected \(3, 7\)",
    ),
    "not a matrix": (
        lambda d: edit_tensors(d, lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(21)})), r"is \(21,\), exp",
    ),
    "empty layer": (
        lambda d: edit_tensors(d, lambda t: t.update({f"{KEY}.lora_B.weight": torch.ones(0, 3)})), r"is \(0, 3\), exp",
    ),
    "half a pair": (lambda d: edit_tensors(d, lambda t: t.pop(f"{KEY}.lora_B.weight")), r"has no lora_B of \S+v_proj"),
    "no tensor at all": (lambda d: edit_tensors(d, lambda t: t.clear()), "holds no tensors"),
    "integers": (
        lambda d: edit_tensors(d, lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(3, 7).char()})), "type I8",
    ),
    "unknown module": (
        lambda d: edit_tensors(d, lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(3, 7)})),
        "lm_head.weight, which are no factors of a LoRA",
    ),
    "untargeted module": (lambda d: edit_config(d, target_modules=["q_proj"]), r"factors of \S+v_proj, which target"),
    "missing module": (
        lambda d: edit_config(d, target_modules=["q_proj", "v_proj", "up_proj"]), "no factors of up_proj, which target",
    ),
    "suffix of a name": (lambda d: edit_config(d, target_modules=["proj"]), "which target_modules does not name"),
    "no rank": (lambda d: edit_config(d, r="8"), "r = '8' and lora_alpha = 6"),
    "true rank": (lambda d: edit_config(d, r=True), "r = True"),
    "alpha": (lambda d: edit_config(d, lora_alpha=float("nan")), "lora_alpha = nan"),
    "huge rank": (lambda d: edit_config(d, r=10**400), "expected numbers"),
    "huge alpha": (lambda d: edit_config(d, lora_alpha=10**400), "expected numbers"),
    "huge header": (
        lambda d: (d / "adapter_model.safetensors").write_bytes((2**26).to_bytes(8, "little") + b"{"),
        "a header of 67108864 bytes, more than",
    ),
    "huge key": (
        lambda d: edit_tensors(d, lambda t: t.update({f"{'a.' * 10**6}q_proj.lora_A.weight": torch.ones(3, 7)})),
        r"has (a\.){500}, which are no factors of a LoRA",
    ),
    "dora": (lambda d: edit_config(d, use_dora=True), "DoRA"),
    "bias": (lambda d: edit_config(d, bias="lora_only"), "trains biases"),
    "whole modules": (lambda d: edit_config(d, modules_to_save=["lm_head"]), "modules_to_save"),
    "patterns": (lambda d: edit_config(d, rank_pattern={"q_proj": 4}), "rank_pattern"),
    "huge json": (lambda d: (d / "adapter_config.json").write_text(" " * 2**23), "larger than"),
    "deep json": (lambda d: (d / "adapter_config.json").write_text("[" * 10**5), "config.json is damaged"),
    "mixed up": (
        lambda d: (d / "hl_provenance.json").write_text('{"base_fingerprint": "e"}'), "the files are of two adapters",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_adapter_is_refused_with_its_directory_and_the_reason(adapter: Path, fault: str) -> None:
    make, message = FAULTS[fault]
    make(adapter)
    with pytest.raises(AdapterError, match=message) as caught:
        validate_adapter(adapter, base_model_name_or_path=NAME, base_fingerprint=FINGERPRINT)
    first, second = str(caught.value).split("\n")
    assert first.startswith(f"{adapter} is refused: ") and second.startswith("  fix: ")


def test_a_good_adapter_is_described(adapter: Path) -> None:
    facts = validate_adapter(adapter, base_model_name_or_path=NAME, base_fingerprint=FINGERPRINT)
    assert (facts.rank, facts.scale, facts.base_model, facts.base_fingerprint) == (3, 2.0, NAME, FINGERPRINT)
    assert facts.slots == SLOTS


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"base_model_name_or_path": "other/base"}, "made for base example/base, not other/base"),
        ({"base_fingerprint": "e" * 64}, "made for base ffffffffffff, not eeeeeeeeeeee"),
        ({"base_fingerprint": "e" * 64, "base_model_name_or_path": NAME}, "not eeeeeeeeeeee"),
    ],
)
def test_an_adapter_of_another_base_is_refused(adapter: Path, asked: dict[str, str], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        validate_adapter(adapter, **asked)


def test_the_same_base_under_another_name_is_known_by_its_fingerprint(adapter: Path) -> None:
    validate_adapter(adapter, base_fingerprint=FINGERPRINT, base_model_name_or_path="/copies/base")


def test_two_paths_to_one_directory_are_one_base(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "base")
    edit_config(adapter, base_model_name_or_path=str(tmp_path / "base"))
    validate_adapter(adapter, base_model_name_or_path=str(tmp_path / "link"))


def test_the_tensor_file_alone_tells_the_base(adapter: Path) -> None:
    (adapter / "hl_provenance.json").unlink()
    assert validate_adapter(adapter).base_fingerprint == FINGERPRINT
    with pytest.raises(AdapterError, match="not eeeeeeeeeeee"):
        validate_adapter(adapter, base_fingerprint="e" * 64)


def test_without_any_fingerprint_the_name_decides_and_without_a_name_nothing_is_taken(adapter: Path) -> None:
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "hl_provenance.json").unlink()
    validate_adapter(adapter, base_fingerprint=FINGERPRINT, base_model_name_or_path=NAME)
    with pytest.raises(AdapterError, match="does not say whether its base is ffffffffffff"):
        validate_adapter(adapter, base_fingerprint=FINGERPRINT)


def test_all_that_is_wrong_is_said_at_once(adapter: Path) -> None:
    edit_config(adapter, target_modules=["q_proj"])
    edit_tensors(adapter, lambda tensors: tensors[f"{KEY}.lora_B.weight"].fill_(float("nan")))
    with pytest.raises(AdapterError, match=r"made for base.*target_modules.*NaN"):
        validate_adapter(adapter, base_fingerprint="e" * 64)


def test_what_peft_saves_is_let_through(tmp_path: Path) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=17, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    )
    config = PeftConfig(r=2, lora_alpha=5, use_rslora=True, target_modules=r".*\.(q|v)_proj", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "theirs")
    facts = validate_adapter(tmp_path / "theirs")
    assert (facts.rank, len(facts.slots), facts.base_fingerprint) == (2, 4, None)
    assert facts.scale == pytest.approx(5 / 2**0.5)
