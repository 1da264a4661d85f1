"""Hyper-adapters (Baziotis et al. 2022, arXiv 2205.10835): a network generates the bottleneck adapters of a condition.

    z = (condition encoded, embedding of the layer, embedding of the position in it)
    g = relu(W z),  h = g + W2 relu(W1 norm(g))
    each of D, b, U, c of h + U relu(D h + b) + c  =  head(h / sqrt(width of h))

Four heads are shared by all layers and both positions, after attention and after the feed-forward layer. What a head
returns is a sum over the entries of h, so it grows with the root of their number; the published rescaling divides by
that root, and a wide network then trains as a narrow one does. D starts as an ordinary adapter's, from the head's bias;
U and c start at zero for every condition. Adapters have no layer norm, as `bottleneck` has none (published: a generated
one, before D).
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from hl_scale.adaptations.adaptation import Adaptation, AdaptationError, transformer_blocks
from hl_scale.adaptations.bottleneck import adapter_size, transform_output
from hl_scale.adaptations.settings import HyperAdapterSettings
from hl_scale.base import AdaptedModel
from hl_scale.hypernetwork.initialization import adapter_a_values

POSITIONS = 2


@dataclass(frozen=True)
class AdapterWeights:
    """Adapters of E conditions at one place.

    Attributes:
        down: D (E, m, hidden).
        down_bias: b (E, m).
        up: U (E, hidden, m).
        up_bias: c (E, hidden).
    """

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor

    def apply(self, h: Tensor) -> Tensor:
        """h (B, T, hidden) with E = B adapters, one per row, or E = 1 -> the same shape and type.

        Raises:
            AdaptationError: E is neither.
        """
        if len(self.down) not in (1, len(h)):
            raise AdaptationError(
                f"{len(self.down)} conditions for a batch of {len(h)} rows\n"
                "  fix: give one condition vector per row of the batch, or one for all"
            )
        inner = torch.relu(h.to(self.down.dtype) @ self.down.mT + self.down_bias[:, None])
        update = inner @ self.up.mT + self.up_bias[:, None]
        return h + update.to(h.dtype)


class HyperAdapterAdaptation(Adaptation):
    """Condition (E, C) -> two bottleneck adapters in every block; see the module docstring.

    Raises:
        AdaptationError: no condition size is given, or blocks differ in their hidden size.
    """

    kind = "hyper_adapter"
    conditional = True

    def __init__(self, base: AdaptedModel, settings: HyperAdapterSettings, condition_size: int | None = None) -> None:
        super().__init__(base, settings, condition_size)
        layers, self.hidden_size = _layers_and_hidden_size(base)
        self.width = settings.width
        inner = settings.hidden_width
        self.condition = nn.Linear(_given(condition_size), settings.condition_width)
        self.layer_embedding = nn.Embedding(layers, settings.embedding_width)
        self.position_embedding = nn.Embedding(POSITIONS, settings.embedding_width)
        self.input = nn.Linear(settings.condition_width + 2 * settings.embedding_width, inner)
        self.norm = nn.LayerNorm(inner)
        self.first, self.second = nn.Linear(inner, inner), nn.Linear(inner, inner)
        self.head_down = nn.Linear(inner, self.width * self.hidden_size)
        self.head_down_bias = nn.Linear(inner, self.width)
        self.head_up = nn.Linear(inner, self.hidden_size * self.width)
        self.head_up_bias = nn.Linear(inner, self.hidden_size)
        self.rescaling = 1.0 / math.sqrt(inner)
        nn.init.normal_(self.head_down.weight, std=0.02)
        nn.init.normal_(self.head_down_bias.weight, std=0.02)
        self.head_down.bias.data.copy_(adapter_a_values(self.width, self.hidden_size).flatten())
        for zero in (self.head_down_bias.bias, *self.head_up.parameters(), *self.head_up_bias.parameters()):
            nn.init.zeros_(zero)

    def generate(self, conditions: Tensor) -> list[tuple[AdapterWeights, AdapterWeights]]:
        """conditions (E, C) -> of each block, the adapters after attention and after the feed-forward layer."""
        layers = self.layer_embedding.num_embeddings
        device, dtype = self.input.weight.device, self.input.weight.dtype
        encoded = self.condition(conditions.to(device, dtype))
        of_layer = self.layer_embedding(torch.arange(layers, device=device))
        of_position = self.position_embedding(torch.arange(POSITIONS, device=device))
        shape = (len(conditions), layers, POSITIONS, -1)
        z = torch.cat(
            (encoded[:, None, None].expand(shape), of_layer[None, :, None].expand(shape),
             of_position[None, None].expand(shape)), dim=-1,
        )  # fmt: skip
        g = torch.relu(self.input(z))
        h = (g + self.second(torch.relu(self.first(self.norm(g))))) * self.rescaling
        down = self.head_down(h).unflatten(-1, (self.width, self.hidden_size))
        up = self.head_up(h).unflatten(-1, (self.hidden_size, self.width))
        parts = (down, self.head_down_bias(h), up, self.head_up_bias(h))
        # Not indexed one by one: each index would be a tensor of the whole size in backward.
        by_place = [part.flatten(1, 2).unbind(1) for part in parts]
        places = [AdapterWeights(*weights) for weights in zip(*by_place, strict=True)]
        return list(zip(places[::POSITIONS], places[1::POSITIONS], strict=True))

    def _attach(self, base: AdaptedModel, conditions: Tensor | None, stack: ExitStack) -> None:
        assert conditions is not None
        for block, adapters in zip(transformer_blocks(base), self.generate(conditions), strict=True):
            for output, weights in zip((block.attention_output, block.feed_forward_output), adapters, strict=True):
                transform_output(output, partial(AdapterWeights.apply, weights), stack)


def _given(condition_size: int | None) -> int:
    if condition_size is None or condition_size < 1:
        raise AdaptationError(
            f"a hyper_adapter adaptation needs condition_size, got {condition_size}\n"
            "  fix: give the number of entries of a condition vector"
        )
    return condition_size


def _layers_and_hidden_size(base: AdaptedModel) -> tuple[int, int]:
    sizes = [block.hidden_size for block in transformer_blocks(base)]
    if len(set(sizes)) > 1:
        raise AdaptationError(
            f"one head for all blocks, but their hidden sizes are {sorted(set(sizes))}\n  fix: use another kind"
        )
    return len(sizes), sizes[0]


def count_hyper_adapter(base: AdaptedModel, settings: HyperAdapterSettings, condition_size: int | None = None) -> int:
    """(C + 1) c + (layers + 2) e + (c + 2 e + 1) w + 2 (w + 1) w + 2 w + (w + 1) (2 m D + m + D)."""
    layers, hidden_size = _layers_and_hidden_size(base)
    c, e, w = settings.condition_width, settings.embedding_width, settings.hidden_width
    inputs = (_given(condition_size) + 1) * c + (layers + POSITIONS) * e + (c + 2 * e + 1) * w
    return inputs + 2 * (w + 1) * w + 2 * w + (w + 1) * adapter_size(hidden_size, settings.width)
