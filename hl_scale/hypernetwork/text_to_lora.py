"""Text-to-LoRA (arXiv 2506.06105): a residual MLP over condition, depth and module embeddings, in three sizes.

The latent of width z is the encoded condition (z/2) beside embeddings of a slot's depth and module (z/4 each), mixed by
an MLP and refined by a residual one, `mlp1`. A second residual one, `mlp2`, and `mlp3` follow; one head per target
module reads what `mlp3` emits, as many times per slot as the size has parts:

| size | parts of a slot                    | a head emits                                                     |
|------|------------------------------------|------------------------------------------------------------------|
| L    | one                                | A and B: r (in + out) numbers                                    |
| M    | A, B                               | either: r max(in, out) numbers, of which the first are used      |
| S    | r rows of A, r columns of B        | either: max(in, out) numbers, of which the first are used        |

In M and S the latent is normalised after `mlp1` and the learned embedding of A or of B is added to it. In S the sum is
then rotated by the part's rank index (RoPE, base 10,000, entry i of its first half paired with entry i of the second),
so rank 0 is as it was; that is the input of `mlp2`, its residual path included. All conditions, slots and parts go
through in one pass. With `generate_per_block` the numbers that heads read, `head_width` per part, are kept for all
slots, and the heads alone run for one block at a time.

Initial values: head weights are zero, so at step 0 the factors are those of the biases. `zero_delta`: A as PEFT draws
it and B = 0, for which A and B of M and S have a bias each (r of them in S). `published`: the same for L; M and S have
one bias for both, A_init / sqrt(2), in S moreover divided by sqrt(r) and the same for all r, where A_init is drawn for
max(in, out) inputs. Then delta W is not 0 at step 0: every adapter starts from a random change of the base, which
training has to undo, and in S from one of rank 1. Hence `zero_delta` is the default.

Slots with the same layer, module name and shape get the same factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hl_scale.config import LoraConfig, TextToLoraConfig
from hl_scale.hypernetwork.hyperlora import GeneratedFactors, Hypernetwork
from hl_scale.hypernetwork.initialization import adapter_a_values
from hl_scale.lora import LoraFactors, Slot

ROTARY_BASE = 10_000.0


class Head(nn.Module):
    """W h + b with W zero at first: h (..., parts, width) -> (..., parts, outputs).

    Args:
        width: entries of h.
        bias: initial b, (outputs,) for all parts or (parts, outputs); parts may be several dimensions.
    """

    def __init__(self, width: int, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(bias.shape[-1], width))
        self.bias = nn.Parameter(bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.weight).add_(self.bias)


class AttentionPooling(nn.Module):
    """What learned queries find among the vectors of a condition; rows of zeros are padding.

    The mean over tokens hardly tells which word plays which part in a description; this learns where to look. Query i
    reads the keys and values of its own head: sum_t softmax_t(q_i . K_i x_t / sqrt(d)) V_i x_t.

    Args:
        condition_size: T * D, entries of a condition.
        tokens: T, vectors that lie end to end in it.
        queries: how many.
    """

    HEAD = 64

    def __init__(self, condition_size: int, tokens: int, queries: int) -> None:
        super().__init__()
        inputs = condition_size // tokens
        self.tokens = tokens
        self.width = queries * self.HEAD
        self.query = nn.Parameter(torch.randn(queries, self.HEAD))
        self.key = nn.Linear(inputs, self.width)
        self.value = nn.Linear(inputs, self.width)

    def forward(self, conditions: Tensor) -> Tensor:
        """(E, T * D) -> (E, queries * HEAD)."""
        tokens = conditions.unflatten(1, (self.tokens, -1))
        heads = (*tokens.shape[:2], *self.query.shape)
        keys, values = self.key(tokens).view(heads), self.value(tokens).view(heads)
        scores = torch.einsum("etqd,qd->etq", keys, self.query) / math.sqrt(self.HEAD)
        padding = (tokens == 0).all(-1, keepdim=True)
        shares = scores.masked_fill(padding, torch.finfo(scores.dtype).min).softmax(1)
        return torch.einsum("etq,etqd->eqd", shares, values).flatten(1)


class TextToLora(Hypernetwork):
    """Size L; see the module docstring. E conditions, K slots, latent width z."""

    def __init__(self, config: TextToLoraConfig, lora: LoraConfig, slots: Sequence[Slot], condition_size: int) -> None:
        super().__init__(lora, slots, condition_size)
        z, width, dropout = config.latent_width, config.head_width, config.dropout
        layers = sorted({slot.layer for slot in self.slots})
        modules = sorted({slot.module for slot in self.slots})
        self.depth_of_slot = [layers.index(slot.layer) for slot in self.slots]
        self.module_of_slot = [modules.index(slot.module) for slot in self.slots]
        pooled = condition_size
        self.pooling: nn.Module = nn.Identity()
        if config.condition_tokens is not None:
            self.pooling = attention = AttentionPooling(condition_size, config.condition_tokens, config.pooling_queries)
            pooled = attention.width
        self.condition = nn.Sequential(nn.Linear(pooled, z // 2), nn.LayerNorm(z // 2))
        self.depth_embedding = nn.Sequential(nn.Embedding(len(layers), z // 4), nn.LayerNorm(z // 4))
        self.module_embedding = nn.Sequential(nn.Embedding(len(modules), z // 4), nn.LayerNorm(z // 4))
        self.mixer = nn.Sequential(nn.Dropout(dropout), *_layers(z, z, dropout), nn.Dropout(dropout))
        self.mlp1 = nn.Sequential(nn.LayerNorm(z), *_layers(z, z, dropout), nn.Dropout(dropout))
        self.mlp2 = nn.Sequential(nn.LayerNorm(z), *_layers(z, z, dropout), nn.Dropout(dropout))
        self.mlp3 = nn.Sequential(nn.LayerNorm(z), *_layers(z, width, dropout))
        published = config.initialization == "published"
        self.heads = nn.ModuleDict()
        for group in self.groups:
            self.heads[group] = Head(width, self.head_bias(*self.shape_of(group), published))
        self.head_input_scale = 1.0 / math.sqrt(width) if config.rescale_heads else 1.0
        self.generate_per_block = config.generate_per_block

    @staticmethod
    def group_of(slot: Slot) -> str:
        return f"{slot.module}_{slot.in_features}x{slot.out_features}"

    def forward(self, conditions: Tensor) -> LoraFactors | GeneratedFactors:
        """conditions (E, C) -> factors of all slots for E conditions, or with `generate_per_block` their source."""
        self.check_conditions(conditions)
        device = conditions.device
        conditions = conditions.to(next(self.condition.parameters()).dtype)
        encoded = self.condition(self.pooling(conditions))
        depth = self.depth_embedding(torch.tensor(self.depth_of_slot, device=device))
        module = self.module_embedding(torch.tensor(self.module_of_slot, device=device))
        shape = (conditions.shape[0], len(self.slots), -1)
        latent = torch.cat((encoded[:, None].expand(shape), depth.expand(shape), module.expand(shape)), dim=-1)
        latent = self.mixer(latent)
        latent = self.parts(latent + self.mlp1(latent))
        latent = latent + self.mlp2(latent)
        hidden = self.watch_gradient(self.mlp3(latent)) * self.head_input_scale
        return GeneratedFactors(self, hidden) if self.generate_per_block else self.generate(self.slots, hidden)

    def generate(self, slots: Sequence[Slot], hidden: Tensor) -> LoraFactors:
        """What heads read for some slots, (E, K, *parts, width) -> their factors, by one call of each head needed.

        There is no dropout in here: blocks that generate their factors again in backward do not restore its draws.
        """
        groups = self.group(slots)
        a, b = {}, {}
        for group, positions in groups.items():
            a[group], b[group] = self.split(self.heads[group](hidden[:, positions]), *self.shape_of(group))
        return self.assemble(a, b, slots, groups)

    def parts(self, latent: Tensor) -> Tensor:
        """Latent (E, K, z) -> that of each part, (E, K, *parts, z)."""
        return latent

    def head_bias(self, in_features: int, out_features: int, published: bool) -> Tensor:
        """Initial bias of a head, (outputs,) or (*parts, outputs)."""
        a = adapter_a_values(self.rank, in_features).flatten()
        return torch.cat((a, torch.zeros(out_features * self.rank)))

    def split(self, output: Tensor, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
        """What a head emitted, (E, K, *parts, outputs) -> A (E, K, r * in) and B (E, K, out * r)."""
        a, b = output.split((self.rank * in_features, out_features * self.rank), dim=-1)
        return a, b


class MediumTextToLora(TextToLora):
    """Size M; parts: A and B."""

    def __init__(self, config: TextToLoraConfig, lora: LoraConfig, slots: Sequence[Slot], condition_size: int) -> None:
        super().__init__(config, lora, slots, condition_size)
        self.part_norm = nn.LayerNorm(config.latent_width)
        self.part = nn.Embedding(2, config.latent_width)

    def parts(self, latent: Tensor) -> Tensor:
        """(E, K, z) -> (E, K, 2, z)."""
        return self.part_norm(latent)[:, :, None] + self.part(torch.arange(2, device=latent.device))

    def head_bias(self, in_features: int, out_features: int, published: bool) -> Tensor:
        longest = max(in_features, out_features)
        if published:
            return adapter_a_values(self.rank, longest).flatten() / math.sqrt(2)
        bias = torch.zeros(2, self.rank * longest)
        bias[0, : self.rank * in_features] = adapter_a_values(self.rank, in_features).flatten()
        return bias

    def split(self, output: Tensor, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
        a, b = output.unbind(-2)
        return a[..., : self.rank * in_features], b[..., : out_features * self.rank]


class SmallTextToLora(MediumTextToLora):
    """Size S; parts: A and B, and their ranks."""

    def parts(self, latent: Tensor) -> Tensor:
        """(E, K, z) -> (E, K, 2, r, z)."""
        return rotate(super().parts(latent), self.rank)

    def head_bias(self, in_features: int, out_features: int, published: bool) -> Tensor:
        longest = max(in_features, out_features)
        if published:
            return adapter_a_values(1, longest)[0] / math.sqrt(2 * self.rank)
        bias = torch.zeros(2, self.rank, longest)
        bias[0, :, :in_features] = adapter_a_values(self.rank, in_features)
        return bias

    def split(self, output: Tensor, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
        a, b = output.unbind(-3)
        return a[..., :in_features].flatten(-2), b[..., :out_features].transpose(-1, -2).flatten(-2)


def rotate(x: Tensor, positions: int) -> Tensor:
    """x (..., z) -> (..., positions, z), rotated by each position (RoPE, arXiv 2104.09864); z is even."""
    half = x.shape[-1] // 2
    frequencies = ROTARY_BASE ** (torch.arange(half, device=x.device, dtype=torch.float32) / -half)
    angles = torch.arange(positions, device=x.device)[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., None, :].chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def _layers(inputs: int, outputs: int, dropout: float) -> list[nn.Module]:
    """Linear to four times the inputs and back to `outputs`, each with SiLU, dropout between them."""
    return [nn.Linear(inputs, 4 * inputs), nn.SiLU(), nn.Dropout(dropout), nn.Linear(4 * inputs, outputs), nn.SiLU()]


SIZES: dict[str, type[TextToLora]] = {"L": TextToLora, "M": MediumTextToLora, "S": SmallTextToLora}
