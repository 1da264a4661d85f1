"""Prefix-tuning (Li and Liang 2021, arXiv 2101.00190): trained keys and values that every token attends to.

In every layer P keys and values, per key-value head, stand before those of the text; softmax runs over prefix and
tokens. The keys are used as they are: they have no position, and positions of the text stay what they were. The prefix
is seen from everywhere, also past the window of a sliding-window layer. (PEFT puts its prefix into the model's cache:
positions of the text are moved by P, which costs a BERT P of its positions, and tokens further than the window from the
beginning do not see it in such layers.)

Initial values are the keys and values of P tokens drawn at random: the paper found activations of real words to train
better than random numbers, and they have the scale that the model's attention expects. So there is an effect at step 0.
The paper's reparametrisation by an MLP, which is dropped after training, is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hl_scale.adaptations.adaptation import Adaptation, AdaptationError, transformer_blocks
from hl_scale.adaptations.settings import PrefixSettings
from hl_scale.base import AdaptedModel

# Others take no mask that could be widened by the prefix.
_ATTENTION = ("eager", "sdpa")


class PrefixAdaptation(Adaptation):
    """P keys and values per block, one table row (2 x heads x head size) for each of the P.

    Raises:
        AdaptationError: the base runs attention in a way that takes no mask.
    """

    kind = "prefix"

    def __init__(self, base: AdaptedModel, settings: PrefixSettings, condition_size: int | None = None) -> None:
        super().__init__(base, settings, None)
        attention = getattr(base.model.config, "_attn_implementation", "eager")
        if attention not in _ATTENTION:
            raise AdaptationError(
                f"a prefix needs attention with a mask, the base runs {attention!r}\n"
                f"  fix: load it with one of {', '.join(_ATTENTION)}"
            )
        blocks = transformer_blocks(base)
        self.shapes = [(settings.prefix_length, 2, block.heads, block.head_size) for block in blocks]
        # Embeddings, not bare parameters, so that an engine that partitions modules gathers them when called.
        self.tables = nn.ModuleList(
            nn.Embedding(settings.prefix_length, 2 * block.heads * block.head_size) for block in blocks
        )

    def keys_and_values(self) -> list[tuple[Tensor, Tensor]]:
        """Of each block, (1, heads, P, head size) each."""
        found = []
        for table, shape in zip(self.tables, self.shapes, strict=True):
            rows = table(torch.arange(shape[0], device=next(table.parameters()).device)).view(shape)
            keys, values = rows.permute(1, 2, 0, 3)[:, None]
            found.append((keys, values))
        return found

    def _attach(self, base: AdaptedModel, conditions: Tensor | None, stack: ExitStack) -> None:
        for block, (keys, values) in zip(transformer_blocks(base), self.keys_and_values(), strict=True):
            hook = _with_prefix(keys, values)
            stack.enter_context(block.attention.register_forward_pre_hook(hook, with_kwargs=True))

    @torch.no_grad()
    def initialize(self, base: AdaptedModel, seed: int) -> None:
        """Keys and values that the base computes for P tokens drawn from its vocabulary."""
        length = self.shapes[0][0]
        columns = min(length, base.context_length)
        vocabulary = base.model.get_input_embeddings().num_embeddings
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(vocabulary, (-(-length // columns), columns), generator=generator)
        ids = ids.to(next(base.parameters()).device)
        recorders = [_Recorder() for _ in self.shapes]
        with ExitStack() as stack:
            for block, recorder in zip(transformer_blocks(base), recorders, strict=True):
                stack.enter_context(block.attention.register_forward_pre_hook(recorder.listen, with_kwargs=True))
            base.hidden_states(ids, torch.ones_like(ids))
        for table, recorder in zip(self.tables, recorders, strict=True):
            rows = torch.stack((recorder.keys, recorder.values))  # (2, rows, heads, columns, head size)
            rows = rows.permute(1, 3, 0, 2, 4).flatten(0, 1)[:length]
            table.get_parameter("weight").copy_(rows.flatten(1))


class _Recorder:
    """Stands in for a cache, and keeps what an attention layer hands it."""

    keys: Tensor
    values: Tensor

    def listen(self, module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return arguments, {**keywords, "past_key_values": self}

    def update(self, keys: Tensor, values: Tensor, *position: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = keys, values
        return keys, values


class _PrefixedCache:
    """Puts the prefix before the keys and values of the text, which the model's own cache, if any, has completed."""

    def __init__(self, keys: Tensor, values: Tensor, cache: Any) -> None:
        self.prefix, self.cache = (keys, values), cache

    def update(self, keys: Tensor, values: Tensor, *position: Any, **options: Any) -> tuple[Tensor, ...]:
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *position, **options)
        return tuple(
            torch.cat((prefix.to(states.dtype).expand(len(states), -1, -1, -1), states), dim=2)
            for prefix, states in zip(self.prefix, (keys, values), strict=True)
        )


def _with_prefix(keys: Tensor, values: Tensor) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """A hook that hands an attention module the prefix, and a mask that lets every token see it."""

    def hook(module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        states = arguments[0] if arguments else keywords["hidden_states"]
        cache = keywords.get("past_key_values")
        mask = keywords.get("attention_mask")
        if mask is None:
            mask = _implied_mask(module, states, cache)
        if mask is not None:
            seen = mask.new_ones if mask.dtype == torch.bool else mask.new_zeros
            mask = torch.cat((seen((*mask.shape[:-1], keys.shape[2])), mask), dim=-1)
        return arguments, {
            **keywords, "attention_mask": mask, "past_key_values": _PrefixedCache(keys, values, cache),
        }  # fmt: skip

    return hook


def _implied_mask(module: nn.Module, states: Tensor, cache: Any) -> Tensor | None:
    """What stands behind no mask: everything is seen, or in a causal module, everything up to the token itself.

    With a prefix that cannot be left to the attention function, which would count the prefix as the first tokens.
    """
    tokens = states.shape[1]
    if tokens == 1 or not getattr(module, "is_causal", True):
        return None
    past = 0 if cache is None else int(cache.get_seq_length(getattr(module, "layer_idx", 0)))
    return torch.ones(1, 1, tokens, past + tokens, dtype=torch.bool, device=states.device).tril(past)


def count_prefix(base: AdaptedModel, settings: PrefixSettings, condition_size: int | None = None) -> int:
    """2 P heads x head size, summed over blocks."""
    return sum(2 * settings.prefix_length * block.heads * block.head_size for block in transformer_blocks(base))
