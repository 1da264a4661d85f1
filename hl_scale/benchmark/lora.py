"""The adapted 4-bit linear with one adapter per example, against the bare 4-bit matmul: a lower bound, not a peer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hl_scale.benchmark.measure import Row
from hl_scale.kernels import dequantize_nf4, generated_lora_linear, generated_lora_linear_reference, quantize_nf4

SHAPES = ((32, 32, 640, 1024), (8, 128, 640, 2048), (8, 128, 2048, 640))
"""Examples, tokens of each, input width, output width."""


def lora_rows(device: str, long: bool) -> Iterator[Row]:
    """Rows for "cpu" or "cuda"; rank 8, float32."""
    generator = torch.Generator().manual_seed(0)
    for examples, length, inputs, outputs in SHAPES:
        weight = torch.randn(outputs, inputs, generator=generator) * 0.02
        packed, constants = quantize_nf4(weight.to(device))
        leaves = [
            torch.randn(examples, length, inputs, generator=generator),
            torch.randn(examples, 8, inputs, generator=generator) / inputs**0.5,
            torch.randn(examples, outputs, 8, generator=generator) * 0.01,
        ]
        name = f"E={examples}, S={length}, {inputs} -> {outputs}, r=8"
        yield _row(name, packed, constants, [leaf.to(device) for leaf in leaves])


def _row(name: str, packed: Tensor, constants: object, inputs: list[Tensor]) -> Row:
    def gradients(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        y = function(*leaves)
        y.sum().backward()
        return [y.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]

    def source(dtype: torch.dtype) -> Tensor:
        return dequantize_nf4(packed, constants, dtype)  # type: ignore[arg-type]

    exact = gradients(
        lambda x, a, b: generated_lora_linear_reference(x, source(torch.float32).double(), a, b, 1.0),
        [tensor.double() for tensor in inputs],
    )
    return Row(
        name,
        lambda: gradients(lambda x, a, b: generated_lora_linear(x, source, a, b, 1.0), inputs),
        exact,
        1e-4,
        {"bare 4-bit matmul": lambda: gradients(lambda x: generated_lora_linear(x, source), inputs[:1])},
        comparable=False,
    )
