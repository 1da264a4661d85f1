"""A tiny causal model, a corpus of a few sentences, and runs made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from hl_scale.base.loading import adapt_model
from hl_scale.conditions import typology
from hl_scale.config import parse_config
from hl_scale.data.corpus import Pair
from hl_scale.engine.conditions import TypologyConditions
from hl_scale.engine.run import LoadedRun
from hl_scale.evaluation import evaluate_dialects
from hl_scale.hypernetwork import build_hypernetwork

VARIETIES = ("Nigerian English", "Chicano English", "Jamaican English")
TEXT = "the old man said that she was not sure whether film is any good and they been working here since last summer"
WORDS = TEXT.split()


@dataclass
class SmallCorpus:
    """What evaluation reads of a corpus, held in memory."""

    train: list[Pair]
    pairs: dict[str, list[Pair]]
    manifest: dict[str, Any] = field(default_factory=lambda: {"fingerprint": "c" * 64, "unavailable_rules": {}})
    source: ClassVar[Any] = typology

    @property
    def heldout_varieties(self) -> tuple[str, ...]:
        return tuple(name for name in self.pairs if name != typology.STANDARD)

    def heldout(self, variety: str) -> list[Pair]:
        return self.pairs[typology.resolve(variety)]


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "<unk>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", unk_token="<unk>")


def make_corpus() -> SmallCorpus:
    """12 held-out sentences; every variety changes all but the last 4 of them, and Jamaican lacks the first."""
    rng = np.random.default_rng(0)
    sentences = [list(rng.choice(WORDS, size=size)) for size in (9, 4, 12, 7, 15, 6, 11, 3, 8, 10, 5, 13)]
    pairs: dict[str, list[Pair]] = {}
    zeros = typology.vector(typology.STANDARD)
    standard = [" ".join(words) for words in sentences]
    pairs[typology.STANDARD] = [Pair(i, 100 + i, "standard", zeros, text, text, ()) for i, text in enumerate(standard)]
    for name in VARIETIES:
        changed = []
        for number, words in enumerate(sentences):
            dialect = list(words)
            if number < 8:
                dialect[rng.integers(len(words))] = "been" if "been" not in words else "film"
                dialect.insert(int(rng.integers(len(words))), "sure")
            pair = Pair(number, 100 + number, name, typology.vector(name), standard[number], " ".join(dialect), ())
            changed.append(pair)
        pairs[name] = changed[1:] if name == "Jamaican English" else changed
    mixtures = (rng.random((6, typology.NUM_FEATURES)) < 0.3).astype(np.float32)
    train = [Pair(i, i, "virtual", vector, "a", "b", ()) for i, vector in enumerate(mixtures)]
    train.append(Pair(9, 9, "standard", zeros, "a", "a", ()))
    return SmallCorpus(train, pairs)


def build_run(
    parent: Path, kind: str = "hyperlora", spread: float = 0.3, evaluation: dict[str, Any] | None = None,
    context: int = 64,
) -> LoadedRun:  # fmt: skip
    """On a tiny Gemma."""
    directory = parent / kind
    directory.mkdir(exist_ok=True)
    config = parse_config(
        {
            "run": {"directory": str(directory)},
            "base": {"model": "example/tiny", "compute_dtype": "float32"},
            "lora": {"rank": 4, "alpha": 6.0, "target_modules": ["q_proj", "v_proj"]},
            "data": {
                "directory": "data",
                "sources": [{"kind": "text", "path": "unused.txt"}],
                "evaluation_varieties": list(VARIETIES),
            },
            "hypernetwork": {"kind": kind, "condition_width": 8, "slot_width": 4, "hidden_width": 16},
            "training": {"steps": 10, "global_batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-3},
            "evaluation": {"batch_size": 5, "bootstrap_samples": 200, **(evaluation or {})},
        }
    )
    torch.manual_seed(4)
    model = Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=len(WORDS) + 3,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=context,
            sliding_window=16,
            pad_token_id=0,
        )
    )
    base = adapt_model(model, _tokenizer(), config.base, config.lora, fingerprint="f" * 64)
    hypernetwork = build_hypernetwork(config.hypernetwork, config.lora, base.slots, typology.NUM_FEATURES)
    with torch.no_grad():
        for parameter in hypernetwork.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return LoadedRun(directory, config, base, hypernetwork.eval(), TypologyConditions(config), 10)


@pytest.fixture
def corpus() -> SmallCorpus:
    return make_corpus()


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., LoadedRun]:
    """make_run(kind=..., spread=..., evaluation=..., context=...) -> LoadedRun on a tiny Gemma."""
    return partial(build_run, tmp_path)


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of `make_run()` on `corpus` with `make_run("plain_lora")` as its control; not to be changed."""
    parent = tmp_path_factory.mktemp("evaluated")
    return evaluate_dialects(build_run(parent), make_corpus(), control=build_run(parent, "plain_lora"), progress=False)
