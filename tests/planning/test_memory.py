"""The plan against real tensors, and what it answers."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from hl_scale import planning
from hl_scale.base import QuantizedLinear, load_base
from hl_scale.hypernetwork import build_hypernetwork
from hl_scale.planning import as_dict, conclusions, parse_size
from hl_scale.planning.memory import CUDA_RESERVE
from hl_scale.planning.phases import (
    BUCKETS,
    CONSTANTS,
    DEQUANTIZED,
    FREED,
    GATHERED,
    MASTER,
    MOMENTS,
    OTHER,
    PACKED,
    PARAMETERS,
    PARTITIONS,
    PROCESS,
    TARGETS,
)

plan_memory = partial(planning.plan_memory, process=10**8)  # measuring one takes seconds


def phases(plan):
    return {phase.name: phase.parts for phase in plan.phases}


@pytest.fixture
def config(tiny_config, tmp_path):
    """config({"section.key": value}) -> the tiny run with short texts."""

    def make(overrides=None):
        return tiny_config(tmp_path / "run", {"data.maximum_tokens": 16, **(overrides or {})})

    return make


@pytest.mark.parametrize("options", [{}, {"base.double_quantization": False}, {"base.compute_dtype": "bfloat16"}])
def test_what_is_loaded_has_the_sizes_of_the_real_tensors(config, options):
    settings = config(options)
    loaded = phases(plan_memory(settings, 2))["load"]
    base = load_base(settings.base, settings.lora)
    layers = [layer for layer in base.linears.values() if isinstance(layer, QuantizedLinear)]
    packed = sum(layer.packed.nbytes for layer in layers)
    assert loaded[PACKED] == packed == sum(layer.in_features * layer.out_features for layer in layers) // 2
    assert loaded[CONSTANTS] == sum(layer.constants.num_bytes for layer in layers)
    everything = sum(tensor.nbytes for tensor in (*base.parameters(), *base.buffers()))
    assert loaded[OTHER] == everything - packed


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_zero3_cuts_what_is_trained_into_parts_and_the_base_where_asked(config, ranks):
    replicated = phases(plan_memory(config({"base.placement": "replicated"}), ranks))
    cut = phases(plan_memory(config({"base.placement": "zero3"}), ranks))
    assert replicated["step"][PACKED] == replicated["load"][PACKED] == cut["load"][PACKED]
    assert cut["step"][PACKED] == cut["load"][PACKED] / ranks  # every layer divides evenly here
    assert cut["step"][CONSTANTS] == cut["load"][CONSTANTS]  # not parameters
    settings = config()
    base = load_base(settings.base, settings.lora)
    network = build_hypernetwork(settings.hypernetwork, settings.lora, base.slots, 235)
    part = sum(math.ceil(parameter.numel() / ranks) for parameter in network.parameters())
    step = cut["step"]
    assert (step[PARAMETERS], step[MASTER], step[PARTITIONS], step[MOMENTS]) == (4 * part, 4 * part, 4 * part, 8 * part)


def test_small_parameters_stay_whole_beside_their_part(config):
    threshold = 10**9
    few = phases(plan_memory(config({"base.placement": "zero3"}), 2))["step"]
    all_stay = {"base.placement": "zero3", "zero3.parameter_persistence_threshold": threshold}
    whole = phases(plan_memory(config(all_stay), 2))["step"]
    assert whole[PACKED] == 3 * few[PACKED]


def test_one_rank_gathers_nothing_and_a_replicated_base_is_not_gathered(config):
    zero3 = {"base.placement": "zero3", "zero3.prefetch_bucket_size": 0, "zero3.maximum_reuse_distance": 0}
    assert phases(plan_memory(config(zero3), 1))["forward"][GATHERED] == 0
    gathered = phases(plan_memory(config(zero3), 2))["forward"][GATHERED]
    base = load_base(config().base, config().lora)
    together = max(sum(layer.packed.nbytes for layer in shared.layers) for shared in base.shared_inputs)
    assert gathered == 2 * max(together, *(layer.packed.nbytes for layer in base.linears.values()))  # gloo's copy too
    assert phases(plan_memory(config(zero3), 2, device="cuda"))["forward"][GATHERED] == gathered / 2
    assert phases(plan_memory(config({**zero3, "base.placement": "replicated"}), 2))["forward"][GATHERED] == 0
    reused = phases(plan_memory(config({**zero3, "zero3.maximum_reuse_distance": 10**9}), 2))["forward"][GATHERED]
    assert reused > gathered


def test_the_dequantised_weight_is_the_largest_layer(config):
    base = load_base(config().base, config().lora)
    largest = max(layer.in_features * layer.out_features for layer in base.linears.values())
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        parts = phases(plan_memory(config({"base.compute_dtype": dtype}), 2))
        assert parts["forward"][DEQUANTIZED] == parts["targets"][DEQUANTIZED] == size * largest
    assert phases(plan_memory(config({"base.quantization": "none"}), 2))["forward"][DEQUANTIZED] == 0


def test_a_gpu_holds_tensors_alone(config):
    parts = phases(plan_memory(config(), 2, device="cuda"))
    assert all(phase.get(PROCESS, 0) == phase.get(TARGETS, 0) == 0 for phase in parts.values())
    assert "save" not in parts  # copies are made in host memory
    assert parts["backward"][BUCKETS] == 4 * config().zero3.reduce_bucket_size
    offloaded = phases(plan_memory(config({"zero3.offload": "cpu"}), 2, device="cuda"))["step"]
    assert offloaded[MASTER] == offloaded[MOMENTS] == 0


def test_on_cpus_the_heap_keeps_what_backward_frees(config):
    parts = phases(plan_memory(config(), 2))
    alive = parts["backward"]["activations"] + parts["backward"]["generated factors"]
    assert parts["reduce"][FREED] == parts["step"][FREED] > alive
    assert all(phase.get(FREED, 0) == 0 for phase in phases(plan_memory(config(), 2, device="cuda")).values())


def test_ranks_of_a_partitioned_base_keep_small_blocks_alone(config):
    long = {"data.maximum_tokens": 128, "training.global_batch_size": 128, "training.micro_batch_size": 64}
    freed = {}
    for placement in ("replicated", "zero3"):
        options = {**long, "base.placement": placement, "zero3.maximum_reuse_distance": 0}
        freed[placement] = phases(plan_memory(config(options), 2))["step"][FREED]
    assert freed["zero3"] < freed["replicated"]


def test_a_process_is_measured_unless_its_size_is_given(config):
    measured = phases(planning.plan_memory(config(), 2))["load"][PROCESS]
    assert 10**8 < measured < 10**10
    assert 10**10 <= phases(plan_memory(config(), 2, process=10**10))["load"][PROCESS] < 2 * 10**10


def test_longer_texts_and_more_pairs_take_more(config):
    small_bucket = {"zero3.reduce_bucket_size": 1000}
    short = plan_memory(config(small_bucket), 2, device="cuda", tokens=16)
    assert plan_memory(config(small_bucket), 2, device="cuda", tokens=64).peak > short.peak
    one = plan_memory(config({**small_bucket, "training.micro_batch_size": 1}), 2, device="cuda")
    four = plan_memory(config({**small_bucket, "training.micro_batch_size": 4}), 2, device="cuda")
    assert (one.micro_batch, four.micro_batch) == (1, 4) and four.peak > one.peak


def write_adapter(directory, rank):
    """A LoRA of one layer of the tiny model."""
    directory.mkdir()
    key = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight"
    tensors = {key.format("A"): torch.ones(rank, 96), key.format("B"): torch.ones(64, rank)}
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["down_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return str(directory)


TASKS = {"data": {"kind": "tasks", "directory": "unused", "sources": [{"kind": "builtin"}]},
         "conditions": {"encoder": "base"}, "objective": {"kind": "supervised"}}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"base.gradient_checkpointing": True}, TASKS])
def test_a_task_adapter_adds_what_its_layers_keep_for_backward(config, tmp_path, options):
    kept = {}
    for rank in (0, 1, 33):
        task = write_adapter(tmp_path / str(rank), rank) if rank else None
        plan = plan_memory(config({**options, "lora.task_adapter": task}), 1, device="cuda")
        kept[rank] = sum(phases(plan)["backward"].values())
    assert kept[0] <= kept[1] < kept[33]


def test_a_task_adapter_that_is_not_there_is_named_with_its_setting(config, tmp_path):
    with pytest.raises(ValueError, match=r"lora\.task_adapter = \S+gone: there is no such directory\n  fix:"):
        plan_memory(config({"lora.task_adapter": str(tmp_path / "gone")}), 1, device="cuda")


def test_texts_are_no_longer_than_the_context(config):
    assert plan_memory(config(), 2, tokens=10**6).tokens == load_base(config().base, config().lora).context_length


def test_the_largest_micro_batch_fits_and_one_more_pair_does_not(config):
    settings = {"zero3.reduce_bucket_size": 1000, "training.global_batch_size": 4096, "cluster.num_workers": 1}
    room = 50_000_000
    found = plan_memory(config(settings), 1, device="cuda", capacity=CUDA_RESERVE + room).largest_micro_batch
    assert found > 10

    def peak(pairs):
        batch = {"training.global_batch_size": pairs, "training.micro_batch_size": pairs}
        return plan_memory(config({**settings, **batch}), 1, device="cuda").peak

    assert peak(found) <= room < peak(found + 1)
    nothing = plan_memory(config(settings), 1, device="cuda", capacity=CUDA_RESERVE + 1000)
    assert nothing.largest_micro_batch == 0
    assert any("does NOT fit" in line for line in conclusions(nothing))


def test_the_checkpoint_has_the_size_of_a_real_one(deepspeed_run, tiny_config):
    from safetensors import safe_open

    size = 0
    for shard in (deepspeed_run / "checkpoints" / "step-000006").glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            size += sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    assert plan_memory(tiny_config(deepspeed_run), 2).checkpoint == size


def test_steps_report_the_peak_of_a_rank(deepspeed_run):
    peaks = [json.loads(line)["peak_memory_bytes"] for line in (deepspeed_run / "metrics.jsonl").open()]
    assert len(peaks) == 6 and peaks == sorted(peaks) and peaks[0] > 10**8


def test_no_weights_are_needed(config, tiny_model, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text((tiny_model / "config.json").read_text())
    bare = plan_memory(config({"base.model": str(tmp_path / "model")}), 2, device="cuda")
    assert phases(bare)["step"] == phases(plan_memory(config(), 2, device="cuda"))["step"]


def test_a_model_without_a_configuration_is_refused(config, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"cannot be read(.|\n)*fix: .*config\.json"):
        plan_memory(config({"base.model": str(tmp_path / "empty")}), 2)


def test_seven_billion_weights_take_what_four_bits_each_take(config):
    settings = config({"base.model": "random:mistral-7b", "base.architecture": "encoder", "base.placement": "zero3"})
    plan = plan_memory(settings, 8, device="cuda", tokens=8)
    linear = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert phases(plan)["load"][PACKED] == linear // 2
    assert phases(plan)["step"][PACKED] == linear // 16
    assert as_dict(plan)["peak_bytes"] == plan.peak


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 * 2**30), ("24 GB", 24 * 10**9), ("16e9", 16 * 10**9), ("1.5g", 1_500_000_000)]
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "80 apples", "-3GB", "0"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match="fix: write it as 80GiB"):
        parse_size(text)


def test_a_tiled_mlp_is_gathered_as_a_whole(config):
    cut = {"base.placement": "zero3", "base.mlp_tile_tokens": 4, "training.steps": 1}
    gathered = phases(plan_memory(config(cut), 2, device="cuda"))["forward"][GATHERED]
    assert gathered == 3 * 64 * 96 // 2  # gate, up and down of one block
