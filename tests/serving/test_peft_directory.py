"""PEFT's own loader is the oracle for exported adapters."""

from __future__ import annotations

import copy
import json
import os
from collections import OrderedDict

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file

from hl_scale.config import LoraConfig
from hl_scale.hypernetwork.fingerprint import weights_fingerprint
from hl_scale.lora import LoraFactors
from hl_scale.serving import ExportError, OutputError, generate_adapter, write_peft_adapter
from hl_scale.serving.export import generate_factors, target_modules
from hl_scale.serving.staging import staged_directory

CONDITION = "dialect:Nigerian English"


def entries(directory):
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def write(run, factors, directory, **arguments):
    settings = {"base_model_name_or_path": "example/tiny", "lora": run.config.lora, "task_type": "CAUSAL_LM"}
    return write_peft_adapter(factors, directory, **settings, provenance={"condition": "test"}, **arguments)


@pytest.mark.parametrize("architecture", ["gemma", "llama"])
@pytest.mark.parametrize("convention", ["alpha_over_rank", "alpha_over_sqrt_rank", "one"])
def test_peft_reproduces_our_logits_under_every_scale_convention(
    make_run, dense_twin, probe, tmp_path, architecture, convention
):
    lora = LoraConfig(rank=4, alpha=6.5, scale_convention=convention, target_modules=("q_proj", "k_proj", "v_proj"))
    run = make_run(architecture, lora)
    directory = generate_adapter(run, CONDITION, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(dense_twin(run.base, architecture), directory).eval()
    _, factors = generate_factors(run, CONDITION)
    keep = probe["attention_mask"].bool()
    with torch.no_grad():
        ours, bare = run.base.logits(**probe, factors=factors)[keep], run.base.logits(**probe)[keep]
        found = theirs(**probe).logits[keep]
    assert (ours - bare).abs().max() > 0.1
    assert (found - ours).abs().max() < 1e-5 * ours.abs().max()


@pytest.mark.parametrize("convention", ["alpha_over_rank", "alpha_over_sqrt_rank", "one"])
def test_a_portable_adapter_is_the_same_update_for_peft_with_a_padded_rank_and_no_rank_stabilised_scale(
    make_run, dense_twin, probe, tmp_path, convention
):
    lora = LoraConfig(rank=5, alpha=6.5, scale_convention=convention, target_modules=("q_proj", "k_proj", "v_proj"))
    run = make_run("llama", lora)
    directory = generate_adapter(run, CONDITION, tmp_path / "adapter", profile="portable")
    config = json.loads((directory / "adapter_config.json").read_text())
    assert (config["r"], config["use_rslora"], config["bias"]) == (8, False, "none")
    assert config["lora_alpha"] / config["r"] == run.hypernetwork.scale  # exact, not approximately
    _, factors = generate_factors(run, CONDITION)
    tensors = load_file(directory / "adapter_model.safetensors")
    for slot in factors.slots:
        a, b = (tensors[f"base_model.model.{slot.path}.lora_{side}.weight"] for side in "AB")
        assert torch.equal(a[:5], factors.a[slot.path][0]) and torch.equal(b[:, :5], factors.b[slot.path][0])
        assert a.shape[0] == b.shape[1] == 8 and not a[5:].any() and not b[:, 5:].any()
    theirs = PeftModel.from_pretrained(dense_twin(run.base, "llama"), directory).eval()
    keep = probe["attention_mask"].bool()
    with torch.no_grad():
        ours = run.base.logits(**probe, factors=factors)[keep]
        assert (theirs(**probe).logits[keep] - ours).abs().max() < 1e-5 * ours.abs().max()


def test_a_rank_that_no_engine_pads_to_is_refused_by_the_portable_profile(make_run, tmp_path):
    run = make_run("gemma")
    slot = run.base.slots[0]
    factors = LoraFactors((slot,), {slot.path: torch.zeros(1, 130, 64)}, {slot.path: torch.zeros(1, 96, 130)}, 1.0)
    run.config = run.config.model_copy(update={"lora": LoraConfig(rank=130, alpha=130.0)})
    with pytest.raises(ValueError, match=r"rank 130 is larger than 128(.|\n)*--profile plain"):
        write(run, factors, tmp_path / "adapter", profile="portable")
    assert entries(tmp_path) == []


def test_the_tensor_file_says_by_itself_where_it_comes_from(make_run, tmp_path):
    run = make_run("gemma")
    directory = generate_adapter(run, CONDITION, tmp_path / "adapter")
    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        header = file.metadata()
    facts = json.loads((directory / "hl_provenance.json").read_text())
    for name in ("condition", "hypernetwork_fingerprint", "base_fingerprint", "data_fingerprint", "base_model"):
        assert header[name] == facts[name]
    assert (header["format"], header["condition"], header["data_fingerprint"]) == ("pt", "Nigerian English", "d" * 64)
    assert float(header["scale"]) == facts["scale"] == run.hypernetwork.scale


def test_the_same_adapter_is_the_same_bytes(make_run, tmp_path):
    first, second = (generate_adapter(make_run("gemma"), CONDITION, tmp_path / name) for name in "ab")
    name = "adapter_model.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_hypernetworks_fingerprint_follows_its_weights():
    torch.manual_seed(0)
    one = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    same = copy.deepcopy(one)
    other = copy.deepcopy(one)
    other[1].weight.data[0, 0] += 1e-6
    assert weights_fingerprint(one) == weights_fingerprint(same) != weights_fingerprint(other)
    renamed = torch.nn.Sequential(OrderedDict(a=one[0], b=one[1]))
    assert weights_fingerprint(renamed) != weights_fingerprint(one)
    assert weights_fingerprint(copy.deepcopy(one).bfloat16()) != weights_fingerprint(one)


def test_peft_reproduces_the_hidden_states_of_an_encoder(make_run, dense_twin, probe, tmp_path):
    run = make_run("roberta", LoraConfig(rank=4, alpha=4.0, target_modules=("query", "value")))
    directory = generate_adapter(run, CONDITION, tmp_path / "adapter")
    assert json.loads((directory / "adapter_config.json").read_text())["task_type"] == "FEATURE_EXTRACTION"
    theirs = PeftModel.from_pretrained(dense_twin(run.base, "roberta"), directory).eval()
    keep = probe["attention_mask"].bool()
    with torch.no_grad():
        ours = run.base.hidden_states(**probe, factors=generate_factors(run, CONDITION)[1])[keep]
        found = theirs(**probe).last_hidden_state[keep]
    assert (found - ours).abs().max() < 1e-5 * ours.abs().max()


def test_slots_in_some_layers_only_are_named_by_full_path_and_peft_touches_no_other(
    make_run, dense_twin, probe, tmp_path
):
    run = make_run("gemma")
    _, factors = generate_factors(run, CONDITION)
    chosen = tuple(slot for slot in factors.slots if slot.layer == 1 and slot.module != "k_proj")
    part = LoraFactors(
        chosen, {s.path: factors.a[s.path] for s in chosen}, {s.path: factors.b[s.path] for s in chosen}, factors.scale
    )
    directory = write(run, part, tmp_path / "adapter", module_paths=[n for n, _ in run.base.model.named_modules()])
    assert json.loads((directory / "adapter_config.json").read_text())["target_modules"] == [s.path for s in chosen]
    theirs = PeftModel.from_pretrained(dense_twin(run.base, "gemma"), directory).eval()
    adapted = {name.split(".lora_A")[0] for name, _ in theirs.named_parameters() if ".lora_A." in name}
    assert adapted == {f"base_model.model.{slot.path}" for slot in chosen}
    keep = probe["attention_mask"].bool()
    with torch.no_grad():
        difference = theirs(**probe).logits[keep] - run.base.logits(**probe, factors=part)[keep]
    assert difference.abs().max() < 1e-5


def test_suffixes_are_used_only_where_they_select_exactly_the_slots(make_run):
    slots = make_run("gemma").base.slots
    paths = [slot.path for slot in slots]
    assert target_modules(slots, [*paths, "model.layers.0.mlp.up_proj"]) == ["k_proj", "q_proj", "v_proj"]
    assert target_modules(slots, [*paths, "vision.layers.0.q_proj"]) == paths
    assert target_modules(slots, None) == paths


def test_the_directory_holds_what_peft_and_vllm_read(make_run, tmp_path):
    run = make_run("gemma")
    directory = generate_adapter(run, CONDITION, tmp_path / "a" / "b")
    assert entries(directory) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "hl_provenance.json"]
    tensors = load_file(directory / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.self_attn.k_proj"
    assert tensors[f"{key}.lora_A.weight"].shape == (4, 64)
    assert tensors[f"{key}.lora_B.weight"].shape == (24, 4)
    assert len(tensors) == 2 * len(run.base.slots)
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 6, False)
    assert config["modules_to_save"] is None
    provenance = json.loads((directory / "hl_provenance.json").read_text())
    assert provenance["condition"] == "Nigerian English"
    assert provenance["base_fingerprint"] == "f" * 64
    assert "library_name: peft" in (directory / "README.md").read_text()


def test_an_existing_directory_is_kept_unless_replacement_is_asked_for(make_run, tmp_path):
    run = make_run("gemma")
    first = generate_adapter(run, "standard", tmp_path / "adapter")
    before = (first / "adapter_model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        generate_adapter(run, CONDITION, tmp_path / "adapter")
    assert (first / "adapter_model.safetensors").read_bytes() == before
    generate_adapter(run, CONDITION, tmp_path / "adapter", force=True)
    assert (first / "adapter_model.safetensors").read_bytes() != before
    assert entries(tmp_path) == ["adapter"]


def test_a_directory_of_someone_else_is_never_replaced(make_run, tmp_path):
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter1.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not written by hl_scale"):
        generate_adapter(make_run("gemma"), CONDITION, mine, force=True)
    assert (mine / "chapter1.tex").read_text() == "years of work"


@pytest.mark.parametrize("replace", [False, True])
def test_a_failure_half_way_leaves_no_trace_and_keeps_what_was_there(make_run, tmp_path, monkeypatch, replace):
    run = make_run("gemma")
    if replace:
        generate_adapter(run, "standard", tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} if replace else {}

    def full_disk(path, tree):
        path.write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hl_scale.serving.export.write_json", full_disk)
    with pytest.raises(OSError, match="No space left"):
        generate_adapter(run, CONDITION, tmp_path / "adapter", force=replace)
    assert entries(tmp_path) == (["adapter"] if replace else [])
    if replace:
        assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before


def test_factors_with_nan_are_refused_and_nothing_is_written(make_run, tmp_path):
    run = make_run("gemma")
    _, factors = generate_factors(run, CONDITION)
    factors.b[factors.slots[3].path][0, 2, 1] = float("nan")
    with pytest.raises(ExportError, match=rf"1 of {len(factors.slots)} slots, first {factors.slots[3].path}"):
        write(run, factors, tmp_path / "adapter")
    assert entries(tmp_path) == []


def test_factors_that_disagree_with_the_configuration_are_refused(make_run, tmp_path):
    run = make_run("gemma")
    _, factors = generate_factors(run, CONDITION)
    several = run.hypernetwork(torch.zeros(2, 235))
    with pytest.raises(ExportError, match="2 conditions"):
        write(run, several, tmp_path / "adapter")
    other_scale = LoraFactors(factors.slots, factors.a, factors.b, 2 * factors.scale)
    with pytest.raises(ExportError, match="scale"):
        write(run, other_scale, tmp_path / "adapter")
    assert entries(tmp_path) == []


def test_an_unknown_dialect_is_refused_with_the_closest_names_before_anything_is_written(make_run, tmp_path):
    with pytest.raises(ValueError, match="Nigerian English"):
        generate_adapter(make_run("gemma"), "dialect:Nigerian Englsh", tmp_path / "adapter")
    assert entries(tmp_path) == []


def test_a_server_under_another_account_can_read_what_was_written(tmp_path):
    with staged_directory(tmp_path / "adapter") as staging:
        descriptor = os.open(staging / "weights", os.O_CREAT | os.O_WRONLY, 0o600)
        os.close(descriptor)
    assert (tmp_path / "adapter").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "adapter" / "weights").stat().st_mode & 0o777 == 0o644
