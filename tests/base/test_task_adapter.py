"""A trained LoRA under generated ones: what PEFT writes is read for any layers, added exactly, or refused with why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import Tensor

from hl_scale.base import AdaptedModel, TaskAdapter, read_task_adapter
from hl_scale.config import BaseModelConfig
from hl_scale.data.peft_directory import AdapterError
from hl_scale.kernels import Segments
from hl_scale.lora import LoraFactors, SummedFactors, sum_factors

Load = Callable[..., AdaptedModel]
Saved = Callable[[str], Path]
TARGETS = {"gemma": ["k_proj", "v_proj", "down_proj"], "llama": ["v_proj", "up_proj"], "roberta": ["key", "value"]}


def train(model: Any, directory: Path, targets: list[str], **options: Any) -> Any:
    """A PEFT model with random factors of rank 3, and its directory."""
    config = PeftConfig(r=3, lora_alpha=5, target_modules=targets, **options)
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(directory)
    return adapted.eval()


@pytest.fixture
def setting(saved: Saved, load: Load, tmp_path: Path) -> Callable[..., tuple[AdaptedModel, BaseModelConfig, Any]]:
    """setting(kind, **PEFT options) -> dense base, its section, and PEFT's model with an adapter in tmp_path/"task"."""

    def make(kind: str, **options: Any) -> tuple[AdaptedModel, BaseModelConfig, Any]:
        from transformers import AutoModel, AutoModelForCausalLM

        loader = AutoModel if kind == "roberta" else AutoModelForCausalLM
        model = loader.from_pretrained(saved(kind))
        theirs = train(model, tmp_path / "task", TARGETS[kind], **options)
        base = load(saved(kind), kind, quantization="none")
        config = BaseModelConfig(model=str(saved(kind)), quantization="none", compute_dtype="float32")
        return base, config, theirs

    return make


def batch() -> tuple[Tensor, Tensor]:
    """Three texts of 9, 1 and 4 tokens."""
    mask = torch.arange(9)[None] < torch.tensor([9, 1, 4])[:, None]
    return torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(2)) * mask, mask.long()


def generated(base: AdaptedModel, conditions: int) -> LoraFactors:
    """Leaves for the slots of the base."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: (0.05 * torch.randn(*shape, generator=generator)).requires_grad_()  # noqa: E731
    return LoraFactors(
        base.slots,
        {slot.path: draw(conditions, 2, slot.in_features) for slot in base.slots},
        {slot.path: draw(conditions, slot.out_features, 2) for slot in base.slots},
        0.5,
    )


@pytest.mark.parametrize("kind", ["gemma", "llama", "roberta"])
@pytest.mark.parametrize("stabilised", [False, True])
def test_an_adapter_that_peft_wrote_does_here_what_it_does_there(
    setting: Any, tmp_path: Path, kind: str, stabilised: bool
) -> None:
    base, config, theirs = setting(kind, use_rslora=stabilised)
    adapter = read_task_adapter(tmp_path / "task", base, config)
    assert {slot.module for slot in adapter.factors.slots} == set(TARGETS[kind])
    assert adapter.factors.scale == pytest.approx(5 / (3**0.5 if stabilised else 3))
    ids, mask = batch()
    model = theirs.base_model.model
    with torch.no_grad():
        bare, ours = (base.hidden_states(ids, mask, f)[mask.bool()] for f in (None, adapter.factors))
        backbone = model if kind == "roberta" else model.model
        found = backbone(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
    assert (ours - bare).abs().max() > 0.1
    torch.testing.assert_close(found, ours, rtol=1e-4, atol=1e-5)


def results(base: AdaptedModel, fixed: LoraFactors, source: Callable[..., Any], packed: bool) -> list[Tensor]:
    """States of real tokens, a condition per row and a fixed adapter for all, and gradients of generated factors."""
    leaves, (ids, mask) = generated(base, 3), batch()
    if packed:
        bounds = (0, *mask.sum(1).cumsum(0).tolist())
        states = base.packed_hidden_states(ids[mask.bool()], Segments(bounds), source(leaves, fixed))
    else:
        states = base.hidden_states(ids, mask, source(leaves, fixed))[mask.bool()]
    states.sin().sum().backward()
    return [states.detach(), *(factor.grad for factor in (*leaves.a.values(), *leaves.b.values()))]  # type: ignore[misc]


@pytest.fixture
def fixed(setting: Any, tmp_path: Path) -> LoraFactors:
    """Of an adapter for key, value and down projections of the tiny Gemma, under the scale of `generated`."""
    base, config, _ = setting("gemma")
    return read_task_adapter(tmp_path / "task", base, config).factors.rescaled(0.5)


def test_each_row_of_a_batch_has_its_own_adapter_and_the_fixed_one(
    saved: Saved, load: Load, fixed: LoraFactors
) -> None:
    base = load(saved("gemma"), "gemma")
    ids, mask = batch()
    with torch.no_grad():
        together = base.hidden_states(ids, mask, SummedFactors(generated(base, 3), fixed))
        for row in range(3):
            dense = load(saved("gemma"), "gemma")  # with both updates written into its weights
            own = generated(base, 3).select(row)
            for part in (own, fixed):
                for slot in part.slots:
                    layer = dense.linears[slot.path]
                    layer.weight_source = _with(layer, part, slot.path)  # type: ignore[method-assign]
            expected = dense.hidden_states(ids[row : row + 1], mask[row : row + 1])[0]
            keep = mask[row].bool()
            torch.testing.assert_close(together[row, keep], expected[keep], rtol=1e-4, atol=1e-5)


def _with(layer: Any, part: LoraFactors, path: str) -> Callable[..., Tensor]:
    """The layer's weight plus an update, as a weight source."""
    before = layer.weight_source
    delta = part.scale * part.b[path][0].double() @ part.a[path][0].double()
    return lambda dtype, update=None: (before(dtype).double() + delta).to(dtype)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"gradient_checkpointing": True}, {"gradient_checkpointing": True, "mlp_tile_tokens": 4}]
)
def test_factors_added_where_a_block_runs_give_the_states_and_gradients_of_those_added_before(
    saved: Saved, load: Load, fixed: LoraFactors, packed: bool, options: dict[str, Any]
) -> None:
    expected = results(load(saved("gemma"), "gemma"), fixed, sum_factors, packed)
    found = results(load(saved("gemma"), "gemma", **options), fixed, SummedFactors, packed)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}])
def test_a_fixed_adapter_alone_needs_no_slot_of_the_base(
    saved: Saved, load: Load, fixed: LoraFactors, options: dict[str, Any]
) -> None:
    ids, mask = batch()
    states = [
        load(saved("gemma"), "gemma", target_modules=targets, **options).hidden_states(ids, mask, fixed)
        for targets in (("o_proj",), ("k_proj", "v_proj", "down_proj"))
    ]
    assert torch.equal(*states)


def edit(directory: Path, **fields: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_the_fingerprint_follows_factors_and_scale_and_nothing_else(setting: Any, tmp_path: Path) -> None:
    base, config, _ = setting("llama")
    read = lambda: read_task_adapter(tmp_path / "task", base, config).fingerprint  # noqa: E731
    before = read()
    edit(tmp_path / "task", lora_dropout=0.5)
    assert read() == before
    edit(tmp_path / "task", lora_alpha=6)
    scaled = read()
    edit(tmp_path / "task", lora_alpha=5)
    setting("llama")  # written again, with the same numbers
    assert scaled != before == read()
    setting("llama", use_rslora=True)
    assert read() not in (before, scaled)


def test_an_adapter_of_another_base_is_refused_by_name_and_by_fingerprint(setting: Any, tmp_path: Path) -> None:
    base, config, _ = setting("llama")
    task = tmp_path / "task"
    edit(task, base_model_name_or_path="somebody/else")
    with pytest.raises(AdapterError, match="made for base somebody/else, not "):
        read_task_adapter(task, base, config)
    read_task_adapter(task, base, config, names=["somebody/else"])
    (task / "hl_provenance.json").write_text(json.dumps({"base_fingerprint": "e" * 64}))
    with pytest.raises(AdapterError, match=f"made for base eeeeeeeeeeee, not {base.fingerprint[:12]}"):
        read_task_adapter(task, base, config, names=["somebody/else"])
    (task / "hl_provenance.json").write_text(json.dumps({"base_fingerprint": base.fingerprint}))
    assert isinstance(read_task_adapter(task, base, config), TaskAdapter)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "trains biases"),
        ({"modules_to_save": ["lm_head"]}, "replaces whole modules"),
        ({"rank_pattern": {"v_proj": 4}}, "rank or alpha differs between layers"),
        ({"r": 4}, r"expected \(4, "),
        ({"peft_type": "LOHA"}, "PEFT type LOHA"),
    ],
)
def test_what_is_no_plain_lora_of_its_rank_is_refused(
    setting: Any, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    base, config, _ = setting("llama")
    edit(tmp_path / "task", **fields)
    with pytest.raises(AdapterError, match=f"{message}(.|\n)*fix:"):
        read_task_adapter(tmp_path / "task", base, config)


def test_layers_that_the_base_lacks_are_refused_with_those_it_has(
    setting: Any, saved: Saved, load: Load, tmp_path: Path
) -> None:
    _, config, _ = setting("llama")
    with pytest.raises(
        AdapterError, match=r"layers\.0\.\S+ is none of them, and 3 more(.|\n)*called dense, key, query"
    ):
        read_task_adapter(tmp_path / "task", load(saved("roberta"), "roberta"), config)


def test_layers_of_another_size_are_refused_with_both_sizes(
    setting: Any, saved: Saved, load: Load, tmp_path: Path
) -> None:
    _, config, _ = setting("llama")  # two key-value heads of 8 outputs; Gemma has one of 12
    with pytest.raises(AdapterError, match=r"v_proj is 32 -> 12 there and 32 -> 16 in the adapter"):
        read_task_adapter(tmp_path / "task", load(saved("gemma"), "gemma"), config)


def test_a_rank_beyond_a_layer_is_refused(saved: Saved, load: Load, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(saved("gemma")), PeftConfig(r=13, target_modules=["k_proj"])
    )
    model.save_pretrained(tmp_path / "task")
    config = BaseModelConfig(model=str(saved("gemma")))
    with pytest.raises(AdapterError, match=r"rank 13 exceeds \S+k_proj \(32 -> 12\)"):
        read_task_adapter(tmp_path / "task", load(saved("gemma"), "gemma"), config)
