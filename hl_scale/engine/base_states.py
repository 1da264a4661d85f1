"""A description as the base model itself reads it: encoders that need no model but the base."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hl_scale.base import AdaptedModel
from hl_scale.base.recompute import find_blocks
from hl_scale.conditions.descriptions import Vectors, check_texts, embed, scaled
from hl_scale.data.builtin import reference_wordings

TEXTS_PER_PASS = 32


class LastStateEncoder:
    """`encoder: base`. The state at the last token of a description, after the final norm."""

    def __init__(self, base: AdaptedModel, maximum_tokens: int) -> None:
        self.base = base
        self.width = base.hidden_size
        self.fingerprint = f"base:{base.fingerprint}"
        self.maximum_tokens = maximum_tokens

    def check(self, texts: Sequence[str]) -> None:
        """See `hl_scale.conditions.descriptions.Encoder`, as for `encode`."""
        _check(self.base, texts, self.maximum_tokens)

    def encode(self, texts: Sequence[str]) -> Vectors:
        self.check(texts)
        return scaled(_states(self.base, texts, _last))


class MeanStateEncoder:
    """`encoder: base_mean`. The mean over tokens, without the first, of states after a third of the blocks.

    Each entry is standardised by its mean and standard deviation over wordings that belong to the project, whatever is
    trained on: a few entries of such states are tens of times larger than all others.

    Args:
        base: whose states.
        maximum_tokens: a longer description is refused.
        directory: where the states of the project's wordings are kept.
    """

    def __init__(self, base: AdaptedModel, maximum_tokens: int, directory: Path) -> None:
        self.states = _MeanStates(base)
        self.maximum_tokens = maximum_tokens
        self.width = base.hidden_size
        self.directory = directory
        self.reference = reference_wordings()
        wordings = hashlib.sha256("\0".join(self.reference).encode()).hexdigest()
        self.fingerprint = f"{self.states.fingerprint}:{wordings[:16]}"
        self._moments: tuple[Vectors, Vectors] | None = None

    def check(self, texts: Sequence[str]) -> None:
        """See `hl_scale.conditions.descriptions.Encoder`, as for `encode`."""
        _check(self.states.base, texts, self.maximum_tokens)

    def encode(self, texts: Sequence[str]) -> Vectors:
        self.check(texts)
        mean, spread = self.moments
        return scaled((self.states.encode(texts) - mean) / spread)

    @property
    def moments(self) -> tuple[Vectors, Vectors]:
        """Mean and standard deviation of each entry over the project's wordings."""
        if self._moments is None:
            found = embed(self.reference, self.states, self.directory)
            self._moments = found.mean(0), found.std(0) + np.float32(1e-6)
        return self._moments


class TokenStateEncoder:
    """`encoder: base_tokens`. States after a third of the blocks, one for each token but the first, for a hypernetwork
    that looks for what it needs among them.

    An embedding is `maximum_tokens` vectors end to end, those of tokens standardised by the moments of `base_mean` and
    brought to length sqrt(D), the others zero. Arguments as for `MeanStateEncoder`.
    """

    def __init__(self, base: AdaptedModel, maximum_tokens: int, directory: Path) -> None:
        self.mean = MeanStateEncoder(base, maximum_tokens, directory)
        self.maximum_tokens = maximum_tokens
        self.width = maximum_tokens * base.hidden_size
        self.fingerprint = f"base_tokens:{maximum_tokens}:{self.mean.fingerprint}"

    def check(self, texts: Sequence[str]) -> None:
        """See `hl_scale.conditions.descriptions.Encoder`, as for `encode`."""
        self.mean.check(texts)

    def encode(self, texts: Sequence[str]) -> Vectors:
        self.check(texts)
        base = self.mean.states.base
        mean, spread = (torch.from_numpy(values) for values in self.mean.moments)

        def tokens(states: Tensor, mask: Tensor) -> Tensor:
            known = mask[:, 1:, None].float()
            found = (states[:, 1:].float() - mean.to(states.device)) / spread.to(states.device)
            found = found / found.norm(dim=-1, keepdim=True).clamp(min=1e-12) * base.hidden_size**0.5 * known
            return torch.nn.functional.pad(found, (0, 0, 0, self.maximum_tokens - found.shape[1])).flatten(1)

        return _states(base, texts, tokens, self.mean.states.block, self.width)


class _MeanStates:
    """States as they are, (n, D)."""

    def __init__(self, base: AdaptedModel) -> None:
        self.base = base
        self.width = base.hidden_size
        blocks = list(find_blocks(base.model).values())
        self.block = blocks[(len(blocks) - 1) // 3]
        self.fingerprint = f"base_mean:{base.fingerprint}"

    def check(self, texts: Sequence[str]) -> None:
        _check(self.base, texts, self.base.context_length)

    def encode(self, texts: Sequence[str]) -> Vectors:
        return _states(self.base, texts, _mean, self.block)


def _check(base: AdaptedModel, texts: Sequence[str], maximum_tokens: int) -> None:
    count = base.tokenizer
    check_texts(texts, lambda text: len(count(text)["input_ids"]), min(maximum_tokens, base.context_length))


def _last(states: Tensor, mask: Tensor) -> Tensor:
    """(B, D) of (B, T, D)."""
    return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1].float()


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    """(B, D) of (B, T, D). The first token is the same for all texts, and may be all there is."""
    mask = mask.clone()
    mask[:, 0] = mask.sum(1) == 1
    weights = mask / mask.sum(1, keepdim=True)
    return torch.einsum("btd,bt->bd", states.float(), weights.float())


class _Reached(Exception):
    """The block has run whose states are wanted."""


@torch.no_grad()
def _states(
    base: AdaptedModel,
    texts: Sequence[str],
    reduce: Callable[[Tensor, Tensor], Tensor],
    block: nn.Module | None = None,
    width: int | None = None,
) -> Vectors:
    """(n, width) float32, width D unless given: what `reduce` makes of states after a block, or after the final norm,
    and of their mask.

    Texts of like length go together. Blocks after the wanted one are not run, so the base must not be partitioned:
    ZeRO-3 would wait for them.
    """
    device = next(base.model.parameters()).device
    kept: list[Tensor] = []

    def keep(_block: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)
        raise _Reached

    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    found = np.empty((len(texts), width or base.hidden_size), np.float32)
    for start in range(0, len(texts), TEXTS_PER_PASS):
        chosen = order[start : start + TEXTS_PER_PASS]
        encoded = base.tokenizer(
            [texts[index] for index in chosen], return_tensors="pt", padding=True, padding_side="right"
        ).to(device)
        mask = encoded["attention_mask"]
        hook = block.register_forward_hook(keep) if block is not None else None
        try:
            kept.append(base.hidden_states(encoded["input_ids"], mask))
        except _Reached:
            pass
        finally:
            if hook is not None:
                hook.remove()
        found[chosen] = reduce(kept.pop(), mask).cpu().numpy()
    return found
