"""Frozen linear layers that can carry a generated adapter: NF4 (`QuantizedLinear`) and dense (`FrozenLinear`).

The packed bytes are one frozen uint8 parameter, so ZeRO-3 can partition and gather them; block constants are a plain
attribute, because an engine that casts modules to bfloat16 would round them as buffers. The autograd function asks the
module for its weight again in backward and keeps nothing dequantised (see hl_scale.kernels.generated_lora).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hl_scale.kernels import BlockConstants, dequantize_nf4, generated_lora_linear, quantize_nf4


class AdaptableLinear(nn.Module):
    """A frozen y = x W^T + bias that adds s (x A^T) B^T while factors are attached.

    Attributes:
        in_features, out_features: sizes.
        factors: (A (E, r, in), B (E, out, r), s), or None for the bare layer; set by `AdaptedModel`.
    """

    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.factors: tuple[Tensor, Tensor, float] | None = None

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """(out, in) weight in `dtype`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out); with E > 1 factors attached x must be (E, S, in)."""
        if self.factors is None:
            return generated_lora_linear(x, self.dense_weight, bias=self.bias)
        a, b, scale = self.factors
        return generated_lora_linear(x, self.dense_weight, a.to(x.dtype), b.to(x.dtype), scale, bias=self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class QuantizedLinear(AdaptableLinear):
    """NF4 layer.

    Args:
        packed: (out * in / 2,) uint8.
        constants: block constants of the weight.
        bias: (out,) or None.
    """

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
        return dequantize_nf4(self.packed.detach(), self.constants, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self.constants = self.constants.to(self.packed.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("absmax", "nested_absmax", "offset"):
            value = getattr(self.constants, name)
            if value is not None:
                destination[f"{prefix}constants.{name}"] = value

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        found = {
            name: state_dict.pop(f"{prefix}constants.{name}", None) for name in ("absmax", "nested_absmax", "offset")
        }
        if found["absmax"] is not None:
            self.constants = BlockConstants(self.constants.shape, **found)
        else:  # new bytes with old constants would be another weight
            missing_keys: list[str] = args[2]
            missing_keys.append(f"{prefix}constants.absmax")
        super()._load_from_state_dict(state_dict, prefix, *args)


class FrozenLinear(AdaptableLinear):
    """Dense frozen layer with the same interface: weight (out, in), bias (out,) or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(in_features=weight.shape[1], out_features=weight.shape[0])
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        return self.weight.detach().to(dtype)
