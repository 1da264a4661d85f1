"""Vectors of languages: read from lang2vec's tables, relative to English, in the place of eWAVE's."""

from __future__ import annotations

import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hl_scale.conditions import languages, typology
from hl_scale.conditions.sources import Typology, mean_vector, source
from hl_scale.conditions.typology import ConditionError, TypologyUnavailableError, UnknownVarietyError


def raw(code: str) -> np.ndarray:
    """A language's row of lang2vec's own table."""
    archive = np.load(
        Path(importlib.metadata.distribution("lang2vec").locate_file("lang2vec/data/feature_predictions.npz"))
    )
    columns = [number for number, name in enumerate(archive["feats"]) if name.startswith("S_")]
    return archive["data"][list(archive["langs"]).index(code)][columns, 0]


def test_a_vector_is_what_distinguishes_a_language_from_english() -> None:
    for code in ("jpn", "cym", "deu"):
        np.testing.assert_array_equal(languages.vector(code), raw(code) - raw("eng"))
    assert not languages.vector("eng").any() and not languages.vector("standard").any()
    order = languages.feature_names().index("S_SOV")
    assert languages.vector("jpn")[order] == 1 and languages.vector("fra")[order] == 0  # Japanese has its verbs last


@pytest.mark.parametrize(("given", "code"), [("de", "deu"), ("DEU", "deu"), (" cy ", "cym"), ("english", "eng")])
def test_languages_go_by_their_iso_codes(given: str, code: str) -> None:
    assert languages.resolve(given) == code


def test_an_unknown_language_is_refused_with_the_closest_codes() -> None:
    with pytest.raises(UnknownVarietyError, match=r"unknown language 'deux'\n  closest: .*deu"):
        languages.vector("deux")


def test_the_distance_is_one_minus_the_cosine_of_features() -> None:
    first, second = raw("nld"), raw("jpn")
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    assert languages.distance("nl", "ja") == pytest.approx(1 - cosine, abs=1e-6)
    assert languages.distance("nl", "nl") == pytest.approx(0, abs=1e-12)
    assert languages.distance("nl", "de") < languages.distance("nl", "fr") < languages.distance("nl", "ja")


def test_coverage_counts_differences_that_training_shares_with_their_sign() -> None:
    target, one, other = (np.zeros(languages.NUM_FEATURES) for _ in range(3))
    target[[3, 5, 9, 20]] = 1, -1, 1, 1
    one[[3, 5]] = 1, 1  # 5 differs the other way
    other[[9, 40]] = 1, 1
    assert languages.coverage(target, np.stack([one, other])) == 0.5
    assert languages.coverage(np.zeros(languages.NUM_FEATURES), np.stack([one])) == 1.0
    with pytest.raises(ConditionError, match="is not defined"):
        languages.coverage(target, np.stack([one]), "attestation")


@pytest.mark.parametrize("name", ["ewave", "lang2vec"])
def test_both_sources_offer_the_same_and_their_standard_is_the_zero_vector(name: str) -> None:
    found = source(name)
    for member, value in vars(Typology).items():
        if inspect.isfunction(value) and not member.startswith("_"):
            expected = [parameter for parameter in inspect.signature(value).parameters if parameter != "self"]
            assert list(inspect.signature(getattr(found, member)).parameters) == expected, member
    assert found.vector(found.STANDARD).shape == (found.NUM_FEATURES,) and not found.vector(found.STANDARD).any()
    assert found.parse_condition("standard").name == found.STANDARD
    assert mean_vector(found).shape == (found.NUM_FEATURES,)
    some = found.varieties()[3]
    np.testing.assert_array_equal(found.parse_condition(f"dialect:{some}").vector, found.vector(some))
    with pytest.raises(ConditionError, match="cannot read the condition"):
        found.parse_condition("task:nothing")


def test_the_distance_of_varieties_of_english_is_that_of_their_vectors() -> None:
    first, second = typology.vector("IndE"), typology.vector("NgE")
    assert typology.distance("IndE", "NgE") == pytest.approx(np.linalg.norm(first - second))


def test_the_tables_are_found_beside_a_script_of_the_same_name() -> None:
    scripts = Path(sys.executable).parent
    assert (scripts / "lang2vec.py").is_file(), "the trap is there: this script stands before the package"
    code = f"import sys; sys.path.insert(0, {str(scripts)!r}); from hl_scale.conditions import languages as l"
    subprocess.run([sys.executable, "-c", f"{code}; l.vector('deu')"], check=True)


def test_without_the_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    languages._table.cache_clear()
    languages._two_letters.cache_clear()
    monkeypatch.setattr(importlib.metadata.Distribution, "discover", lambda **_: iter(()))
    with pytest.raises(TypologyUnavailableError, match=r"pip install 'hl_scale\[languages\]'"):
        languages.varieties()
