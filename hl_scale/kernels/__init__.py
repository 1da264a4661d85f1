"""Tensor kernels that need nothing but torch (and triton on GPUs); `reference` defines what each computes."""

from hl_scale.kernels.generated_lora import Projection, generated_lora_linear, generated_lora_linears
from hl_scale.kernels.nf4 import BlockConstants, dequantize_nf4, quantize_nf4, workspace
from hl_scale.kernels.reference import generated_lora_linear_reference
from hl_scale.kernels.segments import Segments

__all__ = [
    "BlockConstants",
    "Projection",
    "Segments",
    "dequantize_nf4",
    "generated_lora_linear",
    "generated_lora_linear_reference",
    "generated_lora_linears",
    "quantize_nf4",
    "workspace",
]
