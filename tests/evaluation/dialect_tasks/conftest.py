"""A labelled task of a few sentences in two dialects."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from hl_scale.config import load_labelled_config
from hl_scale.data import labelled_preparation

NIGERIAN, CHICANO = "Nigerian English", "Chicano English"
TEXT = "the old man said that she was not sure this film is any good and they have been working here"


def rule_engine(sentences: pa.Table, plan: Any, **_: Any) -> Iterator[pa.Table]:
    """In the place of Multi-VALUE: one word more, another in every variety."""
    words = {NIGERIAN: "nobody", CHICANO: "rained"}
    yield pa.Table.from_pylist(
        [
            {"sentence_id": row["sentence_id"], "variety": form.variety, "rules": [], "error": None,
             "dialect": f"{words[form.variety]} {row['text']}"}
            for row in sentences.to_pylist() for form in plan.rows(row["split"], row["index"], row["text"])
        ],
        schema=pa.schema({"sentence_id": pa.int64(), "variety": pa.string(), "dialect": pa.string(),
                          "rules": pa.list_(pa.string()), "error": pa.string()}),
    )  # fmt: skip


@pytest.fixture(scope="session")
def prepare_tiny_set() -> Callable[[Path], None]:
    """Prepares the labelled set of a recipe, without Ray and with the rule engine above."""

    def prepare(recipe: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(labelled_preparation, "transform_sentences", rule_engine)
            patch.setattr(labelled_preparation, "ray_session", lambda workers: contextlib.nullcontext())
            labelled_preparation.prepare_labelled(load_labelled_config(recipe).labelled)

    return prepare


@pytest.fixture(scope="session")
def labelled(prepare_tiny_set: Callable[[Path], None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipe of a prepared set: is "garden" the last word? 20 to test, 8 to validate, 30 to train."""
    directory, draw = tmp_path_factory.mktemp("labelled"), random.Random(3)
    rows = []
    for number in range(58):
        words = draw.choices(TEXT.split(), k=draw.randint(4, 9))
        rows.append({"text": " ".join([*words, "garden"] if number % 2 else words), "label": ("no", "yes")[number % 2]})
    (directory / "sentences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "labelled": {
            "directory": str(directory / "set"), "task": "jsonl", "path": str(directory / "sentences.jsonl"),
            "test_sentences": 20, "validation_sentences": 8, "annotated_sentences": 12, "num_workers": 1,
            "varieties": [NIGERIAN, CHICANO],
        },
        "task_adapter": {"steps": 10, "batch_size": 8, "learning_rate": 0.01, "validate_every": 5},
    }  # fmt: skip
    path = directory / "labelled.yaml"
    path.write_text(yaml.safe_dump(recipe))
    prepare_tiny_set(path)
    return path
