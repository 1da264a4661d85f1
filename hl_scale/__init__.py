"""hl_scale: hypernetworks that generate LoRA adapters for 4-bit language models.

Symbols used throughout: condition c (E, C); LoRA factors A (E, r, in), B (E, out, r); scale s; token cloud x (N, D)
with weights a (N,) that sum to 1; Sinkhorn divergence S_eps(a, b) with epsilon = blur^2 on the cost 0.5*|x-y|^2.
"""

__version__ = "0.1.0"
