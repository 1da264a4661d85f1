"""A library of trained LoRAs: what PEFT and the exporter write is read, and bad directories are named."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hl_scale.config import LoraConfig
from hl_scale.data.library import Library, LibraryError
from hl_scale.lora import LoraFactors, Slot
from hl_scale.lora_algebra import canonical
from hl_scale.serving import write_peft_adapter

SLOTS = (
    Slot(0, "q_proj", "model.layers.0.self_attn.q_proj", 7, 6),
    Slot(1, "v_proj", "model.layers.1.self_attn.v_proj", 7, 5),
)
RANK, TASKS = 3, ("antonyms", "plurals", "sorting")


def factors(seed: int, rank: int = RANK, scale: float = 2.0, slots: tuple[Slot, ...] = SLOTS) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    a = {s.path: torch.randn(1, rank, s.in_features, generator=generator) for s in slots}
    b = {s.path: torch.randn(1, s.out_features, rank, generator=generator) for s in slots}
    return LoraFactors(slots, a, b, scale)


def write(
    directory: Path, seed: int = 0, base: str = "example/base", fingerprint: str | None = "f", **fields: Any
) -> None:
    """As the exporter writes it; `fields` are those of `factors`."""
    made = factors(seed, **fields)
    provenance = {} if fingerprint is None else {"base_fingerprint": fingerprint}
    lora = LoraConfig(rank=made.rank, alpha=made.scale * made.rank, scale_convention="alpha_over_rank")
    write_peft_adapter(
        made, directory, base_model_name_or_path=base, lora=lora, task_type="CAUSAL_LM", provenance=provenance
    )


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for seed, name in enumerate(TASKS):
        write(tmp_path / name, seed)
    return tmp_path


def edit_config(directory: Path, **fields: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def assert_same(found: LoraFactors, expected: LoraFactors) -> None:
    assert found.slots == expected.slots and found.scale == pytest.approx(expected.scale)
    for slot in expected.slots:
        assert torch.equal(found.a[slot.path], expected.a[slot.path])
        assert torch.equal(found.b[slot.path], expected.b[slot.path])


def test_what_the_exporter_writes_is_read_bit_for_bit(library: Path) -> None:
    opened = Library(library, SLOTS)
    assert opened.names == TASKS
    assert (opened.rank, opened.scale, opened.base_model, opened.base_fingerprint) == (3, 2.0, "example/base", "f")
    for seed, name in enumerate(TASKS):
        assert_same(opened.read(name), factors(seed))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_what_peft_saves_is_read_and_has_the_update_that_peft_applies(tmp_path: Path, use_rslora: bool) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=17, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1,
        )
    )  # fmt: skip
    found = {path: layer for path, layer in model.named_modules() if path.endswith(("q_proj", "v_proj"))}
    slots = tuple(
        Slot(int(path.split(".")[2]), path[-6:], path, layer.in_features, layer.out_features)
        for path, layer in found.items()
    )
    before = {slot.path: model.get_submodule(slot.path).weight.detach().clone() for slot in slots}
    peft = get_peft_model(
        model,
        PeftConfig(
            r=2, lora_alpha=5, use_rslora=use_rslora, target_modules=["q_proj", "v_proj"], init_lora_weights=False
        ),
    )
    peft.save_pretrained(tmp_path / "task")
    read = Library(tmp_path, slots).read("task")
    assert read.scale == pytest.approx(5 / (math.sqrt(2) if use_rslora else 2))
    merged = peft.merge_and_unload()
    for slot in slots:
        update = merged.get_submodule(slot.path).weight.detach() - before[slot.path]
        torch.testing.assert_close(
            read.scale * read.b[slot.path][0] @ read.a[slot.path][0], update, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(("prefix", "name"), [("", ""), ("base_model.model.", ".default"), ("", ".mine")])
def test_keys_with_an_adapters_name_or_without_pefts_prefix_are_read_too(library: Path, prefix: str, name: str) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            new = prefix + key.removeprefix("base_model.model.").replace(".weight", f"{name}.weight")
            tensors[new] = tensors.pop(key)

    edit_tensors(library / TASKS[1], rename)
    assert_same(Library(library, SLOTS).read(TASKS[1]), factors(1))


def test_factors_of_any_floating_type_are_read_as_float32(library: Path) -> None:
    edit_tensors(library / TASKS[0], lambda tensors: tensors.update({k: t.bfloat16() for k, t in tensors.items()}))
    read = Library(library, SLOTS).read(TASKS[0])
    path = SLOTS[0].path
    assert read.a[path].dtype == torch.float32
    assert torch.equal(read.a[path], factors(0).a[path].bfloat16().float())


def test_canonical_factors_are_in_singular_form(library: Path) -> None:
    read = Library(library, SLOTS).read(TASKS[0], canonical=True)
    for slot in SLOTS:
        expected = canonical(factors(0).a[slot.path], factors(0).b[slot.path])
        torch.testing.assert_close((read.a[slot.path], read.b[slot.path]), expected)


def test_several_are_read_in_the_order_asked_for_with_repeats(library: Path) -> None:
    opened = Library(library, SLOTS)
    several = opened.read_all(["sorting", "antonyms", "sorting"])
    assert several.conditions == 3
    for row, seed in enumerate((2, 0, 2)):
        assert_same(several.select(row), factors(seed))


@pytest.mark.parametrize("singular", [False, True])
def test_statistics_are_those_of_the_adapters_together(library: Path, singular: bool) -> None:
    opened = Library(library, SLOTS)
    found = opened.statistics(TASKS, canonical=singular)
    together = opened.read_all(TASKS, canonical=singular)
    for slot in SLOTS:
        for mean, std, side in ((found.mean.a, found.std.a, together.a), (found.mean.b, found.std.b, together.b)):
            torch.testing.assert_close(mean[slot.path], side[slot.path].mean(0, keepdim=True))
            torch.testing.assert_close(std[slot.path], side[slot.path].std(0, keepdim=True, correction=0))
    assert found.mean_square_norm == pytest.approx(float(together.delta_norms().square().mean()))


def test_statistics_of_one_adapter_have_no_spread_and_of_none_are_refused(library: Path) -> None:
    opened = Library(library, SLOTS)
    assert not opened.statistics(["plurals"]).std.a[SLOTS[0].path].any()
    with pytest.raises(LibraryError, match=r"no adapters .*\n  fix"):
        opened.statistics([])


def test_nothing_but_an_index_is_held(library: Path) -> None:
    opened = Library(library, SLOTS)
    held = [value for entry in opened._entries.values() for value in vars(entry).values()]
    assert not any(isinstance(value, torch.Tensor) for value in held)
    write(library / "later", 7)
    (library / TASKS[0] / "adapter_model.safetensors").write_bytes(
        (library / "later" / "adapter_model.safetensors").read_bytes()
    )
    assert_same(opened.read(TASKS[0]), factors(7))


def test_only_the_tasks_that_are_named_are_looked_at(library: Path) -> None:
    write(library / "other", 5, rank=2)
    assert Library(library, SLOTS, names=["sorting", "plurals"]).names == ("plurals", "sorting")
    with pytest.raises(LibraryError, match=rf"{library}/missing: there is no such directory"):
        Library(library, SLOTS, names=["sorting", "missing"])


def test_folders_without_an_adapter_and_hidden_ones_are_passed_over(library: Path) -> None:
    (library / "logs").mkdir()
    (library / "notes.txt").write_text("")
    write(library / ".plurals-x.tmp", 5, rank=2)
    assert Library(library, SLOTS).names == TASKS


@pytest.mark.parametrize("exists", [True, False])
def test_a_library_without_adapters_is_refused(tmp_path: Path, exists: bool) -> None:
    directory = tmp_path if exists else tmp_path / "nowhere"
    with pytest.raises(LibraryError, match=rf"no adapters in {directory}.*\n  fix: correct objective.library"):
        Library(directory, SLOTS)


def test_an_unknown_task_is_refused_with_the_closest_name(library: Path) -> None:
    with pytest.raises(LibraryError, match=r"no adapter for task 'plural'\n  fix: did you mean plurals\?"):
        Library(library, SLOTS).read("plural")


OTHER_SLOTS = (SLOTS[0], Slot(1, "k_proj", "model.layers.1.self_attn.k_proj", 7, 5))
WIDER_SLOTS = (SLOTS[0], Slot(1, "v_proj", "model.layers.1.self_attn.v_proj", 7, 6))


def remove_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"]


def add_bias(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_magnitude_vector.weight"] = torch.zeros(5)


def second_adapter(tensors: dict[str, torch.Tensor]) -> None:
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B"
    tensors[f"{key}.other.weight"] = tensors[f"{key}.weight"].clone()


def truncate(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def pickled(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()
    (directory / "adapter_model.bin").write_bytes(pickle.dumps(Explosive()))


class Explosive:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("unpickled",))


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "rank": (lambda d: write(d, rank=2, scale=2.0), "rank 2, where 3 of 4 have 3"),
    "scale": (lambda d: write(d, scale=4.0), "scale 4.0, where 3 of 4 have 2.0"),
    "fingerprint": (lambda d: write(d, fingerprint="g"), "base g, where 3 of 4 have f"),
    "base": (lambda d: write(d, fingerprint=None, base="other/base"), "base other/base, where 3 of 4 have example"),
    "other modules": (
        lambda d: write(d, slots=OTHER_SLOTS),
        r"has no lora_A of \S+v_proj, lora_B of \S+v_proj; has \S+k_proj.lora_A.weight, \S+, which are no factors",
    ),
    "fewer modules": (lambda d: write(d, slots=SLOTS[:1]), r"has no lora_A of \S+v_proj, lora_B of \S+v_proj"),
    "shape": (lambda d: write(d, slots=WIDER_SLOTS), r"lora_B of \S+v_proj is \(6, 3\), expected \(5, 3\)"),
    "missing tensor": (lambda d: (write(d), edit_tensors(d, remove_one)), r"has no lora_B of \S+v_proj\n"),
    "stray tensor": (lambda d: (write(d), edit_tensors(d, add_bias)), r"has \S+magnitude_vector.weight, which are no"),
    "two adapters": (lambda d: (write(d), edit_tensors(d, second_adapter)), r"has \S+lora_B\S*.weight, which are no"),
    "rank in the file": (lambda d: (write(d), edit_config(d, r=2)), r"lora_A of \S+ is \(3, 7\), expected \(2, 7\)"),
    "huge rank": (lambda d: (write(d), edit_config(d, r=6)), "rank 6 exceeds the smallest layer's 5 features"),
    "no rank": (lambda d: (write(d), edit_config(d, r=None)), "r = None and lora_alpha = 6"),
    "bias": (lambda d: (write(d), edit_config(d, bias="all")), "trains biases"),
    "lora bias": (lambda d: (write(d), edit_config(d, lora_bias=True)), "trains biases"),
    "dora": (lambda d: (write(d), edit_config(d, use_dora=True)), "DoRA"),
    "modules": (lambda d: (write(d), edit_config(d, modules_to_save=["lm_head"])), "modules_to_save"),
    "pattern": (lambda d: (write(d), edit_config(d, alpha_pattern={"q_proj": 1})), "alpha_pattern"),
    "other type": (lambda d: (write(d), edit_config(d, peft_type="IA3")), "PEFT type IA3"),
    "pissa": (lambda d: (write(d), edit_config(d, init_lora_weights="pissa_niter_4")), "also changes the base"),
    "damaged tensors": (lambda d: (write(d), truncate(d)), "adapter_model.safetensors is damaged"),
    "damaged json": (lambda d: (write(d), (d / "adapter_config.json").write_text("{")), "config.json is damaged"),
    "json list": (lambda d: (write(d), (d / "adapter_config.json").write_text("[]")), "not an object"),
    "no config": (lambda d: (write(d), (d / "adapter_config.json").unlink()), "adapter_config.json is missing"),
    "no tensors": (lambda d: (write(d), (d / "adapter_model.safetensors").unlink()), "safetensors is missing"),
    "pickle": (lambda d: (write(d), pickled(d)), "pickle, which is never read"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_unlike_the_others_is_refused_by_its_directory(library: Path, fault: str) -> None:
    make, message = FAULTS[fault]
    make(library / "odd")
    with pytest.raises(LibraryError, match=message) as caught:
        Library(library, SLOTS)
    lines = str(caught.value).split("\n")
    assert lines[1].startswith(f"  {library}/odd: ") and len(lines) == 3 and lines[2].startswith("  fix: ")


def test_the_same_base_under_two_names_is_one_base_if_fingerprints_say_so(library: Path) -> None:
    write(library / "odd", base="/copies/base")
    assert Library(library, SLOTS).base_fingerprint == "f"


def test_without_a_fingerprint_everywhere_the_library_claims_none(library: Path) -> None:
    write(library / "odd", fingerprint=None)
    opened = Library(library, SLOTS)
    assert (opened.base_model, opened.base_fingerprint) == ("example/base", None)


def test_all_problems_are_in_one_message_that_shows_five(library: Path) -> None:
    for number in range(4):
        write(library / f"odd-{number}", rank=2)
    truncate(library / "antonyms")
    write(library / "pointless", slots=SLOTS[:1])
    write(library / "zero", slots=OTHER_SLOTS)
    for name in ("one", "two"):
        write(library / name)
        truncate(library / name)
    write(library / "usual-1"), write(library / "usual-2"), write(library / "usual-3")
    with pytest.raises(LibraryError) as caught:
        Library(library, SLOTS)
    lines = str(caught.value).split("\n")
    names = [line.strip().split(": ")[0].rsplit("/", 1)[-1] for line in lines[1:6]]
    assert names == ["antonyms", "one", "pointless", "two", "zero"]
    assert lines[6:-1] == ["  and 4 more"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused_when_they_are_read(library: Path, value: float) -> None:
    for name in ("plurals", "sorting"):
        edit_tensors(library / name, lambda tensors: tensors[sorted(tensors)[2]].view(-1)[3:4].fill_(value))
    opened = Library(library, SLOTS)
    opened.read("antonyms")
    message = rf"{library}/plurals: holds NaN or infinity in 1 of 4 tensors, first of {SLOTS[1].path}"
    with pytest.raises(LibraryError, match=rf"{message}\n  fix"):
        opened.read("plurals")
    with pytest.raises(LibraryError, match=rf"{message}\n  {library}/sorting: holds NaN"):
        opened.statistics(TASKS)


def test_a_file_damaged_after_opening_is_named(library: Path) -> None:
    opened = Library(library, SLOTS)
    truncate(library / "plurals")
    with pytest.raises(LibraryError, match=rf"{library}/plurals: adapter_model.safetensors cannot be read.*\n  fix"):
        opened.read("plurals")
