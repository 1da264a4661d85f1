"""What a run's conditions are: how a name or a description becomes the vector that its hypernetwork reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from hl_scale.base import AdaptedModel
from hl_scale.conditions import typology
from hl_scale.conditions.descriptions import Encoder, SentenceEncoder, Vectors, check_texts, embed, scaled
from hl_scale.conditions.typology import Condition
from hl_scale.config import Config, ConfigError
from hl_scale.data.tasks import Task, load_tasks, open_tasks
from hl_scale.engine import zero3
from hl_scale.engine.zero3 import World

TEXTS_PER_PASS = 16


class Conditions(Protocol):
    """The conditions of a run."""

    @property
    def size(self) -> int:
        """C, entries of a condition vector."""

    def parse(self, text: str) -> Condition:
        """A condition as users write it; a ValueError says what is understood."""


class TypologyConditions:
    """Feature vectors of varieties: "dialect:NAME", "standard", "features:FILE.json"."""

    size = typology.NUM_FEATURES

    def parse(self, text: str) -> Condition:
        return typology.parse_condition(text)


class DescriptionConditions:
    """Embedded descriptions: "task:NAME" (its first wording) or "description:WORDS".

    With `conditions.with_typology` the feature vector of a variety follows the embedding; "; dialect:NAME" at the end
    of a condition names it.
    """

    def __init__(self, config: Config, base: AdaptedModel) -> None:
        self.config = config
        settings = config.conditions
        self.encoder: Encoder
        if settings.encoder == "base":
            self.encoder = BaseStateEncoder(base, settings.maximum_tokens)
        else:
            self.encoder = SentenceEncoder(settings)
        self.directory = Path(f"{Path(config.data.directory)}-embeddings")
        self.size = self.encoder.width + (typology.NUM_FEATURES if settings.with_typology else 0)

    @property
    def fingerprint(self) -> str:
        """Of the encoder."""
        return self.encoder.fingerprint

    def embed(self, texts: Sequence[str]) -> Vectors:
        """(n, width) embeddings, kept on disk."""
        return embed(texts, self.encoder, self.directory)

    def vectors(self, embeddings: Vectors, variety: str) -> Vectors:
        """(n, C): embeddings, and the vector of a variety ("" is Standard English) where it belongs to conditions."""
        if not self.config.conditions.with_typology:
            return embeddings
        features = typology.vector(variety or typology.STANDARD)
        return np.concatenate((embeddings, np.tile(features, (len(embeddings), 1))), axis=1)

    def parse(self, text: str) -> Condition:
        text, _, dialect = text.partition("; dialect:")
        kind, _, value = text.partition(":")
        variety = typology.resolve(dialect) if dialect else ""
        if kind == "task":
            task = load_tasks(self.config.data.directory).task(value)
            name, words, variety = task.name, task.descriptions[0], variety or task.variety
        elif kind == "description" and value.strip():
            name = words = value.strip()
        else:
            raise ConfigError(
                f"condition {text!r} is not understood\n"
                '  fix: use "task:NAME" for a task of the data, or "description:" and what shall be done in plain words'
            )
        return Condition(name, self.vectors(self.encoder.encode([words]), variety)[0])


class OneHotConditions:
    """A unit vector per task: "task:NAME". Nothing is known of tasks that were not trained on."""

    def __init__(self, config: Config, tasks: Sequence[Task] | None = None) -> None:
        self.tasks = open_tasks(config.tasks).seen if tasks is None else tasks
        self.size = len(self.tasks)
        self.fingerprint = "one_hot"

    def vector(self, number: int) -> Vectors:
        """(1, C) of a task by its place among the seen ones, scaled as embeddings are."""
        return scaled(np.eye(self.size, dtype=np.float32)[number : number + 1])

    def parse(self, text: str) -> Condition:
        kind, _, value = text.partition(":")
        names = [task.name for task in self.tasks]
        if kind != "task" or value not in names:
            raise ConfigError(
                f"condition {text!r} is no trained task\n  fix: use task:NAME, one of {', '.join(names[:8])}"
            )
        return Condition(value, self.vector(names.index(value))[0])


class BaseStateEncoder:
    """The base's own state at the last token of a description, after the final norm: it has read who does what."""

    def __init__(self, base: AdaptedModel, maximum_tokens: int) -> None:
        self.base = base
        self.width = base.hidden_size
        self.fingerprint = f"base:{base.fingerprint}"
        self.maximum_tokens = min(maximum_tokens, base.context_length)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Vectors:
        """See `Encoder`."""
        tokenizer = self.base.tokenizer
        check_texts(texts, lambda text: len(tokenizer(text)["input_ids"]), self.maximum_tokens)
        device = next(self.base.model.parameters()).device
        rows = []
        for start in range(0, len(texts), TEXTS_PER_PASS):
            batch = list(texts[start : start + TEXTS_PER_PASS])
            encoded = tokenizer(batch, return_tensors="pt", padding=True, padding_side="right").to(device)
            states = self.base.hidden_states(encoded["input_ids"], encoded["attention_mask"])
            last = encoded["attention_mask"].sum(1) - 1
            rows.append(states[torch.arange(len(batch), device=device), last].float().cpu().numpy())
        return scaled(np.concatenate(rows))


def open_conditions(config: Config, base: AdaptedModel) -> Conditions:
    """The conditions of a configuration."""
    if config.data.kind == "dialects":
        return TypologyConditions()
    if config.conditions.kind == "one_hot":
        return OneHotConditions(config)
    return DescriptionConditions(config, base)


class TaskVectors:
    """Condition vectors of all wordings of some tasks, for training.

    Args:
        config: of the run.
        tasks: those that are trained on.
        base: for its states, or to share with the encoder.
    """

    def __init__(self, config: Config, tasks: Sequence[Task], base: AdaptedModel) -> None:
        self.tasks = tasks
        self.noise = config.conditions.noise
        self.seed = config.run.seed
        self.conditions: DescriptionConditions | OneHotConditions
        if config.conditions.kind == "one_hot":
            self.conditions = OneHotConditions(config, tasks)
        else:
            self.conditions = DescriptionConditions(config, base)
        self._vectors: list[Vectors] = []

    def prepare(self) -> None:
        """Embed what is not on disk."""
        if isinstance(self.conditions, OneHotConditions):
            self._vectors = [self.conditions.vector(number) for number in range(len(self.tasks))]
            return
        texts = [text for task in self.tasks for text in task.descriptions]
        embeddings, start = self.conditions.embed(texts), 0
        for task in self.tasks:
            own = embeddings[start : start + len(task.descriptions)]
            self._vectors.append(self.conditions.vectors(own, task.variety))
            start += len(task.descriptions)

    def prepare_together(self, world: World) -> None:
        """`prepare` on rank 0, which writes to disk, then on the others; collective."""
        for turn in (True, False):
            with zero3.together(world):
                if world.is_main == turn:
                    self.prepare()

    def counts(self) -> list[int]:
        """Wordings per task."""
        one_hot = isinstance(self.conditions, OneHotConditions)
        return [1 if one_hot else len(task.descriptions) for task in self.tasks]

    def vector(self, task: int, description: int, draw: int) -> Vectors:
        """(C,) of a wording; with noise that the number of the draw decides."""
        found = self._vectors[task][description]
        if not self.noise or isinstance(self.conditions, OneHotConditions):
            return found
        width = self.conditions.encoder.width
        noise = np.random.default_rng([self.seed, 7, draw]).normal(scale=self.noise, size=width).astype(np.float32)
        return np.concatenate((found[:width] + noise, found[width:]))
