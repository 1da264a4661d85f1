"""Random weights: the same everywhere, quantised as any other weight, and harmless through a whole model."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hl_scale.base import BaseModelError, FrozenLinear, QuantizedLinear, load_base
from hl_scale.base.loading import outline_base, resolve_model
from hl_scale.base.random_weights import SHAPES, byte_tokenizer, draw_quantized, draw_weight
from hl_scale.config import BaseModelConfig, LoraConfig
from hl_scale.kernels import quantize_nf4

TINY = "random:mistral-tiny"


def load(model: str = TINY, **options):
    options = {"compute_dtype": "float32", "architecture": "encoder", **options}
    return load_base(BaseModelConfig(model=model, **options), LoraConfig(rank=4))


def digest(model: str = TINY) -> str:
    total = hashlib.sha256()
    base = load(model)
    for name, parameter in sorted(base.model.named_parameters()):
        total.update(name.encode() + parameter.detach().contiguous().numpy().tobytes())
    return f"{total.hexdigest()} {base.fingerprint}"


def test_another_process_draws_the_same_weights_and_fingerprint():
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r}); import test_random_weights; print(test_random_weights.digest())"
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert run.stdout.strip() == digest(), run.stderr[-2000:]


# The second has more weights than are drawn at a time; the third ends within a block of block constants.
@pytest.mark.parametrize("shape", [(2, 32), (300, 448), (33, 192), (5, 30)])
@pytest.mark.parametrize("double_quantization", [True, False])
def test_quantising_as_they_are_drawn_gives_the_bytes_of_quantising_the_drawn_weight(shape, double_quantization):
    packed, constants = draw_quantized("layers.0.mlp.up_proj.weight", shape, 3, double_quantization)
    weight = draw_weight("layers.0.mlp.up_proj.weight", shape, 3)
    expected, expected_constants = quantize_nf4(weight, double_quantization)
    assert packed.equal(expected)
    assert constants.shape == expected_constants.shape
    assert constants.absmax.equal(expected_constants.absmax)
    if double_quantization:
        assert constants.nested_absmax.equal(expected_constants.nested_absmax)
        assert constants.offset.equal(expected_constants.offset)


def test_seeds_and_names_give_independent_weights():
    weights = [draw_weight(name, (64, 64), seed).flatten() for name, seed in (("a", 0), ("b", 0), ("a", 1))]
    correlations = torch.corrcoef(torch.stack(weights)).fill_diagonal_(0)
    assert correlations.abs().max() < 0.06  # 4 standard deviations of 1 / 64
    assert draw_weight("a", (64, 64), 0).equal(weights[0].view(64, 64))


def test_weights_are_uniform_without_bias():
    weight = draw_weight("a", (512, 512), 0)
    largest = weight.abs().max()
    assert abs(float(weight.mean())) < 4 * float(largest) / 3**0.5 / 512
    assert float(weight.std() / largest) == pytest.approx(3**-0.5, rel=0.01)
    assert 0.7 < float(weight.std()) * 512**0.5 < 1.42  # a power of two next to 1


def test_the_seed_is_part_of_the_name_and_of_the_fingerprint():
    assert digest() == digest(f"{TINY}:0")
    assert digest(f"{TINY}:1").split()[0] != digest().split()[0]
    assert digest(f"{TINY}:1").split()[1] != digest().split()[1]


def test_the_head_changes_no_other_weight():
    ids = torch.tensor([[1, 9, 40, 33]])
    with_head, without = load(architecture="causal_lm"), load()
    mask = torch.ones_like(ids)
    assert with_head.has_head and not without.has_head
    assert with_head.hidden_states(ids, mask).equal(without.hidden_states(ids, mask))
    assert isinstance(with_head.model.get_output_embeddings(), torch.nn.Linear)


def test_dense_weights_are_close_to_the_quantised_ones():
    dense, quantized = load(quantization="none"), load()
    for path, layer in quantized.linears.items():
        assert isinstance(layer, QuantizedLinear) and isinstance(dense.linears[path], FrozenLinear)
        exact, rounded = dense.linears[path].dense_weight(torch.float32), layer.dense_weight(torch.float32)
        assert float((exact - rounded).norm() / exact.norm()) < 0.11


def test_deep_models_keep_finite_states_of_size_one(monkeypatch):
    monkeypatch.setitem(SHAPES, "mistral-tiny", SHAPES["mistral-tiny"] | {"num_hidden_layers": 32})
    base = load()
    ids = torch.arange(3, 35)[None]
    blocks: list[float] = []
    for block in base.model.layers:
        block.register_forward_hook(lambda module, inputs, output: blocks.append(float(output.abs().max())))
    with torch.no_grad():
        states = base.hidden_states(ids, torch.ones_like(ids))
    assert len(blocks) == 32 and max(blocks) < 1e4
    assert float(states.std()) == pytest.approx(1, abs=0.1)


def test_texts_become_their_bytes():
    tokenizer = byte_tokenizer()
    texts = ["Ã la carte, naïve.", "ab"]
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    lengths = [1 + len(text.encode()) for text in texts]
    assert encoded["attention_mask"].sum(1).tolist() == lengths
    assert encoded["input_ids"].max() < SHAPES["mistral-tiny"]["vocab_size"]
    for text, row in zip(texts, encoded["input_ids"], strict=True):
        assert tokenizer.decode(row, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("random:mistral-8b", "did you mean random:mistral-7b?"),
        ("random:", "random:mistral-7b, random:llama-70b, random:mistral-tiny"),
        ("random:gpt", "random:mistral-7b, random:llama-70b, random:mistral-tiny"),
        ("random:mistral-tiny:one", "no whole number"),
    ],
)
def test_unknown_names_are_answered_with_the_known_ones(model, expected):
    with pytest.raises(BaseModelError, match="fix:") as caught:
        load(model)
    assert expected in str(caught.value)


def test_there_are_no_files_to_export():
    with pytest.raises(BaseModelError, match="has random weights and no files"):
        resolve_model(BaseModelConfig(model=TINY))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("double_quantization", [True, False])
def test_an_outline_has_the_sizes_of_the_model_and_no_data(quantization, double_quantization):
    options = {"quantization": quantization, "double_quantization": double_quantization, "compute_dtype": "bfloat16"}
    real = load(**options)
    outline = outline_base(BaseModelConfig(model=TINY, architecture="encoder", **options), LoraConfig(rank=4))
    describe = {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in real.named_parameters()}
    assert {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in outline.named_parameters()} == describe
    assert {p.device.type for p in (*outline.parameters(), *outline.buffers())} == {"meta"}
    assert outline.slots == real.slots
    for path, layer in real.linears.items():
        if isinstance(layer, QuantizedLinear):
            assert outline.linears[path].constants.num_bytes == layer.constants.num_bytes
