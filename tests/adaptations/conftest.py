"""Tiny bases in memory, a decoder and encoders, with every number far enough from zero to matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from hl_scale.base import AdaptedModel, adapt_model
from hl_scale.config import BaseModelConfig, LoraConfig

SIZES: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 40, "pad_token_id": 1,
}  # fmt: skip
TARGETS = {"gemma": ("q_proj", "v_proj"), "llama": ("q_proj", "v_proj")}


def _model(kind: str, **sizes: Any) -> Any:
    if kind == "gemma":  # grouped queries, a head size unlike hidden / heads, two sliding layers
        return Gemma3ForCausalLM(
            Gemma3TextConfig(**{"num_key_value_heads": 2, "head_dim": 12, "sliding_window": 6} | SIZES | sizes)
        )
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**{"num_key_value_heads": 2} | SIZES | sizes))
    if kind == "bert":
        return BertModel(BertConfig(**SIZES | sizes), add_pooling_layer=False)
    return RobertaModel(RobertaConfig(**SIZES | {"type_vocab_size": 1} | sizes), add_pooling_layer=False)


@pytest.fixture
def make_base() -> Callable[..., AdaptedModel]:
    """make_base(kind="gemma", sizes=None, fingerprint="tiny", **base options) -> a frozen tiny base.

    In float32 and 4 bits unless said otherwise.
    """

    def make(
        kind: str = "gemma", sizes: dict[str, Any] | None = None, fingerprint: str = "tiny", **options: Any
    ) -> AdaptedModel:
        torch.manual_seed(3)
        model = _model(kind, **(sizes or {}))
        for name, parameter in model.named_parameters():
            # A norm whose weights are near zero would let the text hardly matter; Gemma's are 1 + weight.
            is_norm = "norm" in name.lower() and name.endswith("weight") and kind != "gemma"
            torch.nn.init.normal_(parameter, mean=float(is_norm), std=0.2)
        base = BaseModelConfig.model_validate({"model": "in memory", "compute_dtype": "float32"} | options)
        lora = LoraConfig(rank=2, target_modules=TARGETS.get(kind, ("query", "value")))
        return adapt_model(model, None, base, lora, fingerprint)

    return make


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (3, 9) of rows with 9, 5 and 7 tokens."""
    ids = torch.randint(4, 67, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) < torch.tensor([9, 5, 7])[:, None]).long()
    return torch.where(mask.bool(), ids, 1), mask
