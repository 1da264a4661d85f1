"""Tiny transformers models with grouped queries, a word-level tokenizer, and runs made of them."""

from __future__ import annotations

from types import SimpleNamespace

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
    RobertaModel,
)

from hl_scale.base.loading import adapt_model
from hl_scale.config import BaseModelConfig, LoraConfig, parse_config
from hl_scale.engine.conditions import TypologyConditions
from hl_scale.lora import LoraFactors, lora_scale

VOCABULARY = 97


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ["<s>", "</s>", "<pad>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", "the", "she", "not", "of", "film", "."]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def _gemma() -> torch.nn.Module:
    """Tied embeddings, head size unlike hidden / heads, one key-value head for four query heads."""
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=24,
            max_position_embeddings=64,
            sliding_window=16,
            tie_word_embeddings=True,
            pad_token_id=2,
        )
    )


def _llama() -> torch.nn.Module:
    """Untied head, biases on the attention projections, two key-value heads for four query heads."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            attention_bias=True,
            tie_word_embeddings=False,
        )
    )


def _roberta() -> torch.nn.Module:
    return RobertaModel(
        RobertaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=66,
            pad_token_id=2,
        ),
        add_pooling_layer=False,
    )


BUILDERS = {"gemma": _gemma, "llama": _llama, "roberta": _roberta}


class RandomHypernetwork(torch.nn.Module):
    """Fixed random factors whose B grows with the norm of the condition; a stand-in with a visible effect."""

    def __init__(self, slots, lora: LoraConfig) -> None:
        super().__init__()
        self.slots, self.scale = slots, lora_scale(lora.scale_convention, lora.alpha, lora.rank)
        self.offset = torch.nn.Parameter(torch.ones(()))
        generator = torch.Generator().manual_seed(11)
        self.a = {s.path: torch.randn(lora.rank, s.in_features, generator=generator) / 8 for s in slots}
        self.b = {s.path: torch.randn(s.out_features, lora.rank, generator=generator) / 8 for s in slots}

    def forward(self, conditions: torch.Tensor) -> LoraFactors:
        strength = self.offset + conditions.norm(dim=1)
        a = {path: factor.expand(len(conditions), -1, -1) for path, factor in self.a.items()}
        b = {path: strength[:, None, None] * factor / self.scale for path, factor in self.b.items()}
        return LoraFactors(self.slots, a, b, self.scale)


@pytest.fixture
def make_run(tmp_path):
    """make_run(architecture, lora=..., quantization=...) -> a run in memory with the tiny base."""

    def make(architecture: str = "gemma", lora: LoraConfig | None = None, quantization: str = "nf4"):
        torch.manual_seed(5)
        lora = lora or LoraConfig(rank=4, alpha=6.0, target_modules=("q_proj", "k_proj", "v_proj"))
        base_config = BaseModelConfig(model="example/tiny", quantization=quantization, compute_dtype="float32")
        base = adapt_model(BUILDERS[architecture](), _tokenizer(), base_config, lora, fingerprint="f" * 64)
        config = parse_config(
            {
                "run": {"directory": str(tmp_path / "runs" / "tiny")},
                "base": base_config.model_dump(),
                "lora": lora.model_dump(),
                "data": {"directory": "data", "sources": [{"kind": "text", "path": "unused.txt"}]},
                "training": {"steps": 10, "global_batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-3},
            }
        )
        hypernetwork = RandomHypernetwork(base.slots, lora)
        return SimpleNamespace(
            config=config,
            base=base,
            hypernetwork=hypernetwork,
            conditions=TypologyConditions(config),
            step=10,
            directory=str(tmp_path / "runs" / "tiny"),
            data_fingerprint="d" * 64,
            task_adapter_fingerprint=None,
        )

    return make


@pytest.fixture
def build_model():
    """build_model(architecture) -> a tiny transformers model with random weights."""
    return lambda architecture: BUILDERS[architecture]()


@pytest.fixture
def dense_twin():
    """dense_twin(base, architecture) -> the plain transformers model with the base's dequantised float32 weights."""

    def twin(base, architecture: str) -> torch.nn.Module:
        model = BUILDERS[architecture]()
        state = model.state_dict()
        own = dict(base.model.named_parameters(remove_duplicate=False))
        for name in state:
            path, _, attribute = name.rpartition(".")
            if path in base.linears and attribute == "weight":
                state[name] = base.linears[path].dense_weight(torch.float32)
            else:
                state[name] = own[name].detach()
        model.load_state_dict(state)
        return model.eval()

    return twin


@pytest.fixture
def probe():
    """Right-padded ids and mask, (3, 9)."""
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(3, VOCABULARY, (3, 9), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 6:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}
