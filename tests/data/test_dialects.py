"""The dialect engine: what it changes, that it is deterministic, and what it says it cannot do."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest

from hl_scale.conditions import typology
from hl_scale.data import dialects
from hl_scale.data.dialects import DialectEngine
from hl_scale.data.resources import Resource, ResourceError

from .conftest import SENTENCES

ALL = np.ones(typology.NUM_FEATURES, dtype=np.float32)


def only(*rules: str, value: float = 1.0) -> np.ndarray:
    """The vector that attests the features of these rules alone."""
    vector = np.zeros(typology.NUM_FEATURES, dtype=np.float32)
    for feature, names in typology.rules_by_feature().items():
        if set(names) & set(rules):
            vector[feature - 1] = value
    return vector


@pytest.mark.parametrize(
    ("rule", "text", "expected"),
    [
        ("were_was", "You were late.", "You was late."),
        ("nasal_possessive_pron", "This is her book.", "This is hern book."),
        ("me_us", "Please show me the town.", "Please show us the town."),
        ("negative_concord", "He does not have a camera.", "He does not have no camera."),
        ("who_as", "The man who called me left.", "The man as called me left."),
    ],
)
def test_one_attested_feature_makes_its_own_change_and_reports_its_rule(
    engine: DialectEngine, rule: str, text: str, expected: str
) -> None:
    result = engine.transform(text, only(rule), seed=0)
    assert (result.text, result.rules, result.error) == (expected, (rule,), None)


def test_the_zero_vector_returns_the_text_untouched_even_where_a_contraction_would_apply(engine: DialectEngine) -> None:
    text = "They have to go,  and I will stay."
    assert engine.transform(text, typology.vector("standard"), seed=1) == dialects.Transformed(text, (), None)


def test_unconditional_contractions_are_reported_under_their_own_name(engine: DialectEngine) -> None:
    result = engine.transform("They have to go.", only("who_as"), seed=0)
    assert result.text == "They gotta go." and result.rules == (dialects.SURFACE_RULE,)


def test_an_attestation_value_is_the_probability_of_the_change(engine: DialectEngine) -> None:
    rare = only("were_was", value=0.3)
    changed = sum(engine.transform("You were late.", rare, seed).text == "You was late." for seed in range(400))
    assert abs(changed / 400 - 0.3) < 4 * (0.3 * 0.7 / 400) ** 0.5


def test_retargeting_leaves_nothing_of_the_vector_before(engine: DialectEngine) -> None:
    vectors = [typology.vector(name) for name in ("AAVE", "HKE", "IndE")]
    alone = [engine.transform(SENTENCES[0], vector, seed=5) for vector in vectors]
    engine.transform(SENTENCES[1], ALL, seed=9)
    assert [engine.transform(SENTENCES[0], vector, seed=5) for vector in reversed(vectors)] == alone[::-1]
    assert len({result.text for result in alone}) == 3


def test_the_seed_alone_decides_between_different_outcomes(engine: DialectEngine) -> None:
    outcomes = [engine.transform(SENTENCES[7], typology.vector("HKE"), seed).text for seed in range(12)]
    assert outcomes == [engine.transform(SENTENCES[7], typology.vector("HKE"), seed).text for seed in range(12)]
    assert len(set(outcomes)) > 3


def test_the_global_random_state_is_neither_read_nor_changed(engine: DialectEngine) -> None:
    random.seed(1)
    before = random.getstate()
    first = engine.transform(SENTENCES[2], ALL, seed=3)
    assert random.getstate() == before
    random.seed(2)
    assert engine.transform(SENTENCES[2], ALL, seed=3) == first


def test_samples_do_not_depend_on_the_order_of_the_population() -> None:
    drawn = []
    for population in (["a", "b", "c"], ["c", "a", "b"]):
        generator = dialects._SeededRandom()
        generator.seed(4)
        drawn.append([generator.sample(population, 2) for _ in range(20)])
    assert drawn[0] == drawn[1]


def test_a_process_with_another_hash_seed_writes_the_same_text(engine: DialectEngine) -> None:
    program = """
import json, sys
import numpy as np
from hl_scale.data.dialects import DialectEngine
engine = DialectEngine()
ones = np.ones(235, dtype=np.float32)
print(json.dumps([engine.transform(text, ones, seed).text for seed, text in enumerate(json.loads(sys.argv[1]))]))
"""
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(SENTENCES)],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    here = [engine.transform(text, ALL, seed).text for seed, text in enumerate(SENTENCES)]
    assert json.loads(done.stdout.splitlines()[-1]) == here


@pytest.mark.parametrize(
    ("rule", "text", "expected"),
    [
        ("regularized_reflexives_aave", "He did it himself.", "He did it hisself."),
        ("present_perfect_ever", "I have seen London.", None),
    ],
)
def test_a_rule_that_records_under_another_name_is_expressed_with_its_own_probability(
    engine: DialectEngine, rule: str, text: str, expected: str | None
) -> None:
    always = engine.transform(text, only(rule), seed=0)
    assert always.error is None and always.text != text
    assert expected is None or always.text == expected
    rare = [engine.transform(text, only(rule, value=0.3), seed).text != text for seed in range(300)]
    assert 0.18 < sum(rare) / 300 < 0.42


def test_an_error_inside_a_rule_is_returned_with_the_text_unchanged(engine: DialectEngine, monkeypatch) -> None:
    def broken(self: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr(type(engine._dialect), "were_was", broken)
    result = engine.transform("You were late.", only("were_was"), seed=0)
    assert result == dialects.Transformed("You were late.", (), "IndexError: list index out of range")


def test_an_emptied_sentence_is_an_error(engine: DialectEngine, monkeypatch) -> None:
    monkeypatch.setattr(type(engine._dialect), "transform", lambda self, text: "  ")
    assert engine.transform("You were late.", ALL, seed=0).error == "the transformation left no text"


def test_a_vector_of_another_length_is_refused(engine: DialectEngine) -> None:
    with pytest.raises(typology.ConditionError, match="expected \\(235,\\)"):
        engine.transform("You were late.", np.ones(236), seed=0)


def test_rules_that_need_coreference_are_listed_and_never_fire(engine: DialectEngine) -> None:
    assert set(engine.unavailable_rules) == {
        "she_inanimate_objects",
        "he_inanimate_objects",
        "anaphoric_it",
        "null_referential_pronouns",
        "it_is_referential",
    }
    lacking = only(*engine.unavailable_rules)
    for text in SENTENCES:
        assert not set(engine.transform(text, lacking, seed=0).rules) & set(engine.unavailable_rules)


def test_without_wordnet_and_cmudict_the_rules_that_read_them_are_listed_with_the_reason() -> None:
    here = {name: Resource(name, True, "/somewhere", False) for name in ("cmudict", "wordnet")}
    gone = {name: Resource(name, False, f"{name} is gone\n  fix: get it", False) for name in ("cmudict", "wordnet")}
    with_all, with_none = dialects.unavailable_rules(here), dialects.unavailable_rules(gone)
    assert with_none.keys() > with_all.keys()
    assert with_none["regularized_past_tense"] == "cmudict is gone"
    assert with_none["quotative_like"] == "wordnet is gone"


def test_a_missing_required_resource_stops_the_engine_with_its_fix(monkeypatch) -> None:
    missing = {"spacy_model": Resource("spacy_model", False, "no pipeline\n  fix: install it", True)}
    monkeypatch.setattr(dialects, "ensure_resources", lambda *_, **__: missing)
    with pytest.raises(ResourceError, match="fix: install it"):
        DialectEngine()


def test_a_sentence_is_parsed_once_for_many_vectors(engine: DialectEngine) -> None:
    parse = engine._dialect.nlp
    before = parse.cache_info()
    for seed in range(6):
        engine.transform("A sentence that no other test has parsed.", ALL, seed)
    assert parse.cache_info().misses - before.misses == 1
    assert parse.cache_info().hits - before.hits == 5


def test_a_sentence_does_not_depend_on_those_before_it(engine) -> None:
    """Multi-VALUE remembers that a sentence had "ain't" and let it leak into later ones."""
    concord, aint = np.zeros((2, typology.NUM_FEATURES), dtype=np.float32)
    concord[153] = aint[154] = 1.0  # features 154 and 155
    text = "He is not the man who has a car."
    before = engine.transform(text, concord, 0)
    assert "ain't" in engine.transform("That is not fair.", aint, 0).text
    assert engine.transform(text, concord, 0) == before
    assert "isn't" in before.text and "ain't" not in before.text
