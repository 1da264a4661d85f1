"""Seven billion weights on this machine: one step of the recipe, and the memory that was planned for it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from hl_scale.config import load_config
from hl_scale.planning import plan_memory

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs" / "mistral7b_shape_cpu.yaml"
TEXTS = ("Jacquot's Tosca is a treat.", "May puzzle his most fans.")


def two_short_pairs(rows):
    del rows[2:]
    for row, text in zip(rows, TEXTS, strict=True):
        row["standard"], row["dialect"] = text, text.replace("is", "be")


@pytest.mark.slow  # about 5 minutes and 11 GB
def test_one_step_of_the_7b_shape_takes_the_memory_that_was_planned(launch, write_tiny_corpus, tmp_path):
    places = [
        f"data.directory={write_tiny_corpus(tmp_path / 'data', two_short_pairs)}",
        f"run.directory={tmp_path / 'run'}",
    ]
    done = launch(ROOT / "launch" / "train.py", "--config", str(RECIPE), *places)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"peak memory per rank: [\d.]+ GB \(planned [\d.]+ GB\)", done.stdout)
    step = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert step["step"] == 1 and math.isfinite(step["loss"]) and step["gradient_norm"] > 0
    planned = plan_memory(load_config(RECIPE, places), 2).peak
    assert step["peak_memory_bytes"] == pytest.approx(planned, rel=0.1)
