"""The order of the layers, and what the lowest ones can do without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_each_layer_imports_only_layers_below_it() -> None:
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    run = python(code)
    assert run.returncode == 0, run.stdout + run.stderr


BLOCKED = ("transformers", "deepspeed", "ray", "bitsandbytes", "geomloss", "datasets", "pydantic", "yaml")
BARE = f"""
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f'{{name}} is blocked', name=name)
sys.meta_path.insert(0, Block())
"""


@pytest.mark.parametrize(
    "use",
    [
        "from hl_scale.kernels import quantize_nf4, dequantize_nf4, generated_lora_linear as f\n"
        "w, x = torch.randn(8, 16), torch.randn(2, 3, 16)\n"
        "packed, constants = quantize_nf4(w)\n"
        "f(x, lambda d: dequantize_nf4(packed, constants, d), torch.randn(2, 4, 16), torch.randn(2, 8, 4))",
        "from hl_scale.sinkhorn import sinkhorn_divergence\n"
        "assert sinkhorn_divergence(torch.randn(5, 3), torch.randn(4, 3)) > 0",
        "from hl_scale.lora import LoraFactors, Slot, lora_scale\n"
        "s = Slot(0, 'q', 'q', 4, 4)\n"
        "LoraFactors((s,), {'q': torch.randn(1, 2, 4)}, {'q': torch.randn(1, 4, 2)}, 1.0).delta_norms()",
    ],
    ids=["kernels", "sinkhorn", "lora"],
)
def test_the_lowest_layers_run_where_only_torch_is_installed(use: str) -> None:
    run = python(f"{BARE}\nimport torch\n{use}")
    assert run.returncode == 0, run.stderr
    assert "is blocked" in python(f"{BARE}\nimport transformers").stderr
