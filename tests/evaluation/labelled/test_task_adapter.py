"""Task adapters on a tiny base: what is learnt, kept, written, read back and measured."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hl_scale.base import AdaptedModel, load_base
from hl_scale.base.recompute import attached
from hl_scale.config import BaseModelConfig, LoraConfig, TaskAdapterConfig
from hl_scale.data.labelled import LabelledExample, TaskFacts
from hl_scale.data.peft_directory import read_adapter
from hl_scale.evaluation.labelled import (
    ClassifierHead,
    TaskAdapter,
    TaskAdapterError,
    fit_task_adapter,
    load_measurement,
    load_task_adapter,
    measure,
)
from hl_scale.evaluation.labelled.head import choose_pooling, pool
from hl_scale.evaluation.labelled.measuring import macro_f1, pearson, ranks
from hl_scale.evaluation.measurement import EvaluationError

TEXT = "the old man said that she was not sure this film is any good and they have been working here"
WORDS = TEXT.split(" ")
CLASSES = TaskFacts("nobody", "classification", ("without", "with"))
SCORES = TaskFacts("length", "regression", ())
LORA = LoraConfig(rank=4, alpha=8.0, target_modules=("q_proj", "v_proj"))
CONFIG = TaskAdapterConfig(steps=60, batch_size=8, learning_rate=1e-2, validate_every=15)


def examples(count: int, seed: int, graded: bool = False) -> list[LabelledExample]:
    """Is "nobody" the last word, or how many words are there."""
    draw, found = random.Random(seed), []
    for number in range(count):
        words = draw.choices(WORDS, k=draw.randint(3, 12))
        label = float(number % 2)
        if graded:
            label = float(len(words))
        elif label:
            words[-1] = "nobody"
        found.append(LabelledExample(seed * 1000 + number, (" ".join(words),), label, (" ".join(words),)))
    return found


@pytest.fixture(scope="module")
def base_config(tiny_model: Path) -> BaseModelConfig:
    return BaseModelConfig(model=str(tiny_model), compute_dtype="float32")


@pytest.fixture(scope="module")
def base(base_config: BaseModelConfig) -> AdaptedModel:
    return load_base(base_config, LoraConfig(rank=4, target_modules=("q_proj",)))


Fit = Callable[..., TaskAdapter]


@pytest.fixture(scope="module")
def fit(base: AdaptedModel, base_config: BaseModelConfig) -> Fit:
    def run(directory: Path, task: TaskFacts = CLASSES, config: TaskAdapterConfig = CONFIG, **more: Any) -> TaskAdapter:
        parts = [examples(size, seed, graded=task is SCORES) for size, seed in ((64, 1), (32, 2))]
        return fit_task_adapter(
            base, task, *parts, directory, config=config, lora=LORA, base_config=base_config, **{"say": print, **more}
        )

    return run


@pytest.fixture(scope="module")
def directory(fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a task adapter that tells the two classes apart."""
    directory = tmp_path_factory.mktemp("cells") / "nobody"
    fit(directory)
    return directory


@pytest.fixture
def adapter(base: AdaptedModel, directory: Path) -> TaskAdapter:
    return load_task_adapter(directory, base)


def test_a_task_is_learnt_by_factors_and_head_while_the_base_stays_as_it_was(base, base_config, adapter) -> None:
    fresh = load_base(base_config, LORA)
    assert base.checksums() == fresh.checksums()
    measured = measure(base, adapter.head, examples(60, 3), adapter.factors)
    assert measured.metrics["accuracy"] > 0.9
    assert {slot.module for slot in adapter.factors.slots} == {"q_proj", "v_proj"}
    assert all(bool(b.any()) for b in adapter.factors.b.values())
    bare = measure(base, adapter.head, examples(60, 3))
    assert not np.array_equal(bare.losses, measured.losses)


def test_the_state_that_is_kept_is_the_best_on_the_validation_examples(base, adapter) -> None:
    history = adapter.facts["history"]
    assert [row["step"] for row in history] == [15, 30, 45, 60]
    best = max(history, key=lambda row: (row["accuracy"], -row["loss"]))
    again = measure(base, adapter.head, examples(32, 2), adapter.factors)
    assert adapter.facts["best_step"] == best["step"] and again.metrics["accuracy"] == best["accuracy"]
    assert again.metrics["loss"] == pytest.approx(best["loss"], rel=1e-5)


def test_a_state_before_the_last_is_kept_where_later_ones_are_worse(base, base_config, tmp_path) -> None:
    """Validation labels are the wrong way round: the more is learnt, the worse it is."""
    validation = [dataclasses.replace(example, label=1 - example.label) for example in examples(32, 2)]
    kept = fit_task_adapter(
        base, CLASSES, examples(64, 1), validation, tmp_path / "cell", config=CONFIG, lora=LORA,
        base_config=base_config, say=print,
    )  # fmt: skip
    first, last = kept.facts["history"][0], kept.facts["history"][-1]
    assert last["accuracy"] < first["accuracy"] or last["loss"] > first["loss"]
    assert kept.facts["best_step"] == 15
    assert measure(base, kept.head, validation, kept.factors).metrics["loss"] == pytest.approx(first["loss"], rel=1e-4)


def test_training_says_how_far_it_is_after_every_step(fit, tmp_path) -> None:
    said: list[str] = []
    fit(tmp_path / "cell", say=said.append)
    assert len(said) == 60
    assert said[0].startswith("nobody: step 1/60, loss ") and said[0].endswith("validation -")
    assert re.fullmatch(r"nobody: step 60/60, loss \d\.\d+, validation \d\.\d+", said[-1])


def test_a_finished_directory_is_read_and_not_trained_again(fit, directory, adapter) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    again = fit(directory)
    assert before == {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert all(torch.equal(again.factors.b[path], factor) for path, factor in adapter.factors.b.items())


@pytest.mark.parametrize("change", [{"seed": 1}, {"learning_rate": 2e-2}, {"pooling": "mean"}])
def test_a_directory_of_other_settings_is_refused_and_left_alone(fit, directory, change) -> None:
    before = (directory / "head.json").read_bytes()
    with pytest.raises(TaskAdapterError, match="other settings or examples"):
        fit(directory, config=CONFIG.model_copy(update=change))
    assert (directory / "head.json").read_bytes() == before


def test_the_same_seed_gives_the_same_files_and_leaves_the_callers_random_state_alone(fit, tmp_path) -> None:
    short = CONFIG.model_copy(update={"steps": 4, "validate_every": 4})
    torch.manual_seed(5)
    expected = torch.rand(3)
    for seed, name in ((5, "one"), (6, "two")):
        torch.manual_seed(seed)
        fit(tmp_path / name, config=short)
        assert seed == 6 or torch.equal(torch.rand(3), expected)
    for name in ("adapter_model.safetensors", "head.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_directory_is_a_peft_adapter_of_the_layers_that_were_asked_for(directory, adapter) -> None:
    facts = read_adapter(directory)
    assert (facts.rank, facts.scale, len(facts.slots)) == (4, 2.0, 4)
    assert facts.config["target_modules"] == ["q_proj", "v_proj"]
    assert facts.provenance["task"] == "nobody"


def test_a_damaged_head_and_another_base_are_refused(directory, base, tmp_path, monkeypatch) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    head = copy / "head.safetensors"
    head.write_bytes(head.read_bytes()[:-1] + b"?")
    with pytest.raises(TaskAdapterError, match=r"head\.safetensors is not what head\.json says"):
        load_task_adapter(copy, base)
    monkeypatch.setattr(base, "fingerprint", "0" * 64)
    with pytest.raises(TaskAdapterError, match="was trained on base"):
        load_task_adapter(directory, base)


def test_a_loss_that_is_not_finite_ends_the_training_and_writes_nothing(fit, base, tmp_path, monkeypatch) -> None:
    states = base.hidden_states
    monkeypatch.setattr(base, "hidden_states", lambda *a, **k: states(*a, **k) * float("nan"))
    with pytest.raises(TaskAdapterError, match="not finite at step 1"):
        fit(tmp_path / "cell")
    assert list(tmp_path.iterdir()) == []


def test_a_score_is_learnt_and_predicted_in_its_own_units(fit, base, tmp_path) -> None:
    config = CONFIG.model_copy(update={"pooling": "mean", "steps": 90})
    adapter = fit(tmp_path / "length", task=SCORES, config=config)
    measured = measure(base, adapter.head, examples(60, 3, graded=True), adapter.factors)
    assert measured.metrics["pearson"] > 0.7
    assert abs(measured.predictions.mean() - measured.labels.mean()) < 1.0
    assert measured.metrics["mean_squared_error"] < measured.labels.var()
    assert np.array_equal(measured.correct, -measured.losses)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_predictions_depend_on_no_batch_and_no_order(base, adapter, batch_size) -> None:
    test = examples(20, 4)
    expected = measure(base, adapter.head, test, adapter.factors, batch_size=20)
    shuffled = random.Random(0).sample(test, k=20)
    found = measure(base, adapter.head, shuffled, adapter.factors, batch_size=batch_size)
    rows = [found.example_ids.index(example.example_id) for example in test]
    np.testing.assert_allclose(found.losses[rows], expected.losses, rtol=1e-3, atol=1e-5)
    assert np.array_equal(found.predictions[rows], expected.predictions)


def test_an_adaptation_that_is_attached_around_the_base_is_measured_like_factors(base, adapter) -> None:
    test, factors = examples(20, 4), adapter.factors
    expected = measure(base, adapter.head, test, factors)
    layers = [base.linears[slot.path] for slot in factors.slots]
    pairs = factors.build(factors.slots, factors.inputs(factors.slots))
    found = measure(base, adapter.head, test, context=attached(layers, pairs, factors.scale, None))
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
    assert all(layer.adapter is None for layer in layers)


def test_a_measurement_is_read_back_with_every_prediction(base, adapter, tmp_path) -> None:
    measured = measure(base, adapter.head, examples(9, 4), adapter.factors)
    measured.save(tmp_path / "cells" / "own.json", variety="Nigerian English")
    found = load_measurement(tmp_path / "cells" / "own.json")
    for field in dataclasses.fields(measured):
        assert np.array_equal(getattr(found, field.name), getattr(measured, field.name))
    assert json.loads((tmp_path / "cells" / "own.json").read_text())["variety"] == "Nigerian English"
    (tmp_path / "cells" / "own.json").write_text("{}")
    with pytest.raises(EvaluationError, match="is not a measurement"):
        load_measurement(tmp_path / "cells" / "own.json")


def test_no_examples_and_several_adapters_are_refused(base, adapter) -> None:
    with pytest.raises(EvaluationError, match="no examples"):
        measure(base, adapter.head, [])
    with pytest.raises(EvaluationError, match="one adapter, got 2"):
        measure(base, adapter.head, examples(2, 4), adapter.factors.select(torch.tensor([0, 0])))


def test_long_texts_are_cut_and_counted(base, adapter) -> None:
    long = [dataclasses.replace(e, texts=(e.texts[0] * 20,)) for e in examples(2, 4)]
    assert measure(base, adapter.head, [*long, *examples(3, 5)], maximum_tokens=40).truncated == 2


def test_the_scores_are_those_of_scikit_learn_and_scipy() -> None:
    sklearn, stats = pytest.importorskip("sklearn.metrics"), pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    labels, said = rng.integers(0, 4, 50), rng.integers(1, 5, 50)
    assert macro_f1(labels, said) == pytest.approx(sklearn.f1_score(labels, said, average="macro", zero_division=0))
    x, y = rng.integers(0, 9, 40).astype(float), rng.normal(size=40)
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y)[0])
    assert pearson(ranks(x), ranks(y)) == pytest.approx(stats.spearmanr(x, y)[0])
    assert pearson(x, np.ones(40)) == 0.0


def test_padding_is_in_no_pooled_state() -> None:
    states = torch.arange(24.0).reshape(2, 3, 4)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert torch.equal(pool(states, mask, "first"), states[:, 0])
    assert torch.equal(pool(states, mask, "last"), torch.stack([states[0, 2], states[1, 1]]))
    assert torch.equal(pool(states, mask, "mean"), torch.stack([states[0].mean(0), states[1, :2].mean(0)]))


def test_decoders_are_read_at_the_last_token_roberta_at_the_first_and_bert_at_all(base) -> None:
    from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

    from hl_scale.base.loading import adapt_model

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    dense = BaseModelConfig(model="unused", compute_dtype="float32", quantization="none")
    lora = LoraConfig(rank=2, target_modules=("query",))
    assert choose_pooling(base) == "last"
    for model, expected in ((BertModel(BertConfig(**sizes)), "mean"), (RobertaModel(RobertaConfig(**sizes)), "first")):
        assert choose_pooling(adapt_model(model, None, dense, lora)) == expected


def test_a_head_is_as_wide_as_its_task() -> None:
    states, mask = torch.randn(3, 5, 16), torch.ones(3, 5, dtype=torch.long)
    three = TaskFacts("t", "classification", ("a", "b", "c"))
    assert ClassifierHead(16, three, "mean")(states, mask).shape == (3, 3)
    assert ClassifierHead(16, SCORES, "mean", 2.0, 0.0)(states, mask).tolist() == [[2.0]] * 3
