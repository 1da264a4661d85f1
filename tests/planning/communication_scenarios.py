"""Train several configurations one after the other; write down what DeepSpeed's collectives had sent after each step.

Arguments: a JSON file {name: configuration file}, and the file for rank 0's answer, {name: [communication(), ...]}.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hl_scale.config import load_config
from hl_scale.engine import zero3
from hl_scale.engine.loop import Hooks, train


def main() -> None:
    answers: dict[str, list] = {}
    for name, path in json.loads(Path(sys.argv[-2]).read_text()).items():
        seen = answers[name] = []
        train(load_config(path), hooks=Hooks(on_step=lambda *_, seen=seen: bool(seen.append(zero3.communication()))))
        gc.freeze()  # DeepSpeed calls the garbage collector several times in each training
        if os.environ["RANK"] == "0":
            Path(sys.argv[-1]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # threads of the process group would abort an ordinary exit
