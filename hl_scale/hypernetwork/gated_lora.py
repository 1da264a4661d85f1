"""One LoRA whose rank-one parts are weighted by the condition: delta W(c) = s B diag(g(c)) A.

A and B of every slot are learned as those of a plain LoRA, and at its pace; the condition decides through its gates g
how much of each of the r parts b_i a_i^T is added, also with a negative sign. Conditions that share a property can
share the parts that serve it, so that what was learned for two properties apart can be added up for a condition that
has both: a mixture of LoRA experts (MoLE, arXiv 2404.13628) with experts of rank one and without routing to the best.
The rank bounds what all conditions together can use: take one several times larger than for other kinds.

    g(c) = 1 + W c + MLP(c)

W is drawn with variance 1 / C, the last layer of the MLP is zero at first: gates differ between conditions from the
start, around those of a plain LoRA, and B = 0 makes delta W zero. The MLP normalises; W c keeps how long c is. The
vectors of a tokenwise condition are pooled and normalised first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from hl_scale.config import GatedLoraConfig, LoraConfig
from hl_scale.hypernetwork.hyperlora import Hypernetwork, PlainLora
from hl_scale.hypernetwork.text_to_lora import AttentionPooling
from hl_scale.lora import LoraFactors, Slot


class GatedLora(Hypernetwork):
    """Condition (E, C) -> factors of E conditions; see the module docstring."""

    def __init__(self, config: GatedLoraConfig, lora: LoraConfig, slots: Sequence[Slot], condition_size: int) -> None:
        super().__init__(lora, slots, condition_size)
        self.shared = PlainLora(lora, slots, condition_size)
        width, gates, pooled = config.hidden_width, len(self.slots) * lora.rank, condition_size
        self.pooling: nn.Module = nn.Identity()
        if config.condition_tokens is not None:
            attention = AttentionPooling(condition_size, config.condition_tokens, config.pooling_queries)
            pooled = attention.width
            self.pooling = nn.Sequential(attention, nn.LayerNorm(pooled))
        self.direct = nn.Linear(pooled, gates)
        nn.init.normal_(self.direct.weight, std=1.0 / math.sqrt(pooled))
        nn.init.ones_(self.direct.bias)
        self.encoder = nn.Sequential(
            nn.Linear(pooled, width), nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.mixed = nn.Linear(width, gates, bias=False)
        nn.init.zeros_(self.mixed.weight)

    def gates(self, conditions: Tensor) -> Tensor:
        """(E, C) -> (E, K, r) weights of the parts of each slot."""
        conditions = self.pooling(conditions.to(self.direct.weight.dtype))
        hidden = self.watch_gradient(self.encoder(conditions))
        return (self.direct(conditions) + self.mixed(hidden)).unflatten(1, (len(self.slots), self.rank))

    def forward(self, conditions: Tensor) -> LoraFactors:
        """conditions (E, C) -> factors of all slots for E conditions; A is one for all, seen E times."""
        self.check_conditions(conditions)
        gates, shared = self.gates(conditions).unbind(1), self.shared(conditions)
        a = {path: own.expand(len(conditions), -1, -1) for path, own in shared.a.items()}
        b = {slot.path: shared.b[slot.path] * gate[:, None] for slot, gate in zip(self.slots, gates, strict=True)}
        return LoraFactors(self.slots, a, b, self.scale)
