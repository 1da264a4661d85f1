"""Bottleneck adapters (Houlsby et al. 2019, arXiv 1902.00751): h + U relu(D h + b) + c.

One after attention and one after the feed-forward layer of every block, on the sublayer's output before the skip
connection. U and c are zero at step 0, so that the adapters are the identity then (published: weights near zero).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hl_scale.adaptations.adaptation import Adaptation, transformer_blocks
from hl_scale.adaptations.settings import BottleneckSettings
from hl_scale.base import AdaptedModel


class BottleneckAdapter(nn.Module):
    """h (..., D) -> h + U relu(D h + b) + c, computed in the adapter's type and returned in that of h."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, width)
        self.up = nn.Linear(width, hidden_size)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h: Tensor) -> Tensor:
        update = self.up(torch.relu(self.down(h.to(self.down.weight.dtype))))
        return h + update.to(h.dtype)


class BottleneckAdaptation(Adaptation):
    """Two `BottleneckAdapter` in every block."""

    kind = "bottleneck"

    def __init__(self, base: AdaptedModel, settings: BottleneckSettings, condition_size: int | None = None) -> None:
        super().__init__(base, settings, None)
        sizes = [block.hidden_size for block in transformer_blocks(base)]
        self.attention = nn.ModuleList(BottleneckAdapter(size, settings.width) for size in sizes)
        self.feed_forward = nn.ModuleList(BottleneckAdapter(size, settings.width) for size in sizes)

    def _attach(self, base: AdaptedModel, conditions: Tensor | None, stack: ExitStack) -> None:
        for number, block in enumerate(transformer_blocks(base)):
            transform_output(block.attention_output, self.attention[number], stack)
            transform_output(block.feed_forward_output, self.feed_forward[number], stack)


def transform_output(module: nn.Module, transform: Callable[[Tensor], Tensor], stack: ExitStack) -> None:
    """Let a module return the transform of what it returns, until `stack` is closed."""

    def hook(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        return transform(output)

    stack.enter_context(module.register_forward_hook(hook))


def count_bottleneck(base: AdaptedModel, settings: BottleneckSettings, condition_size: int | None = None) -> int:
    """2 (2 m D + m + D), summed over blocks."""
    return sum(2 * adapter_size(block.hidden_size, settings.width) for block in transformer_blocks(base))


def adapter_size(hidden_size: int, width: int) -> int:
    """Numbers that make up one adapter: two matrices and two biases."""
    return 2 * width * hidden_size + width + hidden_size
