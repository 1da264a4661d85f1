"""What a run's conditions are: how a name or a description becomes the vector that its hypernetwork reads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from hl_scale.base import AdaptedModel
from hl_scale.conditions import typology
from hl_scale.conditions.descriptions import (
    Encoder,
    SentenceEncoder,
    Vectors,
    embed,
    encoder_width,
    part_file,
    parts,
    random_direction,
    scaled,
)
from hl_scale.conditions.sources import source
from hl_scale.conditions.typology import Condition
from hl_scale.config import ConditionsConfig, Config, ConfigError
from hl_scale.data.tasks import Task, load_tasks, open_tasks
from hl_scale.engine import zero3
from hl_scale.engine.base_states import LastStateEncoder, MeanStateEncoder, TokenStateEncoder
from hl_scale.engine.zero3 import World


class Conditions(Protocol):
    """The conditions of a run."""

    @property
    def size(self) -> int:
        """C, entries of a condition vector."""

    def parse(self, text: str) -> Condition:
        """A condition as users write it; a ValueError says what is understood."""


class TypologyConditions:
    """Feature vectors of varieties: "dialect:NAME", "standard", and in eWAVE "features:FILE.json"."""

    def __init__(self, config: Config) -> None:
        self.source = source(config.dialects.vectors)
        self.size = self.source.NUM_FEATURES

    def parse(self, text: str) -> Condition:
        return self.source.parse_condition(text)


class DescriptionConditions:
    """Embedded descriptions: "task:NAME" (its first wording) or "description:WORDS".

    With `conditions.with_typology` the feature vector of a variety follows the embedding; "; dialect:NAME" at the end
    of a condition names it.
    """

    def __init__(self, config: Config, base: AdaptedModel) -> None:
        self.config = config
        settings = config.conditions
        self.directory = Path(f"{Path(config.data.directory)}-embeddings")
        self.encoder = open_encoder(settings, base, self.directory)
        self.size = self.encoder.width + (typology.NUM_FEATURES if settings.with_typology else 0)

    @property
    def fingerprint(self) -> str:
        """Of the encoder."""
        return self.encoder.fingerprint

    def embed(self, texts: Sequence[str]) -> Vectors:
        """(n, width) embeddings, kept on disk."""
        return embed(texts, self.encoder, self.directory)

    def is_embedded(self, part: Sequence[str]) -> bool:
        """Whether a part (see `descriptions.parts`) is on disk."""
        return part_file(part, self.encoder, self.directory).is_file()

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


class JoinedEncoder:
    """Embeddings of several encoders side by side, each scaled by itself."""

    def __init__(self, encoders: Sequence[Encoder]) -> None:
        self.encoders = tuple(encoders)
        self.width = sum(encoder.width for encoder in encoders)
        self.fingerprint = hashlib.sha256("+".join(e.fingerprint for e in encoders).encode()).hexdigest()

    def check(self, texts: Sequence[str]) -> None:
        """See `hl_scale.conditions.descriptions.Encoder`, as for `encode`."""
        for encoder in self.encoders:
            encoder.check(texts)

    def encode(self, texts: Sequence[str]) -> Vectors:
        return np.concatenate([encoder.encode(texts) for encoder in self.encoders], axis=1)


def open_encoder(settings: ConditionsConfig, base: AdaptedModel, directory: Path) -> Encoder:
    """The encoder, or encoders, of a configuration; `directory` is where embeddings are kept.

    Raises:
        EncoderError: see `SentenceEncoder`.
    """
    found: list[Encoder] = []
    for name in settings.encoders:
        if name == "base":
            found.append(LastStateEncoder(base, settings.maximum_tokens))
        elif name == "base_mean":
            found.append(MeanStateEncoder(base, settings.maximum_tokens, directory))
        elif name == "base_tokens":
            found.append(TokenStateEncoder(base, settings.maximum_tokens, directory))
        else:
            found.append(SentenceEncoder(settings.only(name)))
    return found[0] if len(found) == 1 else JoinedEncoder(found)


def condition_size(config: Config, base: AdaptedModel) -> int:
    """C, entries of a condition, without an encoder's weights.

    Raises:
        ValueError: an encoder whose configuration cannot be read; for one-hot conditions, tasks that are not prepared.
    """
    settings = config.conditions
    if config.data.kind == "dialects":
        return source(config.dialects.vectors).NUM_FEATURES
    if settings.kind == "one_hot":
        return len(open_tasks(config.tasks).seen)
    if settings.encoder == "base_tokens":
        return settings.maximum_tokens * base.hidden_size + (typology.NUM_FEATURES if settings.with_typology else 0)
    of_base = len(settings.encoders) - len(settings.sentence_encoders)
    widths = [encoder_width(settings.only(name)) for name in settings.sentence_encoders]
    return of_base * base.hidden_size + sum(widths) + (typology.NUM_FEATURES if settings.with_typology else 0)


def open_conditions(config: Config, base: AdaptedModel) -> Conditions:
    """The conditions of a configuration."""
    if config.data.kind == "dialects":
        return TypologyConditions(config)
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
        embeddings, start = self.conditions.embed(self._texts), 0
        for task in self.tasks:
            own = embeddings[start : start + len(task.descriptions)]
            self._vectors.append(self.conditions.vectors(own, task.variety))
            start += len(task.descriptions)

    def prepare_together(self, world: World, report: Callable[[str], None]) -> None:
        """`prepare`, shared out over the ranks; collective. `report` is told what goes on."""
        with zero3.together(world):
            if isinstance(self.conditions, DescriptionConditions):
                mine = parts(self._texts)[world.rank :: world.size]
                missing = [part for part in mine if not self.conditions.is_embedded(part)]
                for done, part in enumerate(missing):
                    report(f"embedding descriptions: {done}/{len(missing)} parts")
                    self.conditions.embed(part)
        with zero3.together(world):
            self.prepare()

    @property
    def _texts(self) -> list[str]:
        return [text for task in self.tasks for text in task.descriptions]

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
        noise *= found[:width] != 0  # padding stays padding
        return np.concatenate((found[:width] + noise, found[width:]))

    def unfamiliar(self, task: int, description: int, draw: int) -> Vectors:
        """(C,) of a wording with a random direction in place of its embedding; the number of the draw decides it."""
        found = self._vectors[task][description]
        width = len(found) if isinstance(self.conditions, OneHotConditions) else self.conditions.encoder.width
        drawn = random_direction(np.random.default_rng([self.seed, 8, draw]), width)
        return np.concatenate((drawn, found[width:]))
