"""Supervised training: cross-entropy of answers over the whole vocabulary, a few rows of logits at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from hl_scale.config import SupervisedConfig
from hl_scale.lora import LoraFactors


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loses no time to recomputation: the gradient of each chunk is taken while its logits exist."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        label_smoothing: float,
        softcap: float | None,
        rows: int,
    ) -> Tensor:
        losses = hidden.new_empty(len(hidden), dtype=torch.float32 if hidden.dtype != torch.float64 else hidden.dtype)
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = nn.functional.linear(hidden[part], weight, bias).to(losses.dtype)
            slope = None
            if softcap is not None:
                bounded = torch.tanh(logits / softcap)
                slope, logits = 1 - bounded.square(), bounded * softcap
            normalizer = logits.logsumexp(1)
            right = logits.gather(1, targets[part, None])[:, 0]
            losses[part] = normalizer - (1 - label_smoothing) * right
            if label_smoothing:
                losses[part] -= label_smoothing * logits.mean(1)
            if gradient is not None:
                # d loss / d logits = softmax - (1 - smoothing) onehot - smoothing / V
                logits.sub_(normalizer[:, None]).exp_()
                if label_smoothing:
                    logits -= label_smoothing / logits.shape[1]
                logits[torch.arange(len(logits), device=logits.device), targets[part]] -= 1 - label_smoothing
                if slope is not None:
                    logits *= slope
                gradient[part] = logits.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0][:, None].to(gradient.dtype), None, None, None, None, None, None


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    rows: int = 64,
) -> Tensor:
    """Cross-entropy of each row, without the logits of all rows at once.

    Args:
        hidden: (N, D) states before the output head.
        weight: (V, D) of the head, frozen.
        targets: (N,) int64 tokens.
        bias: (V,) of the head.
        label_smoothing: share of the target spread evenly over the vocabulary.
        softcap: c, if logits are c tanh(logits / c).
        rows: of logits that exist at a time.

    Returns:
        (N,) losses in nats, float32 (float64 for float64 states).
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, bias, label_smoothing, softcap, rows)


class ResponseLoss(nn.Module):
    """Mean cross-entropy of each example's answer.

    Its parameters are those of the output head, so that ZeRO-3 gathers them when this module is called.
    """

    def __init__(self, head: nn.Linear, config: SupervisedConfig, softcap: float | None = None) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias
        self.config, self.softcap = config, softcap

    def forward(self, hidden: Tensor, targets: Tensor, example: Tensor, count: int) -> Tensor:
        """(B,) float32.

        Args:
            hidden: (N, D) states at the tokens before each answer token.
            targets: (N,) answer tokens.
            example: (N,) which of the B examples a row belongs to.
            count: B.
        """
        losses = chunked_cross_entropy(
            hidden,
            self.weight,
            targets,
            bias=self.bias,
            label_smoothing=self.config.label_smoothing,
            softcap=self.softcap,
            rows=self.config.logit_tokens,
        )
        sums = losses.new_zeros(count).index_add(0, example, losses)
        return sums / torch.bincount(example, minlength=count).clamp(min=1).to(losses.dtype)


def weight_penalty(factors: LoraFactors, counts: Tensor | None = None) -> Tensor:
    """Mean squares of A and of B, summed over module names; averaged over conditions by how many examples each has.

    Args:
        factors: E conditions.
        counts: (E,) examples of each; equal unless given.
    """
    shares = None if counts is None else counts.float() / counts.sum()
    squares: dict[str, list[Tensor]] = {}
    for slot in factors.slots:
        for factor in (factors.a[slot.path], factors.b[slot.path]):
            squares.setdefault(slot.module, []).append(factor.float().square().mean((1, 2)))
    total = sum(2 * torch.stack(own).mean(0) for own in squares.values())  # means over layers of A's plus B's
    assert isinstance(total, Tensor)
    return total.mean() if shares is None else (total * shares.to(total.device)).sum()


def neftune_noise(shape: tuple[int, int], alpha: float, seed: int) -> Tensor:
    """Noise for the embeddings of one example, uniform within alpha / sqrt(n D) (NEFTune, arXiv 2310.05914).

    Args:
        shape: (n, D), tokens and width.
        alpha: strength.
        seed: decides the draw, so that it depends on no rank.
    """
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) * 2 - 1) * (alpha / math.sqrt(shape[0] * shape[1]))
