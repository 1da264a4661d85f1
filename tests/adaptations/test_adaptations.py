"""What every kind of adaptation promises on decoders and encoders with padded batches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError
from transformers import DistilBertConfig, DistilBertModel, DynamicCache

from hl_scale.adaptations import KINDS, Adaptation, AdaptationError, build_adaptation
from hl_scale.base import AdaptedModel, adapt_model
from hl_scale.config import BaseModelConfig, LoraConfig

MakeBase = Callable[..., AdaptedModel]
Batch = tuple[Tensor, Tensor]
C = 5
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3},
    "prefix": {"prefix_length": 4},
    "bottleneck": {"width": 3},
    "hyper_adapter": {"width": 3, "condition_width": 6, "embedding_width": 4, "hidden_width": 8},
}
ZERO_AT_START = ("lora", "bottleneck", "hyper_adapter")
CONDITIONS = torch.rand(3, C, generator=torch.Generator().manual_seed(2))
BASES = ("gemma", "roberta")


def build(kind: str, base: AdaptedModel, trained: bool = False, **settings: Any) -> Adaptation:
    """An adaptation; with `trained` all its numbers are drawn at random."""
    adaptation = build_adaptation(kind, base, SETTINGS[kind] | settings, condition_size=C)
    if trained:
        generator = torch.Generator().manual_seed(4)
        for parameter in adaptation.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return adaptation


def states(base: AdaptedModel, batch: Batch, adaptation: Adaptation, conditions: Tensor = CONDITIONS) -> Tensor:
    with adaptation.attached(base, conditions):
        return base.hidden_states(*batch)


def real(hidden: Tensor, batch: Batch) -> Tensor:
    """States of real tokens."""
    return hidden[batch[1].bool()]


@pytest.mark.parametrize("model", BASES)
@pytest.mark.parametrize("kind", ZERO_AT_START)
@torch.no_grad()
def test_a_fresh_adaptation_changes_nothing(make_base: MakeBase, batch: Batch, kind: str, model: str) -> None:
    base = make_base(model)
    bare = base.hidden_states(*batch)
    torch.testing.assert_close(states(base, batch, build(kind, base)), bare, rtol=1e-6, atol=1e-6)
    assert (states(base, batch, build(kind, base, trained=True)) - bare).abs().max() > 1e-2


@pytest.mark.parametrize("model", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter_and_nothing_of_the_base(
    make_base: MakeBase, batch: Batch, kind: str, model: str
) -> None:
    base = make_base(model)
    before, checksums = {name: value.clone() for name, value in base.state_dict().items()}, base.checksums()
    adaptation = build(kind, base, trained=True)
    states(base, batch, adaptation).square().mean().backward()
    for name, parameter in adaptation.named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any(), name
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in base.parameters())
    assert base.checksums() == checksums
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize("model", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_few_steps_lower_the_loss(make_base: MakeBase, batch: Batch, kind: str, model: str) -> None:
    base = make_base(model)
    with torch.no_grad():
        target = real(base.hidden_states(batch[0].roll(1, 1), batch[1]), batch)
    adaptation = build(kind, base)
    optimizer = torch.optim.Adam(adaptation.parameters(), lr=3e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (real(states(base, batch, adaptation), batch) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses


@pytest.mark.parametrize("model", BASES)
@torch.no_grad()
def test_each_row_is_adapted_by_its_own_condition_alone(make_base: MakeBase, batch: Batch, model: str) -> None:
    base = make_base(model)
    adaptation = build("hyper_adapter", base, trained=True)
    together = states(base, batch, adaptation)
    alike = states(base, batch, adaptation, CONDITIONS[:1])
    for row in range(3):
        length = int(batch[1][row].sum())
        alone = (batch[0][row : row + 1, :length], batch[1][row : row + 1, :length])
        expected = states(base, alone, adaptation, CONDITIONS[row : row + 1])[0]
        torch.testing.assert_close(together[row, :length], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alike[0], together[0])
    assert (real(alike, batch) - real(together, batch)).abs().max() > 1e-2


@pytest.mark.parametrize("model", BASES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padding_changes_no_real_token(make_base: MakeBase, batch: Batch, kind: str, model: str) -> None:
    base = make_base(model)
    adaptation = build(kind, base, trained=True)
    ids, mask = batch
    wider = torch.nn.functional.pad(ids, (0, 4), value=1), torch.nn.functional.pad(mask, (0, 4))
    expected = real(states(base, batch, adaptation), batch)
    torch.testing.assert_close(real(states(base, wider, adaptation), wider), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_base_is_as_before_after_the_context_even_after_an_exception(
    make_base: MakeBase, batch: Batch, kind: str
) -> None:
    base = make_base()
    bare, adaptation = base.hidden_states(*batch), build(kind, base, trained=True)
    with pytest.raises(ZeroDivisionError), adaptation.attached(base, CONDITIONS):
        assert (base.hidden_states(*batch) - bare).abs().max() > 1e-2
        raise ZeroDivisionError
    assert torch.equal(base.hidden_states(*batch), bare)
    assert all(layer.adapter is None for layer in base.linears.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_an_attachment_that_fails_halfway_leaves_nothing_behind(make_base: MakeBase) -> None:
    base = make_base()
    adaptation = build("bottleneck", base)
    del adaptation.feed_forward[1]
    with pytest.raises(IndexError), adaptation.attached(base):
        pass
    assert not any(module._forward_hooks for module in base.modules())


@torch.no_grad()
def test_adaptations_and_factors_add_up(make_base: MakeBase, batch: Batch) -> None:
    base = make_base()
    lora, bottleneck = build("lora", base, trained=True), build("bottleneck", base, trained=True)
    with ExitStack() as stack:
        stack.enter_context(bottleneck.attached(base))
        with_factors = base.hidden_states(*batch, lora.factors())
        stack.enter_context(lora.attached(base))
        nested = base.hidden_states(*batch)
        with pytest.raises(AdaptationError, match="carry a LoRA already"), lora.attached(base):
            pass
    torch.testing.assert_close(nested, with_factors)
    for one in (lora, bottleneck):
        assert (nested - states(base, batch, one)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_blocks_give_the_same_gradients_inside_the_context_and_an_error_outside(
    make_base: MakeBase, batch: Batch, kind: str
) -> None:
    gradients = []
    for options in ({}, {"gradient_checkpointing": True}, {"mlp_tile_tokens": 2}):
        base = make_base(**options)
        adaptation = build(kind, base, trained=True)
        with adaptation.attached(base, CONDITIONS):
            base.hidden_states(*batch).square().mean().backward()
        gradients.append([parameter.grad for parameter in adaptation.parameters()])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)
    base = make_base(gradient_checkpointing=True)
    loss = states(base, batch, build(kind, base, trained=True)).square().mean()
    with pytest.raises(CheckpointError):
        loss.backward()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_states_keep_the_type_of_a_16_bit_base(make_base: MakeBase, batch: Batch, kind: str) -> None:
    base = make_base(compute_dtype="bfloat16")
    adaptation = build(kind, base, trained=True)
    assert states(base, batch, adaptation).dtype == torch.bfloat16
    assert {parameter.dtype for parameter in adaptation.parameters()} == {torch.float32}


@pytest.mark.parametrize("model", ["gemma", "llama", "roberta", "bert"])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_a_prefix_is_what_a_models_own_cache_makes_of_it_at_unmoved_positions(
    make_base: MakeBase, batch: Batch, model: str, padded: bool
) -> None:
    base = make_base(model, sizes={"sliding_window": 32} if model == "gemma" else {})
    if not padded:
        batch = (batch[0][:1], batch[1][:1])
    ids, mask = batch
    adaptation = build("prefix", base, trained=True)
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(adaptation.keys_and_values()):
        cache.update(keys.repeat(len(ids), 1, 1, 1), values.repeat(len(ids), 1, 1, 1), layer)
    positions = torch.arange(ids.shape[1])[None] + (2 if model == "roberta" else 0)
    backbone = base.model.base_model if base.has_head else base.model
    expected = backbone(
        input_ids=ids, attention_mask=torch.nn.functional.pad(mask, (4, 0), value=1), past_key_values=cache,
        position_ids=positions.expand(len(ids), -1),
    ).last_hidden_state  # fmt: skip
    found = states(base, batch, adaptation)
    torch.testing.assert_close(real(found, batch), real(expected, batch), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_prefix_is_seen_past_the_window_of_a_sliding_layer(make_base: MakeBase) -> None:
    base = make_base(sizes={"num_hidden_layers": 1, "layer_types": ["sliding_attention"]})
    ids = torch.arange(4, 24)[None]
    batch = ids, torch.ones_like(ids)
    change = states(base, batch, build("prefix", base, trained=True)) - base.hidden_states(*batch)
    assert (change[0].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_generation_with_a_cache_and_packed_texts_are_adapted_too(make_base: MakeBase, kind: str) -> None:
    from hl_scale.kernels import Segments

    base = make_base()
    # Let what is attended to decide the next token, and not the last token alone, which gives the same one for ever.
    base.model.get_input_embeddings().weight.mul_(0.3)
    base.model.lm_head.weight = torch.nn.Parameter(torch.randn(67, 32, generator=torch.Generator().manual_seed(0)))
    adaptation, one = build(kind, base, trained=True), CONDITIONS[:1]
    prompt = torch.arange(4, 13)[None]
    with adaptation.attached(base, one):
        tokens = prompt
        for _ in range(8):
            tokens = torch.cat((tokens, base.logits(tokens, torch.ones_like(tokens))[:, -1:].argmax(-1)), dim=1)
        assert base.generate(prompt, torch.ones_like(prompt), max_new_tokens=8) == [tokens[0, 9:].tolist()]
        packed = base.packed_hidden_states(tokens[0], Segments((0, 9, 17)))
        alone = [base.hidden_states(part[None], torch.ones_like(part[None]))[0] for part in tokens[0].split((9, 8))]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_the_seed_alone_decides_initial_values(make_base: MakeBase) -> None:
    base = make_base()
    for kind in KINDS:
        torch.manual_seed(1)
        state = torch.random.get_rng_state()
        built = [build_adaptation(kind, base, SETTINGS[kind], C, seed=seed) for seed in (0, 0, 1)]
        assert torch.equal(torch.random.get_rng_state(), state)
        first, again, other = (torch.cat([p.flatten() for p in one.parameters()]) for one in built)
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_generated_weights_do_not_grow_with_the_width_of_the_network(make_base: MakeBase) -> None:
    base = make_base()
    sizes = []
    for width in (16, 1024):
        adaptation = build("hyper_adapter", base, hidden_width=width)
        torch.nn.init.normal_(adaptation.head_up.weight, std=0.02)
        weights = adaptation.generate(CONDITIONS)[0][0].up
        sizes.append(weights.std().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.5)  # without rescaling it is 8 times as large


def test_misuse_is_refused_with_a_way_out(make_base: MakeBase, batch: Batch) -> None:
    base = make_base()
    hyper = build("hyper_adapter", base)
    refused: list[tuple[str, Callable[[], Any]]] = [
        ("unknown kind", lambda: build_adaptation("adapter", base)),
        ("rank_", lambda: build_adaptation("lora", base, {"rank_": 3})),
        ("width: Input should be greater", lambda: build_adaptation("bottleneck", base, {"width": 0})),
        ("rank 25 is larger", lambda: build_adaptation("lora", base, {"rank": 25})),
        ("needs condition_size", lambda: build_adaptation("hyper_adapter", base)),
        (r"needs conditions \(E, 5\), got None", lambda: hyper.attached(base).__enter__()),
        (r"got \(3, 4\)", lambda: hyper.attached(base, CONDITIONS[:, :4]).__enter__()),
        ("2 conditions for a batch of 3", lambda: states(base, batch, hyper, CONDITIONS[:2])),
        ("built for the base", lambda: hyper.attached(make_base(fingerprint="other"), CONDITIONS).__enter__()),
    ]
    for message, use in refused:
        with pytest.raises(AdaptationError, match=message) as caught:
            use()
        assert "\n  fix: " in str(caught.value)


def test_bases_that_cannot_be_adapted_are_refused() -> None:
    options = DistilBertConfig(dim=32, hidden_dim=48, n_layers=2, n_heads=4, vocab_size=67)
    config = BaseModelConfig(model="in memory", compute_dtype="float32")
    base = adapt_model(DistilBertModel(options), None, config, LoraConfig(rank=2, target_modules=("q_lin",)))
    with pytest.raises(AdaptationError, match="DistilBertModel has no blocks of a known layout"):
        build_adaptation("bottleneck", base)
    build_adaptation("lora", base)


def test_a_prefix_refuses_attention_without_a_mask(make_base: MakeBase) -> None:
    base = make_base()
    base.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(AdaptationError, match="runs 'flash_attention_2'"):
        build_adaptation("prefix", base)
