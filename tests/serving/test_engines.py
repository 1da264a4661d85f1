"""The rules of other engines: what breaks one is found, and portable adapters break none."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hl_scale.cli import app
from hl_scale.cli.adapters import _ENGINES
from hl_scale.config import LoraConfig
from hl_scale.lora import LoraFactors
from hl_scale.serving import generate_adapter, validate_adapter
from hl_scale.serving.engines import ENGINES, PORTABLE_RANKS, check_engines, portable_rank
from hl_scale.serving.export import generate_factors, write_peft_adapter

CONDITION = "dialect:Nigerian English"
TARGETS = ("q_proj", "k_proj", "v_proj")


def problems(directory, engine):
    found = list(check_engines(validate_adapter(directory), [engine]))
    assert all(finding.source for finding in found)
    return [finding.text for finding in found if finding.kind == "problem"]


def notes(directory, engine):
    found = check_engines(validate_adapter(directory), [engine])
    return [finding.text for finding in found if finding.kind == "note"]


@pytest.fixture
def write(make_run, tmp_path):
    def write(profile="plain", layers=(0, 1), **lora):
        run = make_run("llama", LoraConfig(**{"rank": 4, "alpha": 6.0, "target_modules": TARGETS, **lora}))
        _, factors = generate_factors(run, CONDITION)
        slots = tuple(slot for slot in factors.slots if slot.layer in layers or slot.module == "q_proj")
        part = LoraFactors(slots, factors.a, factors.b, factors.scale)
        return write_peft_adapter(
            part, tmp_path / "adapter", base_model_name_or_path="example/tiny", lora=run.config.lora,
            task_type="CAUSAL_LM", provenance={}, profile=profile, force=True,
        )  # fmt: skip

    return write


def edit_config(directory, **fields):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rename(directory, old, new):
    path = directory / "adapter_model.safetensors"
    save_file({key.replace(old, new): tensor for key, tensor in load_file(path).items()}, path)
    (directory / "hl_provenance.json").unlink()


@pytest.mark.parametrize("convention", ["alpha_over_rank", "alpha_over_sqrt_rank", "one"])
@pytest.mark.parametrize("rank", [1, 5, 8, 24])
def test_a_portable_adapter_has_no_problem_anywhere(write, rank, convention):
    directory = write("portable", rank=rank, scale_convention=convention)
    assert {engine: problems(directory, engine) for engine in ENGINES} == {engine: [] for engine in ENGINES}


def test_a_rank_stabilised_scale_is_a_problem_where_it_is_ignored(write):
    directory = write(scale_convention="alpha_over_sqrt_rank")
    for engine in ("sglang", "llamacpp"):
        assert "2 times too weak" in problems(directory, engine)[0]
    for engine in ("peft", "vllm", "lorax"):
        assert problems(directory, engine) == []


def test_keys_that_name_the_adapter_are_found_by_no_engine_that_looks_for_exact_ones(write):
    directory = write()
    rename(directory, ".weight", ".default.weight")
    for engine in ("peft", "vllm", "lorax", "llamacpp"):
        assert ".default.weight" in problems(directory, engine)[0]


def test_keys_without_pefts_prefix_are_silently_lost_by_peft_and_lorax(write):
    directory = write()
    rename(directory, "base_model.model.", "")
    assert problems(directory, "peft") and problems(directory, "lorax")
    assert problems(directory, "vllm") == []


@pytest.mark.parametrize("change", [(".weight", ".mine.weight"), ("base_model.model.", "")])
def test_peft_itself_applies_nothing_under_such_keys(write, make_run, dense_twin, probe, change):
    """The rule is true of the PEFT that is installed."""
    directory = write()
    run = make_run("llama", LoraConfig(rank=4, alpha=6.0, target_modules=TARGETS))
    bare = dense_twin(run.base, "llama")
    with torch.no_grad():
        expected = bare(**probe).logits
        rename(directory, *change)
        found = PeftModel.from_pretrained(dense_twin(run.base, "llama"), directory).eval()(**probe).logits
    assert torch.equal(found, expected)


def test_modules_left_out_in_some_layer_are_a_problem_for_lorax_alone(write):
    directory = write(layers=(1,))
    assert "k_proj has no factors in layer 0" in problems(directory, "lorax")[0]
    assert all(problems(directory, engine) == [] for engine in ("peft", "vllm", "sglang", "llamacpp"))


def test_an_adapter_of_a_layer_with_a_huge_number_is_answered_at_once(write):
    directory = write()
    rename(directory, ".layers.1.", f".layers.{10**12}.")
    edit_config(directory, target_modules=TARGETS)
    assert "has no factors in layer 1:" in problems(directory, "lorax")[0]


def test_patterns_of_target_modules_and_added_tokens_are_problems_for_sglang(write):
    directory = write()
    edit_config(directory, target_modules=".*_proj")
    (directory / "added_tokens.json").write_text("{}")
    assert len(problems(directory, "sglang")) == 2


def test_an_alpha_of_zero_would_be_no_scaling_in_llama_cpp(write):
    directory = write()
    edit_config(directory, lora_alpha=0)
    assert "lora_alpha = 0" in problems(directory, "llamacpp")[0]


def test_options_that_servers_need_are_noted(write):
    directory = write(rank=20)
    assert "--max-lora-rank 32" in notes(directory, "vllm")[0]
    assert "--lora-target-modules k_proj q_proj v_proj" in notes(directory, "sglang")[0]
    assert "rank 20" in notes(directory, "lorax")[0]
    assert notes(write("portable", rank=12), "vllm") == []


def test_the_next_portable_rank():
    assert [portable_rank(rank) for rank in (1, 8, 9, 128)] == [8, 8, 16, 128]
    assert all(math.log2(rank).is_integer() for rank in PORTABLE_RANKS)
    with pytest.raises(ValueError, match=r"129 is larger than 128.*\n  fix"):
        portable_rank(129)


def test_an_engine_without_rules_is_refused(write):
    with pytest.raises(ValueError, match=r"no rules for ollama\n  fix: choose from peft, vllm"):
        list(check_engines(validate_adapter(write()), ["vllm", "ollama"]))


def test_the_command_answers_for_every_engine_and_fails_if_one_refuses(write, make_run, tmp_path):
    assert _ENGINES == ENGINES
    directory = write(scale_convention="alpha_over_sqrt_rank")
    run = CliRunner().invoke(app, ["check", str(directory)])
    assert run.exit_code == 1
    verdicts = dict(line.split() for line in run.stdout.splitlines() if line.endswith((" yes", " no")))
    assert verdicts == {"peft": "yes", "vllm": "yes", "sglang": "no", "lorax": "yes", "llamacpp": "no"}
    portable = generate_adapter(make_run("llama"), CONDITION, tmp_path / "portable", profile="portable")
    assert CliRunner().invoke(app, ["check", str(portable), "--engines", "vllm,sglang"]).exit_code == 0
