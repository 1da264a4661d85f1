"""What a training process holds on a CPU beside tensors: libraries, tokenizer, process group, corpus.

Libraries and tokenizer are loaded and measured, in a process of their own unless the caller is one that has done
nothing else yet. The rest is small and comes with a run only, so it is written down as it was measured (Python 3.11,
PyTorch 2.13, DeepSpeed 0.19, two gloo ranks of Gemma 3 270M).
"""

from __future__ import annotations

import gc
import importlib
import io
import json
import os
import subprocess
import sys
from functools import lru_cache
from importlib.util import find_spec

from hl_scale.config import Config, parse_config
from hl_scale.engine.memory import resident_bytes, return_freed, share_one_heap
from hl_scale.planning.preparation import loads_encoder

RUNNING = 75_000_000
"""Bytes of a run that has tensors, DeepSpeed's engine and its process group, beyond those of its libraries as they were
loaded: 45 MB of engine and group, 30 MB of library pages that are first touched when a step computes."""


def process_baseline(config: Config) -> int:
    """Resident bytes of a training process that holds no tensor, measured in a new process (some seconds).

    Raises:
        OSError: the process failed.
    """
    return _measured(config.model_dump_json(include={"run", "base", "data", "conditions", "objective", "training"}))


@lru_cache
def _measured(config: str) -> int:
    command = [sys.executable, "-m", "hl_scale.planning.process", config]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise OSError(f"the memory of a process could not be measured:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def measure_process(config: Config) -> int:
    """The same in this process, which should have done nothing else; what it loads it gives back."""
    share_one_heap()
    base = config.base
    encoder = ["sentence_transformers"] if loads_encoder(config) and find_spec("sentence_transformers") else []
    for module in ("deepspeed", "hl_scale.engine.loop", "pyarrow.parquet", *encoder):
        importlib.import_module(module)
    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    from hl_scale.base.loading import empty_model, local_directory, model_config

    empty_model(base, model_config(base))  # imports the model's own modules
    file = io.BytesIO()
    pq.write_table(pa.table({"text": ["a"]}), file)
    pq.read_table(file).to_pylist()
    directory = local_directory(base)
    tokenizer = None
    if directory is not None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=base.trust_remote_code)
        except (OSError, ValueError):  # a directory that holds config.json alone
            tokenizer = None
    if tokenizer is not None:
        tokenizer(["a text", "another one"], return_tensors="pt", padding=True)
    gc.collect()
    return_freed()
    size = resident_bytes()
    del tokenizer
    gc.collect()
    return_freed()
    return size + RUNNING


if __name__ == "__main__":
    print(measure_process(parse_config(json.loads(sys.argv[1]))))
