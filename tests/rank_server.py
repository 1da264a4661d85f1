"""Starts ranks without their imports: imports the engine once, then forks the ranks of each script it is asked to run.

A request is a line of JSON on stdin, {"script", "arguments", "ranks", "environment", "output"}; the answer is a line
with the exit status on stdout. Rank n gets what a launcher gives it (RANK, ..., --local_rank=n) and writes to
<output>/rank-n.out and .err. If a rank fails, the others are ended, as launchers do.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import deepspeed  # noqa: F401
import torch._dynamo  # noqa: F401 - torch's optimizers import it
from transformers import Gemma3ForCausalLM  # noqa: F401

import hl_scale.engine.loop  # noqa: F401


def become_rank(rank: int, request: dict, port: int) -> int:
    """Run the script in this process; returns its exit status."""
    os.environ.update(
        request["environment"], RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(request["ranks"]),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    for descriptor, suffix in ((1, "out"), (2, "err")):
        file = os.open(Path(request["output"]) / f"rank-{rank}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    sys.argv = [request["script"], f"--local_rank={rank}", *request["arguments"]]
    try:
        runpy.run_path(request["script"], run_name="__main__")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def serve(request: dict) -> int:
    """Fork the ranks and wait for them; the first exit status that is not 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running, status = set(), 0
    for rank in range(request["ranks"]):
        process = os.fork()
        if process == 0:
            status = become_rank(rank, request, port)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        running.add(process)
    while running:
        process, ended = os.wait()
        running.remove(process)
        if ended and not status:
            status = abs(os.waitstatus_to_exitcode(ended))
            for other in running:
                os.kill(other, signal.SIGTERM)
    return status


if __name__ == "__main__":
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        print(serve(json.loads(line)), flush=True)
