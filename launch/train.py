"""Train under the DeepSpeed launcher, torchrun or SLURM:

deepspeed launch/train.py --config configs/demo_gemma270m_cpu.yaml [section.key=value ...]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML configuration")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help="set by the launcher")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    arguments = parser.parse_args()

    from hl_scale.config import load_config
    from hl_scale.engine.loop import limit_threads, train

    local_size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    limit_threads(int(local_size))
    try:
        result = train(load_config(arguments.config, arguments.overrides))
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    if result.interrupted:
        return 130
    if os.environ.get("RANK", "0") == "0":
        print(f"done: step {result.step}, loss {result.loss:.4f}, {result.checkpoint}")
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads of the process group that still wait for peers would abort an ordinary exit
