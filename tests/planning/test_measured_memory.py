"""The plan of real runs of Gemma 3 270M against the resident memory that they report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hl_scale.config import load_config
from hl_scale.data.corpus import load_corpus
from hl_scale.data.tasks import prepare_tasks
from hl_scale.planning import plan_memory

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs" / "demo_gemma270m_cpu.yaml"


def longest_text(config) -> int:
    """Tokens of it; three global batches of 16 are all pairs of the tiny corpus."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(config.base.cache_directory) / "gemma3-270m")
    pairs = load_corpus(config.data.directory).train
    return max(len(ids) for p in pairs for ids in tokenizer([p.dialect, p.standard])["input_ids"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "placement", "rank"),
    [(1, "replicated", 8), (2, "zero3", 8), (2, "replicated", 32), (4, "replicated", 8)],
)
def test_peak_memory_is_within_a_tenth_of_the_plan(ranks, placement, rank, launch, write_tiny_corpus, tmp_path):
    overrides = [
        f"base.placement={placement}", f"lora.rank={rank}", f"lora.alpha={rank}.0", "training.steps=3",
        "training.loggers=[]", "data.training_sentences=12", "data.variants_per_sentence=3",
        "data.identity_per_sentence=1", f"data.directory={write_tiny_corpus(tmp_path / 'data')}",
        f"run.directory={tmp_path / 'run'}",
    ]  # fmt: skip
    done = launch(ROOT / "launch" / "train.py", "--config", str(RECIPE), *overrides, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["peak_memory_bytes"]
    config = load_config(RECIPE, overrides)
    assert measured == pytest.approx(plan_memory(config, ranks, tokens=longest_text(config)).peak, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_peak_memory_of_a_run_on_tasks_is_within_a_tenth_of_the_plan(ranks, launch, tmp_path):
    overrides = [f"data.directory={tmp_path / 'tasks'}", f"run.directory={tmp_path / 'run'}"]
    config = load_config(ROOT / "configs" / "t2l_shape_cpu.yaml", overrides)
    prepare_tasks(config.tasks)
    done = launch(ROOT / "launch" / "train.py", "--config", str(ROOT / "configs" / "t2l_shape_cpu.yaml"), *overrides,
                  ranks=ranks)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["peak_memory_bytes"]
    assert measured == pytest.approx(plan_memory(config, ranks, tokens=20).peak, rel=0.1)
