"""How the plugin and vLLM's table of adapters work together, without vLLM."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from hl_scale.config import ConfigError
from hl_scale.serving import vllm_resolver
from hl_scale.serving.vllm_resolver import AdaptersInUse, check_arguments, names_in_engine


def test_a_look_up_of_a_known_adapter_counts_as_use():
    used = []
    table = AdaptersInUse({"static": 1}, used.append)
    table["dialect:a"] = 2
    assert "dialect:a" in table and "unknown" not in table and "static" in table
    assert used == ["dialect:a"]


def test_a_forgotten_adapter_is_looked_up_in_vain():
    table = AdaptersInUse({"a": 1, "b": 2}, lambda name: None)
    table.forget(["a", "never known"])
    assert list(table) == ["b"]


def test_an_adapter_that_turns_out_to_be_gone_is_not_found():
    table = AdaptersInUse({"static": 1}, lambda name: table.forget([name]))
    table["dialect:a"] = 2
    assert "dialect:a" not in table and "static" in table


def test_a_service_that_could_not_be_made_can_be_made_later(monkeypatch, tmp_path):
    monkeypatch.setenv("HL_SCALE_SERVE_RUN", str(tmp_path))
    vllm_resolver.service.cache_clear()
    for _ in range(2):
        with pytest.raises(ConfigError, match=str(tmp_path)):
            vllm_resolver.service()


@pytest.mark.parametrize(
    ("rank", "arguments", "message"),
    [
        (8, {"enable_lora": False, "max_lora_rank": 16}, "--enable-lora"),
        (
            20,
            {"enable_lora": True, "max_lora_rank": 16},
            "ranks up to 20, the server takes at most 16(.|\n)*--max-lora-rank 32",
        ),
        (600, {"max_lora_rank": 512}, "ranks up to 512"),
    ],
)
def test_a_server_that_would_refuse_every_adapter_does_not_start(rank, arguments, message):
    with pytest.raises(ConfigError, match=message):
        check_arguments(rank, SimpleNamespace(**arguments))
    check_arguments(16, SimpleNamespace(enable_lora=True, max_lora_rank=16))
    check_arguments(600, SimpleNamespace())


def test_adapters_of_unfinished_requests_are_in_use():
    states = {"1": SimpleNamespace(lora_name="a"), "2": SimpleNamespace(lora_name=None)}
    client = SimpleNamespace(output_processor=SimpleNamespace(request_states=states))
    assert names_in_engine(client) == {"a"}


def test_the_plugin_is_off_unless_a_run_is_named(monkeypatch):
    monkeypatch.delenv("HL_SCALE_SERVE_RUN", raising=False)
    vllm_resolver.service.cache_clear()
    vllm_resolver.register()  # would import vLLM otherwise
    assert vllm_resolver.service() is None
    vllm_resolver.HyperLoraEndpoint().attach_router(pytest.fail)


def test_generation_needs_no_training_libraries():
    code = """
import sys
import hl_scale.serving.vllm_resolver, hl_scale.serving.generator_process, hl_scale.engine.run, hl_scale.serving.export
found = {name.partition(".")[0] for name in sys.modules} & {"deepspeed", "ray", "bitsandbytes", "datasets", "geomloss"}
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
