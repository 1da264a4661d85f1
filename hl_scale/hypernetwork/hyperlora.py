"""Hypernetworks that map a condition vector to the LoRA factors of every slot, and their unconditioned control.

`HyperLora`: condition encoder and slot embedding feed a ReLU trunk; per distinct (in, out) shape one head emits A and
one emits B, so grouped-query attention works. Head inputs are divided by sqrt(width), the rescaling of hyper-adapters
(arXiv 2205.10835). B's head starts at zero, hence delta W = 0 at step 0 for every condition.

`PaperHyperLora`: the network published with HyperLoRA (arXiv 2311.00915): features with the raw slot index appended,
one hidden layer of 8, one net for the down-projection D and one for the up-projection U, shared by all slots;
y = W x + (x D) U, with U divided by sqrt(rank) and no alpha.

`PlainLora`: one adapter whatever the condition, for comparison at equal budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from hl_scale.config import HypernetworkConfig, LoraConfig
from hl_scale.hypernetwork.initialization import adapter_a_values, published_initialization
from hl_scale.lora import LoraFactors, Slot, lora_scale


class Hypernetwork(nn.Module):
    """Base: groups slots that share heads and assembles head outputs into `LoraFactors`.

    Args:
        lora: rank and scale convention.
        slots: slots in model order.
        condition_size: C, entries of a condition.
    """

    def __init__(self, lora: LoraConfig, slots: Sequence[Slot], condition_size: int) -> None:
        super().__init__()
        self.slots = tuple(slots)
        self.rank = lora.rank
        self.scale = lora_scale(lora.scale_convention, lora.alpha, lora.rank)
        self.condition_size = condition_size
        self.groups = self.group(self.slots)
        self.trunk_gradient_norm: float | None = None
        self.dead_unit_share = 0.0

    @staticmethod
    def group_of(slot: Slot) -> str:
        """Name of a slot's group; slots of a group have one shape."""
        return f"{slot.in_features}x{slot.out_features}"

    def group(self, slots: Sequence[Slot]) -> dict[str, list[int]]:
        """Group -> positions of its slots among `slots`."""
        groups: dict[str, list[int]] = {}
        for position, slot in enumerate(slots):
            groups.setdefault(self.group_of(slot), []).append(position)
        return groups

    def shape_of(self, group: str) -> tuple[int, int]:
        """(in, out) of a group."""
        slot = self.slots[self.groups[group][0]]
        return slot.in_features, slot.out_features

    def check_conditions(self, conditions: Tensor) -> None:
        if conditions.ndim != 2 or conditions.shape[1] != self.condition_size:
            raise ValueError(
                f"conditions must have shape (E, {self.condition_size}), got {tuple(conditions.shape)}\n"
                "  fix: use vectors of the features the hypernetwork was trained with"
            )

    def assemble(
        self,
        a: dict[str, Tensor],
        b: dict[str, Tensor],
        slots: Sequence[Slot] | None = None,
        groups: dict[str, list[int]] | None = None,
    ) -> LoraFactors:
        """Per group A (E, K, r * in) and B (E, K, out * r) to factors per slot; of all slots unless some are given."""
        slots = self.slots if slots is None else tuple(slots)
        factors_a, factors_b = {}, {}
        for group, indices in (self.groups if groups is None else groups).items():
            in_features, out_features = self.shape_of(group)
            # Not indexed slot by slot: each index would be a tensor of the whole group's size in backward.
            group_a = a[group].unflatten(-1, (self.rank, in_features)).unbind(1)
            group_b = b[group].unflatten(-1, (out_features, self.rank)).unbind(1)
            for position, index in enumerate(indices):
                factors_a[slots[index].path] = group_a[position]
                factors_b[slots[index].path] = group_b[position]
        return LoraFactors(slots, factors_a, factors_b, self.scale)

    def watch_trunk(self, hidden: Tensor) -> Tensor:
        """Record the share of a ReLU trunk's units that never fire, and what `watch_gradient` records."""
        with torch.no_grad():
            self.dead_unit_share = 1.0 - (hidden > 0).flatten(0, -2).any(dim=0).float().mean().item()
        return self.watch_gradient(hidden)

    def watch_gradient(self, hidden: Tensor) -> Tensor:
        """Record in backward the gradient norm at the trunk's output (a SiLU trunk has no units that never fire)."""
        if hidden.requires_grad:
            hidden.register_hook(self._record_trunk_gradient)
        return hidden

    def _record_trunk_gradient(self, gradient: Tensor) -> None:
        self.trunk_gradient_norm = gradient.detach().float().norm().item()


class HyperLora(Hypernetwork):
    """Condition (E, C) -> factors; see the module docstring. Trunk output h (E, K, width)."""

    def __init__(
        self, config: HypernetworkConfig, lora: LoraConfig, slots: Sequence[Slot], condition_size: int
    ) -> None:
        super().__init__(lora, slots, condition_size)
        self.condition = nn.Linear(condition_size, config.condition_width)
        self.slot_embedding = nn.Embedding(len(self.slots), config.slot_width)
        widths = [config.condition_width + config.slot_width] + [config.hidden_width] * config.trunk_layers
        self.trunk = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        self.heads_a = nn.ModuleDict()
        self.heads_b = nn.ModuleDict()
        for group in self.groups:
            in_features, out_features = self.shape_of(group)
            head_a = nn.Linear(config.hidden_width, lora.rank * in_features)
            nn.init.normal_(head_a.weight, std=0.02)
            head_a.bias.data.copy_(adapter_a_values(lora.rank, in_features).flatten())
            head_b = nn.Linear(config.hidden_width, out_features * lora.rank)
            nn.init.zeros_(head_b.weight)
            nn.init.zeros_(head_b.bias)
            self.heads_a[group], self.heads_b[group] = head_a, head_b
        self.head_input_scale = 1.0 / math.sqrt(config.hidden_width)
        self.generate_per_block = config.generate_per_block

    def forward(self, conditions: Tensor) -> LoraFactors | GeneratedFactors:
        """conditions (E, C) -> factors of all slots for E conditions, or with `generate_per_block` their source."""
        self.check_conditions(conditions)
        dtype = self.condition.weight.dtype
        device = conditions.device
        encoded = self.condition(conditions.to(dtype))
        slots = self.slot_embedding(torch.arange(len(self.slots), device=device))
        shape = (conditions.shape[0], len(self.slots), -1)
        hidden = torch.cat((encoded[:, None].expand(shape), slots[None].expand(shape)), dim=-1)
        for layer in self.trunk:
            hidden = torch.relu(layer(hidden))
        hidden = self.watch_trunk(hidden) * self.head_input_scale
        return GeneratedFactors(self, hidden) if self.generate_per_block else self.generate(self.slots, hidden)

    def generate(self, slots: Sequence[Slot], hidden: Tensor) -> LoraFactors:
        """Trunk outputs (E, K, width) of some slots -> their factors, by one call of each head they need."""
        groups = self.group(slots)
        a, b = {}, {}
        for group, positions in groups.items():
            rows = hidden[:, positions]
            a[group], b[group] = self.heads_a[group](rows), self.heads_b[group](rows)
        return self.assemble(a, b, slots, groups)


class PerBlockGenerator(Protocol):
    """A hypernetwork that can generate the factors of some slots from its trunk's outputs for them."""

    slots: tuple[Slot, ...]
    scale: float

    def generate(self, slots: Sequence[Slot], hidden: Tensor) -> LoraFactors:
        """Trunk outputs (E, K, ...) of K slots -> their factors."""


class GeneratedFactors:
    """A `FactorSource` that generates the factors of a block's slots where the block runs.

    Args:
        hypernetwork: whose heads are called.
        hidden: trunk outputs (E, K, ...) of all its slots.
    """

    def __init__(self, hypernetwork: PerBlockGenerator, hidden: Tensor) -> None:
        self.hypernetwork, self.hidden = hypernetwork, hidden
        self._position = {slot.path: position for position, slot in enumerate(hypernetwork.slots)}

    @property
    def slots(self) -> tuple[Slot, ...]:
        return self.hypernetwork.slots

    @property
    def scale(self) -> float:
        return self.hypernetwork.scale

    @property
    def conditions(self) -> int:
        """E."""
        return self.hidden.shape[0]

    def select(self, index: int | Tensor) -> GeneratedFactors:
        """Of one condition (E = 1), or of several by an index tensor (repeats allowed)."""
        rows = torch.tensor([index]) if isinstance(index, int) else index
        return GeneratedFactors(self.hypernetwork, self.hidden.index_select(0, rows.to(self.hidden.device)))

    def inputs(self, slots: Sequence[Slot]) -> list[Tensor]:
        """See `FactorSource`: the trunk outputs (E, K, ...) of these slots."""
        return [self.hidden[:, [self._position[slot.path] for slot in slots]]]

    def build(self, slots: Sequence[Slot], inputs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        factors = self.hypernetwork.generate(slots, inputs[0])
        return [(factors.a[slot.path], factors.b[slot.path]) for slot in slots]


class _PublishedNet(nn.Module):
    """W2 ReLU(W1 v + b1) + b2 with one output layer per size; v (..., C + 1)."""

    def __init__(self, inputs: int, width: int, sizes: dict[str, int]) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, width)
        self.heads = nn.ModuleDict({group: nn.Linear(width, size) for group, size in sizes.items()})

    def head(self, group: str) -> nn.Linear:
        """Output layer of a shape group."""
        head = self.heads[group]
        assert isinstance(head, nn.Linear)
        return head

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.relu(self.hidden(inputs))


class PaperHyperLora(Hypernetwork):
    """The published network; on RoBERTa-base (query, value, rank 16, width 8) it has 224,976 parameters.

    Slots of several shapes share the hidden layers and get one output layer per shape; the published code covers square
    layers of one shape only. D is read as (in, r) and U as (r, out), row-major.
    """

    def __init__(
        self, config: HypernetworkConfig, lora: LoraConfig, slots: Sequence[Slot], condition_size: int
    ) -> None:
        super().__init__(lora, slots, condition_size)
        sizes = {group: self.shape_of(group) for group in self.groups}
        self.down = _PublishedNet(
            condition_size + 1, config.hidden_width, {g: s[0] * self.rank for g, s in sizes.items()}
        )
        self.up = _PublishedNet(
            condition_size + 1, config.hidden_width, {g: s[1] * self.rank for g, s in sizes.items()}
        )
        self.position_scale = 1.0 / len(self.slots) if config.position == "scaled" else 1.0
        if config.initialization == "published":
            published_initialization(self)
            return
        for group, (in_features, _) in sizes.items():
            down, up = self.down.head(group), self.up.head(group)
            nn.init.normal_(down.weight, std=0.02)
            down.bias.data.copy_(adapter_a_values(self.rank, in_features).T.flatten())
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)

    def forward(self, conditions: Tensor) -> LoraFactors:
        """conditions (E, C) -> factors of all slots for E conditions."""
        self.check_conditions(conditions)
        dtype = self.down.hidden.weight.dtype
        count = len(self.slots)
        position = torch.arange(count, device=conditions.device, dtype=dtype) * self.position_scale
        inputs = torch.cat(
            (
                conditions.to(dtype)[:, None].expand(-1, count, -1),
                position[None, :, None].expand(conditions.shape[0], -1, 1),
            ),
            dim=-1,
        )
        down, up = self.watch_trunk(torch.cat((self.down(inputs), self.up(inputs)), dim=-1)).chunk(2, dim=-1)
        a, b = {}, {}
        for group, indices in self.groups.items():
            in_features, out_features = self.shape_of(group)
            d = self.down.heads[group](down[:, indices]).unflatten(-1, (in_features, self.rank))
            u = self.up.heads[group](up[:, indices]).unflatten(-1, (self.rank, out_features))
            a[group] = d.transpose(-1, -2).flatten(-2)
            b[group] = (u / math.sqrt(self.rank)).transpose(-1, -2).flatten(-2)
        return self.assemble(a, b)


class PlainLora(Hypernetwork):
    """One LoRA for all conditions; factors have E = 1. Tables are embeddings so that ZeRO-3 gathers them on call."""

    def __init__(self, lora: LoraConfig, slots: Sequence[Slot], condition_size: int) -> None:
        super().__init__(lora, slots, condition_size)
        self.tables_a = nn.ModuleDict()
        self.tables_b = nn.ModuleDict()
        for group, indices in self.groups.items():
            in_features, out_features = self.shape_of(group)
            table_a = nn.Embedding(len(indices), lora.rank * in_features)
            table_b = nn.Embedding(len(indices), out_features * lora.rank)
            table_a.weight.data.copy_(
                torch.stack([adapter_a_values(lora.rank, in_features).flatten() for _ in indices])
            )
            nn.init.zeros_(table_b.weight)
            self.tables_a[group], self.tables_b[group] = table_a, table_b

    def forward(self, conditions: Tensor) -> LoraFactors:
        """conditions (E, C), ignored -> factors with E = 1."""
        self.check_conditions(conditions)
        a, b = {}, {}
        for group, indices in self.groups.items():
            rows = torch.arange(len(indices), device=conditions.device)[None]
            a[group], b[group] = self.tables_a[group](rows), self.tables_b[group](rows)
        return self.assemble(a, b)
