"""Labelled sets: splits that share no text, dialect forms, what is read back, and sources."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from hl_scale.conditions import typology
from hl_scale.config import ConfigError, LabelledDataConfig, load_labelled_config
from hl_scale.data import labelled_preparation
from hl_scale.data.generation import DialectActor, counter
from hl_scale.data.labelled import SPLITS, LabelledSet, load_labelled, normal_form, split_rows
from hl_scale.data.labelled_preparation import prepare_labelled
from hl_scale.data.labelled_sources import LabelledError, Row, read_labelled

TEXT = "the old man said that she was not sure whether this film is any good and they have been working here"
WORDS = TEXT.split()
SIZES = {"train": 20, "validation": 6, "test": 8}


def sentences(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [f"{' '.join(draw.choices(WORDS, k=7))} {number}." for number in range(count)]


def forms(rows: list[Row]) -> set[str]:
    return {normal_form(text) for row in rows for text in row.texts}


def assert_apart(splits: Mapping[str, list[Row]]) -> None:
    for one in SPLITS:
        for other in SPLITS:
            assert one == other or not forms(splits[one]) & forms(splits[other]), (one, other)


def test_texts_that_differ_in_case_spacing_and_punctuation_never_lie_in_two_splits() -> None:
    texts = sentences(40)
    variants = [text.upper() for text in texts] + [text.replace(" ", ",  ") for text in texts]
    splits, left_out = split_rows([Row((text,), 1.0) for text in texts + variants], None, SIZES, seed=0)
    assert_apart(splits)
    assert {split: len(rows) for split, rows in splits.items()} == SIZES
    assert left_out["duplicate"] == 80


def test_a_text_with_two_classes_is_in_no_split() -> None:
    texts = sentences(40)
    rows = [Row((text,), 0.0) for text in texts] + [Row((texts[3].upper(),), 1.0)]
    splits, left_out = split_rows(rows, None, {**SIZES, "train": None}, seed=0)
    assert normal_form(texts[3]) not in set().union(*map(forms, splits.values()))
    assert left_out["contradictory"] == 2 and sum(map(len, splits.values())) == 39


@pytest.mark.parametrize("own_test", [False, True])
def test_pairs_in_different_splits_share_neither_text(own_test: bool) -> None:
    draw, texts = random.Random(1), sentences(60)
    rows = [Row((draw.choice(texts), draw.choice(texts)), float(number % 2)) for number in range(90)]
    test_rows = [Row((draw.choice(texts), text), 0.0) for text in sentences(20, seed=5)] if own_test else None
    splits, _ = split_rows(rows, test_rows, {"train": None, "validation": 5, "test": 9}, seed=0)
    assert_apart(splits)
    assert len(splits["test"]) == 9 and splits["train"]


def test_splits_depend_on_no_order_and_a_larger_set_tests_on_the_same_sentences() -> None:
    rows = [Row((text,), 0.0) for text in sentences(50)]
    first, _ = split_rows(rows, None, SIZES, seed=3)
    again, _ = split_rows(rows[::-1], None, SIZES, seed=3)
    larger, _ = split_rows(rows, None, {**SIZES, "train": 30}, seed=3)
    assert first == again and larger["test"] == first["test"] and larger["train"][:20] == first["train"]
    assert split_rows(rows, None, SIZES, seed=4)[0]["test"] != first["test"]


def test_barred_texts_come_into_training_alone() -> None:
    texts = sentences(50)
    barred = {normal_form(text.upper()) for text in texts[:25]}
    splits, _ = split_rows([Row((text,), 0.0) for text in texts], None, {**SIZES, "train": None}, 0, barred)
    assert not (forms(splits["test"]) | forms(splits["validation"])) & barred
    assert barred <= forms(splits["train"])


def test_too_few_examples_are_an_error_that_says_which_split_lacks_them() -> None:
    rows = [Row((text,), 0.0) for text in sentences(12)]
    with pytest.raises(LabelledError, match=r"6 validation examples are asked for, 4 are left[\s\S]*fix: lower"):
        split_rows(rows, None, SIZES, seed=0)


TEXTS = (
    "I have been waiting for the bus that never comes on time, and I am not happy about it.",
    "She does not know who is going to the market with her brothers this afternoon.",
    "The children were playing with their toys when it started to rain very heavily.",
    "My friends and I have already seen the movie, but we would like to see it again.",
    "He is not the man who told me that there are three houses behind the old school.",
    "They have to finish the work quickly because the manager will not wait for them.",
    "You should never give him the money unless he gives you a good reason for it.",
    "It is raining, and the people who live near the river are moving their things themselves.",
    "There is nobody in the village who has ever been more beautiful than her sister.",
    "We were thinking about the problem for a long time before we found any solution.",
)


@pytest.fixture
def labelled_config(tmp_path: Path) -> Callable[..., LabelledDataConfig]:
    """Ten sentences with two classes: 3 to test, 2 to validate, 5 to train, of which 2 are annotated."""
    path = tmp_path / "sentences.jsonl"
    rows = [{"text": text, "label": ("short", "long")[number % 2]} for number, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def build(**fields: Any) -> LabelledDataConfig:
        settings = {
            "directory": str(tmp_path / "set"), "task": "jsonl", "path": str(path), "test_sentences": 3,
            "validation_sentences": 2, "annotated_sentences": 2, "num_workers": 1,
            "varieties": ("AAVE", "Nigerian English"),
        }  # fmt: skip
        return LabelledDataConfig.model_validate({**settings, **fields})

    return build


@pytest.fixture
def without_ray(monkeypatch, engine) -> list[str]:
    """The actor that Ray would run, in this process; returns the varieties as they are transformed."""
    done: list[str] = []

    def transform(sentences: pa.Table, plan: Any, *, unavailable: Any, **_: Any) -> Iterator[pa.Table]:
        actor = object.__new__(DialectActor)
        actor._plan, actor._engine = plan, engine
        done.extend(plan.vectors)
        yield actor(sentences)

    monkeypatch.setattr(labelled_preparation, "transform_sentences", transform)
    monkeypatch.setattr(labelled_preparation, "ray_session", lambda workers: contextlib.nullcontext())
    return done


def test_test_and_annotated_examples_are_transformed_and_keep_id_label_and_original(
    labelled_config, without_ray, engine
) -> None:
    found = prepare_labelled(labelled_config()).labelled
    name = "Nigerian English"
    for split, count in (("test", 3), ("train", 2)):
        standard, dialect = found.examples(split)[:count], found.examples(split, name)
        assert [(e.example_id, e.label, e.texts) for e in standard] == [
            (e.example_id, e.label, e.standard) for e in dialect
        ]
        for example in dialect:
            (text,) = example.standard
            seed = counter(0, "labelled", text, name)
            assert example.texts == (engine.transform(text, typology.vector(name), seed).text,)
    assert found.annotated(name, 1) == found.annotated(name, 2)[:1]
    with pytest.raises(LabelledError, match="has 2 annotated examples in Nigerian English, 3 are asked for"):
        found.annotated(name, 3)
    entry = found.manifest["varieties"][name]
    changed = sum(e.texts != e.standard for e in found.examples("test", name))
    assert entry["test"] == {"examples": 3, "changed": changed, "failed": 0, "changed_share": changed / 3}
    assert found.manifest["unavailable_rules"] and found.manifest["splits"]["test"]["labels"].keys() == {
        "short",
        "long",
    }


def test_a_set_is_reused_and_another_variety_is_added_to_it(labelled_config, without_ray) -> None:
    first = prepare_labelled(labelled_config())
    assert prepare_labelled(labelled_config()).reused and len(without_ray) == 2
    more = prepare_labelled(labelled_config(varieties=("Nigerian English", "Chicano English")))
    assert more.transformed == ("Chicano English",) and without_ray[2:] == ["Chicano English"]
    assert more.labelled.examples("test", "AAVE") == first.labelled.examples("test", "AAVE")
    prepare_labelled(labelled_config(seed=1))
    assert len(without_ray) == 5 and not (set(first.labelled.varieties) - set(more.labelled.varieties))


def test_an_interrupted_preparation_goes_on_with_the_next_variety(labelled_config, without_ray, monkeypatch) -> None:
    transform = labelled_preparation.transform_sentences

    def fails_at_the_second(sentences: pa.Table, plan: Any, **settings: Any) -> Iterator[pa.Table]:
        if "Nigerian English" in plan.vectors:
            raise KeyboardInterrupt
        return transform(sentences, plan, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(labelled_preparation, "transform_sentences", fails_at_the_second)
        patch.setattr(labelled_preparation, "_VARIETIES_AT_ONCE", 1)
        with pytest.raises(KeyboardInterrupt):
            prepare_labelled(labelled_config())
    directory = Path(labelled_config().directory)
    assert not directory.exists()
    made = prepare_labelled(labelled_config())
    assert made.transformed == ("Nigerian English",) and made.labelled.examples("test", "AAVE")
    assert [path.name for path in directory.parent.iterdir() if path.name.startswith(".")] == []


def test_a_sentence_that_the_engine_fails_on_is_missing_there_and_counted(labelled_config, without_ray, engine) -> None:
    prepared = prepare_labelled(labelled_config(varieties=()))
    victim = prepared.labelled.examples("test")[1]
    original = engine.transform

    def transform(text: str, vector: Any, seed: int) -> Any:
        result = original(text, vector, seed)
        return type(result)(text, (), "ValueError: odd") if text == victim.texts[0] else result

    engine.transform = transform
    try:
        found = prepare_labelled(labelled_config(varieties=("AAVE",))).labelled
    finally:
        del engine.transform
    assert victim.example_id not in {e.example_id for e in found.examples("test", "AAVE")}
    name = typology.resolve("AAVE")
    assert found.manifest["varieties"][name]["test"]["failed"] == 1 and len(found.examples("test")) == 3


@pytest.fixture
def corpus(write_tiny_corpus, tmp_path) -> Path:
    return write_tiny_corpus(tmp_path / "corpus")


def set_that_overlaps(corpus: Path, tmp_path: Path, **fields: Any) -> LabelledSet:
    """A labelled set of the corpus's training and held-out sentences, in capitals."""
    from hl_scale.data.generation import SENTENCE_SCHEMA
    from hl_scale.data.shards import read_manifest, read_shards

    texts = read_shards(corpus, read_manifest(corpus), "sentences", SENTENCE_SCHEMA)["text"].to_pylist()
    path = tmp_path / "overlapping.jsonl"
    path.write_text("".join(json.dumps({"text": t.upper() + "!", "label": "a"}) + "\n" for t in texts))
    data = LabelledDataConfig.model_validate(
        {"directory": str(tmp_path / "overlapping"), "task": "jsonl", "path": str(path), "test_sentences": 6,
         "validation_sentences": 2, **fields}
    )  # fmt: skip
    return prepare_labelled(data).labelled


def test_a_set_prepared_apart_from_a_corpus_tests_on_none_of_its_training_sentences(corpus, tmp_path) -> None:
    found = set_that_overlaps(corpus, tmp_path, apart_from=(str(corpus),))
    view = found.apart_from(corpus)
    assert view.examples("test") == found.examples("test") and view.apart[0]["removed"] == {"test": 0, "validation": 0}
    assert found.manifest["apart_from"] == [{"corpus": "corpus", "fingerprint": "c" * 64, "training_sentences": 12}]


def test_overlap_with_a_corpus_is_removed_afterwards_and_recorded(corpus, tmp_path) -> None:
    found = set_that_overlaps(corpus, tmp_path)
    view = found.apart_from(corpus)
    removed = view.apart[0]["removed"]
    assert removed["test"] > 0 and len(view.examples("test")) == 6 - removed["test"]
    assert view.examples("train") == found.examples("train")
    assert view.apart_from(corpus).apart[1]["removed"] == {"test": 0, "validation": 0}


def test_a_damaged_set_and_a_corpus_in_its_place_are_refused(labelled_config, corpus) -> None:
    found = prepare_labelled(labelled_config(varieties=())).labelled
    shard = found.directory / "examples-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(LabelledError, match=r"its sha256 differs[\s\S]*fix: hl-scale prepare-labelled"):
        load_labelled(found.directory)
    with pytest.raises(LabelledError, match="holds no labelled set"):
        load_labelled(corpus)


def test_what_a_set_has_not_is_named(labelled_config) -> None:
    found = prepare_labelled(labelled_config(varieties=())).labelled
    with pytest.raises(LabelledError, match=r"not transformed into Chicano English[\s\S]*labelled\.varieties"):
        found.examples("test", "Chicano English")
    for split, variety in (("dev", "standard"), ("validation", "AAVE")):
        with pytest.raises(LabelledError, match="has no split"):
            found.examples(split, variety)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"text": "a b"}'], "must have the keys"),
        (["{"], "line 1 is not JSON"),
        (['{"text": "a", "label": 1}', '{"text_a": "a", "text_b": "b", "label": 1}'], "others a pair"),
        (['{"text": "a", "label": 1.5}', '{"text": "b", "label": "x"}'], "labels of one form"),
        (['{"text": " ", "label": 1}'], "empty text"),
        (['{"text": "a", "label": null}'], "neither a name nor a number"),
    ],
)
def test_a_file_that_cannot_be_used_is_an_error_that_says_why(labelled_config, tmp_path, lines, said) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(LabelledError, match=said):
        read_labelled(labelled_config(path=str(path)))


def test_numbers_with_a_point_are_scores_and_whole_numbers_are_classes(labelled_config, tmp_path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"text_a": "a &amp; b", "text_b": "c", "label": 1}\n{"text_a": "d", "text_b": "e", "label": 0}')
    found = read_labelled(labelled_config(path=str(path)))
    assert (found.kind, found.labels) == ("classification", ("0", "1")) and found.rows[0] == Row(("a & b", "c"), 1.0)
    path.write_text('{"text": "a", "label": 1.5}\n{"text": "d", "label": 2}')
    found = read_labelled(labelled_config(path=str(path)))
    assert (found.kind, [row.label for row in found.rows]) == ("regression", [1.5, 2.0])


GLUE_CARD = """---
configs:
- config_name: rte
  data_files: [{split: train, path: train.jsonl}, {split: validation, path: validation.jsonl}]
dataset_info:
- config_name: rte
  features:
  - {name: sentence1, dtype: string}
  - {name: sentence2, dtype: string}
  - {name: label, dtype: {class_label: {names: {'0': entailment, '1': not_entailment}}}}
---
"""


def test_a_glue_task_is_tested_on_its_validation_split(labelled_config, tmp_path) -> None:
    for split, count in (("train", 30), ("validation", 10)):
        rows = [
            {"sentence1": text, "sentence2": f"{text} {split}", "label": 1} for text in sentences(count, seed=count)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "README.md").write_text(GLUE_CARD)
    config = labelled_config(task="glue", name="rte", path=str(tmp_path), test_sentences=10, varieties=())
    found = prepare_labelled(config).labelled
    assert found.task.labels == ("entailment", "not_entailment")
    assert {e.texts[1].rsplit(" ", 1)[1] for e in found.examples("test")} == {"validation"}
    assert {e.texts[1].rsplit(" ", 1)[1] for e in found.examples("train")} == {"train"}


def test_a_glue_task_without_a_hub_says_what_to_use_instead(labelled_config, tmp_path) -> None:
    with pytest.raises(LabelledError, match=r"'sst2' cannot be loaded[\s\S]*without a hub use task: jsonl"):
        read_labelled(labelled_config(task="glue", name="sst2", path=str(tmp_path / "nothing")))


def test_a_file_of_labelled_sets_is_as_strict_as_a_run_and_knows_nothing_of_one(tmp_path, monkeypatch) -> None:
    path = tmp_path / "labelled.yaml"
    path.write_text("labelled: {directory: d, task: glue}\ntask_adapter: {step: 3}\n")
    with pytest.raises(ConfigError, match=r"task_adapter\.step[\s\S]*did you mean 'steps'"):
        load_labelled_config(path)
    path.write_text("labelled: {directory: d, task: glue}\n")
    with pytest.raises(ConfigError, match="task 'glue' needs name"):
        load_labelled_config(path)
    monkeypatch.setenv("HL_SCALE_TRAINING__STEPS", "5")
    loaded = load_labelled_config(path, ["labelled.name=rte", "task_adapter.steps=3"])
    assert loaded.labelled.name == "rte" and loaded.task_adapter.steps == 3


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "configs/labelled").glob("*.yaml")), ids=str)
def test_every_file_of_a_labelled_set_loads_and_names_varieties_that_exist(path: Path) -> None:
    loaded = load_labelled_config(path).labelled
    assert len({typology.resolve(name) for name in loaded.varieties}) == len(loaded.varieties) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("task", "labels"), [("sentiment", 2), ("hedging", 2), ("topic", 5), ("domain", 3)])
def test_tasks_that_come_with_packages_have_natural_sentences_of_every_class(task, labels) -> None:
    found = read_labelled(LabelledDataConfig(directory="unused", task=task))
    counts = [sum(row.label == index for row in found.rows) for index in range(labels)]
    assert len(found.labels) == labels and min(counts) > 300, counts
    splits, _ = split_rows(found.rows, None, {"train": None, "validation": 100, "test": 300}, seed=0)
    assert_apart(splits)
    assert all(row.texts[0] == " ".join(row.texts[0].split()) and "&quot;" not in row.texts[0] for row in found.rows)
