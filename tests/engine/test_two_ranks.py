"""Claims about several ranks, checked on real processes: one run of `two_rank_scenarios.py` serves most of them."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hl_scale.config import load_config
from hl_scale.engine import checkpoint
from hl_scale.engine.loop import train
from hl_scale.engine.run import load_run

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-5  # relative; float32 sums in another order
GRADIENT_TOLERANCE = 2e-4  # of the norm of each parameter's gradient: float32 states through two blocks
TEXT_TO_LORA = {
    size: {"kind": "text_to_lora", "size": size, "latent_width": 16, "head_width": 32} for size in ("L", "M", "S")
}

WITHOUT_PENALTY = {"objective": {"kind": "supervised", "label_smoothing": 0.1, "neftune_alpha": 5.0}}


@pytest.fixture(scope="module")
def ranks(tiny_config, tiny_tasks, write_yaml, on_ranks, write_tiny_corpus, tmp_path_factory):
    """What both ranks said about every scenario, and where the runs are."""
    root = tmp_path_factory.mktemp("two-ranks")
    fresh = str(write_tiny_corpus(root / "fresh-corpus"))
    stop = {"training.maximum_consecutive_skips": 3, "training.steps": 20}
    plans = {
        "accumulated": ({"training.micro_batch_size": 2}, {}),
        "packed": ({"training.packed": True}, {"gradients": True}),
        "merged": ({"lora.apply": "merged"}, {"gradients": True}),
        "zero3": ({"base.placement": "zero3"}, {"gradients": True}),
        "zero3_checkpointed": ({"base.placement": "zero3", "base.gradient_checkpointing": True}, {"gradients": True}),
        "zero3_tiled": (
            {"base.placement": "zero3", "base.mlp_tile_tokens": 3, "lora.target_modules": ["v_proj", "gate_proj"]},
            {"gradients": True},
        ),
        "zero3_everything": (
            {
                "base.placement": "zero3", "base.gradient_checkpointing": True, "base.offload_activations": True,
                "base.mlp_tile_tokens": 5, "hypernetwork.generate_per_block": True, "training.packed": True,
                "lora.target_modules": ["v_proj", "gate_proj"],
            },
            {"gradients": True},
        ),
        "offloaded": ({"zero3.offload": "cpu"}, {}),
        "fresh_targets": ({"data.directory": fresh}, {"stop_at": 1}),
        "poisoned": ({**stop, "data.directory": fresh}, {"fault": "poisoned_targets"}),
        "poisoned_zero3_bfloat16": (
            {**stop, "base.placement": "zero3", "base.compute_dtype": "bfloat16"}, {"fault": "poisoned_targets"},
        ),
        "damaged_corpus": ({}, {"fault": "damaged_corpus"}),
        "full_disk": ({}, {"fault": "full_disk"}),
        "other_settings": ({}, {"fault": "other_settings"}),
        "other_directory": ({}, {"fault": "other_directory"}),
        "flipped_bit": ({"zero3.parameter_persistence_threshold": 100_000}, {"fault": "flipped_bit"}),
        "background": ({"training.save_in_background": True, "training.save_every": 1}, {}),
        "gated": (
            {"base.placement": "zero3", "hypernetwork": {"kind": "gated_lora", "hidden_width": 16}},
            {"gradients": True},
        ),
        "supervised_padded": (tiny_tasks, {"gradients": True}),
        "supervised_everything": (
            {
                **tiny_tasks, **WITHOUT_PENALTY, "base.placement": "zero3", "base.gradient_checkpointing": True,
                "training.packed": True,
                "hypernetwork": {**TEXT_TO_LORA["M"], "generate_per_block": True},
            },
            {"gradients": True},
        ),
        **{
            f"text_to_lora_{size}": (
                {
                    "base.placement": "zero3", "base.gradient_checkpointing": True,
                    "hypernetwork": {**section, "generate_per_block": True},
                },
                {"gradients": True},
            )
            for size, section in TEXT_TO_LORA.items()
        },
    }  # fmt: skip
    scenarios = [
        {"name": name, "config": str(write_yaml(tiny_config(root / name, settings), root / f"{name}.yaml")), **more}
        for name, (settings, more) in plans.items()
    ]
    # The same run in two parts.
    halves = str(write_yaml(tiny_config(root / "halves"), root / "halves.yaml"))
    scenarios += [
        {"name": "first_half", "config": halves, "stop_at": 3},
        {"name": "second_half", "config": halves},
    ]
    (root / "scenarios.json").write_text(json.dumps(scenarios))
    script = Path(__file__).with_name("two_rank_scenarios.py")
    buffers = set(Path("/dev/shm").glob("deepspeed_*"))
    elsewhere = {"OTHER_DIRECTORY": str(root / "elsewhere")}
    done = on_ranks(script, str(root / "scenarios.json"), str(root), **elsewhere)
    left = sorted(set(Path("/dev/shm").glob("deepspeed_*")) - buffers)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-14000:]
    answers = [json.loads((root / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    return SimpleNamespace(root=root, answers=answers, buffers=left)


@pytest.fixture(scope="module")
def one_rank_losses(single_process, tiny_config, losses_of, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "one-rank"
    train(tiny_config(directory))
    return losses_of(directory)


def close(losses, expected):
    return losses == pytest.approx(expected, rel=TOLERANCE)


def test_ranks_leave_no_buffer_in_shared_memory(ranks):
    assert ranks.buffers == []


def test_two_ranks_give_the_losses_of_one_rank(single_process, deepspeed_run, losses_of, one_rank_losses):
    assert close(losses_of(deepspeed_run), one_rank_losses)
    assert len(one_rank_losses) == 6


def test_gradient_accumulation_gives_the_same_losses(ranks, losses_of, deepspeed_run):
    assert close(losses_of(ranks.root / "accumulated"), losses_of(deepspeed_run))


def test_both_placements_give_the_same_losses(ranks, losses_of, deepspeed_run):
    assert close(losses_of(ranks.root / "zero3"), losses_of(deepspeed_run))


def test_recomputed_blocks_and_offloaded_states_give_the_same_losses(ranks, losses_of, deepspeed_run):
    for name in ("zero3_checkpointed", "offloaded"):
        assert close(losses_of(ranks.root / name), losses_of(deepspeed_run))


def test_packed_and_merged_batches_give_the_same_losses(ranks, losses_of, deepspeed_run):
    for name in ("packed", "merged"):
        assert close(losses_of(ranks.root / name), losses_of(deepspeed_run))


def test_tiles_offload_and_generation_per_block_give_the_losses_of_plain_training(ranks, losses_of):
    assert close(losses_of(ranks.root / "zero3_everything"), losses_of(ranks.root / "zero3_tiled"))


@pytest.mark.parametrize("size", TEXT_TO_LORA)
def test_text_to_lora_by_the_block_on_two_ranks_gives_the_losses_of_one_rank(
    single_process, size, ranks, losses_of, tiny_config, tmp_path
):
    train(tiny_config(tmp_path, {"hypernetwork": TEXT_TO_LORA[size]}))
    losses = losses_of(ranks.root / f"text_to_lora_{size}")
    assert close(losses, losses_of(tmp_path)) and len(set(losses)) == 6


def test_tasks_on_two_ranks_give_the_losses_of_one_rank(
    single_process, ranks, losses_of, tiny_config, tiny_tasks, tmp_path
):
    train(tiny_config(tmp_path / "padded", tiny_tasks))
    assert close(losses_of(ranks.root / "supervised_padded"), losses_of(tmp_path / "padded"))
    train(tiny_config(tmp_path / "medium", {**tiny_tasks, **WITHOUT_PENALTY, "hypernetwork": TEXT_TO_LORA["M"]}))
    losses = losses_of(ranks.root / "supervised_everything")
    assert close(losses, losses_of(tmp_path / "medium")) and len(set(losses)) == 6


TASK_SCENARIOS = ["supervised_padded", "supervised_everything"]
GRADIENT_SCENARIOS = ["gated", "packed", "merged", "zero3", "zero3_checkpointed", "zero3_tiled", "zero3_everything"]


@pytest.mark.parametrize(
    "name", [*GRADIENT_SCENARIOS, *TASK_SCENARIOS, *(f"text_to_lora_{size}" for size in TEXT_TO_LORA)]
)
def test_gradients_to_the_hypernetwork_equal_the_float64_reference(name, ranks, reference_gradients):
    expected = reference_gradients(load_config(ranks.root / f"{name}.yaml"))
    found = load_file(ranks.root / f"{name}-gradients.safetensors")
    assert {key.removeprefix("hypernetwork.") for key in found} == expected.keys()
    for key, gradient in expected.items():
        ours = found[f"hypernetwork.{key}"].double()
        assert torch.linalg.norm(ours - gradient) <= GRADIENT_TOLERANCE * torch.linalg.norm(gradient), key
    assert any(gradient.norm() > 0 for gradient in expected.values())


@pytest.mark.parametrize("name", ["zero3_everything", "text_to_lora_S"])
def test_a_run_that_generated_per_block_is_opened_like_any_other(name, ranks):
    run = load_run(ranks.root / name)
    factors = run.hypernetwork(torch.zeros(2, run.hypernetwork.condition_size)).select(0)
    assert (factors.conditions, factors.rank) == (1, run.config.lora.rank)


def test_zero3_leaves_half_of_the_packed_bytes_on_each_rank(ranks):
    for answer in ranks.answers:
        packed = answer["zero3"]["packed"]
        assert len(packed) == 2 * 7  # every linear layer of two blocks
        for gathered, kept, whole, dtype in packed.values():
            assert (gathered, kept, dtype) == (0, whole / 2, "torch.uint8")


def test_a_replicated_base_is_outside_the_engine(ranks):
    assert ranks.answers[0]["accumulated"]["packed"] == {}


def test_ranks_compute_disjoint_chunks_of_the_targets_and_all_of_them(ranks):
    first, second = (list(itertools.chain(*answer["fresh_targets"]["chunks"])) for answer in ranks.answers)
    assert (len(first), len(second)) == (7, 5)  # chunks of 5, 5 and 2
    assert len({*first, *second}) == 12


def test_targets_on_disk_are_not_computed_again(ranks):
    assert all(answer["poisoned"]["chunks"] == [] for answer in ranks.answers)


def test_resuming_at_the_same_world_size_is_exact(ranks, losses_of, deepspeed_run):
    assert ranks.answers[0]["first_half"]["step"] == 3
    assert losses_of(ranks.root / "halves") == losses_of(deepspeed_run)
    parts = [
        checkpoint.read_full(checkpoint.newest(directory / "checkpoints")[0])
        for directory in (ranks.root / "halves", deepspeed_run)
    ]
    for name, kinds in parts[1].items():
        for kind, tensor in kinds.items():
            assert tensor.equal(parts[0][name][kind]), (name, kind)


def test_resuming_two_ranks_on_one_goes_through_the_same_batches(
    single_process, ranks, deepspeed_run, losses_of, tiny_config, tmp_path
):
    directory = tmp_path / "resumed"
    shutil.copytree(deepspeed_run / "checkpoints" / "step-000002", directory / "checkpoints" / "step-000002")
    shutil.copy(deepspeed_run / "metrics.jsonl", directory / "metrics.jsonl")
    train(tiny_config(directory))
    expected = losses_of(deepspeed_run)
    assert losses_of(directory)[:2] == expected[:2]
    assert close(losses_of(directory), expected)


@pytest.mark.parametrize("name", ["poisoned", "poisoned_zero3_bfloat16"])
def test_non_finite_numbers_on_one_rank_change_no_weight_on_any_rank(ranks, name):
    for answer in (both[name] for both in ranks.answers):
        assert answer["error"] == "TrainingAborted"
        assert answer["skipped"] == 3
        before, *skipped = answer["digests"][2:]
        assert len(skipped) == 3 and set(skipped) == {before}
        assert answer["digests"][1] != before  # while finite steps do change them


def test_an_aborted_run_writes_the_pairs_and_losses_of_every_rank(ranks):
    message = ranks.answers[0]["poisoned"]["message"]
    assert "step 6: loss nan, 3 non-finite steps in a row" in message
    ranks_written = json.loads((ranks.root / "poisoned" / "nonfinite-step-000006.json").read_text())["ranks"]
    pairs = [pair for share in ranks_written for one in share["passes"] for pair in one["samples"]]
    assert len(set(pairs)) == 8 and all(0 <= pair < 48 for pair in pairs)
    assert [share["passes"][0]["loss"] == "nan" for share in ranks_written] == [False, True]


def test_an_error_on_one_rank_ends_all_ranks_before_anything_is_written(ranks):
    first, second = (answer["damaged_corpus"] for answer in ranks.answers)
    assert first["error"] == "RankError" and first["message"] == "rank 1: shard on this node is damaged"
    assert second["error"] == "CheckpointError"
    assert not (ranks.root / "damaged_corpus").exists()


def test_a_failed_checkpoint_on_one_rank_leaves_nothing_half_written(ranks):
    first, second = (answer["full_disk"] for answer in ranks.answers)
    assert "No space left on device" in first["message"] and second["error"] == "CheckpointError"
    assert list((ranks.root / "full_disk" / "checkpoints").iterdir()) == []


def test_bfloat16_losses_are_finite_until_the_fault(ranks):
    lines = (ranks.root / "poisoned_zero3_bfloat16" / "metrics.jsonl").read_text().splitlines()
    assert all(math.isfinite(json.loads(line)["loss"]) for line in lines[:3])


def test_ranks_with_different_settings_refuse_before_anything_is_written(ranks):
    for answer in ranks.answers:
        assert answer["other_settings"]["error"] == "ConfigError"
        message = answer["other_settings"]["message"]
        assert "rank 1 has another configuration than rank 0: training.learning_rate = 0.5 instead of 0.01" in message
    assert not (ranks.root / "other_settings").exists()


def test_ranks_whose_run_directories_are_not_the_same_storage_are_refused(ranks):
    for answer in ranks.answers:
        assert answer["other_directory"]["error"] == "ConfigError"
        message = answer["other_directory"]["message"]
        assert "is not the same directory everywhere: rank 1 on" in message


def test_ranks_that_hold_other_values_end_the_run_before_a_checkpoint_is_written(ranks):
    for answer in ranks.answers:
        assert answer["flipped_bit"]["error"] == "TrainingAborted"
        assert (
            "rank 1 holds other values than rank 0 in 1 parameters, first hypernetwork."
            in (answer["flipped_bit"]["message"])
        )
    saved = checkpoint.find(ranks.root / "flipped_bit" / "checkpoints")
    assert [path.name for path in saved] == ["step-000002"]


def test_checkpoints_written_in_the_background_are_those_written_at_once(ranks, losses_of, deepspeed_run):
    assert losses_of(ranks.root / "background") == losses_of(deepspeed_run)
    directory = ranks.root / "background" / "checkpoints"
    assert [path.name for path in checkpoint.find(directory)] == [f"step-{step:06d}" for step in range(1, 7)]
    for step in (2, 4, 6):
        name = f"step-{step:06d}"
        mine, other = (
            checkpoint.read_full(checkpoint.verify(path / name)) for path in (directory, deepspeed_run / "checkpoints")
        )
        assert all(mine[key][kind].equal(other[key][kind]) for key in other for kind in other[key])


def test_three_ranks_go_on_from_two_with_shares_that_are_not_equal(
    tiny_config, write_yaml, on_ranks, deepspeed_run, losses_of, tmp_path
):
    """8 pairs on 3 ranks: 3, 3 and 2, in passes of at most 2: 2 + 1, 2 + 1 and 1 + 1."""
    directory = tmp_path / "run"
    shutil.copytree(deepspeed_run / "checkpoints" / "step-000002", directory / "checkpoints" / "step-000002")
    shutil.copy(deepspeed_run / "metrics.jsonl", directory / "metrics.jsonl")
    config = write_yaml(tiny_config(directory, {"training.micro_batch_size": 2}), tmp_path / "config.yaml")
    done = on_ranks(ROOT / "launch" / "train.py", "--config", str(config), ranks=3)
    assert done.returncode == 0, done.stderr[-3000:]
    assert close(losses_of(directory), losses_of(deepspeed_run))
    last, other = (checkpoint.newest(path / "checkpoints")[0] for path in (directory, deepspeed_run))
    assert last.manifest.world_size == 3 and other.manifest.world_size == 2
    mine, theirs = checkpoint.read_full(last), checkpoint.read_full(other)
    for name, kinds in theirs.items():
        assert torch.allclose(mine[name]["master"], kinds["master"], rtol=1e-3, atol=1e-5), name
