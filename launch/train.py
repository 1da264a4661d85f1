"""Train under the DeepSpeed launcher, torchrun or SLURM:

deepspeed launch/train.py --config configs/demo_gemma270m_cpu.yaml [section.key=value ...]
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from hl_scale.config import Config


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML configuration")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help="set by the launcher")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    arguments = parser.parse_args()

    from hl_scale.config import load_config
    from hl_scale.engine.loop import limit_threads, train
    from hl_scale.planning import gigabytes

    local_size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    limit_threads(int(local_size))
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        config = load_config(arguments.config, arguments.overrides)
        planned = planned_memory(config) if is_main else None
        result = train(config)
    except (ValueError, OSError) as error:
        if is_main:
            print(f"error: {error}", file=sys.stderr)
        return 2
    if is_main:
        plan = f" (planned {gigabytes(planned)})" if planned is not None else ""
        print(f"peak memory per rank: {gigabytes(result.peak_memory_bytes)}{plan}")
    if result.interrupted:
        return 130
    if is_main:
        print(f"done: step {result.step}, loss {result.loss:.4f}, {result.checkpoint}")
    return 0


def planned_memory(config: Config) -> int | None:
    """Peak bytes of each rank by `hl-scale plan`; None where there is none: training then says what is wrong."""
    from hl_scale.engine.memory import return_freed
    from hl_scale.engine.zero3 import default_device
    from hl_scale.planning import measure_process, plan_memory

    device = default_device()
    try:
        process = measure_process(config) if device == "cpu" else None  # it has done nothing else yet
        return plan_memory(config, int(os.environ.get("WORLD_SIZE", "1")), device=device, process=process).peak
    except (ValueError, OSError):
        return None
    finally:
        return_freed()


if __name__ == "__main__":
    try:
        status = main()
    except Exception:  # among others, of collectives whose peers have ended
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads of the process group that still wait for peers would abort an ordinary exit
