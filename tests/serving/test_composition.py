"""A generated adapter and a trained one as one adapter: three independent ways to load it agree with the model here.

Tolerance in float32: 1e-5 of the largest logit, as for a generated adapter alone.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hl_scale.base import read_task_adapter
from hl_scale.config import LoraConfig
from hl_scale.lora import SummedFactors
from hl_scale.serving import generate_adapter, merge_adapter, validate_adapter
from hl_scale.serving.batch import Request, RequestError, generate_adapters
from hl_scale.serving.engines import check_engines
from hl_scale.serving.export import generate_factors
from hl_scale.serving.gguf_adapter import gguf_tensors

CONDITION = "dialect:Nigerian English"
TOLERANCE = 1e-5


@pytest.fixture
def write_task(dense_twin, tmp_path):
    """write_task(run, architecture, targets, **options) -> directory of a random LoRA of rank 3, and PEFT's model."""

    def write(run, architecture, targets, **options):
        model = get_peft_model(dense_twin(run.base, architecture), PeftConfig(r=3, target_modules=targets, **options))
        generator = torch.Generator().manual_seed(8)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(tmp_path / "task")
        path = tmp_path / "task" / "adapter_config.json"
        config = {**json.loads(path.read_text()), "base_model_name_or_path": "example/tiny"}
        path.write_text(json.dumps(config))
        return tmp_path / "task", model.eval()

    return write


@pytest.fixture
def compose(make_run, write_task):
    """compose(architecture, convention, targets, **options) -> run, task adapter, and PEFT's model with the latter."""

    def make(architecture="gemma", convention="alpha_over_sqrt_rank", targets=("k_proj", "down_proj"), **options):
        lora = LoraConfig(rank=5, alpha=6.5, scale_convention=convention, target_modules=("q_proj", "k_proj", "v_proj"))
        run = make_run(architecture, lora)
        directory, theirs = write_task(run, architecture, list(targets), **options)
        return run, read_task_adapter(directory, run.base, run.config.base), theirs

    return make


def composed(run, task, probe):
    """Logits as in training, both parts added where a layer runs; then those of each part alone, and of the base."""
    _, own = generate_factors(run, CONDITION)
    keep = probe["attention_mask"].bool()
    with torch.no_grad():
        source = SummedFactors(own, task.factors.rescaled(own.scale))
        return [run.base.logits(**probe, factors=factors)[keep] for factors in (source, own, task.factors, None)]


def assert_same(found, expected):
    assert (found - expected).abs().max() < TOLERANCE * expected.abs().max()


def assert_each_part_matters(logits):
    both, own, task, bare = logits
    assert min((both - other).abs().max() for other in (own, task, bare)) > 0.1


@pytest.mark.parametrize("architecture", ["gemma", "llama"])
@pytest.mark.parametrize("convention", ["alpha_over_rank", "alpha_over_sqrt_rank", "one"])
@pytest.mark.parametrize("profile", ["plain", "portable"])
@pytest.mark.parametrize("options", [{"lora_alpha": 5}, {"lora_alpha": 7, "use_rslora": True}])
def test_peft_gives_the_logits_of_training_from_one_combined_directory(
    compose, dense_twin, probe, tmp_path, architecture, convention, profile, options
):
    run, task, _ = compose(architecture, convention, **options)
    directory = generate_adapter(run, CONDITION, tmp_path / "both", profile=profile, with_adapter=task)
    facts = validate_adapter(directory, base_model_name_or_path="example/tiny", base_fingerprint="f" * 64)
    assert (facts.rank, facts.scale) == (8, pytest.approx(run.hypernetwork.scale))
    assert {slot.module for slot in facts.slots} == {"q_proj", "k_proj", "v_proj", "down_proj"}
    theirs = PeftModel.from_pretrained(dense_twin(run.base, architecture), directory).eval()
    logits = composed(run, task, probe)
    assert_each_part_matters(logits)
    with torch.no_grad():
        assert_same(theirs(**probe).logits[probe["attention_mask"].bool()], logits[0])


def test_peft_itself_adds_both_adapters_to_the_same_logits(compose, probe, tmp_path):
    run, task, theirs = compose()
    alone = generate_adapter(run, CONDITION, tmp_path / "alone")
    theirs.load_adapter(alone, "dialect")
    theirs.base_model.set_adapter(["default", "dialect"])  # both at a time
    with torch.no_grad():
        found = theirs(**probe).logits[probe["attention_mask"].bool()]
    assert_same(found, composed(run, task, probe)[0])


@pytest.mark.parametrize("architecture", ["gemma", "llama"])
def test_a_checkpoint_merged_with_both_gives_the_logits_of_training(compose, probe, tmp_path, architecture):
    run, task, _ = compose(architecture)
    merged = merge_adapter(run, CONDITION, tmp_path / "merged", dtype="float32", with_adapter=task, progress=False)
    model = AutoModelForCausalLM.from_pretrained(merged.directory, dtype=torch.float32).eval()
    logits = composed(run, task, probe)
    assert_each_part_matters(logits)
    with torch.no_grad():
        assert_same(model(**probe).logits[probe["attention_mask"].bool()], logits[0])
    facts = json.loads((merged.directory / "hl_provenance.json").read_text())
    assert facts["task_adapter_fingerprint"] == task.fingerprint and facts["condition"] == "Nigerian English"


def test_a_rank_below_a_portable_one_is_padded_and_every_engine_takes_the_sum(compose, tmp_path):
    run, task, _ = compose(targets=("q_proj", "k_proj", "v_proj"))
    run.config = run.config.model_copy(update={"lora": LoraConfig(rank=6, alpha=6.0, target_modules=("q_proj",))})
    run.hypernetwork = type(run.hypernetwork)(run.base.slots, run.config.lora)
    directory = generate_adapter(run, CONDITION, tmp_path / "both", profile="portable", with_adapter=task)
    facts = validate_adapter(directory)
    assert facts.rank == 16
    assert [finding for finding in check_engines(facts) if finding.kind == "problem"] == []


def test_a_sum_names_both_of_its_parts(compose, tmp_path):
    run, task, _ = compose(lora_alpha=5)
    directory = generate_adapter(run, CONDITION, tmp_path / "both", with_adapter=task)
    facts = json.loads((directory / "hl_provenance.json").read_text())
    assert (facts["condition"], facts["task_adapter"]) == ("Nigerian English", "task")
    assert (facts["task_adapter_rank"], facts["task_adapter_scale"]) == (3, pytest.approx(5 / 3))
    assert (facts["rank"], facts["scale"]) == (8, pytest.approx(6.5 / math.sqrt(5)))
    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["task_adapter_fingerprint"] == task.fingerprint
    card = (directory / "README.md").read_text()
    assert "# Adapter for Nigerian English, with task" in card and "the trained adapter task was added" in card


@pytest.mark.parametrize("profile", ["plain", "portable"])
def test_each_sum_of_many_is_the_one_generated_alone_and_kept_the_next_time(compose, tmp_path, profile):
    run, task, _ = compose()
    dialects = ("Nigerian English", "Indian English")
    requests = [Request(name[:6].lower(), run.conditions.parse(f"dialect:{name}")) for name in dialects]
    made = generate_adapters(run, requests, tmp_path / "many", profile=profile, with_adapter=task, progress=False)
    assert made.written == ("nigeri", "indian")
    for request, dialect in zip(requests, dialects, strict=True):
        one, of_many = tmp_path / request.name, tmp_path / "many" / request.name
        generate_adapter(run, f"dialect:{dialect}", one, profile=profile, with_adapter=task)
        for name in ("adapter_config.json", "hl_provenance.json"):
            alone, found = (json.loads((directory / name).read_text()) for directory in (one, of_many))
            assert {**alone, "created": 0, "files": 0} == {**found, "created": 0, "files": 0}
        expected, tensors = (load_file(directory / "adapter_model.safetensors") for directory in (one, of_many))
        assert expected.keys() == tensors.keys()
        assert all(torch.allclose(tensors[key], value, rtol=1e-5, atol=1e-6) for key, value in expected.items())
    again = generate_adapters(run, requests, tmp_path / "many", profile=profile, with_adapter=task, progress=False)
    assert (again.written, again.kept) == ((), made.written)
    with pytest.raises(RequestError, match=r"it differs in .*task_adapter"):
        generate_adapters(run, requests, tmp_path / "many", profile=profile, progress=False)


def test_an_adapter_alone_says_nothing_of_a_task_adapter(make_run, tmp_path):
    directory = generate_adapter(make_run("gemma"), CONDITION, tmp_path / "alone")
    assert not any(
        "task_adapter" in path.read_text() for path in directory.glob("*.*") if path.suffix != ".safetensors"
    )


def test_a_sum_with_a_sum_is_read_like_any_other_adapter(compose, tmp_path, probe):
    run, task, _ = compose()
    both = generate_adapter(run, CONDITION, tmp_path / "both", with_adapter=task)
    again = read_task_adapter(both, run.base, run.config.base)
    with torch.no_grad():
        found = run.base.logits(**probe, factors=again.factors)[probe["attention_mask"].bool()]
    assert_same(found, composed(run, task, probe)[0])


def test_the_stored_factors_of_the_dialect_are_those_it_has_alone(compose, tmp_path):
    run, task, _ = compose()
    alone, both = (
        load_file(generate_adapter(run, CONDITION, tmp_path / name, with_adapter=added) / "adapter_model.safetensors")
        for name, added in (("alone", None), ("both", task))
    )
    for name, tensor in alone.items():
        own = both[name][:5] if "lora_A" in name else both[name][:, :5]
        assert torch.equal(own, tensor)


def test_a_gguf_adapter_of_a_sum_has_one_rank_in_all_its_tensors(compose):
    pytest.importorskip("gguf")
    run, task, _ = compose("llama")
    _, factors = generate_factors(run, CONDITION, task)
    tensors = gguf_tensors(factors, run.base.model.config)
    assert {tensor.shape[0 if name.endswith("lora_a") else 1] for name, tensor in tensors.items()} == {8}
    assert len(tensors) == 2 * len(factors.slots) == 2 * 2 * 4
