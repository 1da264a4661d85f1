"""The frozen base model whose linear layers accept generated adapters."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hl_scale.base.quantized_linear import AdaptableLinear
from hl_scale.config import LoraConfig
from hl_scale.lora import LoraFactors, Slot


class BaseModelError(ValueError):
    """A base model that cannot be loaded or adapted as configured."""


class AdaptedModel(nn.Module):
    """A transformers model with frozen `AdaptableLinear` layers, and the slots that receive factors.

    Args:
        model: transformers model whose linear layers were replaced.
        tokenizer: its tokenizer, or None in tests.
        lora: which modules are slots, and the rank to check against.
        fingerprint: identifies weights and quantisation; keys caches and run provenance.
        from_multimodal: this is the language model inside a larger checkpoint, where its modules have other paths.

    Raises:
        BaseModelError: a target module does not exist, or the rank is larger than a slot allows.
    """

    def __init__(self, model: Any, tokenizer: Any, lora: LoraConfig, fingerprint: str) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        self.from_multimodal = False
        # Path inside the transformers model -> every frozen linear layer.
        self.linears: dict[str, AdaptableLinear] = {
            path: module for path, module in model.named_modules() if isinstance(module, AdaptableLinear)
        }
        self.slots = find_slots(self.linears, lora)

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def context_length(self) -> int:
        """Longest input in tokens."""
        config = self.model.config
        limit = int(config.max_position_embeddings)
        # RoBERTa-family position ids start after the padding index.
        return (
            limit - config.pad_token_id - 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else limit
        )

    @property
    def has_head(self) -> bool:
        """Whether `logits` can be asked for."""
        return self.model.get_output_embeddings() is not None

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor, factors: LoraFactors | None = None) -> Tensor:
        """States after the final norm; the head is not run.

        Args:
            input_ids: (B, T) int64, padded on the right.
            attention_mask: (B, T), 1 for tokens.
            factors: E == B adapters, one per row, or E == 1, or None for the bare base.

        Returns:
            (B, T, D) in the model's dtype.
        """
        backbone = self.model.base_model if self.has_head else self.model
        with self._attached(factors):
            arguments = {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}
            return backbone(input_ids=input_ids, attention_mask=attention_mask, **arguments).last_hidden_state

    def logits(self, input_ids: Tensor, attention_mask: Tensor, factors: LoraFactors | None = None) -> Tensor:
        """(B, T, V) next-token scores of a causal model; arguments as `hidden_states`."""
        if not self.has_head:
            raise BaseModelError(f"{type(self.model).__name__} has no language-model head, so it has no logits")
        with self._attached(factors):
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    @contextmanager
    def _attached(self, factors: LoraFactors | None) -> Iterator[None]:
        """Hand each slot its factors.

        They stay attached until the next call: checkpointed blocks run again in backward and must see them.
        """
        self.detach_factors()
        if factors is not None:
            for slot in factors.slots:
                self.linears[slot.path].factors = (factors.a[slot.path], factors.b[slot.path], factors.scale)
        try:
            yield
        finally:
            if not torch.is_grad_enabled():
                self.detach_factors()

    def detach_factors(self) -> None:
        """Forget attached factors, and with them the graph they hang on."""
        for module in self.linears.values():
            module.factors = None


def find_slots(linears: dict[str, AdaptableLinear], lora: LoraConfig) -> tuple[Slot, ...]:
    """Slots of the target modules, in model order.

    Raises:
        BaseModelError: see `AdaptedModel`.
    """
    modules = {path: path.rsplit(".", 1)[-1] for path in linears}
    known = sorted(set(modules.values()))
    for name in lora.target_modules:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise BaseModelError(
                f"lora.target_modules names {name!r}, which this base does not have\n"
                f"  fix: {hint}its linear layers are called {', '.join(known)}"
            )
    slots = []
    for path, name in modules.items():
        if name not in lora.target_modules:
            continue
        module = linears[path]
        slot = Slot(_layer_index(path), name, path, module.in_features, module.out_features)
        if lora.rank > min(slot.in_features, slot.out_features):
            raise BaseModelError(
                f"lora.rank = {lora.rank} is larger than slot {path} ({slot.in_features} -> {slot.out_features})\n"
                f"  fix: use a rank of at most {min(slot.in_features, slot.out_features)}"
            )
        slots.append(slot)
    return tuple(slots)


def _layer_index(path: str) -> int:
    """First number in a module path, 0 where there is none."""
    match = re.search(r"\.(\d+)\.", path)
    return int(match.group(1)) if match else 0
