"""URIEL: what a language is, as 103 numbers, for languages other than English.

URIEL (Littell et al., 2017; https://aclanthology.org/E17-2002) joins what WALS, SSWL and Ethnologue say of the syntax
of some eight thousand languages; what they leave open is predicted from related and neighbouring languages. Features
are 0 or 1. A language is the vector of its features minus those of English, so that English, which pairs start from,
is the zero vector, as Standard American English is in `hl_scale.conditions.typology`.

The tables are read from the installed `lang2vec` package (CC BY-SA 4.0) without importing it, because its modules need
`pkg_resources`. This module offers the same names as `typology`; `hl_scale.conditions.sources` chooses between them.
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hl_scale.conditions.typology import (
    Condition,
    ConditionError,
    TypologyUnavailableError,
    UnknownVarietyError,
    Vector,
)

NUM_FEATURES = 103
STANDARD = "eng"
WEIGHTINGS: tuple[str, ...] = ("binary",)

_FIX = "fix: pip install 'hl_scale[languages]'"


@functools.lru_cache(maxsize=1)
def _table() -> tuple[dict[str, int], npt.NDArray[np.float32], tuple[str, ...]]:
    """Language -> row, features (languages, 103) of 0 and 1, and their names."""
    with np.load(_file("feature_predictions.npz"), allow_pickle=False) as archive:
        names = [str(name) for name in archive["feats"]]
        columns = [number for number, name in enumerate(names) if name.startswith("S_")]
        values = np.asarray(archive["data"][:, columns, 0], dtype=np.float32)
        languages = {str(name): row for row, name in enumerate(archive["langs"])}
    if values.shape[1] != NUM_FEATURES or STANDARD not in languages or not np.isin(values, (0, 1)).all():
        raise TypologyUnavailableError(
            f"the installed lang2vec has {values.shape[1]} features of syntax; expected {NUM_FEATURES} of 0 and 1\n"
            f"  {_FIX}"
        )
    return languages, values, tuple(names[column] for column in columns)


@functools.lru_cache(maxsize=1)
def _two_letters() -> dict[str, str]:
    """ISO 639-1 code -> ISO 639-3 code."""
    codes: dict[str, str] = json.loads(_file("letter_codes.json").read_text(encoding="utf-8"))
    return codes


def _file(name: str) -> Path:
    try:  # not by import: the package also installs a script lang2vec.py, which hides it from other scripts beside it
        path = Path(str(importlib.metadata.distribution("lang2vec").locate_file(f"lang2vec/data/{name}")))
    except importlib.metadata.PackageNotFoundError:
        raise TypologyUnavailableError(
            f"vectors of languages come with the package lang2vec, which is not installed\n  {_FIX}"
        ) from None
    if not path.is_file():
        raise TypologyUnavailableError(f"the installed lang2vec lacks {path}\n  {_FIX}")
    return path


def feature_names() -> tuple[str, ...]:
    """URIEL's names of the 103 features, for example `S_SVO`."""
    return _table()[2]


def varieties() -> tuple[str, ...]:
    """ISO 639-3 codes of the languages, without English."""
    return tuple(sorted(name for name in _table()[0] if name != STANDARD))


def resolve(name: str) -> str:
    """The ISO 639-3 code of a language given by that or by its ISO 639-1 code, in any case; `standard` is English.

    Raises:
        UnknownVarietyError: no such language; the closest codes are listed.
    """
    code = name.strip().casefold()
    code = STANDARD if code in ("standard", "english") else _two_letters().get(code, code)
    if code in _table()[0]:
        return code
    closest = difflib.get_close_matches(code, list(_table()[0]), n=3, cutoff=0.3)
    raise UnknownVarietyError(
        f"unknown language {name!r}\n  closest: {'; '.join(closest) or 'none'}\n"
        "  fix: use its ISO 639-3 code (deu, cym, jpn), or its ISO 639-1 code (de, cy, ja)"
    )


def vector(name: str) -> Vector:
    """(103,) float32, read-only: the features of a language minus those of English, in {-1, 0, 1}.

    Raises:
        UnknownVarietyError: see `resolve`.
    """
    return _difference(resolve(name))


@functools.cache
def _difference(code: str) -> Vector:
    rows, values, _ = _table()
    found = values[rows[code]] - values[rows[STANDARD]]
    found.setflags(write=False)
    return found


def distance(first: str, second: str) -> float:
    """URIEL's syntactic distance of two languages: one minus the cosine of their features, in [0, 1]."""
    rows, values, _ = _table()
    left, right = (values[rows[resolve(name)]].astype(np.float64) for name in (first, second))
    return float(1 - left @ right / np.sqrt((left @ left) * (right @ right)))


def coverage(target_vector: npt.NDArray[Any], training_vectors: npt.NDArray[Any], weighting: str = "binary") -> float:
    """Share of the features in which a language differs from English that some training language differs in too.

    Args:
        target_vector: (103,).
        training_vectors: (K, 103) of what was trained on.
        weighting: `binary`, each feature counts once.

    Returns:
        A share in [0, 1]; 1.0 for a language that differs in nothing.
    """
    target, training = np.asarray(target_vector), np.asarray(training_vectors)
    if weighting != "binary" or target.shape != (NUM_FEATURES,) or training.shape[1:] != (NUM_FEATURES,):
        raise ConditionError(
            f"coverage of {target.shape} by {training.shape}, weighted {weighting!r}, is not defined\n"
            f"  fix: pass ({NUM_FEATURES},), (K, {NUM_FEATURES}) and 'binary'"
        )
    differs = target != 0
    return float((training == target)[:, differs].any(0).mean()) if differs.any() else 1.0


def parse_condition(text: str) -> Condition:
    """Read a condition from the command line: `standard`, or `dialect:CODE` with what `resolve` knows.

    Raises:
        UnknownVarietyError: no such language.
        ConditionError: another form.
    """
    kind, separator, argument = text.strip().partition(":")
    if not separator and kind.casefold() in ("standard", "english"):
        return Condition(STANDARD, vector(STANDARD))
    if kind == "dialect" and argument.strip():
        return Condition(resolve(argument), vector(argument))
    raise ConditionError(
        f"cannot read the condition {text!r}\n  fix: use 'standard' or 'dialect:CODE', e.g. dialect:deu"
    )
