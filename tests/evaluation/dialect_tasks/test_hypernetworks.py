"""Experiments that train hypernetworks of their own, on a tiny base."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hl_scale.conditions import typology
from hl_scale.config import DialectDataConfig, load_suite
from hl_scale.data.corpus import PreparedCorpus, load_corpus
from hl_scale.data.labelled import corpus_texts
from hl_scale.data.one_hot import one_hot_corpus
from hl_scale.data.shards import CorpusError
from hl_scale.evaluation.dialect_tasks import run_suite, workbench
from hl_scale.evaluation.dialect_tasks.cells import CellStore
from hl_scale.evaluation.dialect_tasks.methods import Methods

NIGERIAN, CHICANO = "Nigerian English", "Chicano English"


def test_a_hypernetwork_is_trained_in_its_cell_and_goes_on_where_it_was_cut_off(
    tiny_config, tiny_corpus, single_process, tmp_path, losses_of
) -> None:
    from hl_scale.base import load_base
    from hl_scale.config import RunConfig
    from hl_scale.engine.loop import train

    config = tiny_config(tmp_path / "unused", {"run.seed": 3})
    base, corpus = load_base(config.base, config.lora), load_corpus(tiny_corpus)
    store = CellStore(tmp_path / "cells")
    whole = Methods({3: config}, base, corpus, store).run(3)
    assert whole.step == config.training.steps and losses_of(whole.directory)
    cut = tmp_path / "later" / whole.directory.name
    train(config.model_copy(update={"run": RunConfig(directory=str(cut), seed=3)}), stop_at=2)
    again = Methods({3: config}, base, corpus, CellStore(tmp_path / "later")).run(3)
    assert again.directory == cut and len(losses_of(cut)) == 6
    for one, other in zip(whole.hypernetwork.parameters(), again.hypernetwork.parameters(), strict=True):
        assert torch.equal(one, other)
    read = CellStore(tmp_path / "cells")
    Methods({3: config}, base, corpus, read).run(3)
    assert read.made == []


@pytest.fixture
def recipe_to_train(
    labelled, tiny_config, write_tiny_corpus, write_yaml, single_process, tmp_path, monkeypatch
) -> Path:
    """Of a suite that trains its hypernetworks, on tiny corpora instead of those of the rule engine."""

    def prepare(data: DialectDataConfig) -> PreparedCorpus:
        directory = Path(data.directory)
        names = data.training_varieties

        def name_them(rows: list[dict[str, Any]]) -> None:
            for number, row in enumerate(rows):
                if names and row["variety"] == "virtual":
                    row["variety"] = names[number % len(names)]
                    row["vector"] = typology.vector(row["variety"]).tolist()

        if not directory.exists():
            write_tiny_corpus(directory, name_them)
            path = directory / "manifest.json"
            path.write_text(path.read_text().replace("c" * 64, hashlib.sha256(repr(names).encode()).hexdigest()))
        return PreparedCorpus(directory, load_corpus(directory).manifest, reused=False)

    monkeypatch.setattr(workbench, "prepare_corpus", prepare)
    config = tiny_config(tmp_path / "run", {"data.directory": str(tmp_path / "corpus"), "training.steps": 3})
    tree = {
        "suite": {
            "recipe": str(write_yaml(config, tmp_path / "run.yaml")), "labelled": [str(labelled)],
            "methods": ["lora"], "bootstrap_samples": 200,
        },
        "ablations": {
            "variants": {"narrow": ["hypernetwork.hidden_width=8"], "query": ["lora.target_modules=[q_proj]"]},
        },
    }  # fmt: skip
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "suite.yaml"


def test_the_dialect_that_is_left_out_is_seen_by_the_method_trained_on_all_alone(recipe_to_train, tmp_path) -> None:
    found = run_suite(load_suite(recipe_to_train), tmp_path / "out", "leave_one_out", "cpu", shown=False)
    rows = found.result["cells"]
    unseen = [row for row in rows if not row["variant"]]
    assert {row["method"] for row in unseen} == {"none", "own", "lora"} and not any(row["seen"] for row in unseen)
    together = [row for row in rows if row["variant"] == "seen"]
    assert {(row["method"], row["variety"]) for row in together} == {("own", NIGERIAN), ("own", CHICANO)}
    assert all(row["seen"] for row in together) and len({row["adapter"] for row in together}) == 1
    runs = {row["variety"]: row["adapter"] for row in unseen if row["method"] == "own"}
    assert set(runs) == {NIGERIAN, CHICANO} and len({*runs.values(), together[0]["adapter"]}) == 3

    def training(run: str) -> set[str]:
        config = yaml.safe_load((tmp_path / "out" / "cells" / run / "config.yaml").read_text())
        return set(config["data"]["training_varieties"])

    assert training(runs[NIGERIAN]) == {CHICANO} and training(runs[CHICANO]) == {NIGERIAN}
    assert training(together[0]["adapter"]) == {NIGERIAN, CHICANO}
    baselines = {row["variety"]: row["adapter"] for row in unseen if row["method"] == "lora"}
    assert len(set(baselines.values())) == 2
    again = run_suite(load_suite(recipe_to_train), tmp_path / "out", "leave_one_out", "cpu", shown=False)
    assert again.made == 0 and again.result["cells"] == rows
    said = (tmp_path / "out/leave_one_out/tables.md").read_text()
    assert "own adapters minus the task adapter alone" in said and "own - own (seen)" in said
    assert "minus own adapters of a hypernetwork trained on all of them" in said


def test_ablations_change_the_hypernetwork_alone(recipe_to_train, tmp_path) -> None:
    found = run_suite(load_suite(recipe_to_train), tmp_path / "out", "ablations", "cpu", shown=False)
    rows = found.result["cells"]
    names = [method["method"] for method in found.result["tasks"]["jsonl"]["methods"]]
    assert names == ["none", "own", "own (narrow)", "own (query)"]
    assert len({row["task_adapter"] for row in rows}) == 1 and len({r["adapter"] for r in rows if r["adapter"]}) == 3
    trained = {row["variant"]: (row["carried"], row["trained"]) for row in rows if row["method"] == "own"}
    assert trained["narrow"][0] == trained[""][0] > trained["query"][0] and trained["narrow"][1] < trained[""][1]


def test_one_hot_vectors_tell_dialects_apart_and_nothing_about_them(recipe_to_train, tmp_path) -> None:
    named = [
        "data.mode=named", f"data.training_varieties=[{NIGERIAN}, Indian English]",
        f"data.directory={tmp_path / 'named'}",
    ]  # fmt: skip
    recipe = load_suite(recipe_to_train, ["ablations.variants={}", f"ablations.one_hot={json.dumps(named)}"])
    found = run_suite(recipe, tmp_path / "out", "ablations", "cpu", shown=False)
    seen = {(r["variant"], r["variety"]): r["seen"] for r in found.result["cells"] if r["method"] == "own"}
    for variant in ("named", "one-hot"):
        assert seen[variant, NIGERIAN] and not seen[variant, CHICANO]
    over = found.result["tasks"]["jsonl"]["over_one_hot"]
    assert (over["first"], over["second"]) == ("own (named)", "own (one-hot)") and list(over["dialects"]) == [CHICANO]
    said = (tmp_path / "out/ablations/tables.md").read_text()
    assert f"that neither network was trained on ({CHICANO}): " in said
    original, changed = load_corpus(tmp_path / "named"), load_corpus(tmp_path / "named-one-hot")
    for before, after in zip(original.train, changed.train, strict=True):
        assert (before.variety, before.dialect) == (after.variety, after.dialect)
        assert after.vector.sum() == (before.variety != "standard")
    assert len({after.vector.argmax() for after in changed.train if after.vector.any()}) == 2
    runs = {r["variant"]: r["adapter"] for r in found.result["cells"] if r["method"] == "own"}
    assert len(set(runs.values())) == 3
    with pytest.raises(CorpusError, match="random mixtures"):
        one_hot_corpus(load_corpus(tmp_path / "corpus"), tmp_path / "other")
    assert corpus_texts(changed.directory)[0] == corpus_texts(original.directory)[0]  # what tests must be apart from
    again = one_hot_corpus(original, tmp_path / "named-one-hot")
    assert again.manifest == changed.manifest


def test_a_dialect_that_training_names_is_seen(recipe_to_train, tmp_path) -> None:
    changes = f"suite.overrides=[data.mode=named,'data.training_varieties=[{NIGERIAN}]']"
    found = run_suite(load_suite(recipe_to_train, [changes]), tmp_path / "out", "main", "cpu", shown=False)
    task = found.result["tasks"]["jsonl"]
    assert {(r["variety"], r["seen"]) for r in found.result["cells"] if r["method"] in ("own", "lora")} == {
        (NIGERIAN, True), (CHICANO, False), ("Standard American English", False)
    }  # fmt: skip
    assert task["headline"]["varieties"] == [CHICANO] and task["headline"]["best_baseline"] == "lora"
