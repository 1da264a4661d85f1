"""Labelled sets and task adapters: what is measured with an adapter, never what a hypernetwork is trained on.

They have a file of their own, with the sections `labelled` and `task_adapter`, because nothing else of a run's
configuration applies to them: one labelled set serves every base, and every run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from hl_scale.config.loading import read_sections
from hl_scale.config.section import Section


class LabelledDataConfig(Section):
    directory: str
    """Where `hl-scale prepare-labelled` writes Parquet shards and manifest.json."""
    task: Literal["sentiment", "graded_sentiment", "hedging", "topic", "domain", "glue", "jsonl"]
    """`sentiment` (its sign) and `graded_sentiment` (-4 to 4): sentences that people have scored; `domain`: which of
    the sets a sentence is from; `hedging`: is a sentence of an encyclopedia uncertain; `topic`: of a news report;
    `glue`: a task of GLUE by its name, from the hub; `jsonl`: files of your own."""
    domains: tuple[Literal["movie", "news", "product", "tweets"], ...] = Field(
        ("movie", "news", "product"), min_length=1
    )
    """`sentiment`, `graded_sentiment`, `domain`: the sets that sentences are taken from."""
    margin: float = Field(default=0.5, ge=0)
    """`sentiment`: sentences whose mean score is closer to 0 than this are left out."""
    name: Literal["sst2", "cola", "qnli", "rte", "mnli", "qqp", "stsb"] | None = None
    """`glue`: which task."""
    path: str | None = None
    """`jsonl`: file or glob, of lines {"text", "label"} or {"text_a", "text_b", "label"}; `glue`: hub id."""
    revision: str | None = None
    """`glue`: hub revision."""
    test_sentences: int = Field(default=500, ge=1)
    """Examples set apart for testing, before anything else; all of them are transformed."""
    validation_sentences: int = Field(default=300, ge=1)
    """Examples set apart for choosing among checkpoints of a task adapter; Standard English."""
    training_sentences: int | None = Field(default=None, ge=1)
    """Examples to train task adapters on; all that remain unless given."""
    annotated_sentences: int = Field(default=500, ge=0)
    """So many of the training examples, the first ones, are transformed too: a dialect's own annotations."""
    varieties: tuple[str, ...] = ()
    """Varieties of English that test and annotated examples are transformed into."""
    apart_from: tuple[str, ...] = ()
    """Directories of parallel corpora: no sentence that one of them trains on comes into test or validation."""
    minimum_words: int = Field(default=4, ge=1)
    """Shorter texts are left out; `glue` and `jsonl` are taken whole."""
    maximum_words: int = Field(default=60, ge=1)
    """Longer texts are left out, likewise."""
    seed: int = Field(default=0, ge=0)
    """Seed of the splits and of the dialect engine's draws."""
    rows_per_shard: int = Field(default=4096, ge=1)
    """Rows per Parquet file."""
    num_workers: int = Field(default=2, ge=1)
    """Ray Data actors that run the dialect engine."""

    @model_validator(mode="after")
    def _task_has_what_it_needs(self) -> LabelledDataConfig:
        if self.task == "glue" and self.name is None:
            raise ValueError("task 'glue' needs name: one of sst2, cola, qnli, rte, mnli, qqp, stsb")
        if self.task == "jsonl" and self.path is None:
            raise ValueError("task 'jsonl' needs a path (file or glob)")
        if self.task == "domain" and len(set(self.domains)) < 2:
            raise ValueError("task 'domain' needs at least two domains to tell apart")
        if self.minimum_words > self.maximum_words:
            raise ValueError("minimum_words is larger than maximum_words")
        return self


class TaskAdapterConfig(Section):
    """How a LoRA and a classification head are trained on labelled sentences."""

    steps: int = Field(default=600, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=16, ge=1)
    """Examples per step."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate of AdamW."""
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps with a linearly growing learning rate; it then falls linearly to 0."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW weight decay."""
    gradient_clipping: float = Field(default=1.0, gt=0)
    """Bound of the gradient norm."""
    validate_every: int = Field(default=50, ge=1)
    """Steps between measurements on the validation examples; the best of these states is kept."""
    pooling: Literal["auto", "first", "mean", "last"] = "auto"
    """Which state is classified: of the `first` token, the `mean` over tokens, or the `last` token's. `auto`: last for
    decoders, first for RoBERTa, as published, mean for other encoders."""
    maximum_tokens: int = Field(default=128, ge=2)
    """Longer texts are cut there, and counted."""
    evaluation_batch_size: int = Field(default=64, ge=1)
    """Examples per forward pass of a measurement."""
    seed: int = Field(default=0, ge=0)
    """Seed of initial values and of the order of examples."""


class LabelledConfig(Section):
    """A file of labelled sets."""

    labelled: LabelledDataConfig
    task_adapter: TaskAdapterConfig = TaskAdapterConfig()


def load_labelled_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> LabelledConfig:
    """Read a YAML file with the sections `labelled` and `task_adapter`; see `load_config`.

    Environment variables are a run's and do not count here.
    """
    return read_sections(LabelledConfig, path, overrides, environment={})
