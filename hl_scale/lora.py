"""LoRA factors and the slots they belong to (LoRA, arXiv 2106.09685): y = W x + s B (A x)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
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
        """r; the largest one where a sum (`sum_factors`) has slots that some parts lack."""
        return max(a.shape[1] for a in self.a.values())

    def select(self, index: int | slice | Tensor) -> LoraFactors:
        """Factors of one condition (E = 1), of a slice (views), or of several by an index tensor (repeats allowed)."""
        if isinstance(index, slice):
            a, b = ({path: factor[index] for path, factor in side.items()} for side in (self.a, self.b))
            return replace(self, a=a, b=b)
        rows = torch.tensor([index]) if isinstance(index, int) else index
        return LoraFactors(
            self.slots,
            {path: factor.index_select(0, rows.to(factor.device)) for path, factor in self.a.items()},
            {path: factor.index_select(0, rows.to(factor.device)) for path, factor in self.b.items()},
            self.scale,
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> LoraFactors:
        """The same on another device, in another floating dtype if one is given."""
        a, b = ({path: f.to(device, dtype) for path, f in side.items()} for side in (self.a, self.b))
        return replace(self, a=a, b=b)

    def rescaled(self, scale: float) -> LoraFactors:
        """The same update under another scale: B times s / scale, rounded once in its dtype; A is untouched."""
        if scale == self.scale:
            return self
        ratio = self.scale / scale
        return replace(self, b={path: b * ratio for path, b in self.b.items()}, scale=scale)

    def inputs(self, slots: Sequence[Slot]) -> list[Tensor]:
        """See `FactorSource`: A and B of each slot in turn."""
        return [factor for slot in slots for factor in (self.a[slot.path], self.b[slot.path])]

    def build(self, slots: Sequence[Slot], inputs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        return list(zip(inputs[::2], inputs[1::2], strict=True))

    def delta_norms(self) -> Tensor:
        """(E,) float64 norm of s B A over all slots, on the CPU."""
        with torch.no_grad():
            return self.squared_delta_norms(torch.float64).sqrt().cpu()

    def squared_delta_norms(self, dtype: torch.dtype) -> Tensor:
        """(E,) squared norm of s B A over all slots, without forming it; differentiable.

        |B A|^2 = tr((B^T B) (A A^T)).
        """
        squares = []
        for slot in self.slots:
            a, b = self.a[slot.path].to(dtype), self.b[slot.path].to(dtype)
            squares.append(((b.mT @ b) * (a @ a.mT)).sum((1, 2)))
        return self.scale**2 * torch.stack(squares).sum(0).clamp(min=0)


@dataclass(frozen=True)
class SummedFactors:
    """A `FactorSource` that adds a fixed adapter to others, slot by slot, where their factors are built.

    Updates of one slot are added by stacking: B_1 A_1 + B_2 A_2 = [B_1 B_2] [A_1; A_2], whose rank is the sum of both.
    A slot that one of them lacks keeps the factors of the other. E conditions and one are added for each of the E.

    Args:
        first: the other adapters, perhaps still to be generated.
        fixed: of the same scale (`LoraFactors.rescaled`).

    Raises:
        ValueError: another scale, numbers of conditions that are neither equal nor 1, or sizes of a slot that differ.
    """

    first: FactorSource
    fixed: LoraFactors

    def __post_init__(self) -> None:
        first, fixed = self.first, self.fixed
        if first.scale != fixed.scale:
            raise ValueError(
                f"factors of scale {first.scale} and {fixed.scale} are not added as they are: rescale them"
            )
        if first.conditions != fixed.conditions and 1 not in (first.conditions, fixed.conditions):
            raise ValueError(
                f"adapters of {first.conditions} and of {fixed.conditions} conditions cannot be added\n"
                "  fix: select the same number of conditions from both, or a single one from either"
            )
        sizes = {slot.path: (slot.in_features, slot.out_features) for slot in first.slots}
        for slot in fixed.slots:
            own = (slot.in_features, slot.out_features)
            if sizes.get(slot.path, own) != own:
                raise ValueError(
                    f"slot {slot.path} has {sizes[slot.path]} features (in, out) in one adapter, {own} in the other\n"
                    "  fix: add adapters of one base"
                )

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """Of both, by layer; within a layer those of `first` come first."""
        own = {slot.path for slot in self.first.slots}
        more = [slot for slot in self.fixed.slots if slot.path not in own]
        return tuple(sorted([*self.first.slots, *more], key=lambda slot: slot.layer))

    @property
    def scale(self) -> float:
        return self.first.scale

    @property
    def conditions(self) -> int:
        """E, of both together."""
        return max(self.first.conditions, self.fixed.conditions)

    def inputs(self, slots: Sequence[Slot]) -> list[Tensor]:
        """See `FactorSource`: those of the fixed adapter come first, two for each of its slots."""
        own, fixed = self._parts(slots)
        return [*self.fixed.inputs(fixed), *(self.first.inputs(own) if own else [])]

    def build(self, slots: Sequence[Slot], inputs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        own, fixed = self._parts(slots)
        cut = 2 * len(fixed)
        added = dict(zip((slot.path for slot in fixed), self.fixed.build(fixed, inputs[:cut]), strict=True))
        first = self.first.build(own, inputs[cut:]) if own else []
        built = dict(zip((slot.path for slot in own), first, strict=True))
        return [self._stacked([part[slot.path] for part in (built, added) if slot.path in part]) for slot in slots]

    def _parts(self, slots: Sequence[Slot]) -> tuple[list[Slot], list[Slot]]:
        """Which of these slots each of the two has."""
        own, fixed = ({slot.path for slot in part.slots} for part in (self.first, self.fixed))
        return [slot for slot in slots if slot.path in own], [slot for slot in slots if slot.path in fixed]

    def _stacked(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        pairs = [(a.expand(self.conditions, -1, -1), b.expand(self.conditions, -1, -1)) for a, b in pairs]
        if len(pairs) == 1:
            return pairs[0]
        return torch.cat([a for a, _ in pairs], dim=1), torch.cat([b for _, b in pairs], dim=2)


def with_fixed(factors: FactorSource, fixed: LoraFactors | None) -> FactorSource:
    """Factors added to fixed ones of the same scale (`SummedFactors`), or as they are where nothing is fixed."""
    return factors if fixed is None else SummedFactors(factors, fixed)


def sum_factors(first: LoraFactors, *others: LoraFactors) -> LoraFactors:
    """One adapter whose update is the sum of the updates of all: s_1 B_1 A_1 + s_2 B_2 A_2 + ...

    Ranks of a slot add up, see `SummedFactors` for slots and conditions. The scale is that of `first` (1 if that is 0),
    whose factors are stored as they are; the others' B are multiplied by s_i / s_1 and rounded in their own dtype.
    Where dtypes differ the sum has the wider one. Gradients flow to the factors of every part.

    Raises:
        ValueError: adapters that cannot be added, see `SummedFactors`.
    """
    total = first if first.scale else first.rescaled(1.0)
    for other in others:
        source = SummedFactors(total, other.rescaled(total.scale))
        pairs = dict(zip(source.slots, source.build(source.slots, source.inputs(source.slots)), strict=True))
        a, b = ({slot.path: pair[side] for slot, pair in pairs.items()} for side in (0, 1))
        total = LoraFactors(source.slots, a, b, source.scale)
    return total


def lora_scale(convention: str, alpha: float, rank: int) -> float:
    """s under a convention: "alpha_over_rank", "alpha_over_sqrt_rank" (arXiv 2312.03732) or "one" (HyperLoRA)."""
    scales = {"alpha_over_rank": alpha / rank, "alpha_over_sqrt_rank": alpha / math.sqrt(rank), "one": 1.0}
    if convention not in scales:
        raise ValueError(f"unknown scale convention {convention!r}; use one of {', '.join(scales)}")
    return scales[convention]
