"""Train on a Ray cluster (or on this machine, where no cluster is named by RAY_ADDRESS):

ray job submit --address http://127.0.0.1:8265 --working-dir . -- python launch/ray_train.py --config CONFIG \\
    run.directory=/shared/runs/mine data.directory=/shared/data/mine [section.key=value ...]

A submitted job runs in a temporary copy of the working directory: give absolute paths. docs/clusters.md says how to
start Ray so that only holders of a token may submit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML configuration")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    arguments = parser.parse_args()

    from hl_scale.cluster.ray_train import train_on_ray
    from hl_scale.config import ConfigError, load_config

    try:
        outcome = train_on_ray(load_config(arguments.config, arguments.overrides))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if outcome["interrupted"]:
        return 130
    print(f"done: step {outcome['step']}, loss {outcome['loss']:.4f}, {outcome['checkpoint']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
