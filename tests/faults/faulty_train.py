"""launch/train.py with one fault, which happens once: FAULT is JSON with `at`, `rank`, `step` and `marker`, a file that
is made when it happens. Started again, the same command finds the marker and trains undisturbed.

The fault is real (SIGKILL, SIGSTOP, a full disk); only the moment is chosen, by standing in front of one function.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from hl_scale.engine import alignment, checkpoint_writer, loop, zero3  # noqa: E402

FAULT = json.loads(os.environ["FAULT"])
NOW: dict[str, Any] = {"step": 0, "saving": None}


def happen(number: int) -> None:
    """The signal to this process, once."""
    Path(FAULT["marker"]).touch()
    os.kill(os.getpid(), number)


def before(owner: Any, name: str, when: Callable[..., bool], act: Callable[[], None]) -> None:
    """Call `act` in front of a function's first call for which `when(*arguments)` holds."""
    real = getattr(owner, name)

    def replacement(*arguments: Any, **keywords: Any) -> Any:
        if not Path(FAULT["marker"]).exists() and when(*arguments, **keywords):
            act()
        return real(*arguments, **keywords)

    setattr(owner, name, replacement)


def watch() -> None:
    """Keep track of the step at hand (from 1) and of the step whose checkpoint is being written."""
    step, begin = loop._Loop.step, checkpoint_writer.CheckpointWriter.begin

    def stepping(self: Any, number: int, *arguments: Any) -> Any:
        NOW["step"] = number + 1
        return step(self, number, *arguments)

    def beginning(self: Any, engine: Any, partitions: Any, number: int, details: Any) -> None:
        NOW["saving"] = number
        begin(self, engine, partitions, number, details)

    loop._Loop.step = stepping
    checkpoint_writer.CheckpointWriter.begin = beginning


def stepping(*arguments: Any, **keywords: Any) -> bool:
    return NOW["step"] == FAULT["step"]


def saving(*arguments: Any, **keywords: Any) -> bool:
    return NOW["saving"] == FAULT["step"]


def kill() -> None:
    happen(signal.SIGKILL)


def half_a_shard() -> None:
    """Leave the first half of the file behind, as a process killed while writing does."""
    real = checkpoint_writer.save_file

    def half(tensors: Any, path: Path) -> None:
        real(tensors, path)
        os.truncate(path, path.stat().st_size // 2)
        kill()

    checkpoint_writer.save_file = half


def fill_the_disk() -> None:
    """Write until nothing fits any more."""
    Path(FAULT["marker"]).touch()
    chunk = b"x" * 4096
    with Path(FAULT["filler"]).open("wb", buffering=0) as file:
        try:
            while True:
                file.write(chunk)
        except OSError:
            pass


def manifest_or_latest(name: str) -> Callable[..., bool]:
    return lambda path, text: saving() and name in Path(path).name


POINTS: dict[str, Callable[[], None]] = {
    "forward": lambda: before(alignment.AlignmentModule, "forward", stepping, kill),
    # The other ranks are in it already, or come to it later and find nobody there.
    "all_reduce": lambda: before(zero3.dist, "all_reduce", stepping, kill),
    "stopped": lambda: before(alignment.AlignmentModule, "forward", stepping, lambda: happen(signal.SIGSTOP)),
    "save_begun": lambda: before(checkpoint_writer, "random_states", saving, kill),
    "half_shard": lambda: before(checkpoint_writer, "_write_shard", saving, half_a_shard),
    "shard_unflushed": lambda: before(checkpoint_writer, "flush", saving, kill),
    "shards_exchanged": lambda: before(checkpoint_writer, "write_text", manifest_or_latest("manifest"), kill),
    "manifest_written": lambda: before(
        checkpoint_writer.os, "rename", lambda old, new: saving() and str(old).endswith(".tmp"), kill
    ),
    "renamed": lambda: before(checkpoint_writer, "write_text", manifest_or_latest("LATEST"), kill),
    "latest_replaced": lambda: before(checkpoint_writer.CheckpointWriter, "_retain", saving, kill),
    "retention_begun": lambda: before(
        shutil, "rmtree", lambda path, **_: saving() and str(path).endswith(".old"), kill
    ),
    "disk_full": lambda: before(checkpoint_writer, "save_file", saving, fill_the_disk),
}


def main() -> int:
    if int(os.environ.get("RANK", "0")) == FAULT["rank"]:
        watch()
        POINTS[FAULT["at"]]()
    specification = importlib.util.spec_from_file_location("launch_train", ROOT / "launch" / "train.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.main()


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
