"""The published step is the same step, and nothing is timed where it is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hl_scale.benchmark import text_to_lora as benchmark
from hl_scale.config import Config


@pytest.fixture
def recipe(
    tiny_config: Callable[..., Config],
    tiny_tasks: dict[str, Any],
    write_yaml: Callable[[Config, Path], Path],
    tmp_path: Path,
) -> Path:
    settings = {
        **tiny_tasks,
        "objective": {"kind": "supervised", "label_smoothing": 0.1},
        "hypernetwork": {"kind": "text_to_lora", "latent_width": 16, "head_width": 32},
        "training.packed": True,
    }
    return write_yaml(tiny_config(tmp_path / "run", settings), tmp_path / "recipe.yaml")


def test_both_steps_agree_and_the_table_is_printed(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.run_text_to_lora_benchmark(recipe, None, 1) == 0
    out = capsys.readouterr().out
    assert "\n| ours |" in out and "\n| as published: copies per token, all logits |" in out


def test_a_published_step_that_differs_is_not_timed(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = benchmark.published_loss
    monkeypatch.setattr(benchmark, "published_loss", lambda *arguments: loss(*arguments) * 1.01)
    assert benchmark.run_text_to_lora_benchmark(recipe, None, 1) == 1
    assert "not timed: loss or gradients differ by" in capsys.readouterr().out


def test_a_recipe_of_another_kind_is_refused(
    tiny_config: Callable[..., Config], write_yaml: Callable[[Config, Path], Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"objective\.kind 'supervised'"):
        benchmark.run_text_to_lora_benchmark(write_yaml(tiny_config(tmp_path), tmp_path / "r.yaml"), None, 1)
