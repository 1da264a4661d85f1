"""Timings of the hot paths against the peers that are installed, on a machine that has torch (and triton) alone:

python launch/benchmark.py sinkhorn|lora [--device cuda] [--threads 2] [--repeats 5] [--long]

`hl-scale bench` is the same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sinkhorn", "lora"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=None, help="of torch on the CPU")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each computation")
    parser.add_argument("--long", action="store_true", help="also rows that take minutes")
    arguments = parser.parse_args()

    from hl_scale.benchmark import run_benchmark

    return int(run_benchmark(**vars(arguments)) > 0)


if __name__ == "__main__":
    sys.exit(main())
