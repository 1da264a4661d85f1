"""A real run, a real generator process, and services without vLLM."""

from __future__ import annotations

import asyncio

import pytest
import torch
from peft import LoraConfig, get_peft_model
from prometheus_client import CollectorRegistry
from transformers import AutoModelForCausalLM

from hl_scale.engine.loop import train
from hl_scale.serving.adapter_metrics import AdapterMetrics
from hl_scale.serving.adapter_service import AdapterError, AdapterService, ServingSettings
from hl_scale.serving.generator_process import GeneratorProcess


@pytest.fixture(scope="module")
def run(single_process, tiny_config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "served"
    train(tiny_config(directory))
    return directory


@pytest.fixture(scope="module")
def loop():
    """One event loop for all tests, so that they can share a generator process."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def generator(run, tiny_model, loop):
    process = GeneratorProcess([str(run), "--step", "6", "--model", str(tiny_model)])
    yield process
    loop.run(process.stop())


@pytest.fixture
def open_service(run, generator, tmp_path):
    """open_service(setting=value, ...) -> a service of the run, with the shared process."""
    opened = []

    def make(**settings):
        given = {"run": run, "cache": tmp_path / "cache", "deadline": 3600.0, **settings}
        service = AdapterService(ServingSettings.model_validate(given), AdapterMetrics(CollectorRegistry()))
        service.generator = generator
        opened.append(service)
        return service

    yield make
    for service in opened:
        service.cache.close()


@pytest.fixture(scope="module")
def task_adapter(tiny_model, tmp_path_factory):
    """Directory of a random LoRA of rank 3, also for layers that the run has no slots in."""
    directory = tmp_path_factory.mktemp("adapters") / "mood"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def ask(loop, tiny_model):
    """ask(service, *names) -> adapters of names that are asked for at the same time."""

    async def together(service, names):
        return await asyncio.gather(*(service.resolve(name, str(tiny_model)) for name in names))

    return lambda service, *names: loop.run(together(service, names))


@pytest.fixture
def refusal(ask):
    """refusal(service, name) -> (HTTP status, text) with which a name is refused."""

    def of(service, name):
        with pytest.raises(AdapterError) as caught:
            ask(service, name)
        return caught.value.status, str(caught.value)

    return of


def count(service, outcome):
    return service.metrics.requests.labels(outcome=outcome)._value.get()
