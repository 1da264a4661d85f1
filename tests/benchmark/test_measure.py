"""Nothing is timed that was not checked, memory is seen, and a bare machine can run it all."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hl_scale.benchmark import lora, measure, sinkhorn
from hl_scale.benchmark.measure import Row, measured, print_row

ROOT = Path(__file__).resolve().parents[2]
FOREIGN = (
    "transformers",
    "deepspeed",
    "ray",
    "datasets",
    "bitsandbytes",
    "geomloss",
    "pydantic",
    "peft",
    "ot",
    "typer",
)


def test_a_row_whose_check_fails_is_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def wrong() -> list[torch.Tensor]:
        calls.append(1)
        return [torch.tensor([1.01])]

    exact = [torch.ones(1, dtype=torch.float64)]
    assert not print_row(Row("case", wrong, exact, 1e-3, {"peer": wrong}), "cpu", 5)
    assert len(calls) == 1
    assert "not timed: error 1.0e-02 is above 1e-03" in capsys.readouterr().out
    assert not print_row(Row("case", lambda: [torch.tensor([torch.nan])], exact, 1e-3), "cpu", 5)
    assert print_row(Row("case", wrong, exact, 2e-2, {"peer": wrong}), "cpu", 5)
    assert len(calls) == 1 + 2 + 2 * 5
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("| case | ours |") and lines[-1].startswith("|  | peer |")


def test_an_error_that_is_not_a_number_is_not_passed_over() -> None:
    exact = [torch.ones(1, dtype=torch.float64), torch.ones(2, dtype=torch.float64)]
    assert math.isnan(measure.error([torch.ones(1), torch.full((2,), torch.nan)], exact))
    with pytest.raises(ValueError, match="zip"):
        measure.error([torch.ones(1)], exact)


def test_a_peer_that_fails_is_named_and_the_others_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> list[torch.Tensor]:
        raise RuntimeError("out of memory")

    ours = lambda: [torch.ones(1)]  # noqa: E731
    assert print_row(Row("case", ours, [torch.ones(1).double()], 1e-6, {"a": fails, "b": ours}), "cpu", 1)
    out = capsys.readouterr().out
    assert "| a | failed: out of memory" in out and "|  | b |" in out


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from /proc")
def test_peak_memory_is_that_of_the_call_alone() -> None:
    torch.zeros(50_000_000).add_(1)
    for megabytes in (40, 160):
        _, _, extra = measured(lambda size=megabytes: [torch.ones(size * 250_000).sum()], "cpu")
        assert megabytes * 1e6 * 0.95 < extra < megabytes * 1e6 * 1.3 + 5e6


def test_rows_of_each_kind_pass_their_check_at_small_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(8, 64), torch.randn(2, 3, 64), torch.randn(2, 9, 3)]
    rows = [
        sinkhorn._ragged_row(generator, 5, 2, 9, 8, "cpu"),
        *sinkhorn._long_rows(generator, 600, 16, torch.float32, "cpu"),
        sinkhorn._huge_row(generator, 700, 8, 2_000_000),
        *(lora._Case(torch.randn(9, 64), leaves, torch.tensor(bounds)).row() for bounds in ([0, 4, 8], [0, 1, 8])),
    ]
    assert all([print_row(row, "cpu", 1) for row in rows])
    assert capsys.readouterr().out.count("| geomloss") >= 2


def test_torch_alone_is_enough() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        f"for name in {FOREIGN!r}: sys.modules[name] = None\n"
        "import torch\nfrom hl_scale.benchmark import lora, measure, sinkhorn\n"
        "generator = torch.Generator().manual_seed(0)\n"
        "leaves = [torch.randn(6, 64), torch.randn(2, 3, 64), torch.randn(2, 8, 3)]\n"
        "layer = lora._Case(torch.randn(8, 64), leaves, torch.tensor([0, 2, 6]))\n"
        "rows = [sinkhorn._ragged_row(generator, 3, 2, 5, 4, 'cpu'), layer.row()]\n"
        "sys.exit(not all([measure.print_row(row, 'cpu', 1) for row in rows]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| ours |") == 2 and "geomloss" not in done.stdout
    assert "copied per token" in done.stdout and "bitsandbytes" not in done.stdout


def test_an_unknown_benchmark_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from hl_scale.cli import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hl-scale", "bench", "everything"])
        with pytest.raises(SystemExit) as stopped:
            main()
    assert stopped.value.code == 2
    assert "choose sinkhorn, lora, step or t2l" in capsys.readouterr().err


def test_the_machine_is_described_with_versions() -> None:
    assert f"torch {torch.__version__}" in measure.describe_machine("cpu")
