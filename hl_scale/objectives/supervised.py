"""The supervised objective: cross-entropy of answers, without ever holding the logits of all their tokens.

    loss_i = (1 - e) (log sum_v exp z_iv - z_it) + e (log sum_v exp z_iv - mean_v z_iv)      z_i = W x_i + bias

with target t and label smoothing e; with final-logit soft-capping z becomes c tanh(z / c). Logits exist for a few
tokens at a time. The gradient with respect to x_i needs the same logits, (softmax(z_i) - (1 - e) 1_t - e / V) W, so it
is taken while they are there and kept until backward: a product for logits, one for gradients, none repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hl_scale.lora import LoraFactors

if TYPE_CHECKING:
    from hl_scale.config import SupervisedConfig

_CPU_TILE = 1024
"""Rows of a 16-bit W upcast at a time on CPUs, whose 16-bit products round their results: they stay in cache."""

_NO_UPDATE = 1e-12
"""Squared norm below which an update counts as none: delta W = 0 at first, and nothing may be divided by it."""


class EmptyAnswerError(ValueError):
    """An example has no token to predict."""


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
    """Cross-entropy of each token under a frozen output layer.

    Args:
        hidden: (N, D) states, any floating dtype; N may be 0.
        weight: (V, D) frozen, in the dtype of `hidden` or any other.
        targets: (N,) int64 in [0, V).
        bias: (V,) frozen.
        label_smoothing: share of the target spread over the vocabulary.
        softcap: c of final-logit soft-capping, or None.
        rows: logits exist for so many tokens at a time, in float32.

    Returns:
        (N,) float32 losses (float64 for float64 states), differentiable in `hidden` once. Products are accumulated in
        that dtype and not rounded below it.

    Raises:
        ValueError: shapes that do not fit, a target outside the vocabulary, or a weight that is being trained.
    """
    _check(hidden, weight, targets, bias)
    head = _Head(weight.detach(), None if bias is None else bias.detach(), label_smoothing, softcap)
    # Inside a Function autograd is always off, so whether a gradient will be asked for is seen here.
    wants_gradient = torch.is_grad_enabled() and hidden.requires_grad
    return _ChunkedCrossEntropy.apply(hidden, targets, head, rows, wants_gradient)


class ResponseLoss(nn.Module):
    """Mean cross-entropy of each example's answer.

    The output layer's weight is registered here as well, so that ZeRO-3 gathers it when this module is called.

    Args:
        output: the model's output layer, with `weight` (V, D) and perhaps `bias` (V,), frozen.
        config: section ``objective``.
        softcap: the model's ``final_logit_softcapping``.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, output: nn.Module, config: SupervisedConfig, softcap: float | None = None) -> None:
        super().__init__()
        self.weight = output.weight  # type: ignore[assignment]
        self.bias = getattr(output, "bias", None)
        self.config = config
        self.softcap = softcap

    def forward(self, hidden: Tensor, targets: Tensor, example: Tensor, examples: int) -> Tensor:
        """Loss of each example: the mean over its own tokens.

        Args:
            hidden: (N, D) states at the positions that predict the answers' tokens.
            targets: (N,) int64, the tokens they predict.
            example: (N,) int64 in [0, B), the example each belongs to.
            examples: B.

        Returns:
            (B,) float32.

        Raises:
            EmptyAnswerError: an example has no token.
            ValueError: see `chunked_cross_entropy`.
        """
        counts = torch.bincount(example, minlength=examples)
        empty = (counts == 0).nonzero()[:, 0].tolist()
        if empty:
            raise EmptyAnswerError(
                f"no token to predict in example {', '.join(map(str, empty[:5]))} of {examples}\n"
                "  fix: remove examples with an empty answer, or give data.answer_end"
            )
        losses = chunked_cross_entropy(
            hidden, self.weight, targets, bias=self.bias, label_smoothing=self.config.label_smoothing,
            softcap=self.softcap, rows=self.config.logit_tokens,
        )  # fmt: skip
        return losses.new_zeros(examples).index_add(0, example, losses) / counts


def weight_penalty(factors: LoraFactors, counts: Tensor | None = None) -> Tensor:
    """Mean squares of A and of B over all layers of a module name, summed over names: (), float32.

    The mean over conditions weighs each by `counts` (E,), its number of examples; equally if None.
    """
    by_module: dict[str, list[str]] = {}
    for slot in factors.slots:
        by_module.setdefault(slot.module, []).append(slot.path)
    penalties = torch.stack(
        [
            _mean_square([side[path] for path in paths])
            for paths in by_module.values()
            for side in (factors.a, factors.b)
        ]
    ).sum(0)
    if counts is None:
        return penalties.mean()
    shares = counts.to(penalties)
    return (penalties * shares).sum() / shares.sum()


def unfamiliar_penalty(factors: LoraFactors, counts: Tensor) -> Tensor:
    """Squared norm of the updates of unfamiliar conditions, relative to the own ones: (), float32.

    Without it a condition unlike any description gets the adapter of some task or other. Norms of own updates are
    taken as constants.

    Args:
        factors: of E own conditions and E unfamiliar ones after them; one condition for all gives 0.
        counts: (E,) numbers of examples, which weigh the ratios.
    """
    if factors.conditions == 1:
        return torch.zeros((), device=counts.device)
    own, unfamiliar = factors.squared_delta_norms(torch.float32).unflatten(0, (2, -1))
    ratios = unfamiliar / own.detach().clamp(min=_NO_UPDATE)
    shares = counts.to(ratios)
    return (ratios * shares).sum() / shares.sum()


def neftune_noise(shape: tuple[int, int], alpha: float, seed: int) -> Tensor:
    """Noise on the embeddings of one example (NEFTune, arXiv 2310.05914): uniform within alpha / sqrt(n D).

    Args:
        shape: n real tokens of the example, and the width D.
        alpha: strength.
        seed: all that the draw depends on.

    Returns:
        (n, D) float32 on the CPU.
    """
    tokens, width = shape
    uniform = torch.rand(tokens, width, generator=torch.Generator().manual_seed(seed))
    return (2 * uniform - 1) * (alpha / max(tokens * width, 1) ** 0.5)


@dataclass(frozen=True)
class _Head:
    """A frozen output layer with its loss; attributes as the arguments of `chunked_cross_entropy`."""

    weight: Tensor
    bias: Tensor | None
    label_smoothing: float
    softcap: float | None

    def losses(self, scores: Tensor, targets: Tensor, wants_gradient: bool) -> Tensor:
        """(R,) losses; `scores` (R, V) are W x on entry, and the gradient with respect to them at the end."""
        slope = None
        if self.bias is not None:
            scores.add_(self.bias)
        if self.softcap is not None:
            scores.div_(self.softcap).tanh_()
            slope = 1 - scores.square() if wants_gradient else None
            scores.mul_(self.softcap)
        scores.sub_(scores.amax(1, keepdim=True))
        own, smoothing = torch.arange(len(targets), device=targets.device), self.label_smoothing
        aim = (1 - smoothing) * scores[own, targets]
        if smoothing:
            aim += smoothing * scores.mean(1)
        total = scores.exp_().sum(1, keepdim=True)
        if wants_gradient:
            scores.div_(total)
            if smoothing:
                scores.sub_(smoothing / scores.shape[1])
            scores[own, targets] -= 1 - smoothing
            if slope is not None:
                scores.mul_(slope)
        return total[:, 0].log() - aim

    def scores(self, hidden: Tensor, out: Tensor) -> None:
        """out (R, V) = hidden W^T, not rounded below the dtype of `out`."""
        if hidden.is_cuda and hidden.dtype == self.weight.dtype != out.dtype:
            torch.mm(hidden, self.weight.T, out_dtype=out.dtype, out=out)
            return
        wide = hidden.to(out.dtype)
        for part, weight in self._tiles(out.dtype):
            torch.mm(wide, weight.T, out=out[:, part])

    def gradient(self, by_scores: Tensor, dtype: torch.dtype) -> Tensor:
        """(R, D) = by_scores W in the dtype of `by_scores`; on GPUs its factors are rounded to `dtype`."""
        if by_scores.is_cuda and dtype == self.weight.dtype != by_scores.dtype:
            return torch.mm(by_scores.to(dtype), self.weight, out_dtype=by_scores.dtype)
        total = by_scores.new_zeros(len(by_scores), self.weight.shape[1])
        for part, weight in self._tiles(by_scores.dtype):
            total.addmm_(by_scores[:, part], weight)
        return total

    def _tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """W in `dtype`, whole if it is so already."""
        size = len(self.weight) if self.weight.dtype == dtype else _CPU_TILE
        for start in range(0, len(self.weight), size):
            part = slice(start, start + size)
            yield part, self.weight[part].to(dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """hidden (N, D), targets (N,) -> losses (N,)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: _Head, rows: int, wants_gradient: bool) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses = hidden.new_empty(len(hidden), dtype=wide)
        gradient = torch.empty_like(hidden, dtype=wide) if wants_gradient else None
        buffer = hidden.new_empty(min(rows, len(hidden)), len(head.weight), dtype=wide)
        for start in range(0, len(hidden), rows):
            part = slice(start, min(start + rows, len(hidden)))
            scores = buffer[: part.stop - part.start]
            head.scores(hidden[part], out=scores)
            losses[part] = head.losses(scores, targets[part], wants_gradient)
            if gradient is not None:
                gradient[part] = head.gradient(scores, hidden.dtype)
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden.dtype
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad[:, None]).to(ctx.dtype), None, None, None, None


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    fits = (
        hidden.dim() == weight.dim() == 2 and hidden.shape[1] == weight.shape[1] and targets.shape == hidden.shape[:1]
    )
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)} and bias "
            f"{None if bias is None else tuple(bias.shape)} do not fit; expected (N, D), (V, D), (N,) and (V,) or None"
        )
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError(
            "the output layer is taken as frozen, but requires a gradient\n  fix: call requires_grad_(False)"
        )
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < len(weight):
        raise ValueError(
            f"targets lie in [{int(targets.min())}, {int(targets.max())}], the vocabulary has {len(weight)} tokens\n"
            "  fix: pass the positions that predict answer tokens only; there is no ignored index"
        )


def _mean_square(tensors: list[Tensor]) -> Tensor:
    """(E,) mean square of each condition's entries in tensors (E, ...)."""
    squares = torch.stack([tensor.float().square().flatten(1).sum(1) for tensor in tensors]).sum(0)
    return squares / sum(tensor[0].numel() for tensor in tensors)
