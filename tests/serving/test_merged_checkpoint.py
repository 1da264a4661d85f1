"""Merged checkpoints: transformers' loader reproduces the run, in the promised precision, or nothing is written."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from hl_scale.base import load_base
from hl_scale.config import LoraConfig
from hl_scale.serving import ExportError, OutputError, merge_adapter
from hl_scale.serving.export import generate_factors
from hl_scale.serving.original import difference_table
from hl_scale.serving.shards import TensorSource, plan_shards, write_sharded

CONDITION = "dialect:Nigerian English"


def entries(directory):
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


@pytest.mark.parametrize("architecture", ["gemma", "llama"])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float16", 5e-3), ("bfloat16", 4e-2)])
def test_transformers_reproduces_our_logits_from_the_merged_checkpoint(
    make_run, probe, tmp_path, architecture, dtype, bound
):
    run = make_run(architecture)
    merged = merge_adapter(run, CONDITION, tmp_path / "merged", dtype=dtype, progress=False)
    model = AutoModelForCausalLM.from_pretrained(merged.directory, dtype=torch.float32).eval()
    _, factors = generate_factors(run, CONDITION)
    keep = probe["attention_mask"].bool()
    with torch.no_grad():
        ours, bare = run.base.logits(**probe, factors=factors)[keep], run.base.logits(**probe)[keep]
        found = model(**probe).logits[keep]
    assert (found - ours).abs().max() < bound * ours.abs().max() < (bare - ours).abs().max()
    assert merged.check.max_difference < bound * merged.check.adapter_effect * 10
    assert AutoModelForCausalLM.from_pretrained(merged.directory).dtype == getattr(torch, dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_merged_weight_is_the_float64_sum_rounded_once(make_run, tmp_path, dtype):
    run = make_run("gemma")
    merged = merge_adapter(run, CONDITION, tmp_path / "merged", dtype=dtype, progress=False)
    stored = load_file(merged.directory / "model.safetensors")
    _, factors = generate_factors(run, CONDITION)
    unit = torch.finfo(getattr(torch, dtype)).eps
    for path, linear in run.base.linears.items():
        exact = linear.dense_weight(torch.float32).double()
        if path in factors.a:
            exact = exact + factors.scale * factors.b[path][0].double() @ factors.a[path][0].double()
        found = stored[f"{path}.weight"].double()
        # Half a unit in the last place of the result, and the float32 sum's own error on top.
        assert ((found - exact).abs() <= 0.5 * unit * exact.abs() + 1e-6).all(), path


def test_an_encoder_is_merged_and_compared_by_its_hidden_states(make_run, probe, tmp_path):
    run = make_run("roberta", LoraConfig(rank=4, alpha=4.0, target_modules=("query", "value")))
    merged = merge_adapter(run, CONDITION, tmp_path / "merged", dtype="float32", progress=False)
    assert (merged.check.output, merged.check.top1_agreement) == ("hidden states", None)
    model = AutoModel.from_pretrained(merged.directory, add_pooling_layer=False).eval()
    keep = probe["attention_mask"].bool()
    with torch.no_grad():
        ours = run.base.hidden_states(**probe, factors=generate_factors(run, CONDITION)[1])[keep]
        assert (model(**probe).last_hidden_state[keep] - ours).abs().max() < 1e-5 * ours.abs().max()


@pytest.fixture
def original_run(make_run, build_model, tmp_path):
    """A run whose base was loaded from a checkpoint on disk, as `make_run` has it otherwise."""

    def make(architecture):
        run = make_run(architecture)
        torch.manual_seed(5)
        model = build_model(architecture)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(std=0.5 if name.endswith("norm.weight") else 0.08)
        model.save_pretrained(tmp_path / "original")
        run.base.tokenizer.save_pretrained(tmp_path / "original")
        base_config = run.config.base.model_copy(update={"model": str(tmp_path / "original")})
        run.config = run.config.model_copy(update={"base": base_config})
        run.base = load_base(base_config, run.config.lora)
        return run, model.eval()

    return make


@pytest.mark.parametrize("architecture", ["gemma", "llama"])
def test_merged_into_the_original_base_it_is_the_original_and_the_update(original_run, probe, tmp_path, architecture):
    run, model = original_run(architecture)
    merged = merge_adapter(run, CONDITION, tmp_path / "merged", dtype="float32", merge_base="original", progress=False)
    stored = load_file(merged.directory / "model.safetensors")
    _, factors = generate_factors(run, CONDITION)
    for name, weight in model.state_dict().items():
        path = name.removesuffix(".weight")
        expected = weight.double()
        if path in factors.a:
            expected = expected + factors.scale * factors.b[path][0].double() @ factors.a[path][0].double()
        if name in stored:  # of tied weights there is one
            torch.testing.assert_close(stored[name].double(), expected, rtol=1e-6, atol=1e-6)
    assert merged.check.relative_difference < 1e-5
    assert merged.check.difference_from_run > 0.01
    facts = json.loads((merged.directory / "hl_provenance.json").read_text())
    assert facts["merge_base"] == "original" and len(facts["differences"]) == len(run.base.slots)
    assert "the original base" in (merged.directory / "README.md").read_text()


def test_what_quantisation_changed_is_measured_beside_the_update_of_every_layer(original_run, tmp_path, caplog):
    run, model = original_run("llama")
    _, factors = generate_factors(run, CONDITION)
    for factor in run.hypernetwork.b.values():
        factor.mul_(1e-3)
    merged = merge_adapter(run, CONDITION, tmp_path / "merged", merge_base="original", progress=False)
    assert [difference.path for difference in merged.differences] == [slot.path for slot in factors.slots]
    for difference in merged.differences:
        held = run.base.linears[difference.path].dense_weight(torch.float32).double()
        original = model.get_submodule(difference.path).weight.double()
        a, b = factors.a[difference.path][0].double(), 1e-3 * factors.b[difference.path][0].double()
        assert difference.quantization == pytest.approx((original - held).norm().item(), rel=1e-6)
        assert difference.update == pytest.approx((factors.scale * b @ a).norm().item(), rel=1e-5)
    assert all(difference.ratio > 10 for difference in merged.differences)
    assert "in 6 of 6 layers quantisation changed the weights more than 10 times" in caplog.text
    table = difference_table(merged.differences)
    assert [column.header for column in table.columns] == ["layer", "q_proj", "k_proj", "v_proj"]
    assert table.row_count == 2


def test_the_dequantised_base_needs_no_original_and_measures_nothing(make_run, tmp_path):
    assert merge_adapter(make_run("gemma"), CONDITION, tmp_path / "merged", progress=False).differences == ()


def test_an_adapter_that_is_smaller_than_the_rounding_is_warned_of(make_run, tmp_path, caplog):
    run = make_run("gemma")
    merge_adapter(run, CONDITION, tmp_path / "large", progress=False)
    assert "rounding" not in caplog.text
    for factor in run.hypernetwork.b.values():
        factor.mul_(1e-4)
    merge_adapter(run, CONDITION, tmp_path / "small", progress=False)
    assert "rounding to bfloat16 changes logits" in caplog.text


@pytest.mark.gpu
def test_a_run_on_a_gpu_is_merged_into_the_original_base(original_run, tmp_path):
    run, _ = original_run("gemma")
    run.base = load_base(run.config.base, run.config.lora, "cuda")
    run.hypernetwork.to("cuda")
    for side in (run.hypernetwork.a, run.hypernetwork.b):
        side.update({path: factor.cuda() for path, factor in side.items()})
    merged = merge_adapter(run, CONDITION, tmp_path / "merged", dtype="float32", merge_base="original", progress=False)
    assert merged.check.relative_difference < 1e-4


def test_an_original_that_is_not_there_any_more_is_refused(make_run, tmp_path):
    run = make_run("gemma")
    base_config = run.config.base.model_copy(update={"model": str(tmp_path / "gone")})
    run.config = run.config.model_copy(update={"base": base_config})
    with pytest.raises(ValueError, match="not a directory"):
        merge_adapter(run, CONDITION, tmp_path / "merged", merge_base="original", progress=False)
    assert entries(tmp_path) == []


def test_at_most_one_produced_tensor_is_alive_while_shards_are_written(tmp_path):
    alive, most = [], 0

    def produce():
        nonlocal most
        tensor = torch.randn(64, 64)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in alive))
        return tensor

    sources = [TensorSource(str(number), (64, 64), torch.float32, produce) for number in range(12)]
    assert len(write_sharded(tmp_path, sources, 5 * 64 * 64 * 4)) == 3
    assert most == 1


def test_tied_embeddings_stay_tied_and_untied_heads_stay_untied(make_run, tmp_path):
    tied = merge_adapter(make_run("gemma"), CONDITION, tmp_path / "tied", progress=False)
    untied = merge_adapter(make_run("llama"), CONDITION, tmp_path / "untied", progress=False)
    assert "lm_head.weight" not in load_file(tied.directory / "model.safetensors")
    assert "lm_head.weight" in load_file(untied.directory / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tied.directory)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_the_checkpoint_is_complete_and_says_nothing_of_quantisation(make_run, tmp_path):
    run = make_run("gemma")
    run.base.model.config.quantization_config = {"load_in_4bit": True}
    merged = merge_adapter(run, CONDITION, tmp_path / "merged", progress=False)
    names = entries(merged.directory)
    assert {"README.md", "config.json", "generation_config.json", "hl_provenance.json", "tokenizer.json"} <= set(names)
    config = json.loads((merged.directory / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["dtype"], config["architectures"]) == ("bfloat16", ["Gemma3ForCausalLM"])
    facts = json.loads((merged.directory / "hl_provenance.json").read_text())
    assert facts["check"]["max_difference"] == merged.check.max_difference > 0
    text = "the film she not"
    assert AutoTokenizer.from_pretrained(merged.directory)(text)["input_ids"] == run.base.tokenizer(text)["input_ids"]


def test_small_shards_hold_every_tensor_once_within_their_bound(make_run, tmp_path):
    run = make_run("llama")
    whole = merge_adapter(run, CONDITION, tmp_path / "whole", progress=False)
    cut = merge_adapter(run, CONDITION, tmp_path / "cut", max_shard_bytes=20_000, progress=False)
    assert whole.files == ("model.safetensors",)
    assert len(cut.files) > 3
    index = json.loads((cut.directory / "model.safetensors.index.json").read_text())
    expected, found = load_file(whole.directory / "model.safetensors"), {}
    for name in cut.files:
        shard = load_file(cut.directory / name)
        assert sum(t.nbytes for t in shard.values()) <= 20_000 or len(shard) == 1
        assert all(index["weight_map"][key] == name for key in shard)
        found.update(shard)
    assert found.keys() == expected.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())


def test_the_streaming_writer_is_read_back_exactly_by_the_safetensors_library(tmp_path):
    tensors = {
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float16),
        "odd": torch.arange(7, dtype=torch.uint8),
        "bf16": torch.randn(5, 3).bfloat16(),
        "strided": torch.randn(4, 6).T,
        "steps": torch.tensor([2**40, -1]),
        "mask": torch.tensor([True, False, True]),
    }
    sources = [TensorSource(n, tuple(t.shape), t.dtype, lambda t=t: t) for n, t in tensors.items()]
    assert write_sharded(tmp_path, sources, 10**6) == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == t.dtype for name, t in tensors.items())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own():
    sources = [TensorSource(str(n), (n,), torch.uint8, lambda: torch.empty(0)) for n in (3, 10, 4, 4, 1)]
    assert [[s.nbytes for s in shard] for shard in plan_shards(sources, 8)] == [[3], [10], [4, 4], [1]]


def test_a_source_that_breaks_its_promise_is_refused(tmp_path):
    source = TensorSource("weight", (2, 2), torch.float32, lambda: torch.zeros(2, 3))
    with pytest.raises(ValueError, match="announced"):
        write_sharded(tmp_path, [source], 100)


def test_a_merge_that_does_not_reproduce_the_run_is_not_written(make_run, tmp_path, monkeypatch):
    run = make_run("gemma")
    monkeypatch.setattr(
        "hl_scale.serving.merge._merged_weight",
        lambda path, linear, factors, scale, dtype, *others: lambda: linear.dense_weight(torch.float32).to(dtype),
    )
    with pytest.raises(ExportError, match="does not reproduce"):
        merge_adapter(run, CONDITION, tmp_path / "merged", progress=False)
    assert entries(tmp_path) == []


def test_a_weight_beyond_the_range_of_float16_is_refused_and_nothing_remains(make_run, tmp_path):
    run = make_run("gemma")
    inner = run.hypernetwork.b
    path = run.base.slots[0].path
    inner[path] = inner[path] * 1e6
    with pytest.raises(ExportError, match=rf"{path}.weight .*float16(.|\n)*bfloat16"):
        merge_adapter(run, CONDITION, tmp_path / "merged", dtype="float16", progress=False)
    assert entries(tmp_path) == []


def test_an_existing_directory_is_refused_before_any_work_is_done(make_run, tmp_path):
    run = make_run("gemma")
    (tmp_path / "merged").mkdir()
    run.hypernetwork = None
    with pytest.raises(OutputError, match="exists already"):
        merge_adapter(run, CONDITION, tmp_path / "merged", progress=False)
