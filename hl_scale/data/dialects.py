"""Multi-VALUE as an engine: Standard English in, dialect text out, for any vector of eWAVE attestation values.

`DialectEngine` loads spaCy, CMUdict and WordNet once per process and is then re-targeted to any vector at no cost, so
one engine serves random feature mixtures. A transformation depends on (text, vector, seed) and on nothing else:
Multi-VALUE's calls of Python's global `random` are routed to a generator of the engine, seeded per sentence, whose
`sample` sorts what it draws from (rules pass it sets, whose order changes with PYTHONHASHSEED).

What Multi-VALUE lacks data for is named, not skipped in silence: `unavailable_rules` says which rules cannot fire and
why. The coreference model (stanza) is never used, so that every machine writes the same corpus.

Source: Ziems et al., "Multi-VALUE: A Framework for Cross-Dialectal English NLP", ACL 2023.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.util
import os
import random
import sys
import types
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import numpy.typing as npt

from hl_scale.conditions import typology
from hl_scale.data.resources import Resource, ResourceError, ensure_resources, nltk_directory

SURFACE_RULE = "surface_contract"
"""Name given to Multi-VALUE's unconditional contractions ("have to" -> "gotta"), which belong to no feature."""

_PARSES_KEPT = 64
ENGINE_VERSION = "2"
"""Raised whenever this module changes what a transformation returns; part of a corpus's fingerprint."""

_COREFERENCE_REASON = "coreference is switched off (its stanza model must be downloaded)"
_COREFERENCE_EXCEPTION = "it_is_non_referential"
"""Reads coreference only to leave referential "it is" out: without it, it fires on every "it is"."""

# Rules that record their edits under another rule's name. Unless that one is attested too, Multi-VALUE 0.3 then raises
# KeyError in its counter, and would express the edit with probability 1.
_RECORDED_AS = {
    "present_perfect_ever": "present_for_exp_perfect",
    "regularized_reflexives_aave": "regularized_reflexives",
    "regularized_reflexives_object_pronouns": "regularized_reflexives",
}


@dataclass(frozen=True)
class Transformed:
    """Dialect text, the names of the rules that changed it (sorted, each once), and the error that stopped it, if any.

    With an `error`, `text` is the unchanged input and `rules` is empty.
    """

    text: str
    rules: tuple[str, ...]
    error: str | None


class DialectEngine:
    """One loaded Multi-VALUE, usable for every vector; see the module's text.

    Args:
        directory: resource folder (`hl_scale.data.resources`).
        download: fetch missing resources.

    Raises:
        ResourceError: Multi-VALUE or an English spaCy pipeline is not installed.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None, *, download: bool = True) -> None:
        resources = ensure_resources(directory, download=download)
        missing = [found for found in resources.values() if found.required and not found.available]
        if missing:
            raise ResourceError("\n".join(found.detail for found in missing))
        self.unavailable_rules = unavailable_rules(resources)
        self._random = _SeededRandom()
        self._dialect = _build(resources, str(nltk_directory(directory)), self._random)

    def transform(self, text: str, vector: npt.NDArray[np.floating], seed: int) -> Transformed:
        """Rewrite one sentence.

        Args:
            text: a Standard English sentence.
            vector: (235,) attestation values: the probability that each feature is expressed where it applies. The
            zero vector
                is Standard English itself and returns the text untouched.
            seed: of the draws; the same (text, vector, seed) gives the same result in any process.

        Returns:
            The result; a sentence that Multi-VALUE fails on or empties is reported in `error`, not raised.

        Raises:
            ConditionError: the vector has the wrong length or values outside [0, 1].
        """
        vector = typology.checked_vector(vector, "vector")
        if not vector.any():
            return Transformed(text, (), None)
        self._target(vector)
        self._random.seed(seed)
        try:
            dialect = " ".join(self._dialect.transform(text).split())  # deleted words leave double spaces
        except Exception as error:  # third-party rules raise whatever comes up: the row is reported and left out
            return Transformed(text, (), f"{type(error).__name__}: {error}")
        if not dialect:
            return Transformed(text, (), "the transformation left no text")
        rules = {rule["type"] for rule in self._dialect.executed_rules.values()}
        if self._dialect.modification_counter["lexical"]:
            rules.add(SURFACE_RULE)
        return Transformed(dialect, tuple(sorted(rules)), None)

    def _target(self, vector: npt.NDArray[np.float32]) -> None:
        self._dialect.morphosyntax_transforms = {}
        # Python floats of the table's own decimals: float32(0.3) is above 0.3 and would shift the draws.
        self._dialect.vector = [0.0, *(round(float(value), 6) for value in vector)]
        self._dialect.initialize_from_vector()
        for rule in self.unavailable_rules:
            self._dialect.morphosyntax_transforms.pop(rule, None)


def unavailable_rules(resources: Mapping[str, Resource]) -> dict[str, str]:
    """Rules (function names) that cannot fire with these resources, and why.

    Found from Multi-VALUE's own source: a rule lacks what it, or a method it calls, reads.
    """
    reasons = {rule: _COREFERENCE_REASON for rule in _rules_reading("coref_clusters") if rule != _COREFERENCE_EXCEPTION}
    for name, words in {"cmudict": ("cmudict",), "wordnet": ("wn", "wnl")}.items():
        if not resources[name].available:
            for word in words:
                reasons.update(dict.fromkeys(_rules_reading(word), resources[name].detail.splitlines()[0]))
    return dict(sorted(reasons.items()))


def approximate_rules() -> dict[str, str]:
    """Rules that fire, but differently from Multi-VALUE with all of its models, and how."""
    return {_COREFERENCE_EXCEPTION: f'{_COREFERENCE_REASON}: every "it is" counts as non-referential'}


def engine_versions(resources: Mapping[str, Resource]) -> dict[str, str]:
    """Versions of what decides a transformation's result (distribution name -> version)."""
    model = resources["spacy_model"].detail.splitlines()[0]
    names = ["value-nlp", "spacy", model, "lemminflect", "inflect", "nltk"]
    versions = {"hl_scale dialect engine": ENGINE_VERSION}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


class _SeededRandom(random.Random):
    """Stands in for the module `random`; draws samples from sorted populations, as rules hand it lists made of sets."""

    def sample(self, population: Sequence[Any], k: int, *, counts: Any = None) -> list[Any]:
        return super().sample(sorted(population), k, counts=counts)


@functools.lru_cache(maxsize=1)
def _methods_reading() -> dict[str, set[str]]:
    """Per method of Multi-VALUE's BaseDialect, the attributes of self and the global names it reads."""
    path = typology.multivalue_directory() / "BaseDialect.py"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # the file's regular expressions are not raw strings
        warnings.simplefilter("ignore", DeprecationWarning)
        tree = ast.parse(path.read_text(encoding="utf-8"))
    base = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "BaseDialect")
    reading: dict[str, set[str]] = {}
    for method in base.body:
        if isinstance(method, ast.FunctionDef):
            attributes = {node.attr for node in ast.walk(method) if isinstance(node, ast.Attribute)}
            reading[method.name] = attributes | {node.id for node in ast.walk(method) if isinstance(node, ast.Name)}
    return reading


def _rules_reading(name: str) -> list[str]:
    """Rules that read `name`, themselves or through methods they call, sorted."""
    reading = _methods_reading()
    found = {method for method, names in reading.items() if name in names}
    while True:
        callers = {method for method, names in reading.items() if names & found} - found
        if not callers:
            break
        found |= callers
    return sorted({rule for rules in typology.rules_by_feature().values() for rule in rules} & found)


def _build(resources: Mapping[str, Resource], nltk_data: str, generator: _SeededRandom) -> Any:
    """A DialectFromVector of Multi-VALUE with its downloads, its coreference model and its randomness replaced."""
    import nltk
    import spacy

    if nltk_data not in nltk.data.path:
        nltk.data.path.insert(0, nltk_data)
    if resources["wordnet"].available:
        nltk.corpus.wordnet.ensure_loaded()
    pipeline = spacy.load(resources["spacy_model"].detail)
    parse = functools.lru_cache(maxsize=_PARSES_KEPT)(pipeline)
    with _multivalue() as dialects:
        base = importlib.import_module("multivalue.BaseDialect")
    pronunciations = base.cmudict if resources["cmudict"].available else types.SimpleNamespace(dict=dict)
    replacements = {
        "spacy": types.SimpleNamespace(load=lambda _: parse),
        "stanza": types.SimpleNamespace(Pipeline=lambda *_, **__: None),
        "cmudict": pronunciations,
        "random": generator,
    }
    for name, value in replacements.items():
        setattr(base, name, value)

    class Engine(dialects.DialectFromVector):  # type: ignore[misc, name-defined]
        def create_coref_cluster(self, string: str) -> None:
            return None

        def clear(self) -> None:
            super().clear()
            self.aint = False  # set by the rules for "ain't" and read by negative concord; never reset otherwise
            self.modification_counter: Counter[str] = Counter()

        def decide_filter_rules(self) -> Any:
            for rule, name in _RECORDED_AS.items():
                if rule in self.morphosyntax_transforms and name in self.rules:
                    self.morphosyntax_transforms.setdefault(name, self.morphosyntax_transforms[rule])
            return super().decide_filter_rules()

    return Engine(vector=[0.0] * (typology.NUM_FEATURES + 1))


@contextlib.contextmanager
def _multivalue() -> Iterator[Any]:
    """Import `multivalue.Dialects` without running the package's `__init__`, which downloads models.

    Stanza's import, seconds of torch for a model that is not used, is spared too: a stub stands in while it lasts.
    """
    if "multivalue" not in sys.modules:
        spec = importlib.util.find_spec("multivalue")
        assert spec is not None, "multivalue_directory() found the package"
        sys.modules["multivalue"] = importlib.util.module_from_spec(spec)
    stub = "stanza" not in sys.modules
    if stub:
        sys.modules["stanza"] = types.ModuleType("stanza")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield importlib.import_module("multivalue.Dialects")
    finally:
        if stub:
            del sys.modules["stanza"]
