"""Run several trainings one after the other in each of two ranks (starting takes longer than training).

Arguments: a JSON file with a list of {name, config, stop_at, fault, gradients}, and a directory for the answers,
rank-<n>.json. With `gradients` those of the first step are written to <name>-gradients.safetensors.
Faults act on rank 1 alone: `poisoned_targets` makes its targets NaN from step 4 on, `damaged_corpus` lets it read
another corpus folder, `other_settings` gives it another learning rate, `other_directory` another run directory,
`full_disk` fails its first checkpoint write, `flipped_bit` changes a parameter that ranks hold whole after step 4.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import save_file

from hl_scale.config import load_config
from hl_scale.engine import alignment, checkpoint, checkpoint_writer, inputs, loop, targets, zero3

RANK = int(os.environ["RANK"])
POISONED_FROM = 3


@contextmanager
def poisoned_targets():
    collate, step, current = alignment.AlignmentWorkload.collate, loop._Loop.step, []

    def stepping(self, number, *arguments):
        current[:] = [number]
        try:
            return step(self, number, *arguments)
        finally:
            current.clear()

    def poisoned(self, samples):
        batch = collate(self, samples)
        if current and current[0] >= POISONED_FROM:
            batch.target.fill_(float("nan"))
        return batch

    with (
        mock.patch.object(alignment.AlignmentWorkload, "collate", poisoned),
        mock.patch.object(loop._Loop, "step", stepping),
    ):
        yield


@contextmanager
def flipped_bit():
    step = loop._Loop.step

    def flipping(self, number, *arguments):
        metrics = step(self, number, *arguments)
        if number == POISONED_FROM:
            whole = [p for p in zero3.trainable_parameters(self.engine.module).values() if p.ds_persist]
            whole[0].data.view(torch.int32).view(-1)[0] ^= 1 << 22
        return metrics

    with mock.patch.object(loop._Loop, "step", flipping):
        yield


def other_variable(name: str, value: str):
    return lambda: mock.patch.dict(os.environ, {name: value})


FAULTS = {
    "poisoned_targets": poisoned_targets,
    "flipped_bit": flipped_bit,
    "damaged_corpus": lambda: mock.patch.object(
        inputs, "load_corpus", lambda directory: checkpoint_error("shard on this node is damaged")
    ),
    "other_settings": other_variable("HL_SCALE_TRAINING__LEARNING_RATE", "0.5"),
    "other_directory": other_variable("HL_SCALE_RUN__DIRECTORY", os.environ.get("OTHER_DIRECTORY", "")),
    "full_disk": lambda: mock.patch.object(
        checkpoint_writer, "save_file", side_effect=OSError(28, "No space left on device")
    ),
}


def checkpoint_error(text: str):
    raise checkpoint.CheckpointError(text)


def digest(engine) -> str:
    """Of this rank's master weights and moments."""
    total = hashlib.sha256()
    for name, kinds in sorted(zero3.local_partitions(engine).items()):
        for kind, tensor in sorted(kinds.items()):
            total.update(f"{name}|{kind}".encode() + tensor.numpy().tobytes())
    return total.hexdigest()


def keep_gradients(engine, path: Path) -> None:
    """Write the reduced gradients of the engine's first backward pass, gathered, to `path`."""
    from deepspeed.utils import safe_get_full_grad

    backward = engine.backward

    def recorded(loss):
        backward(loss)
        engine.backward = backward
        named = zero3.trainable_parameters(engine.module).items()
        gradients = {name: safe_get_full_grad(parameter).clone() for name, parameter in named}
        if RANK == 0:
            save_file(gradients, path)

    engine.backward = recorded


@contextmanager
def recorded(digests: list[str]):
    """Add the digest after each step to the list."""
    step = loop._Loop.step

    def stepping(self, *arguments):
        try:
            return step(self, *arguments)
        finally:
            digests.append(digest(self.engine))

    with mock.patch.object(loop._Loop, "step", stepping):
        yield


def run(scenario: dict, out: Path) -> dict:
    seen: dict = {"engine": None, "chunks": []}
    build, write = zero3.build_engine, targets.TargetCache._write

    def build_engine(*arguments):
        seen["engine"] = build(*arguments)
        if scenario.get("gradients"):
            keep_gradients(seen["engine"], out / f"{scenario['name']}-gradients.safetensors")
        return seen["engine"]

    def write_chunk(self, texts, device):
        seen["chunks"].append(sorted(texts))
        write(self, texts, device)

    answer: dict = {"digests": []}

    with (
        FAULTS[scenario["fault"]]() if RANK == 1 and "fault" in scenario else nullcontext(),
        mock.patch.object(zero3, "build_engine", build_engine),
        mock.patch.object(targets.TargetCache, "_write", write_chunk),
        recorded(answer["digests"]),
    ):
        try:
            result = loop.train(load_config(scenario["config"]), stop_at=scenario.get("stop_at"))
            answer |= {"step": result.step, "loss": result.loss}
        except ValueError as error:
            answer |= {"error": type(error).__name__, "message": str(error)}
    answer["chunks"] = seen["chunks"]
    engine = seen["engine"]
    if engine is not None:
        answer["skipped"] = engine.skipped_steps
        answer["packed"] = {
            name: [
                parameter.numel(),
                parameter.ds_tensor.numel(),
                int(parameter.ds_numel),
                str(parameter.ds_tensor.dtype),
            ]
            for name, parameter in engine.module.named_parameters()
            if name.rpartition(".")[2].startswith("packed")
        }
        engine.destroy()
    return answer


def main() -> None:
    targets.TEXTS_PER_CHUNK = 5
    scenarios, out = json.loads(Path(sys.argv[-2]).read_text()), Path(sys.argv[-1])
    answers = {}
    for scenario in scenarios:
        answers[scenario["name"]] = run(scenario, out)
        gc.freeze()  # DeepSpeed calls the garbage collector several times in each training
    (out / f"rank-{RANK}.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
