"""eWAVE vectors, names, coverage and conditions."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from hl_scale.conditions import typology

SIX = ("AAVE", "AppE", "ChcE", "CollSgE", "IndE", "NgE")


def test_vectors_equal_the_grades_of_the_raw_ewave_table_for_every_variety() -> None:
    grades = {"A": 1.0, "B": 0.6, "C": 0.3}
    expected = {name: np.zeros(typology.NUM_FEATURES, dtype=np.float32) for name in typology.varieties()}
    with (typology.multivalue_directory() / "resources" / "ewave.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["language_name"] in expected:
                expected[row["language_name"]][int(row["parameter_pk"]) - 1] = grades.get(row["attestation"], 0.0)
    assert len(expected) == 50
    for name, values in expected.items():
        np.testing.assert_array_equal(typology.vector(name), values, err_msg=name)


def test_names_are_235_and_start_and_end_as_in_ewave() -> None:
    names = typology.feature_names()
    assert len(names) == len(set(names)) == typology.NUM_FEATURES
    assert names[0] == "She/her used for inanimate referents"
    assert names[-1] == "Like as a quotative particle"


@pytest.mark.parametrize(
    ("given", "full", "attested"),
    [
        ("AAVE", "Urban African American Vernacular English", 141),
        ("appe", "Appalachian English", 76),
        ("ChcE", "Chicano English", 32),
        ("singlish", "Colloquial Singapore English (Singlish)", 75),
        ("  indian   ENGLISH ", "Indian English", 100),
        ("NgE", "Nigerian English", 51),
        ("NigE", "Nigerian English", 51),
        ("JamE", "Jamaican English", 78),
        ("HKE", "Hong Kong English", 81),
    ],
)
def test_full_names_abbreviations_and_aliases_find_the_variety(given: str, full: str, attested: int) -> None:
    assert typology.resolve(given) == full
    assert int((typology.vector(given) > 0).sum()) == attested


def test_standard_american_english_is_the_zero_vector() -> None:
    for name in ("standard", "SAE", "Standard American English"):
        assert not typology.vector(name).any()


def test_vectors_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match="read-only"):
        typology.vector("HKE")[0] = 1.0


def test_an_unknown_variety_names_the_closest_ones() -> None:
    with pytest.raises(typology.UnknownVarietyError, match="closest: Nigerian English"):
        typology.vector("Nigerain Englsh")


def test_188_features_have_a_rule_and_every_rule_exists_in_multivalue() -> None:
    assert int(typology.implementable_features().sum()) == 188
    source = (typology.multivalue_directory() / "BaseDialect.py").read_text(encoding="utf-8")
    for rules in typology.rules_by_feature().values():
        for rule in rules:
            assert f"def {rule}(" in source


@pytest.mark.parametrize(
    ("target", "expected"),
    [("AppE", 0.882), ("ChcE", 1.0), ("CollSgE", 0.880), ("IndE", 0.870), ("NgE", 1.0), ("AAVE", 0.801)],
)
def test_binary_coverage_by_the_other_five_varieties_equals_the_hand_computed_share(
    target: str, expected: float
) -> None:
    others = np.stack([typology.vector(name) for name in SIX if name != target])
    assert typology.coverage(typology.vector(target), others) == pytest.approx(expected, abs=5e-4)


def test_weightings_of_coverage_on_a_case_done_by_hand() -> None:
    without_rule = int(np.flatnonzero(~typology.implementable_features())[0])
    target = np.zeros(typology.NUM_FEATURES, dtype=np.float32)
    target[[0, 1, without_rule]] = 1.0, 0.3, 0.6
    training = np.zeros((2, typology.NUM_FEATURES), dtype=np.float32)
    training[0, 0] = 0.3
    training[1, without_rule] = 1.0
    assert typology.coverage(target, training) == pytest.approx(2 / 3)
    assert typology.coverage(target, training, "attestation") == pytest.approx(1.6 / 1.9)
    assert typology.coverage(target, training, "implementable") == pytest.approx(1 / 2)


def test_coverage_of_nothing_is_complete_and_coverage_by_nothing_is_zero() -> None:
    nothing = np.zeros((1, typology.NUM_FEATURES), dtype=np.float32)
    assert typology.coverage(nothing[0], nothing) == 1.0
    assert typology.coverage(typology.vector("HKE"), nothing) == 0.0


def test_coverage_refuses_training_vectors_of_another_length() -> None:
    with pytest.raises(typology.ConditionError, match=r"shape \(1, 236\)"):
        typology.coverage(typology.vector("HKE"), np.zeros((1, 236), dtype=np.float32))


def test_conditions_are_read_from_names_and_from_feature_files(tmp_path) -> None:
    assert typology.parse_condition("dialect:nge").name == "Nigerian English"
    assert not typology.parse_condition("standard").vector.any()
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"1": 0.3, typology.feature_names()[234]: 1}))
    condition = typology.parse_condition(f"features:{path}")
    assert condition.name == "mine"
    assert condition.vector[0] == np.float32(0.3) and condition.vector[234] == 1 and (condition.vector > 0).sum() == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[0.1]", "holds a list"),
        ('{"236": 1}', "ids run from 1 to 235"),
        ('{"Like as a quotativ particle": 1}', "closest: Like as a quotative particle"),
        ('{"1": 1.5}', "lie in \\[0, 1\\]"),
        ('{"1": NaN}', "lie in \\[0, 1\\]"),
        ('{"1": 1' + 400 * "0" + "}", "lie in \\[0, 1\\]"),
        ("[" * 10**5, "not valid JSON"),
        ('{"1": "A"}', "expected a number"),
        ('{"1": true}', "expected a number"),
    ],
)
def test_a_wrong_feature_file_is_refused_with_its_reason(tmp_path, content: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(typology.ConditionError, match=message):
        typology.parse_condition(f"features:{path}")


@pytest.mark.parametrize("text", ["", "dialect:", "feature:x", "Nigerian English", "features:/nowhere.json"])
def test_a_condition_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(typology.ConditionError, match=r"condition|not found"):
        typology.parse_condition(text)


def test_a_vector_of_236_values_is_refused() -> None:
    with pytest.raises(typology.ConditionError, match="drop row 0"):
        typology.checked_vector(np.zeros(236))


@pytest.fixture
def _without_multivalue(monkeypatch) -> Iterator[None]:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "multivalue" else find(name))
    typology.multivalue_directory.cache_clear()
    yield
    typology.multivalue_directory.cache_clear()


@pytest.mark.usefixtures("_without_multivalue")
def test_a_missing_multivalue_says_how_to_install_it() -> None:
    with pytest.raises(typology.TypologyUnavailableError, match=r"pip install --no-deps value-nlp==0\.3"):
        typology.multivalue_directory()


def test_reading_the_tables_imports_neither_multivalue_nor_torch() -> None:
    program = (
        "import sys; from hl_scale.conditions import typology; typology.vector('HKE'); "
        "print(sorted({'multivalue', 'spacy', 'torch', 'nltk'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
