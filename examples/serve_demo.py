"""Start a vLLM server that makes adapters on demand, ask it for three dialects, and stop it: `make serve-demo`.

HL_SCALE_SERVE_RUN=runs/demo .venv-vllm/bin/python examples/serve_demo.py
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from hl_scale.config import load_config
from hl_scale.serving.export import base_reference

PORT = os.environ.get("PORT", "8000")
START_SECONDS = 1800
ENVIRONMENT = {
    "VLLM_PLUGINS": "hl_scale",  # nothing of hl_scale runs in vLLM unless it is named here
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
}


def main() -> None:
    run = Path(os.environ["HL_SCALE_SERVE_RUN"])
    if not (run / "checkpoints").is_dir():
        sys.exit(f"there is no trained run in {run}: run `make demo` first")
    model = base_reference(load_config(run / "config.yaml", environment={}).base)
    # The `vllm` command looks for a distribution of that name, and the CPU build has another.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--enforce-eager"]
    options = ["--enable-lora", "--max-loras", "2", "--max-cpu-loras", "8", "--max-model-len", "512"]
    log = Path("runs") / "serve-demo.log"
    log.parent.mkdir(exist_ok=True)
    print(f"starting vLLM on 127.0.0.1:{PORT}; it takes a minute or more; log: {log}", flush=True)
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, *options, "--host", "127.0.0.1", "--port", PORT],
            env={**ENVIRONMENT, **os.environ}, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        wait(server, log)
        client = Path(__file__).with_name("ask_for_dialects.py")
        subprocess.run([sys.executable, str(client), "--url", f"http://127.0.0.1:{PORT}/v1"], check=True)
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/hl_scale/health") as answer:
            print(answer.read().decode())
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def wait(server: subprocess.Popen[bytes], log: Path) -> None:
    """Until the server answers."""
    for _ in range(START_SECONDS):
        if server.poll() is not None:
            sys.exit(f"vLLM ended with status {server.returncode}:\n{log.read_text()[-2000:]}")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health"):
            return
        time.sleep(1)
    sys.exit(f"vLLM did not answer within {START_SECONDS} s; see {log}")


if __name__ == "__main__":
    main()
