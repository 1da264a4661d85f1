"""A real vLLM server that generates adapters on demand, in the environment that `make .venv-vllm/.ready` builds."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from hl_scale.base import read_task_adapter
from hl_scale.engine.loop import train
from hl_scale.engine.run import composed_factors, load_run

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
START_TIMEOUT = 3600
"""Seconds; it takes about 45 on a free machine, and several minutes on a busy one."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("single_process"),
    pytest.mark.skipif(not PYTHON.exists(), reason="no vLLM here: `make .venv-vllm/.ready` installs it"),
]


@pytest.fixture(scope="module")
def run(single_process, tiny_config, tiny_model, tmp_path_factory):
    """A run over an unquantised tiny Gemma with heads as large as vLLM asks for."""
    from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    base = tmp_path_factory.mktemp("base") / "gemma"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(7)
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=128, sliding_window=16, pad_token_id=0,
        bos_token_id=1, initializer_range=0.15,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    directory = base.parent / "run"
    train(tiny_config(directory, {"base.model": str(base), "base.quantization": "none"}))
    return load_run(directory)


@pytest.fixture(scope="module")
def task_adapter(run, tmp_path_factory):
    """Directory of a random LoRA of rank 3 on one of the run's layers and on another, as PEFT writes it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(run.config.base.model), config)
    directory = tmp_path_factory.mktemp("tasks") / "mood"
    model.save_pretrained(directory)
    return directory


class Server:
    """`vllm serve` of the run's base, with the plugin and a task adapter called "mood"."""

    def __init__(self, run: Any, task_adapter: Path, scratch: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.cache = scratch / "cache"
        self.log = scratch / "server.log"
        self.model = run.config.base.model
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MASTER_", "WORLD_"))},
            "VLLM_PLUGINS": "hl_scale", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
            "TORCH_COMPILE_DISABLE": "1", "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(START_TIMEOUT),
            "HL_SCALE_SERVE_RUN": str(run.directory), "HL_SCALE_SERVE_CACHE": str(self.cache),
            "HL_SCALE_SERVE_DEADLINE": "900", "HL_SCALE_SERVE_DESCRIPTION_CHARACTERS": "1000",
            "HL_SCALE_SERVE_TASK_ADAPTERS": json.dumps({"mood": str(task_adapter)}),
        }  # fmt: skip

    def start(self) -> None:
        arguments = [
            "--model", self.model, "--dtype", "float32", "--enforce-eager", "--max-model-len", "64", "--max-logprobs",
            "200", "--enable-lora", "--max-loras", "2", "--max-cpu-loras", "2", "--host", "127.0.0.1", "--port",
            str(self.port),
        ]  # fmt: skip
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", *arguments],
                env=self.environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        limit = time.monotonic() + START_TIMEOUT
        while time.monotonic() < limit and self.process.poll() is None:
            with contextlib.suppress(OSError):
                self.get("/health")
                return
            time.sleep(1)
        pytest.fail(f"vLLM did not start:\n{self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return answer.read().decode()

    def complete(self, model: str, prompt: Any = "the old man", **options: Any) -> tuple[int, Any]:
        """(HTTP status, choice or error text)."""
        content = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, **options}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions", json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        try:
            with urllib.request.urlopen(request, timeout=START_TIMEOUT) as answer:
                return answer.status, json.loads(answer.read())["choices"][0]
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())["error"]["message"]

    def count(self, outcome: str) -> float:
        found = re.search(rf'hl_scale_adapter_requests_total{{outcome="{outcome}"}} (\S+)', self.get("/metrics"))
        return float(found.group(1)) if found else 0.0


@pytest.fixture(scope="module")
def server(run, task_adapter, tmp_path_factory) -> Iterator[Server]:
    made = Server(run, task_adapter, tmp_path_factory.mktemp("server"))
    made.start()
    yield made
    made.kill()


IDS = [1, 5, 9, 12, 30, 7]


def log_probabilities(run: Any, factors: Any) -> torch.Tensor:
    """(V,) of the token after IDS, by the training-time model."""
    with torch.no_grad():
        return run.base.logits(torch.tensor([IDS]), torch.ones(1, len(IDS)), factors)[0, -1].log_softmax(-1)


def assert_answered(server: Server, name: str, expected: torch.Tensor, *others: torch.Tensor) -> None:
    """The server's log-probabilities under this name are `expected`, and clearly none of `others`."""
    status, choice = server.complete(name, IDS, logprobs=100, return_tokens_as_token_ids=True)
    assert status == 200, choice
    found = {int(key.split(":")[1]): value for key, value in choice["logprobs"]["top_logprobs"][0].items()}
    tokens, values = list(found), torch.tensor(list(found.values()))
    error = (values - expected[tokens]).abs().max()
    assert error < 1e-3
    assert all((expected[tokens] - other[tokens]).abs().max() > 10 * error for other in others)


@pytest.mark.parametrize("dialect", ["Nigerian English", "Indian English", "Appalachian English"])
def test_a_dialect_is_answered_as_the_training_time_model_would(server, run, dialect):
    vector = torch.tensor(run.conditions.parse(f"dialect:{dialect}").vector)[None]
    adapted = log_probabilities(run, composed_factors(run, vector))
    assert_answered(server, f"dialect:{dialect}", adapted, log_probabilities(run, None))


def test_a_dialect_with_a_task_is_answered_as_the_sum_of_both_adapters_would(server, run, task_adapter):
    vector = torch.tensor(run.conditions.parse("dialect:Indian English").vector)[None]
    task = read_task_adapter(task_adapter, run.base, run.config.base)
    alone, of_task = log_probabilities(run, composed_factors(run, vector)), log_probabilities(run, task.factors)
    both = log_probabilities(run, composed_factors(run, vector, task))
    assert_answered(server, "dialect:Indian English+task:mood", both, alone, of_task)
    assert_answered(server, "dialect:Indian English", alone, both)
    status, message = server.complete("dialect:Indian English+task:mod")
    assert status == 404 and "mood" in message


def test_thirty_two_requests_for_one_new_dialect_generate_it_once(server):
    before = server.count("generated")
    names = ["dialect:Hong Kong English", "dialect:HKE"] * 16
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(server.complete, names))
    assert {status for status, _ in answers} == {200}
    assert server.count("generated") == before + 1


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("dialect:Atlantean", 404, "unknown variety 'Atlantean'"),
        ("dialect:../../../etc/passwd", 404, "unknown variety"),
        ("features:/etc/passwd", 400, "not read for clients"),
        ("../../../etc/passwd", 404, "does not exist"),
        ("description:" + "x" * 100_000, 400, "1 to 1000 printable characters"),
        ("task:not a dialect", 404, "condition 'task:not a dialect'"),
    ],
)
def test_what_is_no_condition_is_refused_with_the_reason_and_the_server_lives_on(server, name, status, message):
    found, text = server.complete(name)
    assert found == status and message in text
    assert server.complete("dialect:Nigerian English")[0] == 200


def test_more_adapters_than_the_engine_holds_are_read_from_disk_again(server):
    names = [f"dialect:{name}" for name in ("Nigerian English", "Indian English", "Appalachian English")]
    assert [server.complete(name)[0] for name in [*names, *names]] == [200] * 6


def test_an_operator_sees_counters_and_health(server):
    metrics, health = server.get("/metrics"), json.loads(server.get("/hl_scale/health"))
    assert "hl_scale_adapter_generation_seconds_count" in metrics and "hl_scale_adapter_cache_bytes" in metrics
    assert health["problem"] is None and health["adapters"] >= 1 and health["generator_running"]


def test_killed_and_restarted_it_serves_from_its_cache_and_makes_damaged_adapters_again(server):
    answer = server.complete("dialect:Nigerian English", max_tokens=5)
    assert server.complete("dialect:Indian English")[0] == 200
    server.kill()
    alone = {"condition": "Indian English", "task_adapter": None}
    (damaged,) = (
        path.parent / "adapter_model.safetensors"
        for path in server.cache.glob("*/hl_provenance.json")
        if {key: json.loads(path.read_text()).get(key) for key in alone} == alone
    )
    damaged.write_bytes(damaged.read_bytes()[:64])
    server.start()
    assert server.complete("dialect:Nigerian English", max_tokens=5) == answer
    assert server.count("cached") == 1 and server.count("generated") == 0
    assert server.complete("dialect:Indian English")[0] == 200
    assert server.count("generated") == 1
