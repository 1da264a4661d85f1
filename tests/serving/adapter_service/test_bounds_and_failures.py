"""The bounds of cache and queue, and a generator that dies or hangs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys

import pytest

from hl_scale.serving import adapter_service
from hl_scale.serving.adapter_service import AdapterError
from hl_scale.serving.generator_process import GenerationFailed, GeneratorProcess
from hl_scale.serving.vllm_resolver import AdaptersInUse

from .conftest import count

pytestmark = pytest.mark.usefixtures("single_process")


def test_the_cache_keeps_its_bound_by_removing_what_was_used_least_recently(open_service, ask, monkeypatch):
    monkeypatch.setattr(adapter_service, "KEEP_SECONDS", 0.0)
    service = open_service()
    first, second = ask(service, "dialect:Nigerian English", "dialect:Indian English")
    service.cache.maximum_bytes = service.cache.bytes + 10
    forgotten = []
    service.needed_by_engine = set
    service.before_removal = lambda names: forgotten.extend(names) if all_there() else None
    all_there = lambda: second.directory.is_dir()  # noqa: E731
    service.touch("dialect:Nigerian English")
    (third,) = ask(service, "dialect:Hong Kong English")
    assert forgotten == ["dialect:Indian English"] and not second.directory.exists()
    assert first.directory.is_dir() and third.directory.is_dir()
    assert service.cache.bytes <= service.cache.maximum_bytes
    assert ask(service, "dialect:Nigerian English") == [first] and count(service, "cached") == 1


def test_an_adapter_is_not_removed_before_those_who_wait_for_it_have_it(open_service, loop, tiny_model):
    service = open_service()
    service.needed_by_engine = set

    def another_lands(flight):
        service.cache.maximum_bytes = 1
        with contextlib.suppress(AdapterError):  # there is no room for it
            service._make_room("0" * 64)

    async def wait_for_one():
        waiting = asyncio.create_task(service.resolve("dialect:Nigerian English", str(tiny_model)))
        await asyncio.sleep(0)
        (flight,) = service._flights.values()
        flight.add_done_callback(another_lands)  # called before those who wait wake up
        return await waiting

    assert loop.run(wait_for_one()).directory.is_dir()


def test_an_adapter_that_is_made_again_is_forgotten_before_its_files_go(open_service, ask):
    service = open_service()
    (found,) = ask(service, "dialect:Nigerian English")
    weights = found.directory / "adapter_model.safetensors"
    weights.write_bytes(b"")
    there = []
    service.before_removal = lambda names: there.extend((name, weights.exists()) for name in names)
    assert ask(service, "dialect:NgE") == [found]
    assert there == [("dialect:Nigerian English", True)]


def test_what_was_removed_before_the_server_had_loaded_it_or_by_another_hand_is_not_found_any_more(
    open_service, ask, monkeypatch
):
    monkeypatch.setattr(adapter_service, "KEEP_SECONDS", 0.0)
    service = open_service()
    table = AdaptersInUse({}, service.touch)
    service.needed_by_engine, service.before_removal = set, table.forget
    first, second = "dialect:Nigerian English", "dialect:Indian English"
    ask(service, first)
    service.cache.maximum_bytes = service.cache.bytes + 10
    (found,) = ask(service, second)
    table.update({first: "loaded after it was removed", second: "loaded", "other resolver's": "loaded"})
    assert first not in table and second in table and "other resolver's" in table
    shutil.rmtree(found.directory)
    assert second not in table
    assert ask(service, second) == [found] and found.directory.is_dir()


@pytest.mark.parametrize("known", [True, False])
def test_an_adapter_in_use_is_not_removed_and_the_new_one_is_turned_away(
    open_service, ask, refusal, monkeypatch, known
):
    monkeypatch.setattr(adapter_service, "KEEP_SECONDS", 0.0)
    service = open_service()
    (first,) = ask(service, "dialect:Nigerian English")
    service.cache.maximum_bytes = service.cache.bytes
    if known:
        service.needed_by_engine = lambda: {"dialect:Nigerian English"}
    status, text = refusal(service, "dialect:Indian English")
    assert status == 503 and "full of adapters in use" in text
    assert first.directory.is_dir() and service.cache.keys == [first.key]


def test_more_new_adapters_than_the_limit_are_turned_away(open_service, ask, loop, tiny_model):
    async def all_at_once(service, names):
        return await asyncio.gather(*(service.resolve(n, str(tiny_model)) for n in names), return_exceptions=True)

    service = open_service(waiting=2)
    names = [f"dialect:{name}" for name in ("Nigerian English", "Indian English", "Hong Kong English")]
    found = loop.run(all_at_once(service, names))
    assert [getattr(answer, "status", 200) for answer in found] == [200, 200, 429]
    assert count(service, "busy") == 1
    assert ask(service, names[2])[0].directory.is_dir()


def test_who_cannot_wait_is_told_so_and_the_adapter_is_made_all_the_same(open_service, loop, tiny_model):
    service = open_service(deadline=1e-6)

    async def impatient_then_patient():
        with pytest.raises(AdapterError, match="not ready after") as caught:
            await service.resolve("dialect:Nigerian English", str(tiny_model))
        assert caught.value.status == 503
        service.settings = service.settings.model_copy(update={"deadline": 3600.0})
        return await service.resolve("dialect:Nigerian English", str(tiny_model))

    assert loop.run(impatient_then_patient()).directory.is_dir()


def test_who_asks_when_an_adapter_is_overdue_does_not_wait_as_long_again(open_service, loop, tiny_model):
    service = open_service()

    async def ask_late():
        first = asyncio.create_task(service.resolve("dialect:Nigerian English", str(tiny_model)))
        await asyncio.sleep(0)
        (key,) = service._begun
        service._begun[key] -= service.settings.deadline
        with pytest.raises(AdapterError, match="not ready after"):
            await service.resolve("dialect:Nigerian English", str(tiny_model))
        assert not first.done() and service._flights
        await first
        assert not service._begun

    loop.run(ask_late())


def test_a_killed_generator_is_started_again(open_service, ask, generator):
    service = open_service()
    ask(service, "dialect:Nigerian English")
    starts = generator.starts
    os.kill(generator._process.pid, signal.SIGKILL)
    with pytest.raises(AdapterError, match="died") as caught:
        ask(service, "dialect:Indian English")
    assert caught.value.status == 503 and service.health()["problem"]
    assert ask(service, "dialect:Indian English")[0].directory.is_dir()
    assert generator.starts == starts + 1 and service.health()["problem"] is None


def test_a_generator_that_hangs_is_killed(loop):
    process = GeneratorProcess([])
    process.command = [sys.executable, "-c", "print('{}', flush=True); input(); input()"]
    with pytest.raises(GenerationFailed, match=r"did not answer within 0.2 s and was killed"):
        loop.run(process.generate({}, timeout=0.2))
    assert not process.running and process.starts == 1


def test_a_generator_ends_when_its_server_does(generator, loop):
    loop.run(generator.start())
    process = generator._process
    process.stdin.close()
    assert loop.run(asyncio.wait_for(process.wait(), 600)) == 0


def test_a_run_that_cannot_be_read_is_reported(loop, tmp_path):
    process = GeneratorProcess([str(tmp_path)])
    with pytest.raises(GenerationFailed, match="is not a run directory"):
        loop.run(process.start())
    assert not process.running and "is not a run directory" in process.problem


def test_a_generator_that_cannot_be_started_is_reported(loop):
    process = GeneratorProcess([])
    process.command = ["/no/such/interpreter"]
    with pytest.raises(GenerationFailed, match=r"cannot be started: .*/no/such/interpreter"):
        loop.run(process.start())
    assert not process.running and "cannot be started" in process.problem
