"""One dialect engine for all data tests: it takes seconds to start."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hl_scale.config import DialectDataConfig, SentenceSource
from hl_scale.data.dialects import DialectEngine

SENTENCES = (
    "I have been waiting for the bus that never comes on time, and I am not happy about it.",
    "She does not know who is going to the market with her brothers this afternoon.",
    "The children were playing with their toys when it started to rain very heavily.",
    "My friends and I have already seen the movie, but we would like to see it again.",
    "He is not the man who told me that there are three houses behind the old school.",
    "They have to finish the work quickly because the manager will not wait for them.",
    "You should never give him the money unless he gives you a good reason for it.",
    "It is raining, and the people who live near the river are moving their things themselves.",
    "There is nobody in the village who has ever been more beautiful than her sister.",
    "We were thinking about the problem for a long time before we found any solution.",
    "Those teachers always tell their students that they must read the books at home.",
    "The woman whose car was stolen yesterday is talking to the police right now.",
)


@pytest.fixture(scope="session")
def engine() -> DialectEngine:
    return DialectEngine()


@pytest.fixture
def data_config(tmp_path: Path) -> Callable[..., DialectDataConfig]:
    """Builds a small configuration over `SENTENCES` in `tmp_path`; keywords override fields."""
    source = tmp_path / "sentences.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))

    def build(**fields: object) -> DialectDataConfig:
        settings = {
            "directory": str(tmp_path / "corpus"),
            "sources": (SentenceSource(kind="jsonl", path=str(source)),),
            "evaluation_varieties": ("AAVE", "Nigerian English"),
            "training_sentences": 8,
            "heldout_sentences": 4,
            "variants_per_sentence": 2,
            "num_workers": 1,
            "rows_per_shard": 10,
        }
        return DialectDataConfig.model_validate({**settings, **fields})

    return build
