"""A corpus whose conditions say which dialect it is and nothing about it: what is left without features?"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hl_scale.conditions import typology
from hl_scale.data.corpus import Corpus, load_corpus
from hl_scale.data.generation import SENTENCE_SCHEMA, pair_schema
from hl_scale.data.shards import CorpusError, ShardWriter, read_shards, replaced_directory, write_manifest


def one_hot_vector(variety: str) -> typology.Vector:
    """(235,) a unit vector, another for each variety of eWAVE, with zeros after the 50th; zeros for Standard English.

    Raises:
        UnknownVarietyError: see `typology.resolve`.
    """
    vector = np.zeros(typology.NUM_FEATURES, dtype=np.float32)
    name = typology.resolve(variety)
    if name != typology.STANDARD:
        vector[typology.varieties().index(name)] = 1.0
    return vector


def one_hot_corpus(corpus: Corpus, directory: str | Path) -> Corpus:
    """A corpus with the same training pairs under one-hot vectors, without held-out ones; read if it is there.

    Raises:
        CorpusError: a corpus of random mixtures, which have no names, or something else in the directory.
    """
    directory = Path(directory)
    fingerprint = hashlib.sha256(f"one-hot {corpus.manifest['fingerprint']}".encode()).hexdigest()
    try:
        found = load_corpus(directory)
        if found.manifest["fingerprint"] == fingerprint:
            return found
    except CorpusError:
        pass  # none yet, or damaged: written below, unless other files are in the way
    table = read_shards(corpus.directory, corpus.manifest, "train", pair_schema())
    names = table["variety"].to_pylist()
    if "virtual" in names:
        raise CorpusError(
            f"{corpus.directory} holds random mixtures of features, which are no dialects to tell apart\n"
            "  fix: set data.mode=named and data.training_varieties"
        )
    vectors = {name: one_hot_vector(name).tolist() for name in set(names)}
    column = pa.array([vectors[name] for name in names], type=pair_schema().field("vector").type)
    with replaced_directory(directory) as fresh:
        pairs = table.set_column(table.schema.get_field_index("vector"), "vector", column)
        sentences = read_shards(corpus.directory, corpus.manifest, "sentences", SENTENCE_SCHEMA)
        shards: dict[str, list[dict[str, Any]]] = {name: [] for name in corpus.manifest["shards"]}
        for name, schema, rows in (("train", pair_schema(), pairs), ("sentences", SENTENCE_SCHEMA, sentences)):
            writer = ShardWriter(fresh, name, schema, rows_per_shard=4096)
            writer.add(rows)
            shards[name] = writer.close()
        changes = {"fingerprint": fingerprint, "evaluation_varieties": [], "shards": shards}
        write_manifest(fresh, {**corpus.manifest, **changes})
    return load_corpus(directory)
