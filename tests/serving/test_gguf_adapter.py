"""GGUF adapters: read back with llama.cpp's own package, and right for how llama.cpp rotates heads."""

from __future__ import annotations

import math

import gguf
import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hl_scale.config import LoraConfig
from hl_scale.serving import ExportError, OutputError
from hl_scale.serving.export import generate_factors
from hl_scale.serving.gguf_adapter import export_gguf, gguf_tensors, neighbouring_rows, write_gguf

CONDITION = "dialect:Nigerian English"


def read(path):
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}


@pytest.mark.parametrize("convention", ["alpha_over_rank", "alpha_over_sqrt_rank", "one"])
def test_the_file_holds_llama_cpps_keys_and_the_update_under_every_scale_convention(make_run, tmp_path, convention):
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    run = make_run("gemma", LoraConfig(rank=5, alpha=6.5, scale_convention=convention, target_modules=targets))
    fields, tensors = read(export_gguf(run, CONDITION, tmp_path / "a" / "adapter.gguf"))
    assert (fields["general.type"], fields["general.architecture"]) == ("adapter", "gemma3")
    assert fields["adapter.type"] == "lora"
    assert fields["hl_scale.condition"] == "Nigerian English" and fields["hl_scale.base_fingerprint"] == "f" * 64
    _, factors = generate_factors(run, CONDITION)
    names = {
        "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
        "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    }  # fmt: skip
    assert len(tensors) == 2 * len(factors.slots) == 28
    for slot in factors.slots:
        name = f"blk.{slot.layer}.{names[slot.module]}.weight"
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        assert a.shape == (5, slot.in_features) and b.shape == (slot.out_features, 5)
        found = fields["adapter.lora.alpha"] / b.shape[1] * b.double() @ a.double()
        expected = factors.scale * factors.b[slot.path][0].double() @ factors.a[slot.path][0].double()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def rotate_neighbours(states, cos, sin):
    """llama.cpp's rotation of Llama: entry 2i with 2i + 1 by angle i; `cos`, `sin` (tokens, size) hold angles twice."""
    half = states.shape[-1] // 2
    x, y, cos, sin = states[..., 0::2], states[..., 1::2], cos[..., :half], sin[..., :half]
    return torch.stack((x * cos - y * sin, x * sin + y * cos), -1).flatten(-2)


@pytest.mark.parametrize(("heads", "key_heads", "size"), [(4, 2, 16), (3, 1, 6), (2, 2, 2)])
def test_attention_scores_are_the_same_with_rows_in_llama_cpps_order(heads, key_heads, size):
    """The order is right if rotating neighbours gives the scores that transformers gets by rotating halves."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    query = torch.randn(heads * size, 12, generator=generator, dtype=torch.float64)
    key = torch.randn(key_heads * size, 12, generator=generator, dtype=torch.float64)
    angles = torch.outer(torch.arange(5.0), 10000.0 ** -(torch.arange(0, size, 2) / size)).double()
    cos, sin = torch.cat((angles, angles), 1).cos(), torch.cat((angles, angles), 1).sin()

    def states(weight, count):
        return (x @ weight.T).view(5, count, size).transpose(0, 1)

    def scores(q, k):
        return q @ k.repeat_interleave(heads // key_heads, 0).mT

    halves = apply_rotary_pos_emb(states(query, heads)[None], states(key, key_heads)[None], cos[None], sin[None])
    expected = scores(halves[0][0], halves[1][0])
    found = scores(
        rotate_neighbours(states(neighbouring_rows(query, heads), heads), cos, sin),
        rotate_neighbours(states(neighbouring_rows(key, key_heads), key_heads), cos, sin),
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if size > 2:
        unordered = scores(
            rotate_neighbours(states(query, heads), cos, sin), rotate_neighbours(states(key, key_heads), cos, sin)
        )
        assert (unordered - expected).abs().max() > 0.1


def test_only_q_and_k_of_llama_are_reordered_each_by_its_own_heads(make_run):
    run = make_run("llama")
    _, factors = generate_factors(run, CONDITION)
    tensors = gguf_tensors(factors, run.base.model.config)
    for slot in factors.slots:
        name = f"blk.{slot.layer}.attn_{slot.module[0]}.weight"
        b = factors.b[slot.path][0]
        heads = {"q_proj": 4, "k_proj": 2}.get(slot.module)
        expected = b if heads is None else neighbouring_rows(b, heads)
        assert torch.equal(tensors[f"{name}.lora_b"], expected)
        assert torch.equal(tensors[f"{name}.lora_b"], b) == (slot.module == "v_proj")
        assert torch.equal(tensors[f"{name}.lora_a"], factors.a[slot.path][0])


def test_an_architecture_without_known_rules_is_refused(make_run, tmp_path):
    run = make_run("roberta", LoraConfig(rank=4, alpha=4.0, target_modules=("query", "value")))
    with pytest.raises(ExportError, match=r"roberta models cannot be written as GGUF \(there are llama(.|\n)*--merged"):
        export_gguf(run, CONDITION, tmp_path / "adapter.gguf")
    assert list(tmp_path.iterdir()) == []


def test_nan_is_refused_and_an_existing_file_is_kept_unless_it_is_ours_and_replacement_is_asked_for(make_run, tmp_path):
    run = make_run("gemma")
    file = tmp_path / "adapter.gguf"
    file.write_bytes(b"GGUF of someone else")
    with pytest.raises(OutputError, match="exists already"):
        export_gguf(run, CONDITION, file)
    with pytest.raises(OutputError, match="not written by hl_scale"):
        export_gguf(run, CONDITION, file, force=True)
    assert file.read_bytes() == b"GGUF of someone else"
    file.unlink()
    first = export_gguf(run, "standard", file).read_bytes()
    assert export_gguf(run, CONDITION, file, force=True).read_bytes() != first
    second = file.read_bytes()
    run.hypernetwork.b[run.base.slots[0].path][0, 0] = math.nan
    with pytest.raises(ExportError, match="NaN"):
        export_gguf(run, CONDITION, file, force=True)
    assert file.read_bytes() == second and list(tmp_path.iterdir()) == [file]


def test_what_was_not_written_as_meant_is_not_kept(tmp_path, monkeypatch):
    tensors = {"blk.0.attn_q.weight.lora_a": torch.ones(2, 3)}
    whole = gguf.GGUFWriter.add_tensor
    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", lambda self, name, data: whole(self, name, data * 1.001))
    with pytest.raises(ExportError, match="does not hold what was written"):
        write_gguf(tmp_path / "adapter.gguf", tensors, "llama", 8.0, {})
    with pytest.raises(ExportError, match="alpha of 0"):
        write_gguf(tmp_path / "adapter.gguf", tensors, "llama", 0.0, {})
    assert list(tmp_path.iterdir()) == []
