"""Tables and report.html from results on disk."""

from __future__ import annotations

import base64
import io
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console

from hl_scale.config import dump_config
from hl_scale.evaluation import (
    EvaluationError,
    markdown_table,
    render_table,
    save,
    write_report,
)
from hl_scale.evaluation.charts import dialect_chart, training_curves


def estimate(value: float, half: float = 0.02) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half, "resamples": 1000}


@pytest.fixture
def run(make_run, evaluated):
    """A run directory with everything a report reads."""
    run = make_run()
    metrics = [
        {
            "step": step,
            "loss": 1.4 - 0.03 * step,
            "learning_rate": 1e-3,
            "gradient_norm": 0.6,
            "tokens_per_second": 800.0,
            "seconds": 0.5,
            "skipped_steps": 0.0,
            "dead_unit_share": 0.1,
        }
        for step in range(1, 31)
    ]
    (run.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (run.directory / "config.yaml").write_text(dump_config(run.config))
    (run.directory / "environment.json").write_text(json.dumps({"versions": {"torch": "2.x"}}))
    save(evaluated, run.directory)
    return run


@pytest.fixture
def result(run):
    return json.loads((run.directory / "evaluation.json").read_text())


def rendered(result) -> str:
    console = Console(width=80, file=io.StringIO())
    console.print(render_table(result))
    return console.file.getvalue()


def test_the_terminal_table_fits_80_columns_with_a_row_per_dialect_and_every_condition(result):
    text = rendered(result)
    for word in (
        "Nigerian",
        "Chicano",
        "Jamaican",
        "average of 3",
        "named",
        "train",
        "wrong",
        "LoRA",
        "nats per token",
    ):
        assert word in text
    assert "…" not in text
    own = result["dialects"][0]["ratio"]["own"]
    assert f"{own['value']:.2f}" in text or f"{own['value']:.3f}".lstrip("0") in text


def test_signs_mark_controls_whose_paired_interval_excludes_zero(result):
    row = result["dialects"][0]
    row["ratio"]["wrong"], row["difference"]["wrong"] = estimate(0.7111), estimate(0.05)
    row["ratio"]["zero"], row["difference"]["zero"] = estimate(0.7222), estimate(0.01)
    row["ratio"]["plain_lora"], row["difference"]["plain_lora"] = estimate(0.7333), estimate(-0.05)
    first = next(line for line in rendered(result).splitlines() if line.startswith("Nigerian"))
    assert ".711+" in first
    assert ".722 " in first
    assert ".733-" in first
    markdown = markdown_table(result)
    assert "0.711 [0.691, 0.731] + |" in markdown
    assert "0.722 [0.702, 0.742] |" in markdown
    assert "0.733 [0.713, 0.753] - |" in markdown


def test_a_reduced_evaluation_says_so_in_every_form(result, run):
    result["reduced"] = ["6 of 12 held-out sentences"]
    save(result, run.directory)
    page = write_report(run.directory).read_text()
    assert all("6 of 12 held-out sentences" in text for text in (rendered(result), markdown_table(result), page))


def test_the_markdown_tables_are_rectangular_and_hold_the_numbers(result):
    text = markdown_table(result)
    blocks = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 7
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines()}) == 1
    assert f"{result['dialects'][1]['difference']['zero']['value']:+.3f}" in text
    assert all(caveat in text for caveat in result["caveats"])


def test_a_dialect_without_changed_sentences_is_shown_without_a_ratio(result):
    row = result["dialects"][0]
    row["ratio"], row["difference"] = {}, {}
    row["changed"] = {"sentences": 0, "ratio": {}, "difference": {}}
    assert "Nigerian" in rendered(result)
    assert "| Nigerian English (unseen) | - |" in markdown_table(result)
    assert len(dialect_chart(result).axes[0].get_yticklabels()) == 2


def test_the_report_is_one_self_contained_page_with_both_charts_and_all_tables(run, result):
    path = write_report(run.directory)
    page = path.read_text()
    assert path.name == "report.html"
    assert not re.search(r"(src|href)=[\"'](?!data:)", page)
    images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(images) == 2
    for image in images:
        assert ElementTree.fromstring(base64.b64decode(image)).tag.endswith("svg")
    assert page.count("<table>") == 7
    texts = [
        "Nigerian English",
        "between training seeds",
        "target_modules",
        result["provenance"]["run"]["base_fingerprint"],
    ]
    assert all(text in page for text in texts)


def test_the_page_is_the_same_for_the_same_run(run):
    first = write_report(run.directory).read_bytes()
    assert write_report(run.directory).read_bytes() == first


def test_text_from_files_is_escaped(run):
    (run.directory / "config.yaml").write_text("run: '<script>alert(1)</script>'\n")
    assert "<script>" not in write_report(run.directory).read_text()


def test_a_run_without_evaluation_or_metrics_still_gets_a_page_that_says_what_is_missing(run):
    (run.directory / "evaluation.json").unlink()
    (run.directory / "metrics.jsonl").unlink()
    page = write_report(run.directory).read_text()
    assert "not been evaluated yet" in page
    assert "no training metrics" in page
    assert "<img" not in page


def test_metrics_with_missing_and_non_finite_values_are_drawn(run):
    lines = [
        {"step": 1, "loss": float("nan")},
        {"step": 2, "loss": 0.5, "learning_rate": 1e-3},
        {"step": 3, "loss": 0.4},
    ]
    labels = [axes.get_ylabel() for axes in training_curves(lines).axes if axes.get_visible()]
    assert labels == ["loss (mean divergence)", "learning rate"]


def test_a_directory_that_is_no_run_and_a_damaged_evaluation_are_refused(run, tmp_path):
    with pytest.raises(EvaluationError, match="not a run directory"):
        write_report(tmp_path / "nowhere")
    (run.directory / "evaluation.json").write_text('{"evaluation": ')
    with pytest.raises(EvaluationError, match="not valid JSON"):
        write_report(run.directory)
