"""The step from stock parts is the same step, and nothing is timed where it is not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hl_scale.benchmark import step as benchmark
from hl_scale.benchmark.step import PHASES, StockLinear, run_step_benchmark
from hl_scale.config import Config

pytest.importorskip("bitsandbytes")
pytest.importorskip("geomloss")


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with rows of whole blocks: with AVX-512, bitsandbytes 0.50 dequantises others wrongly."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tiny_model)
    config.intermediate_size = 128
    torch.manual_seed(7)
    directory = shutil.copytree(tiny_model, tmp_path_factory.mktemp("model") / "whole-blocks")
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.fixture
def recipe(
    model: Path, tiny_config: Callable[..., Config], write_yaml: Callable[[Config, Path], Path], tmp_path: Path
) -> Path:
    return write_yaml(tiny_config(tmp_path / "run", {"base.model": str(model)}), tmp_path / "recipe.yaml")


def test_both_steps_agree_and_both_tables_are_printed(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_step_benchmark(recipe, None, 1) == 0
    out = capsys.readouterr().out
    for name in ("ours", "stock parts", "stock parts, targets computed in the step", *PHASES):
        assert f"\n| {name} |" in out
    assert "products with the frozen weights alone" in out


def test_a_stock_step_that_differs_is_not_timed(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = StockLinear.forward
    monkeypatch.setattr(StockLinear, "forward", lambda self, x: forward(self, x) * 1.001)
    assert run_step_benchmark(recipe, None, 1) == 1
    assert "not timed: loss or gradients differ by" in capsys.readouterr().out


def test_the_phases_of_a_step_add_up_to_the_gradients_of_the_whole(recipe: Path) -> None:
    case = benchmark._Case(benchmark.load_config(recipe))
    step: Any = case.steps()["ours"]
    whole = case.gradients(step)[1:]
    case.step_in_phases(step)
    parts = [p.grad for p in case.hypernetwork.parameters() if p.grad is not None]
    assert len(parts) == len(whole)
    clipped = 1 / torch.stack([g.norm() for g in whole]).norm().clamp(min=1.0)  # gradients were clipped to a norm of 1
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other * clipped, rtol=1e-4, atol=1e-7)
