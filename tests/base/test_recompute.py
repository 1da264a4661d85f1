"""Layers computed together, recomputed blocks and tiled MLPs: the same function, less memory, named gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hl_scale.base import AdaptedModel
from hl_scale.base.quantized_linear import QuantizedLinear, SharedInput, apply_together
from hl_scale.base.recompute import RecomputedBlock
from hl_scale.kernels import Segments
from hl_scale.lora import LoraFactors

Load = Callable[..., AdaptedModel]
Saved = Callable[[str], Any]
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def factors(base: AdaptedModel, conditions: int) -> LoraFactors:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: (0.05 * torch.randn(*shape, generator=generator)).requires_grad_()  # noqa: E731
    return LoraFactors(
        base.slots,
        {slot.path: draw(conditions, 2, slot.in_features) for slot in base.slots},
        {slot.path: draw(conditions, slot.out_features, 2) for slot in base.slots},
        0.5,
    )


def batch() -> tuple[Tensor, Tensor]:
    """Three texts of 9, 1 and 4 tokens."""
    mask = torch.arange(9)[None] < torch.tensor([9, 1, 4])[:, None]
    return torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(2)) * mask, mask.long()


def results(base: AdaptedModel, packed: bool = False, conditions: int = 3) -> list[Tensor]:
    """States of the real tokens and the gradients of all factors."""
    generated, (ids, mask) = factors(base, conditions), batch()
    if packed:
        bounds = (0, *mask.sum(1).cumsum(0).tolist())
        states = base.packed_hidden_states(ids[mask.bool()], Segments(bounds), generated)
    else:
        states = base.hidden_states(ids, mask, generated)[mask.bool()]
    states.sin().sum().backward()
    gradients = [factor.grad for factor in (*generated.a.values(), *generated.b.values())]
    assert all(gradient is not None for gradient in gradients)
    return [states.detach(), *(gradient for gradient in gradients if gradient is not None)]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gemma", "llama"])
@pytest.mark.parametrize("conditions", [1, 3])
def test_packed_texts_have_the_states_and_gradients_of_padded_ones(
    saved: Saved, load: Load, kind: str, conditions: int
) -> None:
    base = load(saved(kind), kind, target_modules=ALL)
    assert_close(results(base, packed=True, conditions=conditions), results(base, conditions=conditions))


def test_packed_texts_need_a_causal_model(saved: Saved, load: Load) -> None:
    with pytest.raises(ValueError, match=r"fix: set training\.packed = false"):
        load(saved("roberta"), "roberta").packed_hidden_states(torch.tensor([1, 2]), Segments((0, 2)))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tile", [1, 4, 9, 100])
@pytest.mark.parametrize("recompute", [False, True])
def test_tiled_mlps_change_no_state_and_sum_the_gradients_of_their_tiles(
    saved: Saved, load: Load, packed: bool, tile: int, recompute: bool
) -> None:
    plain = load(saved("gemma"), "gemma", target_modules=ALL)
    tiled = load(saved("gemma"), "gemma", target_modules=ALL, mlp_tile_tokens=tile, gradient_checkpointing=recompute)
    assert_close(results(tiled, packed), results(plain, packed))


def test_a_tile_is_all_an_mlp_sees_at_a_time(saved: Saved, load: Load) -> None:
    base, seen = load(saved("llama"), mlp_tile_tokens=4, target_modules=ALL), []
    path = next(path for path in base.linears if path.endswith("down_proj"))
    base.linears[path].register_forward_hook(lambda _, args, y: seen.append(args[0].shape[1]))
    results(base)
    assert seen == [4, 4, 1, 4, 4, 1]  # forward, and again in backward


def test_tiles_are_refused_where_no_mlp_is_found(saved: Saved, load: Load) -> None:
    with pytest.raises(ValueError, match="has no MLP with up_proj and down_proj"):
        load(saved("roberta"), "roberta", mlp_tile_tokens=4)


def test_offloaded_blocks_keep_a_copy_and_give_identical_gradients(
    saved: Saved, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load(saved("llama"), gradient_checkpointing=True)
    expected, copies, copy = results(base), [], Tensor.copy_
    offloaded = load(saved("llama"), gradient_checkpointing=True, offload_activations=True)
    monkeypatch.setattr(Tensor, "copy_", lambda self, *a, **k: copies.append(self.shape) or copy(self, *a, **k))
    for one, other in zip(results(offloaded), expected, strict=True):
        assert torch.equal(one, other)
    assert copies.count((3, 9, offloaded.hidden_size)) >= 2  # one for each block


def test_a_recomputed_block_keeps_its_input_and_its_factors_alone(saved: Saved, load: Load) -> None:
    def kept(recompute: bool) -> int:
        base, sizes = load(saved("llama"), gradient_checkpointing=recompute, target_modules=ALL), {}
        generated, (ids, mask) = factors(base, 3), batch()
        own = {f.data_ptr() for f in (*generated.a.values(), *generated.b.values())}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.update({t.data_ptr(): t.numel() * (t.data_ptr() not in own)}) or t, lambda t: t
        ):
            base.hidden_states(ids, mask, generated)
        return sum(sizes.values())

    assert kept(True) < 0.25 * kept(False)


def test_recomputation_walks_the_graph_behind_the_factors_once(saved: Saved, load: Load) -> None:
    for options in ({}, {"gradient_checkpointing": True}, {"mlp_tile_tokens": 2, "gradient_checkpointing": True}):
        base = load(saved("llama"), target_modules=ALL, **options)
        generated, calls = factors(base, 3), []
        doubled = {path: a * 2 for path, a in generated.a.items()}
        for a in doubled.values():
            a.register_hook(lambda _, calls=calls: calls.append(1))
        base.hidden_states(*batch(), LoraFactors(base.slots, doubled, generated.b, 0.5)).sum().backward()
        assert len(calls) == len(base.slots)


def test_layers_that_read_the_same_input_are_computed_together(
    saved: Saved, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hl_scale.base import quantized_linear

    base, groups = load(saved("gemma"), "gemma"), []
    monkeypatch.setattr(
        quantized_linear, "apply_together", lambda layers, x: groups.append(len(layers)) or apply_together(layers, x)
    )
    base.hidden_states(*batch())
    assert groups == [3, 1, 2, 1] * len({slot.layer for slot in base.slots})


def two_layers() -> tuple[QuantizedLinear, QuantizedLinear]:
    generator = torch.Generator().manual_seed(0)
    one, other = (QuantizedLinear.from_dense(torch.randn(6, 64, generator=generator), None) for _ in range(2))
    return one, other


def test_a_layer_called_with_another_input_computes_alone() -> None:
    one, other = two_layers()
    x, y = torch.randn(3, 64), torch.randn(3, 64)
    expected = other(y), one(x)
    SharedInput([one, other])
    for _ in range(2):
        assert torch.equal(one(x), expected[1])
        assert torch.equal(other(y), expected[0])


def test_a_recomputed_block_whose_layers_read_different_inputs_has_the_gradients_of_a_plain_one() -> None:
    class Cross(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = two_layers()
            SharedInput([self.q, self.k])

        def forward(self, hidden: Tensor, other: Tensor) -> Tensor:
            return self.q(hidden).sin() * self.k(other).cos()

    gradients = []
    for recompute in (False, True):
        block = Cross()
        if recompute:
            RecomputedBlock(block, "block", {}, offload=False)
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        block(x, 2 * x).sum().backward()
        gradients.append(x.grad)
    assert gradients[0] is not None and torch.equal(*gradients)


def test_a_layer_used_in_inference_mode_can_be_trained_on_afterwards() -> None:
    layer = QuantizedLinear.from_dense(torch.randn(70, 6400), None)  # larger than any other here: a new workspace
    with torch.inference_mode():
        layer(torch.randn(2, 6400))
    layer(torch.randn(2, 6400, requires_grad=True)).sum().backward()


def test_models_that_do_not_keep_packed_texts_apart_are_refused(
    saved: Saved, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load(saved("llama"))
    base.check_packing()
    forward = base.model.model.forward
    monkeypatch.setattr(base.model.model, "forward", lambda **inputs: forward(**{**inputs, "position_ids": None}))
    with pytest.raises(ValueError, match=r"end to end apart\n  fix: set training\.packed = false"):
        base.check_packing()


def test_outputs_wait_for_one_call_each() -> None:
    one, other = two_layers()
    x = torch.randn(3, 64)
    expected = other(x)
    shared = SharedInput([one, other])
    for _ in range(2):
        one(x)
        assert torch.equal(other(x), expected)
    assert shared._input is None and other.shared is shared


def test_an_input_of_another_width_is_refused_by_name_of_both() -> None:
    with pytest.raises(ValueError, match="has 63 features, the layer takes 64"):
        two_layers()[0](torch.randn(2, 63))


@pytest.mark.parametrize("entry", ["packed", "constants.absmax"])
def test_weights_whose_checksum_is_off_are_refused(entry: str) -> None:
    layer = two_layers()[0]
    state = {name: value.clone() for name, value in torch.nn.Sequential(layer).state_dict().items()}
    state[f"0.{entry}"][3] += 1
    with pytest.raises(RuntimeError, match="0: packed bytes or constants do not match their checksum"):
        torch.nn.Sequential(two_layers()[1]).load_state_dict(state)


def test_a_frozen_byte_that_changed_is_found_and_its_layer_named(saved: Saved, load: Load) -> None:
    base = load(saved("llama"))
    before = base.checksums()
    results(base)
    base.verify(before)
    path = list(base.linears)[3]
    base.linears[path].packed.data[5] ^= 1
    with pytest.raises(ValueError, match=f"1 layers have changed since they were loaded: {path}"):
        base.verify(before)
