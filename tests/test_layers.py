"""The order of the layers, and what the lowest ones can do without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


USE = """
import torch
from hl_scale.kernels import dequantize_nf4, generated_lora_linear, quantize_nf4
packed, constants = quantize_nf4(torch.randn(8, 16))
weight = lambda dtype: dequantize_nf4(packed, constants, dtype)
generated_lora_linear(torch.randn(2, 3, 16), weight, torch.randn(2, 4, 16), torch.randn(2, 8, 4))
from hl_scale.sinkhorn import sinkhorn_divergence
assert sinkhorn_divergence(torch.randn(5, 3), torch.randn(4, 3)) > 0
from hl_scale.lora import LoraFactors, Slot
LoraFactors((Slot(0, "q", "q", 4, 4),), {"q": torch.randn(1, 2, 4)}, {"q": torch.randn(1, 4, 2)}, 1.0).delta_norms()
from hl_scale.lora_algebra import canonical
canonical(torch.randn(2, 4), torch.randn(4, 2))
try:
    import transformers
except ModuleNotFoundError:
    print("blocked")
"""


def test_the_lowest_layers_run_where_only_torch_is_installed() -> None:
    run = python(BARE + USE)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "blocked"


CHECK = """
import json, pathlib, sys, torch
from safetensors.torch import save_file
directory = pathlib.Path(sys.argv[1])
path = "base_model.model.model.layers.0.q_proj"
save_file({f"{path}.lora_A.weight": torch.ones(2, 4), f"{path}.lora_B.weight": torch.ones(3, 2)},
          directory / "adapter_model.safetensors")
config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
(directory / "adapter_config.json").write_text(json.dumps(config))
from hl_scale.serving.engines import check_engines
from hl_scale.data.validation import validate_adapter
print([finding.kind for finding in check_engines(validate_adapter(directory), ["vllm"])])
"""


def test_adapters_are_checked_where_only_torch_and_safetensors_are_installed(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", BARE + CHECK, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"
