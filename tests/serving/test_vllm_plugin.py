"""How the plugin and vLLM's table of adapters work together, without vLLM."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from hl_scale.serving import vllm_resolver
from hl_scale.serving.vllm_resolver import AdaptersInUse, names_in_engine


def test_a_look_up_of_a_known_adapter_counts_as_use():
    used = []
    table = AdaptersInUse({"static": 1}, used.append)
    table["dialect:a"] = 2
    assert "dialect:a" in table and "unknown" not in table and "static" in table
    assert used == ["dialect:a", "static"]


def test_a_forgotten_adapter_is_looked_up_in_vain():
    table = AdaptersInUse({"a": 1, "b": 2}, lambda name: None)
    table.forget(["a", "never known"])
    assert list(table) == ["b"]


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
