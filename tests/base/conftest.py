"""Tiny random models saved as a hub repository would hold them: safetensors, config.json and a word-level tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from hl_scale.base import AdaptedModel, load_base
from hl_scale.config import BaseModelConfig, LoraConfig

VOCABULARY = 67
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
}


def gemma() -> Any:
    """Tied head, one key-value head for four query heads, a head size unlike hidden / heads."""
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, num_key_value_heads=1, head_dim=12, sliding_window=8))


def llama() -> Any:
    """Untied head, biases, two key-value heads for four query heads."""
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, attention_bias=True, tie_word_embeddings=False))


def roberta() -> Any:
    """Saved with a masked-LM head, as the published checkpoint is."""
    return RobertaForMaskedLM(RobertaConfig(**SIZES, type_vocab_size=1))


BUILDERS: dict[str, Callable[[], Any]] = {"gemma": gemma, "llama": llama, "roberta": roberta}
TARGETS = {"gemma": ("q_proj", "v_proj"), "llama": ("q_proj", "v_proj"), "roberta": ("query", "value")}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *"abcdefghij"])}
    model = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", pad_token="<pad>", unk_token="<unk>")


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """saved("llama") -> directory of that model, written once; not to be changed."""
    done: dict[str, Path] = {}

    def save(kind: str) -> Path:
        if kind not in done:
            torch.manual_seed(3)
            done[kind] = tmp_path_factory.mktemp(kind)
            model = BUILDERS[kind]()
            for parameter in model.parameters():  # biases too, and far enough from each other to matter
                torch.nn.init.normal_(parameter, std=0.2)
            model.save_pretrained(done[kind])
            tokenizer().save_pretrained(done[kind])
        return done[kind]

    return save


@pytest.fixture
def load() -> Callable[..., AdaptedModel]:
    """load(directory, kind="llama", rank=4, target_modules=None, **base options) -> that model.

    In float32 unless said otherwise; slots are queries and values unless given.
    """

    def load(
        directory: Path,
        kind: str = "llama",
        rank: int = 4,
        target_modules: tuple[str, ...] | None = None,
        **options: Any,
    ) -> AdaptedModel:
        base = BaseModelConfig.model_validate({"model": str(directory), "compute_dtype": "float32"} | options)
        return load_base(base, LoraConfig(rank=rank, target_modules=target_modules or TARGETS[kind]))

    return load
