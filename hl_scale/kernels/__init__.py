"""Tensor kernels that need nothing but torch (and triton on GPUs); `reference` defines what each computes."""

from hl_scale.kernels.generated_lora import generated_lora_linear
from hl_scale.kernels.nf4 import BlockConstants, dequantize_nf4, quantize_nf4
from hl_scale.kernels.reference import generated_lora_linear_reference

__all__ = [
    "BlockConstants",
    "dequantize_nf4",
    "generated_lora_linear",
    "generated_lora_linear_reference",
    "quantize_nf4",
]
