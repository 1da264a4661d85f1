"""What Text-to-LoRA emits in its three sizes: against a slow twin, at step 0, after training, and block by block."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hl_scale.config import LoraConfig, TextToLoraConfig
from hl_scale.hypernetwork import TextToLora, build_hypernetwork
from hl_scale.hypernetwork.hyperlora import GeneratedFactors
from hl_scale.hypernetwork.text_to_lora import AttentionPooling
from hl_scale.lora import LoraFactors, Slot

FEATURES, RANK = 11, 3
# Grouped queries: value layers are narrower than query layers. Layers 2, 5 and 7 have adapters, 7 for one module alone.
SHAPES = {"q_proj": (12, 20), "v_proj": (12, 6), "down_proj": (16, 12)}
SLOTS = tuple(
    Slot(layer, name, f"model.layers.{layer}.{name}", *SHAPES[name])
    for layer, names in ((2, SHAPES), (5, SHAPES), (7, ("v_proj",)))
    for name in names
)
ALL_SIZES = pytest.mark.parametrize("size", ["L", "M", "S"])
MISTRAL = {"q_proj": (4096, 4096), "v_proj": (4096, 1024)}
MISTRAL_ALL = MISTRAL | {
    "k_proj": (4096, 1024), "o_proj": (4096, 4096), "gate_proj": (4096, 14336), "up_proj": (4096, 14336),
    "down_proj": (14336, 4096),
}  # fmt: skip


def build(size: str, slots: tuple[Slot, ...] = SLOTS, rank: int = RANK, **options: Any) -> TextToLora:
    torch.manual_seed(7)
    sizes = {"latent_width": 16, "head_width": 24} | options
    config = TextToLoraConfig.model_validate({"kind": "text_to_lora", "size": size, **sizes})
    network = build_hypernetwork(config, LoraConfig(rank=rank), slots, FEATURES)
    assert isinstance(network, TextToLora)
    return network


def away_from_zero(network: TextToLora) -> TextToLora:
    """The network with every parameter moved at random, heads included."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3
    return network


def conditions(count: int = 3) -> Tensor:
    return torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(1))


def tiny_loss(factors: LoraFactors) -> Tensor:
    """|s B A x - y|^2 averaged over a slot and summed over slots, for one fixed x per slot; y is 1, 2, ... in turn for
    the conditions, negative in layers of odd number."""
    loss, numbers = torch.zeros(()), 1.0 + torch.arange(factors.conditions)[:, None, None]
    for slot in factors.slots:
        target = -numbers if slot.layer % 2 else numbers
        x = torch.linspace(-1, 1, slot.in_features, dtype=factors.a[slot.path].dtype)
        delta = factors.scale * (factors.b[slot.path] @ (factors.a[slot.path] @ x)[..., None])
        loss = loss + (delta - target).square().mean()
    return loss


def mistral(size: str, modules: dict[str, tuple[int, int]], rank: int, **options: Any) -> TextToLora:
    slots = [Slot(i, name, f"model.layers.{i}.{name}", *shape) for i in range(32) for name, shape in modules.items()]
    config = TextToLoraConfig.model_validate({"kind": "text_to_lora", "size": size, **options})
    with torch.device("meta"):
        network = build_hypernetwork(config, LoraConfig(rank=rank), slots, 1024)
    assert isinstance(network, TextToLora)
    return network


def parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("size", "published", "zero_delta"),
    [("L", 55_424_000, 55_424_000), ("M", 34_412_032, 34_477_568), ("S", 4_994_560, 5_117_440)],
)
def test_the_sizes_have_55_34_and_5_million_parameters_on_mistral_7b(
    size: str, published: int, zero_delta: int
) -> None:
    """Without biases of the heads, L and M have 55,317,504 and 34,346,496: the 55.3 and 34.3 million quoted elsewhere;
    two biases instead of one shared by A and B are what `zero_delta` adds."""
    assert parameters(mistral(size, MISTRAL, 8, initialization="published")) == published
    assert parameters(mistral(size, MISTRAL, 8)) == zero_delta


def test_the_heads_for_all_linear_layers_of_mistral_7b_have_2684_million_weights() -> None:
    network = mistral("L", MISTRAL_ALL, 16, latent_width=512, head_width=2048)
    assert sum(head.weight.numel() for head in network.heads.values()) == 2_684_354_560
    outputs = 16 * sum(i + o for i, o in MISTRAL_ALL.values())
    assert parameters(network.heads) == 2_684_354_560 + outputs
    assert parameters(network) == 2_697_482_880


def reference(network: TextToLora, size: str, condition: Tensor, slot: Slot) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) of one condition (C,) and one slot, a part at a time, with RoPE in complex numbers."""
    depth = sorted({other.layer for other in SLOTS}).index(slot.layer)
    module = sorted({other.module for other in SLOTS}).index(slot.module)
    embedded = [network.depth_embedding(torch.tensor(depth)), network.module_embedding(torch.tensor(module))]
    latent = network.mixer(torch.cat((network.condition(condition), *embedded)))
    latent = latent + network.mlp1(latent)
    head = network.heads[f"{slot.module}_{slot.in_features}x{slot.out_features}"]

    def emitted(part: Tensor, bias: Tensor) -> Tensor:
        hidden = network.mlp3(part + network.mlp2(part)) / math.sqrt(24)
        return torch.mv(head.weight, hidden) + bias

    if size == "L":
        values = emitted(latent, head.bias)
        return values[: RANK * slot.in_features].view(RANK, -1), values[RANK * slot.in_features :].view(-1, RANK)
    a, b = (network.part_norm(latent) + row for row in network.part.weight)
    if size == "M":
        a, b = emitted(a, head.bias[0]), emitted(b, head.bias[1])
        return a[: RANK * slot.in_features].view(RANK, -1), b[: RANK * slot.out_features].view(-1, RANK)

    def rotated(part: Tensor, position: int) -> Tensor:
        pairs = torch.complex(part[:8], part[8:])
        angles = torch.tensor([position * 10_000 ** (-i / 8) for i in range(8)], dtype=torch.float64)
        turned = pairs * torch.polar(torch.ones(8, dtype=torch.float64), angles)
        return torch.cat((turned.real, turned.imag))

    rows = [emitted(rotated(a, i), head.bias[0, i])[: slot.in_features] for i in range(RANK)]
    columns = [emitted(rotated(b, i), head.bias[1, i])[: slot.out_features] for i in range(RANK)]
    return torch.stack(rows), torch.stack(columns, dim=1)


@ALL_SIZES
def test_one_pass_gives_what_each_condition_slot_and_part_gives_by_itself(size: str) -> None:
    network = away_from_zero(build(size)).double()
    factors = network(conditions().double())
    assert factors.conditions == 3 and factors.rank == RANK and factors.slots == SLOTS
    for number, condition in enumerate(conditions().double()):
        for slot in SLOTS:
            a, b = reference(network, size, condition, slot)
            # The angles of RoPE are float32.
            torch.testing.assert_close(factors.a[slot.path][number], a, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(factors.b[slot.path][number], b, rtol=1e-6, atol=1e-6)


@ALL_SIZES
def test_the_update_is_exactly_zero_at_step_0_with_a_as_peft_draws_it(size: str) -> None:
    factors = build(size)(conditions())
    assert (factors.delta_norms() == 0).all()
    for slot in SLOTS:
        a, bound = factors.a[slot.path], 1 / math.sqrt(slot.in_features)
        assert 0.5 * bound < a.abs().max() <= bound
        assert torch.linalg.matrix_rank(a[0]) == RANK
    gradients = torch.autograd.grad(tiny_loss(factors), list(factors.b.values()))
    assert all((gradient != 0).any() for gradient in gradients)


@pytest.mark.parametrize(("size", "delta_rank"), [("L", 0), ("M", RANK), ("S", 1)])
def test_the_published_initialisation_of_m_and_s_changes_the_base_at_step_0(size: str, delta_rank: int) -> None:
    factors = build(size, initialization="published")(conditions())
    for slot in SLOTS:
        a, b = factors.a[slot.path][0], factors.b[slot.path][0]
        assert torch.linalg.matrix_rank(b @ a) == delta_rank
        if size != "L":
            shared = min(slot.in_features, slot.out_features)
            assert torch.equal(a.flatten()[:shared], (b if size == "M" else b.T).flatten()[:shared])


@ALL_SIZES
def test_a_condition_gets_the_same_factors_alone_and_in_a_batch(size: str) -> None:
    network = away_from_zero(build(size))
    together, alone = network(conditions()).select(1), network(conditions()[1:2])
    for slot in SLOTS:
        torch.testing.assert_close(together.a[slot.path], alone.a[slot.path], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(together.b[slot.path], alone.b[slot.path], rtol=1e-5, atol=1e-6)


@ALL_SIZES
def test_training_gives_each_condition_and_slot_the_update_that_it_needs(size: str) -> None:
    network = build(size)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        loss = tiny_loss(network(conditions()))
        loss.backward()
        optimizer.step()
    # One adapter for all three conditions cannot do better than their variance, 2/3 per slot, nor one for all layers.
    assert loss < 0.1 * 2 / 3 * len(SLOTS)
    assert network.trunk_gradient_norm is not None and network.trunk_gradient_norm > 0


@ALL_SIZES
@pytest.mark.parametrize("initialization", ["zero_delta", "published"])
def test_gradients_reach_every_entry_of_every_parameter_away_from_step_0(size: str, initialization: str) -> None:
    network = away_from_zero(build(size, initialization=initialization))
    tiny_loss(network(conditions())).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        if name.startswith("heads") and size != "L":
            continue  # the shorter of A and B leaves entries unused
        assert (parameter.grad != 0).any(dim=-1).all(), name


@pytest.mark.parametrize("size", ["M", "S"])
def test_gradients_equal_finite_differences(size: str) -> None:
    network = away_from_zero(build(size)).double()
    weights = [network.condition[0].weight, network.part.weight, network.heads["v_proj_12x6"].weight]

    def loss(*_: Tensor) -> Tensor:
        return tiny_loss(network(conditions(1).double()))

    assert torch.autograd.gradcheck(loss, weights, fast_mode=True, check_undefined_grad=False)


@ALL_SIZES
def test_a_state_dict_holds_all_that_another_draw_needs_to_give_the_same_factors(size: str) -> None:
    network, other = away_from_zero(build(size, dropout=0.1)), build(size)
    other.load_state_dict(copy.deepcopy(network.state_dict()))
    factors, expected = other(conditions()), network.eval()(conditions())
    assert all(torch.equal(factors.b[slot.path], expected.b[slot.path]) for slot in SLOTS)
    assert {name for name, _ in network.named_parameters()} == network.state_dict().keys()


@ALL_SIZES
def test_a_block_at_a_time_gives_the_factors_and_gradients_of_all_at_once(size: str) -> None:
    """With dropout, whose draws must not be made again when a block is recomputed."""
    whole = away_from_zero(build(size, dropout=0.2)).double()
    blocks = away_from_zero(build(size, dropout=0.2, generate_per_block=True)).double()
    torch.manual_seed(0)
    expected = whole(conditions().double())
    torch.manual_seed(0)
    source = blocks(conditions().double())
    assert isinstance(source, GeneratedFactors) and source.conditions == 3
    a, b = {}, {}
    for layer in (5, 2, 7):
        slots = [slot for slot in SLOTS if slot.layer == layer]
        for _ in range(2):
            for slot, pair in zip(slots, source.build(slots, source.inputs(slots)), strict=True):
                a[slot.path], b[slot.path] = pair
    for slot in SLOTS:
        torch.testing.assert_close(a[slot.path], expected.a[slot.path])
        torch.testing.assert_close(b[slot.path], expected.b[slot.path])
    tiny_loss(expected).backward()
    tiny_loss(LoraFactors(SLOTS, a, b, source.scale)).backward()
    for (name, ours), theirs in zip(blocks.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


@ALL_SIZES
def test_dropout_acts_in_training_alone(size: str) -> None:
    network = away_from_zero(build(size, dropout=0.5))
    path = SLOTS[0].path
    assert {layer.p for layer in network.modules() if isinstance(layer, torch.nn.Dropout)} == {0.5}
    assert not torch.equal(network(conditions()).b[path], network(conditions()).b[path])
    network.eval()
    assert torch.equal(network(conditions()).b[path], network(conditions()).b[path])


def test_rescaled_heads_read_the_trunk_divided_by_the_square_root_of_their_width() -> None:
    rescaled, plain = away_from_zero(build("L")), away_from_zero(build("L", rescale_heads=False))
    path, head = SLOTS[0].path, plain.heads["q_proj_12x20"]
    bias = head.bias[: RANK * 12].view(RANK, 12)
    conditioned = plain(conditions()).a[path] - bias
    torch.testing.assert_close(rescaled(conditions()).a[path] - bias, conditioned / math.sqrt(24), rtol=1e-4, atol=1e-5)


@ALL_SIZES
def test_a_module_of_two_shapes_has_a_head_for_each(size: str) -> None:
    slots = (Slot(0, "proj", "layers.0.proj", 8, 6), Slot(1, "proj", "layers.1.proj", 5, 9))
    network = away_from_zero(build(size, slots, rank=1))
    assert network.heads.keys() == {"proj_8x6", "proj_5x9"}
    factors = network(conditions(2))
    for slot in slots:
        assert factors.a[slot.path].shape == (2, 1, slot.in_features)
        assert factors.b[slot.path].shape == (2, slot.out_features, 1)


@ALL_SIZES
def test_a_network_in_bfloat16_takes_float32_conditions_and_emits_bfloat16(size: str) -> None:
    network = away_from_zero(build(size))
    expected = network(conditions())
    factors = copy.deepcopy(network).bfloat16()(conditions())
    for slot in SLOTS:
        b = factors.b[slot.path]
        assert b.dtype == torch.bfloat16
        torch.testing.assert_close(b.float(), expected.b[slot.path], rtol=0.1, atol=0.1)


def test_conditions_of_the_wrong_length_are_refused() -> None:
    with pytest.raises(ValueError, match=rf"shape \(E, {FEATURES}\), got"):
        build("L")(torch.zeros(2, FEATURES + 1))


def test_attention_pooling_is_a_softmax_over_the_tokens_that_are_there_whatever_their_padding() -> None:
    torch.manual_seed(0)
    pooling = AttentionPooling(12 * 6, 12, 3).double()
    lengths = (4, 1, 7)
    tokens = [torch.randn(length, 6, dtype=torch.float64) for length in lengths]
    padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    found = pooling(torch.nn.functional.pad(padded, (0, 0, 0, 5)).flatten(1))
    for row, own in zip(found, tokens, strict=True):
        expected = []
        for query in range(3):
            part = slice(64 * query, 64 * (query + 1))
            keys = own @ pooling.key.weight[part].T + pooling.key.bias[part]
            values = own @ pooling.value.weight[part].T + pooling.value.bias[part]
            expected.append((keys @ pooling.query[query] / 8).softmax(0) @ values)
        torch.testing.assert_close(row, torch.cat(expected))


def test_where_padding_stands_changes_nothing_and_what_tokens_are_does() -> None:
    config = TextToLoraConfig(kind="text_to_lora", latent_width=16, head_width=8, condition_tokens=5, pooling_queries=2)
    network = build_hypernetwork(config, LoraConfig(rank=2), SLOTS, 5 * 6)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    tokens = torch.randn(2, 3, 6)
    left, right = (torch.nn.functional.pad(tokens, (0, 0, before, 2 - before)).flatten(1) for before in (0, 2))
    first, second = network(left), network(right)
    path = SLOTS[0].path
    torch.testing.assert_close(first.b[path], second.b[path])
    assert not torch.allclose(first.b[path][0], first.b[path][1])
