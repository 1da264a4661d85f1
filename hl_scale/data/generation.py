"""From sentences to corpus rows: which rows a sentence gets, and Ray Data actors that transform them.

Every draw comes from a hash of (data seed, sentence text, variety, copy number), never from a shared stream, so a row
is the same on any number of workers, in any order, and in a corpus of another size.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hl_scale.conditions import typology
from hl_scale.config import DialectDataConfig
from hl_scale.data.dialects import DialectEngine, Transformed
from hl_scale.data.resources import ResourceError
from hl_scale.data.shards import CorpusError

VIRTUAL = "virtual"
"""Variety name of a random feature mixture."""
STANDARD = "standard"
"""Variety name of an identity pair: the zero vector, dialect text equal to the standard text."""

ATTESTATION_VALUES = (0.3, 0.6, 1.0)

SENTENCE_SCHEMA = pa.schema(
    {"sentence_id": pa.int64(), "split": pa.string(), "index": pa.int64(), "source": pa.int64(), "text": pa.string()}
)

_SENTENCES_PER_BLOCK = 32
_LOCAL_OBJECT_STORE_BYTES = 512 * 2**20


def pair_schema(width: int = typology.NUM_FEATURES) -> pa.Schema:
    """Columns of pairs whose vectors have `width` entries."""
    return pa.schema(
        {
            "pair_id": pa.int64(),
            "sentence_id": pa.int64(),
            "variety": pa.string(),
            "vector": pa.list_(pa.float32(), width),
            "standard": pa.string(),
            "dialect": pa.string(),
            "rules": pa.list_(pa.string()),
        }
    )


def row_schema(width: int = typology.NUM_FEATURES) -> pa.Schema:
    """Columns of `pair_schema`, with the split and with why a row failed, if it did."""
    return pair_schema(width).append(pa.field("split", pa.string())).append(pa.field("error", pa.string()))


def row_table(
    rows: Sequence[tuple[Any, ...]],
    vectors: Sequence[npt.NDArray[np.float32]],
    width: int = typology.NUM_FEATURES,
) -> pa.Table:
    """A table of `row_schema` from rows without their vectors, and these."""
    schema = row_schema(width)
    names = [name for name in schema.names if name != "vector"]
    columns = dict(zip(names, zip(*rows, strict=True), strict=True)) if rows else {name: () for name in names}
    flat = np.concatenate(vectors) if vectors else np.zeros(0, dtype=np.float32)
    vector = pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.float32()), width)
    lists = {name: pa.array(list(values), schema.field(name).type) for name, values in columns.items()}
    return pa.table({**lists, "vector": vector}).select(schema.names).cast(schema)


@dataclass(frozen=True)
class PlannedRow:
    """A row before its transformation; `vector` (235,) float32, `seed` of the engine's draws."""

    pair_id: int
    variety: str
    vector: npt.NDArray[np.float32]
    seed: int


class Plan(Protocol):
    """Which rows each sentence gets."""

    def rows(self, split: str, index: int, text: str) -> list[PlannedRow]:
        """Rows of the sentence number `index` (from 0) of a split."""


@dataclass(frozen=True)
class RowPlan:
    """Which rows each sentence gets. Training rows are numbered first, sentence by sentence, then held-out rows."""

    seed: int
    training_sentences: int
    mixtures: int
    training_varieties: tuple[str, ...]
    identities: int
    evaluation_varieties: tuple[str, ...]
    densities: tuple[float, float]

    @classmethod
    def from_config(cls, data: DialectDataConfig) -> RowPlan:
        """The plan of a configuration, with variety names resolved.

        Raises:
            UnknownVarietyError: a variety that eWAVE does not know.
            CorpusError: Standard American English among the training varieties.
        """
        named = data.mode == "named"
        training = tuple(dict.fromkeys(typology.resolve(name) for name in data.training_varieties)) if named else ()
        if typology.STANDARD in training:
            raise CorpusError(
                f"data.training_varieties contains {typology.STANDARD}, which needs no transformation\n"
                "  fix: remove it and set data.identity_per_sentence"
            )
        evaluation = dict.fromkeys(typology.resolve(name) for name in data.evaluation_varieties)
        evaluation.pop(typology.STANDARD, None)
        return cls(
            seed=data.seed,
            training_sentences=data.training_sentences,
            mixtures=0 if named else data.variants_per_sentence,
            training_varieties=training,
            identities=data.identity_per_sentence,
            evaluation_varieties=tuple(evaluation),
            densities=(data.minimum_density, data.maximum_density),
        )

    @property
    def rows_per_training_sentence(self) -> int:
        return self.mixtures + len(self.training_varieties) + self.identities

    def rows(self, split: str, index: int, text: str) -> list[PlannedRow]:
        """Rows of the sentence number `index` (from 0) of a split (`train` or `heldout`)."""
        per_sentence = self.rows_per_training_sentence
        if split == "heldout":
            first = self.training_sentences * per_sentence + index * len(self.evaluation_varieties)
            varieties = [(name, 0) for name in self.evaluation_varieties]
        else:
            first = index * per_sentence
            varieties = [(VIRTUAL, copy) for copy in range(self.mixtures)]
            varieties += [(name, 0) for name in self.training_varieties]
            varieties += [(STANDARD, copy) for copy in range(self.identities)]
        return [
            PlannedRow(
                first + offset,
                name,
                self.mixture(text, copy) if name == VIRTUAL else typology.vector(name),
                counter(self.seed, "transform", text, name, copy),
            )
            for offset, (name, copy) in enumerate(varieties)
        ]

    def mixture(self, text: str, copy: int) -> npt.NDArray[np.float32]:
        """A random condition (235,), the `copy`-th of a sentence.

        Its density is uniform between `densities`; every feature that Multi-VALUE has a rule for is present with that
        probability and then takes 0.3, 0.6 or 1.0 with equal probability.
        """
        draw = random.Random(counter(self.seed, "mixture", text, copy)).random
        low, high = self.densities
        density = low + (high - low) * draw()
        vector = np.zeros(typology.NUM_FEATURES, dtype=np.float32)
        for feature in np.flatnonzero(typology.implementable_features()):
            if draw() < density:
                vector[feature] = ATTESTATION_VALUES[int(draw() * len(ATTESTATION_VALUES))]
        return vector


def counter(*parts: int | str) -> int:
    """A 64-bit number that depends on the parts alone (blake2b), to seed one draw."""
    digest = hashlib.blake2b("\x00".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def transform_sentences(
    sentences: pa.Table, plan: Plan, *, num_workers: int, directory: str, unavailable: Mapping[str, str]
) -> Iterator[pa.Table]:
    """Run the dialect engine over sentences in Ray Data actors.

    Args:
        sentences: columns of `SENTENCE_SCHEMA`.
        plan: which rows each sentence gets.
        num_workers: actors of one CPU each (fewer where an existing cluster has fewer free).
        directory: resource folder, filled on each node that lacks it.
        unavailable: rules that must be unavailable on every worker, so that all write the same corpus.

    Yields:
        Tables of `row_schema` in the order of the sentences.

    Raises:
        CorpusError: Ray or a worker failed.
    """
    import ray
    import ray.data

    with ray_session(num_workers):
        blocks = max(2 * num_workers, -(-sentences.num_rows // _SENTENCES_PER_BLOCK))
        try:
            rows = ray.data.from_arrow(sentences, override_num_blocks=min(blocks, sentences.num_rows)).map_batches(
                DialectActor,
                fn_constructor_args=(plan, directory, dict(unavailable)),
                batch_format="pyarrow",
                batch_size=None,
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=num_workers, initial_size=num_workers),
                num_cpus=1,
            )
            yield from rows.iter_batches(batch_format="pyarrow", batch_size=None)
        except ray.exceptions.RayError as error:
            raise CorpusError(
                f"preparing the corpus failed in a Ray worker:\n  {_root_cause(error)}\n"
                "  (if workers run out of memory, data.num_workers=1 uses the least)"
            ) from error


class DialectActor:
    """A Ray Data actor: one dialect engine, called with batches of sentences; see `transform_sentences`."""

    def __init__(self, plan: Plan, directory: str, unavailable: Mapping[str, str]) -> None:
        self._plan = plan
        self._engine = DialectEngine(directory)
        here = set(self._engine.unavailable_rules)
        if here != set(unavailable):
            difference = ", ".join(sorted(here ^ set(unavailable)))
            raise ResourceError(
                f"this worker and the driver differ in the rules they lack data for: {difference}\n"
                "  fix: run python -m hl_scale.data.resources on every node"
            )

    def __call__(self, sentences: pa.Table) -> pa.Table:
        rows, vectors = [], []
        for sentence in sentences.to_pylist():
            for planned in self._plan.rows(sentence["split"], sentence["index"], sentence["text"]):
                result = self._transform(sentence["text"], planned)
                vectors.append(planned.vector)
                values = (planned.pair_id, sentence["sentence_id"], planned.variety, sentence["text"], result.text)
                rows.append((*values, list(result.rules), sentence["split"], result.error))
        return row_table(rows, vectors)

    def _transform(self, text: str, planned: PlannedRow) -> Transformed:
        if planned.variety == STANDARD:
            return Transformed(text, (), None)
        return self._engine.transform(text, planned.vector, planned.seed)


@contextlib.contextmanager
def ray_session(num_workers: int) -> Iterator[None]:
    """Use the Ray that is there (initialised, or named by RAY_ADDRESS as in a job), else a local one.

    Only a Ray that was started here is shut down.
    """
    import ray
    import ray.data

    started = not ray.is_initialized()
    if started:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if not os.environ.get("RAY_ADDRESS"):
            quiet |= {"address": "local", "include_dashboard": False, "object_store_memory": _LOCAL_OBJECT_STORE_BYTES}
            quiet |= {"num_cpus": max(num_workers, os.cpu_count() or 1)}
        ray.init(**quiet)
    context = ray.data.DataContext.get_current()
    before = (context.execution_options.preserve_order, context.enable_progress_bars)
    logger = logging.getLogger("ray.data")
    level = logger.level
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    logger.setLevel(logging.CRITICAL)  # a worker's error is raised here, once
    try:
        yield
    finally:
        context.execution_options.preserve_order, context.enable_progress_bars = before
        logger.setLevel(level)
        if started:
            ray.shutdown()


def _root_cause(error: Exception) -> str:
    """The last exception of a remote traceback, without the traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    heads = [number for number, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return "\n  ".join(lines[heads[-1] if heads else -1 :])
