"""Frozen linear layers that can carry a generated adapter: NF4 (`QuantizedLinear`) and dense (`FrozenLinear`).

The packed bytes are one frozen uint8 parameter, so ZeRO-3 can partition and gather them; block constants are a plain
attribute, because an engine that casts modules to bfloat16 would round them as buffers. The autograd function asks the
module for its weight again in backward and keeps nothing dequantised (see hl_scale.kernels.generated_lora).

Layers that read the same input (query, key and value; gate and up) are computed together when the first is called
(`SharedInput`); the others hand out what is ready.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hl_scale.kernels import (
    BlockConstants,
    Projection,
    Segments,
    dequantize_nf4,
    generated_lora_linears,
    quantize_nf4,
    workspace,
)
from hl_scale.kernels.generated_lora import Apply, Update, dense_source


@dataclass(frozen=True)
class Attachment:
    """An adapter on one layer.

    Attributes:
        a: (E, r, in).
        b: (E, out, r).
        scale: s.
    """

    a: Tensor
    b: Tensor
    scale: float


class AdaptableLinear(nn.Module):
    """A frozen y = x W^T + bias that adds s (x A^T) B^T while an adapter is attached.

    Attributes:
        in_features, out_features: sizes.
        frozen_name: name of the parameter that holds the weight.
        adapter: what is attached, or None for the bare layer; set by `AdaptedModel`.
        segments: which tokens of a packed x (1, T, in) belong to which condition; None for one row per condition.
        apply_as: how adapters are applied, see `generated_lora_linear`.
        shared: the layers that read the same input, or None.
    """

    bias: Tensor | None
    frozen_name: str

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.adapter: Attachment | None = None
        self.segments: Segments | None = None
        self.apply_as: Apply = "auto"
        self.shared: SharedInput | None = None
        self._elsewhere: tuple[nn.Parameter, ...] = ()

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """(out, in) weight in `dtype`, in memory of its own."""
        raise NotImplementedError

    def weight_source(self, dtype: torch.dtype, update: Update | None = None) -> Tensor:
        """The weight, or with `update` the weight with an adapter merged into it; valid until the next call."""
        raise NotImplementedError

    def frozen_tensors(self) -> list[Tensor]:
        """Everything that makes up the weight and bias, as held now (under ZeRO-3 this rank's part)."""
        held = [self._frozen, *([] if self.bias is None else [self.bias])]
        return [getattr(tensor, "ds_tensor", tensor).detach() for tensor in held]

    def checksum(self) -> int:
        """CRC-32 of the frozen bytes as held now."""
        total = 0
        for tensor in self.frozen_tensors():
            total = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy(), total)
        return total

    @property
    def _frozen(self) -> nn.Parameter:
        """The parameter with the weight, wherever it is registered."""
        return self._elsewhere[0] if self._elsewhere else self.get_parameter(self.frozen_name)

    def projection(self, dtype: torch.dtype) -> Projection:
        """This layer for `generated_lora_linears`."""
        adapter = self.adapter
        if adapter is None:
            return Projection(self.weight_source, bias=self.bias)
        return Projection(self.weight_source, adapter.a.to(dtype), adapter.b.to(dtype), adapter.scale, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out); with E > 1 conditions attached x is (E, S, in), or (1, T, in) with segments."""
        if self.shared is not None:
            return self.shared(self, x)
        return apply_together([self], x)[0]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def apply_together(layers: Sequence[AdaptableLinear], x: Tensor) -> tuple[Tensor, ...]:
    """Outputs of layers for the same x.

    Raises:
        ValueError: x has another number of features than a layer takes.
    """
    for layer in layers:
        if x.shape[-1] != layer.in_features:
            raise ValueError(f"x {tuple(x.shape)} has {x.shape[-1]} features, the layer takes {layer.in_features}")
    projections = [layer.projection(x.dtype) for layer in layers]
    segments = next((layer.segments for layer in layers if layer.adapter is not None), None)
    return generated_lora_linears(x, projections, offsets=segments, apply=layers[0].apply_as)


def gather_with(owner: nn.Module, layers: Sequence[AdaptableLinear]) -> None:
    """Make the layers' frozen weights parameters of `owner`: ZeRO-3 then gathers them when `owner` is called."""
    for layer in layers:
        if layer is not owner and not layer._elsewhere:
            frozen = layer._parameters.pop(layer.frozen_name)
            assert frozen is not None
            layer._elsewhere = (frozen,)
            number = sum(name.startswith(layer.frozen_name) for name in owner._parameters)
            owner.register_parameter(f"{layer.frozen_name}_{number}", frozen)


class SharedInput:
    """Layers that read the same input, in the order of their calls.

    The first computes all and keeps the others' outputs for them. A layer that is called with another input than the
    first had computes alone, every time: a recomputed block must do again what it did.
    """

    def __init__(self, layers: Sequence[AdaptableLinear]) -> None:
        self.layers = tuple(layers)
        self._input: Tensor | None = None
        self._ready: dict[int, Tensor] = {}
        for layer in layers:
            layer.shared = self

    def __call__(self, layer: AdaptableLinear, x: Tensor) -> Tensor:
        if layer is self.layers[0]:
            outputs = apply_together(self.layers, x)
            self._input, self._ready = x, {id(o): y for o, y in zip(self.layers[1:], outputs[1:], strict=True)}
            return outputs[0]
        same = self._input is not None and x.data_ptr() == self._input.data_ptr() and x.shape == self._input.shape
        if not same or id(layer) not in self._ready:
            return apply_together([layer], x)[0]
        y = self._ready.pop(id(layer))
        if not self._ready:
            self._input = None
        return y

    def forget(self) -> None:
        """Drop outputs nobody came for."""
        self._input, self._ready = None, {}


class QuantizedLinear(AdaptableLinear):
    """NF4 layer.

    Args:
        packed: (out * in / 2,) uint8.
        constants: block constants of the weight.
        bias: (out,) or None.
    """

    frozen_name = "packed"

    def __init__(self, packed: Tensor, constants: BlockConstants, bias: Tensor | None = None) -> None:
        super().__init__(in_features=constants.shape[1], out_features=constants.shape[0])
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.constants = constants
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None, double_quantization: bool = True) -> QuantizedLinear:
        """Quantise a dense (out, in) weight."""
        return cls(*quantize_nf4(weight, double_quantization), bias=bias)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        return dequantize_nf4(self._frozen.detach(), self.constants, dtype)

    def weight_source(self, dtype: torch.dtype, update: Update | None = None) -> Tensor:
        packed = self._frozen.detach()
        out = workspace(self.constants.shape, dtype, packed.device)
        return dequantize_nf4(packed, self.constants, dtype, update=update, out=out)

    def frozen_tensors(self) -> list[Tensor]:
        constants = (self.constants.absmax, self.constants.nested_absmax, self.constants.offset)
        return super().frozen_tensors() + [tensor for tensor in constants if tensor is not None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self.constants = self.constants.to(fn(self.constants.absmax).device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("absmax", "nested_absmax", "offset"):
            value = getattr(self.constants, name)
            if value is not None:
                destination[f"{prefix}constants.{name}"] = value
        destination[f"{prefix}checksum"] = torch.tensor(self.checksum())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        found = {
            name: state_dict.pop(f"{prefix}constants.{name}", None) for name in ("absmax", "nested_absmax", "offset")
        }
        expected = state_dict.pop(f"{prefix}checksum", None)
        if found["absmax"] is not None:
            device = self._frozen.device
            copies: dict[str, Any] = {
                name: None if value is None else value.to(device, copy=True) for name, value in found.items()
            }
            self.constants = BlockConstants(self.constants.shape, **copies)
        else:  # new bytes with old constants would be another weight
            missing_keys: list[str] = args[2]
            missing_keys.append(f"{prefix}constants.absmax")
        super()._load_from_state_dict(state_dict, prefix, *args)
        if expected is not None and self.checksum() != int(expected):
            errors: list[str] = args[4]
            errors.append(f"{prefix.rstrip('.')}: packed bytes or constants do not match their checksum")


class FrozenLinear(AdaptableLinear):
    """Dense frozen layer with the same interface: weight (out, in), bias (out,) or None."""

    frozen_name = "weight"

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(in_features=weight.shape[1], out_features=weight.shape[0])
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        return self._frozen.detach().to(dtype, copy=True)

    def weight_source(self, dtype: torch.dtype, update: Update | None = None) -> Tensor:
        return dense_source(self._frozen)(dtype, update)
