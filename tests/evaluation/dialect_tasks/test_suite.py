"""The suite from the command to the report, on a tiny base: what is trained, kept, compared and written."""

from __future__ import annotations

import base64
import csv
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from hl_scale.cli import app
from hl_scale.conditions import typology
from hl_scale.config import ConfigError, load_suite
from hl_scale.data.corpus import load_corpus
from hl_scale.engine.run import load_run
from hl_scale.evaluation.dialect_tasks import run_suite
from hl_scale.evaluation.dialect_tasks.charts import gain_chart
from hl_scale.evaluation.dialect_tasks.methods import GENERATED, MEANINGS, PER_DIALECT, TRAINED
from hl_scale.evaluation.dialects import evaluate_dialects
from hl_scale.evaluation.labelled import load_measurement
from hl_scale.evaluation.measurement import EvaluationError

NIGERIAN, CHICANO = "Nigerian English", "Chicano English"
ALL = ["none", *GENERATED, *TRAINED, "lora_dialect"]


@pytest.fixture(scope="module")
def recipe(labelled, tiny_config, single_process, tmp_path_factory) -> Path:
    """Of a suite that reads a trained hypernetwork."""
    from hl_scale.engine.loop import train

    directory = tmp_path_factory.mktemp("suite")
    train(tiny_config(directory / "run"))
    tree = {
        "suite": {
            "runs": [str(directory / "run")], "labelled": [str(labelled)], "methods": ALL, "bootstrap_samples": 200,
        },
        "annotations": {"counts": [2, 12]},
        "coverage": {"varieties": "labelled"},
    }  # fmt: skip
    path = directory / "suite.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def out(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command wrote."""
    directory = tmp_path_factory.mktemp("out")
    arguments = ["evaluate", str(recipe), "--suite", "dialect-tasks", "--out", str(directory), "--device", "cpu"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0 and "in 2 unseen dialects the task adapter alone loses" in done.output
    assert ", 0 read" in done.output
    return directory


@pytest.fixture(scope="module")
def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "main" / "results.json").read_text())


Losses = Callable[..., np.ndarray]


@pytest.fixture
def losses(out: Path, result: dict[str, Any]) -> Losses:
    """losses(method, variety) -> loss of each sentence."""

    def read(method: str, variety: str = NIGERIAN) -> np.ndarray:
        (row,) = [r for r in result["cells"] if r["method"] == method and r["variety"] == variety]
        return load_measurement(out / "cells" / row["cell"] / "measurement.json").losses

    return read


def test_a_second_call_makes_no_cell_and_finds_the_same_numbers(recipe, out, result) -> None:
    again = run_suite(load_suite(recipe), out, "main", "cpu", shown=False)
    assert again.made == 0 and again.read == len(list((out / "cells").iterdir()))
    assert again.result["tasks"] == result["tasks"] and again.result["cells"] == result["cells"]


def test_a_broken_cell_is_made_again_and_no_other(recipe, out, result) -> None:
    row = next(r for r in result["cells"] if r["method"] == "lora" and r["variety"] == CHICANO)
    (weights,) = (out / "cells" / row["adapter"]).glob("adaptation-*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4] + b"????")
    again = run_suite(load_suite(recipe), out, "main", "cpu", shown=False)
    assert again.made == 1 and again.result["cells"] == result["cells"]


def test_own_zero_wrong_and_shuffled_vectors_give_other_predictions(losses) -> None:
    found = {method: losses(method) for method in ("none", *GENERATED)}
    names = list(found)
    for i, name in enumerate(names):
        for other in names[i + 1 :]:
            assert not np.allclose(found[name], found[other], rtol=1e-6), (name, other)
    assert not np.allclose(losses("own", NIGERIAN), losses("own", CHICANO))


def test_the_wrong_vector_is_that_of_the_other_dialect(recipe, out, result) -> None:
    run = {r["method"]: r["adapter"] for r in result["cells"]}
    assert run["own"] == run["wrong"] == load_suite(recipe).suite.runs[0]
    cells = {}
    for r in result["cells"]:
        if r["method"] in ("own", "wrong") and r["variety"] in (NIGERIAN, CHICANO):
            key = json.loads((out / "cells" / r["cell"] / "cell.json").read_text())["key"]
            cells[r["method"], r["variety"]] = key["condition"]
    assert cells["own", NIGERIAN] == cells["wrong", CHICANO] != cells["own", CHICANO]


def test_no_baseline_carries_more_than_the_generated_adapter(result) -> None:
    budget = result["provenance"]["budget"]
    carried = {r["method"]: (r["carried"], r["trained"]) for r in result["cells"]}
    assert carried["own"][0] == carried["lora"][0] == carried["lora_dialect"][0] == budget
    for method in ("lora", "prefix", "bottleneck", "tada", "lora_dialect"):
        assert budget / 2 < carried[method][0] <= budget and carried[method][0] == carried[method][1], method
    # Of networks it is what they generate that counts.
    assert carried["hyper_adapter"][0] == carried["bottleneck"][0] < carried["hyper_adapter"][1]


def test_baselines_see_as_many_pairs_in_as_many_steps_as_the_hypernetwork(out, result, tiny_config) -> None:
    training = tiny_config(out).training
    for row in result["cells"]:
        if row["method"] in TRAINED + PER_DIALECT:
            facts = json.loads((out / "cells" / row["adapter"] / "cell.json").read_text())["facts"]
            assert facts["steps"] == training.steps
            assert facts["pairs_seen"] == training.steps * training.global_batch_size
            assert facts["distinct_pairs"] == row["pairs"] == (12 if row["method"] in PER_DIALECT else 48)
            assert row["seen"] == (row["method"] in PER_DIALECT)


def test_the_report_holds_every_cell_and_the_tables_every_method(out, result) -> None:
    page = (out / "main" / "report.html").read_text()
    assert len(result["cells"]) == 2 * len(ALL) + 2 + len(TRAINED)  # and Standard English
    for row in result["cells"]:
        assert row["cell"] in page and (out / "cells" / row["cell"] / "measurement.json").is_file()
    charts = [path.read_bytes() for path in sorted((out / "main").glob("*.svg"))]
    embedded = re.findall('data:image/svg\\+xml;base64,([^"]*)', page)
    assert len(charts) == 2 and sorted(map(base64.b64decode, embedded)) == sorted(charts)
    assert "http://" not in page.replace("http://www.w3.org", "")
    with (out / "main" / "cells.csv").open() as file:
        assert [line["cell"] for line in csv.DictReader(file)] == [row["cell"] for row in result["cells"]]
    tables = (out / "main" / "tables.md").read_text()
    assert all(f"| {method} |" in tables and MEANINGS[method] in tables for method in ALL)
    with (out / "main" / "quality.csv").open() as file:
        rows = {(line["method"], line["variety"]): line for line in csv.DictReader(file)}
    (cell,) = [r for r in result["cells"] if r["method"] == "tada" and r["variety"] == CHICANO]
    assert float(rows["tada", CHICANO]["value"]) == pytest.approx(cell["accuracy"])
    assert rows["tada", CHICANO]["cells"] == cell["cell"]


def test_the_chart_of_gains_sets_each_dialect_against_none_and_the_best_baseline(result) -> None:
    (task,) = result["tasks"].values()
    (axes,) = gain_chart(task).axes
    best = task["headline"]["best_baseline"]
    assert axes.get_legend_handles_labels()[1] == ["own adapter minus none", f"own adapter minus {best}"]
    assert [label.get_text() for label in axes.get_yticklabels()] == [NIGERIAN, CHICANO, "mean of dialects"]
    for name, bars in zip(("none", best), axes.containers, strict=True):
        (found,) = [each for each in task["differences"] if each["second"] == name]
        parts = [*(found["dialects"][place] for place in (NIGERIAN, CHICANO)), found["mean"]]
        assert list(bars.lines[0].get_xdata()) == pytest.approx([100 * part["value"] for part in parts])


def test_scores_are_compared_by_their_correlation(recipe, labelled, prepare_tiny_set, tmp_path) -> None:
    settings = yaml.safe_load(labelled.read_text())
    lines = [json.loads(line) for line in Path(settings["labelled"]["path"]).read_text().splitlines()]
    rows = [{**row, "label": len(row["text"].split()) / 4} for row in lines]  # how long is it?
    (tmp_path / "graded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings["labelled"] |= {"directory": str(tmp_path / "set"), "path": str(tmp_path / "graded.jsonl")}
    (tmp_path / "graded.yaml").write_text(yaml.safe_dump(settings))
    prepare_tiny_set(tmp_path / "graded.yaml")
    changes = [f"suite.labelled=[{tmp_path / 'graded.yaml'}]", "suite.methods=[lora]", "annotations.counts=[4]"]
    found = run_suite(load_suite(recipe, changes), tmp_path / "out", "main", "cpu", shown=False)
    task = found.result["tasks"]["jsonl"]
    assert task["metric"] == "Pearson's correlation" and task["headline"]["over_best"] is not None
    for row in found.result["cells"]:
        method = next(m for m in task["methods"] if m["method"] == row["method"])
        place = method["standard"] if row["variety"] == typology.STANDARD else method["dialects"][row["variety"]]
        assert place["value"] == pytest.approx(row["pearson"])
    assert all(part["p"] is None for each in task["differences"] for part in each["dialects"].values())
    tables = (tmp_path / "out/main/tables.md").read_text()
    assert "Pearson's correlation" in tables and "(p " not in tables
    assert "Pearson" in (tmp_path / "out/main/report.html").read_text()
    assert run_suite(load_suite(recipe, changes), tmp_path / "out", "annotations", "cpu", shown=False).made == 8


def test_annotations_reuse_what_there_is_and_say_what_the_vector_is_worth(recipe, out) -> None:
    found = run_suite(load_suite(recipe), out, "annotations", "cpu", shown=False)
    assert found.made == 2 * 2 * 2 * 2  # kinds, counts, dialects; an adapter and a measurement of each
    task = found.result["tasks"]["jsonl"]
    assert set(task["curves"]) == {"aligned", "annotated"} and task["curves"]["aligned"]["counts"] == [2, 12]
    assert "the generated adapter is worth" in (out / "annotations" / "tables.md").read_text()


def test_alignment_is_that_of_the_evaluation_of_the_run(recipe, out) -> None:
    found = run_suite(load_suite(recipe), out, "alignment", "cpu", shown=False)
    run = load_run(load_suite(recipe).suite.runs[0], device="cpu")
    corpus = load_corpus(run.config.data.directory)
    data = run.config.data.model_copy(update={"evaluation_varieties": corpus.heldout_varieties})
    run = dataclasses.replace(run, config=run.config.model_copy(update={"data": data}))
    expected = evaluate_dialects(run, corpus, progress=False)
    task = found.result["tasks"]["alignment"]
    assert [method["method"] for method in task["methods"]] == [name for name in ALL if name != "lora_dialect"]
    for method in task["methods"]:
        for row in expected["dialects"]:
            removed = method["dialects"][row["variety"]]["value"]
            if method["method"] in ("own", "zero", "mean_training", "wrong"):
                assert removed == pytest.approx(1 - row["ratio"][method["method"]]["value"], rel=1e-6)
            elif method["method"] == "none":
                assert removed == 0
            else:
                assert abs(removed) > 1e-9
    damage = task["standard_damage"]
    assert damage["own"]["value"] == pytest.approx(
        expected["standard_english"]["divergence"]["zero"]["value"], rel=1e-6
    )
    assert set(damage) == {"own", *TRAINED} and task["best_baseline"] in TRAINED
    best = task["best_baseline"]
    (over,) = [each["mean"] for each in task["differences"] if each["second"] == best]
    assert task["over_best"] == over
    tables = (out / "alignment" / "tables.md").read_text()
    assert f"Minus the best baseline of equal budget, {best}" in tables and "Standard English sentences" in tables
    assert run_suite(load_suite(recipe), out, "alignment", "cpu", shown=False).made == 0


def test_alignment_asks_for_sentences_that_were_held_out(recipe, tmp_path) -> None:
    missing = ["suite.dialects=[Appalachian English]"]
    with pytest.raises(EvaluationError, match=r"no held-out sentences in Appalachian English\n  fix: add it"):
        run_suite(load_suite(recipe, missing), tmp_path, "alignment", "cpu", shown=False)


def test_loras_of_one_dialect_may_take_fewer_steps_than_what_all_share(recipe, out) -> None:
    changes = ["suite.dialect_steps=2", "suite.methods=[lora,lora_dialect]", f"suite.dialects=[{NIGERIAN}]"]
    found = run_suite(load_suite(recipe, changes), out, "main", "cpu", shown=False)
    assert found.made == 2  # the LoRA of the dialect and its measurement
    adapters = {row["method"]: row["adapter"] for row in found.result["cells"]}
    steps = {
        method: json.loads((out / "cells" / adapters[method] / "cell.json").read_text())["facts"]["steps"]
        for method in ("lora", "lora_dialect")
    }
    assert steps == {"lora": 6, "lora_dialect": 2}


def test_coverage_of_a_run_on_mixtures_is_told_for_every_dialect(recipe, out) -> None:
    found = run_suite(load_suite(recipe), out, "coverage", "cpu", shown=False)
    task = found.result["tasks"]["jsonl"]
    assert found.made == 0 and set(task["coverage"]) == {NIGERIAN, CHICANO}
    assert task["correlations"]["binary"] is None and task["points"] == 2


def test_what_cannot_be_asked_for_is_refused(recipe, out, tmp_path) -> None:
    with pytest.raises(EvaluationError, match="there is no experiment 'all'"):
        run_suite(load_suite(recipe), out, "all", "cpu")
    with pytest.raises(EvaluationError, match="not transformed into Jamaican English"):
        run_suite(load_suite(recipe, ["suite.dialects=[Jamaican English]"]), out, "main", "cpu", shown=False)
    with pytest.raises(EvaluationError, match="trains hypernetworks of its own"):
        run_suite(load_suite(recipe), out, "leave_one_out", "cpu", shown=False)
    for arguments, said in (
        (["--suite", "dialect-tasks"], "needs --out"),
        (["--suite", "dialect-tasks", "--out", "x", "--sentences", "3"], "the rest is in its recipe"),
        (["--suite", "dialects", "--out", "x"], "--suite dialects is not one of dialect-tasks"),
        (["--out", "x"], "go with --suite"),
    ):
        refused = CliRunner().invoke(app, ["evaluate", str(recipe), *arguments])
        assert isinstance(refused.exception, ValueError) and said in str(refused.exception)
    for wrong in ("suite.recipe=a.yaml", "suite.seeds=[0, 1]", "suite.methods=[magic]", "suite.overrides=[a.b=1]"):
        with pytest.raises(ConfigError):
            load_suite(recipe, [wrong])


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[3] / "configs/suites").glob("*.yaml")), ids=str)
def test_every_recipe_of_a_suite_loads_and_names_recipes_that_exist(path: Path) -> None:
    suite = load_suite(path).suite
    root = Path(__file__).parents[3]
    assert all((root / name).is_file() for name in (*suite.labelled, *([suite.recipe] if suite.recipe else [])))
