"""LoRA factors and the slots they belong to (LoRA, arXiv 2106.09685): y = W x + s B (A x)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """One linear layer that receives an adapter.

    Attributes:
        layer: index of the transformer block.
        module: last part of the path, for example "q_proj".
        path: full module path inside the transformers model.
        in_features, out_features: sizes of the layer.
    """

    layer: int
    module: str
    path: str
    in_features: int
    out_features: int


class FactorSource(Protocol):
    """Factors of E conditions, at hand (`LoraFactors`) or still to be generated from something smaller.

    A block of the base asks for `inputs` of its slots, and for `build` wherever it runs, perhaps a second time in
    backward: what is recomputed there and what gradients flow to is named explicitly.
    """

    @property
    def slots(self) -> tuple[Slot, ...]: ...

    @property
    def scale(self) -> float: ...

    @property
    def conditions(self) -> int:
        """E."""

    def inputs(self, slots: Sequence[Slot]) -> list[Tensor]:
        """Tensors that the factors of these slots are made from."""

    def build(self, slots: Sequence[Slot], inputs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """A (E, r, in) and B (E, out, r) of each slot."""


@dataclass(frozen=True)
class LoraFactors:
    """Factors of every slot for E conditions.

    Attributes:
        slots: the slots, in model order.
        a: path -> A (E, r, in).
        b: path -> B (E, out, r).
        scale: s, the same for every slot.
    """

    slots: tuple[Slot, ...]
    a: dict[str, Tensor]
    b: dict[str, Tensor]
    scale: float

    @property
    def conditions(self) -> int:
        """E, the number of conditions."""
        return self.a[self.slots[0].path].shape[0]

    @property
    def rank(self) -> int:
        return self.a[self.slots[0].path].shape[1]

    def select(self, index: int | Tensor) -> LoraFactors:
        """Factors of one condition (E = 1), or of several by an index tensor (repeats allowed)."""
        rows = torch.tensor([index]) if isinstance(index, int) else index
        return LoraFactors(
            self.slots,
            {path: factor.index_select(0, rows.to(factor.device)) for path, factor in self.a.items()},
            {path: factor.index_select(0, rows.to(factor.device)) for path, factor in self.b.items()},
            self.scale,
        )

    def inputs(self, slots: Sequence[Slot]) -> list[Tensor]:
        """See `FactorSource`: A and B of each slot in turn."""
        return [factor for slot in slots for factor in (self.a[slot.path], self.b[slot.path])]

    def build(self, slots: Sequence[Slot], inputs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        return list(zip(inputs[::2], inputs[1::2], strict=True))

    def delta_norms(self) -> Tensor:
        """(E,) float64 norm of s B A over all slots, without forming it: |BA|^2 = tr((B^T B)(A A^T))."""
        total = torch.zeros(self.conditions, dtype=torch.float64)
        for slot in self.slots:
            a, b = self.a[slot.path].double(), self.b[slot.path].double()
            total = total + ((b.transpose(1, 2) @ b) * (a @ a.transpose(1, 2))).sum((1, 2)).detach().cpu()
        return abs(self.scale) * total.clamp(min=0).sqrt()


def lora_scale(convention: str, alpha: float, rank: int) -> float:
    """s under a convention: "alpha_over_rank", "alpha_over_sqrt_rank" (arXiv 2312.03732) or "one" (HyperLoRA)."""
    scales = {"alpha_over_rank": alpha / rank, "alpha_over_sqrt_rank": alpha / math.sqrt(rank), "one": 1.0}
    if convention not in scales:
        raise ValueError(f"unknown scale convention {convention!r}; use one of {', '.join(scales)}")
    return scales[convention]
