"""What the hypernetworks emit at step 0, after a step, and for slots of several shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hl_scale.config import GatedLoraConfig, HypernetworkConfig, LoraConfig
from hl_scale.hypernetwork import GatedLora, Hypernetwork, PaperHyperLora, build_hypernetwork
from hl_scale.lora import LoraFactors, Slot

FEATURES = 11
# Grouped queries: key and value layers are narrower than query layers.
SHAPES = {"q_proj": (12, 20), "v_proj": (12, 6), "down_proj": (16, 12)}
SLOTS = tuple(Slot(i, name, f"model.layers.{i}.{name}", *shape) for i in range(3) for name, shape in SHAPES.items())
ZERO_AT_START = ["hyperlora", "plain_lora", "hyperlora.paper", "gated_lora"]
CONDITIONED = ["hyperlora", "hyperlora.paper", "gated_lora"]


def build(kind: str = "hyperlora", lora: dict[str, Any] | None = None, **options: Any) -> Hypernetwork:
    torch.manual_seed(7)
    config: HypernetworkConfig | GatedLoraConfig
    if kind == "gated_lora":
        config = GatedLoraConfig.model_validate({"kind": kind, "hidden_width": 16, **options})
    else:
        sizes = {"condition_width": 8, "slot_width": 4, "hidden_width": 16} | options
        config = HypernetworkConfig.model_validate({"kind": kind, **sizes})
    return build_hypernetwork(config, LoraConfig(**({"rank": 4} | (lora or {}))), SLOTS, FEATURES)


def conditions(count: int = 3) -> Tensor:
    return torch.rand(count, FEATURES, generator=torch.Generator().manual_seed(1))


def tiny_loss(factors: LoraFactors) -> Tensor:
    """|x + s B A x - 1|^2 summed over slots, for one fixed x per slot."""
    loss = torch.zeros(())
    for slot in SLOTS:
        x = torch.linspace(-1, 1, slot.in_features)
        delta = factors.scale * (factors.b[slot.path] @ (factors.a[slot.path] @ x)[..., None])
        loss = loss + (delta - 1).square().mean()
    return loss


def step(network: Hypernetwork, rate: float = 0.5, batches: int = 1) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=rate)
    for _ in range(batches):
        optimizer.zero_grad()
        tiny_loss(network(conditions())).backward()
        optimizer.step()


@pytest.mark.parametrize("initialization", ["published", "zero_delta"])
def test_the_published_network_has_224976_parameters_on_roberta_base(initialization: str) -> None:
    modules = ("query", "value")
    slots = [Slot(i, m, f"encoder.layer.{i}.attention.self.{m}", 768, 768) for i in range(12) for m in modules]
    config = HypernetworkConfig.model_validate(
        {"kind": "hyperlora.paper", "hidden_width": 8, "initialization": initialization}
    )
    network = build_hypernetwork(config, LoraConfig(rank=16, scale_convention="one"), slots, 235)
    assert sum(parameter.numel() for parameter in network.parameters()) == 224_976


@pytest.mark.parametrize("kind", ZERO_AT_START)
def test_the_update_is_exactly_zero_at_step_0_while_gradients_reach_b(kind: str) -> None:
    network = build(kind)
    factors = network(conditions())
    assert (factors.delta_norms() == 0).all()
    assert all((a != 0).any() for a in factors.a.values())
    gradients = torch.autograd.grad(tiny_loss(factors), list(factors.b.values()))
    assert all((gradient != 0).any() for gradient in gradients)


@pytest.mark.parametrize("kind", CONDITIONED)
def test_factors_have_the_shape_of_their_slot_for_every_condition(kind: str) -> None:
    factors = build(kind)(conditions(5))
    assert factors.conditions == 5 and factors.rank == 4 and factors.slots == SLOTS
    for slot in SLOTS:
        assert factors.a[slot.path].shape == (5, 4, slot.in_features)
        assert factors.b[slot.path].shape == (5, slot.out_features, 4)


def test_the_plain_adapter_is_one_whatever_the_conditions() -> None:
    network = build("plain_lora")
    step(network)
    one, other = network(conditions(1)), network(conditions(4) * 3)
    assert one.conditions == other.conditions == 1
    assert all(torch.equal(one.b[slot.path], other.b[slot.path]) for slot in SLOTS)
    assert one.delta_norms() > 0


def test_the_plain_adapter_starts_each_slot_with_values_of_its_own() -> None:
    factors = build("plain_lora")(conditions())
    assert not torch.equal(factors.a[SLOTS[0].path], factors.a[SLOTS[3].path])


@pytest.mark.parametrize("kind", CONDITIONED)
def test_after_one_step_different_conditions_get_different_updates(kind: str) -> None:
    network = build(kind, **({"position": "scaled"} if kind == "hyperlora.paper" else {}))
    step(network)
    factors = network(conditions())
    for slot in SLOTS:
        delta = factors.b[slot.path] @ factors.a[slot.path]
        assert not torch.allclose(delta[0], delta[1], rtol=1e-3, atol=0)


def test_slots_of_one_shape_get_different_updates() -> None:
    network = build()
    step(network)
    factors = network(conditions(1))
    assert not torch.allclose(factors.b[SLOTS[0].path], factors.b[SLOTS[3].path], rtol=1e-3, atol=0)


def test_training_lowers_the_loss_with_no_dead_units_and_gradient_at_the_trunk() -> None:
    network = build()
    before = tiny_loss(network(conditions())).item()
    step(network, rate=0.02, batches=30)
    assert tiny_loss(network(conditions())).item() < 0.8 * before
    assert network.dead_unit_share < 1
    assert network.trunk_gradient_norm is not None and network.trunk_gradient_norm > 0


def test_a_condition_gets_the_same_factors_alone_and_in_a_batch() -> None:
    network = build()
    step(network)
    together = network(conditions(3)).select(1)
    alone = network(conditions(3)[1:2])
    for slot in SLOTS:
        torch.testing.assert_close(together.b[slot.path], alone.b[slot.path], rtol=1e-5, atol=1e-7)


def test_the_published_initialisation_starts_with_tiny_gradients_that_are_not_zero() -> None:
    network = build("hyperlora.paper", initialization="published", hidden_width=8)
    factors = network(conditions())
    for factor in (*factors.a.values(), *factors.b.values()):
        assert 0 < factor.abs().max() < 1e-11
    tiny_loss(factors).backward()
    for name, parameter in network.named_parameters():
        if "heads" in name and name.endswith("bias"):
            assert parameter.grad is not None and 0 < parameter.grad.abs().max() < 1e-10, name


def test_the_published_network_computes_x_d_u_over_the_square_root_of_the_rank() -> None:
    network = build("hyperlora.paper", hidden_width=8, lora={"scale_convention": "one", "alpha": 3.0})
    assert isinstance(network, PaperHyperLora)
    step(network, rate=0.01)
    factors = network(conditions(1))
    assert factors.scale == 1.0
    for index in (0, 4, 8):
        slot = SLOTS[index]
        group = f"{slot.in_features}x{slot.out_features}"
        value = torch.cat((conditions(1)[0], torch.tensor([float(index)])))  # the raw slot index is the last input
        d = network.down.heads[group](torch.relu(network.down.hidden(value))).view(slot.in_features, 4)
        u = network.up.heads[group](torch.relu(network.up.hidden(value))).view(4, slot.out_features) / 2.0
        x = torch.linspace(-1, 1, slot.in_features)
        applied = factors.b[slot.path][0] @ (factors.a[slot.path][0] @ x)
        torch.testing.assert_close(applied, x @ d @ u, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["hyperlora", "hyperlora.paper"])
def test_a_killed_trunk_is_reported_as_wholly_dead_and_stops_conditioning(kind: str) -> None:
    network = build(kind)
    step(network, rate=0.01)
    assert network(conditions()) and network.dead_unit_share < 1
    last = [network.trunk[-1]] if kind == "hyperlora" else [network.down.hidden, network.up.hidden]
    for layer in last:
        torch.nn.init.constant_(layer.bias, -1e6)
    factors = network(conditions())
    assert network.dead_unit_share == 1.0
    assert all(torch.equal(b[0], b[1]) for b in factors.b.values())


def test_one_dead_net_of_the_published_two_is_half_of_the_units() -> None:
    network = build("hyperlora.paper", position="scaled")
    torch.nn.init.constant_(network.up.hidden.bias, -1e6)
    torch.nn.init.constant_(network.down.hidden.bias, 1e6)
    network(conditions())
    assert network.dead_unit_share == 0.5


def test_gates_weigh_the_parts_of_one_shared_lora() -> None:
    network = build("gated_lora")
    assert isinstance(network, GatedLora)
    step(network)
    given = conditions(4)
    factors, gates = network(given), network.gates(given)
    hidden = network.encoder(given)
    torch.testing.assert_close(gates.flatten(1), network.direct(given) + hidden @ network.mixed.weight.T)
    shared = network.shared(given)
    for number, slot in enumerate(SLOTS):
        for row in range(4):
            parts = [
                gates[row, number, i] * torch.outer(shared.b[slot.path][0, :, i], shared.a[slot.path][0, i])
                for i in range(4)
            ]
            delta = factors.b[slot.path][row] @ factors.a[slot.path][row]
            torch.testing.assert_close(delta, sum(parts), rtol=1e-5, atol=1e-6)


def test_gates_differ_between_conditions_from_the_start_and_are_one_on_average() -> None:
    network = build("gated_lora", lora={"rank": 64})
    assert isinstance(network, GatedLora)
    gates = network.gates(torch.randn(50, FEATURES, generator=torch.Generator().manual_seed(2)))
    assert gates.mean().item() == pytest.approx(1, abs=0.05)
    assert gates.std(0).mean().item() == pytest.approx(1, abs=0.1)


def test_gates_of_tokenwise_conditions_do_not_see_padding() -> None:
    config = GatedLoraConfig(kind="gated_lora", hidden_width=8, condition_tokens=5, pooling_queries=2)
    network = build_hypernetwork(config, LoraConfig(rank=2), SLOTS, 5 * 6)
    tokens = torch.randn(2, 3, 6)
    left, right = (torch.nn.functional.pad(tokens, (0, 0, before, 2 - before)).flatten(1) for before in (0, 2))
    assert isinstance(network, GatedLora)
    torch.testing.assert_close(network.gates(left), network.gates(right))
    assert not torch.allclose(network.gates(left)[0], network.gates(left)[1])


@pytest.mark.parametrize("kind", ZERO_AT_START)
@pytest.mark.parametrize("shape", [(2, FEATURES + 1), (FEATURES,), (1, 2, FEATURES)])
def test_conditions_of_the_wrong_length_are_refused(kind: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"shape \(E, {FEATURES}\), got"):
        build(kind)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("convention", "scale"), [("alpha_over_rank", 3.0), ("alpha_over_sqrt_rank", 6.0), ("one", 1.0)]
)
def test_generated_factors_carry_the_scale_of_the_convention(convention: str, scale: float) -> None:
    assert build(lora={"alpha": 12.0, "scale_convention": convention})(conditions()).scale == scale
