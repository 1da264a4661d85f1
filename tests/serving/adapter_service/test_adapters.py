"""Adapters by name: what is generated, summed, refused, and how a service is set up."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hl_scale.base import read_task_adapter
from hl_scale.base.adapted import BaseModelError
from hl_scale.config import ConfigError, load_config
from hl_scale.engine.run import load_run
from hl_scale.serving import adapter_service
from hl_scale.serving.adapter_cache import CacheError
from hl_scale.serving.adapter_service import AdapterError, settings_from_environment
from hl_scale.serving.export import generate_adapter

from .conftest import count

pytestmark = pytest.mark.usefixtures("single_process")


def test_a_new_dialect_gets_the_adapter_that_the_run_gives_it(open_service, ask, run, tmp_path):
    (found,) = ask(open_service(), "dialect:Nigerian English")
    direct = generate_adapter(load_run(run), "dialect:Nigerian English", tmp_path / "direct")
    expected, tensors = (load_file(path / "adapter_model.safetensors") for path in (direct, found.directory))
    assert expected.keys() == tensors.keys()
    assert all(tensors[name].equal(tensor) for name, tensor in expected.items())


def test_many_requests_for_one_new_dialect_generate_it_once(open_service, ask):
    service = open_service()
    found = ask(service, *["dialect:Nigerian English", "dialect: nigerian  ENGLISH"] * 16)
    assert len({adapter.directory for adapter in found}) == 1 and len({adapter.number for adapter in found}) == 1
    assert count(service, "generated") == 1 and count(service, "joined") == 31
    assert service.metrics.seconds._sum.get() > 0


def test_a_restarted_server_answers_from_its_cache_without_a_generator(open_service, ask):
    first = open_service()
    (before,) = ask(first, "dialect:Nigerian English")
    first.cache.close()
    again = open_service()
    again.generator = None
    assert ask(again, "dialect:Nigerian English") == [before]
    assert again.generator is None and count(again, "cached") == 1


def test_a_truncated_adapter_is_made_again(open_service, ask):
    service = open_service()
    (found,) = ask(service, "dialect:Nigerian English")
    weights = found.directory / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    assert ask(service, "dialect:Nigerian English") == [found]
    assert weights.read_bytes() == whole
    assert count(service, "generated") == 2 and service.metrics.damaged._value.get() == 1


def test_a_dialect_with_a_task_gets_the_sum_of_both_adapters(open_service, ask, run, task_adapter, tmp_path):
    service = open_service(task_adapters={"mood": task_adapter})
    (found,) = ask(service, "dialect:Nigerian English+task:mood")
    loaded = load_run(run)
    task = read_task_adapter(task_adapter, loaded.base, loaded.config.base)
    direct = generate_adapter(loaded, "dialect:Nigerian English", tmp_path / "direct", with_adapter=task)
    expected, tensors = (load_file(path / "adapter_model.safetensors") for path in (direct, found.directory))
    assert expected.keys() == tensors.keys() and any("down_proj" in name for name in tensors)
    assert all(tensors[name].equal(tensor) for name, tensor in expected.items())


def test_a_dialect_alone_and_with_a_task_are_two_adapters_whatever_they_are_called(open_service, ask, task_adapter):
    service = open_service(task_adapters={"mood": task_adapter, "same": task_adapter})
    with_task = ["Nigerian English+task:mood", "NIGERIAN english+task: mood ", "Nigerian English+task:same"]
    alone, first, again, same = ask(service, *(f"dialect:{name}" for name in ("Nigerian English", *with_task)))
    assert first == again == same != alone and first.number != alone.number
    assert count(service, "generated") == 2


def test_a_restarted_server_answers_for_a_sum_from_its_cache_unless_the_task_adapter_is_another(
    open_service, ask, task_adapter, tmp_path
):
    changed = shutil.copytree(task_adapter, tmp_path / "changed")
    name = "dialect:Nigerian English+task:mood"
    first = open_service(task_adapters={"mood": changed})
    (before,) = ask(first, name)
    first.cache.close()
    settings = json.loads((changed / "adapter_config.json").read_text())
    (changed / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 6}))
    moved = open_service(task_adapters={"mood": task_adapter})
    assert ask(moved, name) == [before] and count(moved, "cached") == 1
    moved.cache.close()
    (after,) = ask(open_service(task_adapters={"mood": changed}), name)
    assert after.key != before.key


def test_a_task_adapter_that_changes_under_a_server_is_not_served_under_its_old_key(
    open_service, refusal, ask, task_adapter, tmp_path
):
    changing = shutil.copytree(task_adapter, tmp_path / "changing")
    service = open_service(task_adapters={"mood": changing})
    settings = json.loads((changing / "adapter_config.json").read_text())
    (changing / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 6}))
    status, text = refusal(service, "dialect:Nigerian English+task:mood")
    assert status == 503 and service.cache.keys == [] and "has changed since the server started" in text
    assert ask(service, "dialect:Nigerian English")[0].directory.is_dir()


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("dialect:Nigerian English+task:mod", 404, "no task adapter 'mod' is registered here; did you mean 'mood'?"),
        ("dialect:Nigerian English+task:", 404, "no task adapter ''"),
        ("dialect:Nigerian English+task:../mood", 404, "no task adapter '../mood'"),
        ("dialect:Nigerian English+task:/etc/passwd", 404, "no task adapter"),
        ("dialect:Nigerian English+task:mood+task:mood", 404, "no task adapter 'mood+task:mood'"),
        ("dialect:Klingon+task:mood", 404, "unknown variety 'Klingon'"),
        ("dialect:+task:mood", 400, "1 to 200 printable characters"),
        ("dialect:Nigerian English+task:" + "x" * 1000, 400, "at most 200 characters"),
        ("task:first+task:mood", 404, "condition 'task:first+task:mood'"),
    ],
)
def test_sums_that_cannot_be_made_are_refused_with_the_reason(
    open_service, refusal, task_adapter, name, status, message
):
    service = open_service(task_adapters={"mood": task_adapter})
    found, text = refusal(service, name)
    assert found == status and message in text
    assert service.cache.keys == [] and count(service, "refused") == 1


def test_a_task_adapter_of_another_base_or_with_a_name_nobody_can_send_keeps_the_server_from_starting(
    open_service, task_adapter, tmp_path
):
    foreign = shutil.copytree(task_adapter, tmp_path / "foreign")
    settings = json.loads((foreign / "adapter_config.json").read_text())
    (foreign / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "some/other"}))
    for adapters, message in (
        ({"mood": foreign}, r"HL_SCALE_SERVE_TASK_ADAPTERS, mood: .* made for base some/other"),
        ({"mood": tmp_path / "gone"}, "no such directory"),
        ({"a+b": task_adapter}, r"'a\+b' cannot be asked for"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_service(task_adapters=adapters)


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("dialect:Klingon", 404, "unknown variety 'Klingon'"),
        ("dialect:../../etc/passwd", 404, "unknown variety"),
        ("dialect:", 400, "1 to 200 printable characters"),
        ("dialect:" + "x" * 100_000, 400, "not 100000"),
        ("dialect:Nigerian\nEnglish", 400, "printable"),
        ("features:/etc/passwd", 400, "not read for clients"),
        ("task:no such task", 404, "condition 'task:no such task'"),
        ("description:answer in one word", 403, "HL_SCALE_SERVE_DESCRIPTION_CHARACTERS"),
    ],
)
def test_names_that_are_no_conditions_are_refused_with_the_reason(open_service, refusal, name, status, message):
    service = open_service()
    found, text = refusal(service, name)
    assert found == status and message in text
    assert service.cache.keys == [] and count(service, "refused") == 1
    assert not service._numbers  # or names of strangers would fill the memory


def test_descriptions_have_a_size_limit_where_they_are_served(open_service, refusal):
    status, text = refusal(open_service(description_characters=10), "description:eleven long")
    assert status == 400 and "1 to 10" in text


def test_other_names_are_left_to_other_resolvers(open_service):
    service = open_service()
    assert service.serves("dialect:Nigerian English")
    assert not any(map(service.serves, ["gemma", "/etc/passwd", "org/adapter", "standard", "dialect"]))


def test_a_base_that_is_not_here_is_reported_when_the_server_starts_and_not_to_a_client(run, open_service, tmp_path):
    elsewhere = tmp_path / "run"
    shutil.copytree(run, elsewhere)
    written = (elsewhere / "config.yaml").read_text()
    (elsewhere / "config.yaml").write_text(re.sub(r"(?m)^  model: .*$", "  model: package:gone", written))
    with pytest.raises(BaseModelError, match="package:gone"):
        open_service(run=elsewhere)
    assert open_service(run=elsewhere, base="/models/gemma").step == 6


def test_a_server_with_another_base_gets_no_adapters(open_service, loop, tmp_path):
    with pytest.raises(AdapterError, match="HL_SCALE_SERVE_BASE") as caught:
        loop.run(open_service().resolve("dialect:Nigerian English", str(tmp_path)))
    assert caught.value.status == 503


def test_a_second_server_on_the_same_cache_is_refused(open_service):
    open_service()
    with pytest.raises(CacheError, match="HL_SCALE_SERVE_CACHE"):
        open_service()


@pytest.mark.parametrize("step", [None, 4])
def test_a_service_stays_with_the_checkpoint_it_started_with(open_service, step):
    assert open_service(step=step).step == (step or 6)


def test_a_step_that_was_not_saved_is_refused(open_service):
    with pytest.raises(ConfigError, match="no checkpoint of step 3"):
        open_service(step=3)


def test_settings_come_from_the_environment():
    assert settings_from_environment({"HL_SCALE_SERVE_CACHE": "/x"}) is None
    found = settings_from_environment(
        {
            "HL_SCALE_SERVE_RUN": "runs/a",
            "HL_SCALE_SERVE_CACHE_BYTES": "2GB",
            "HL_SCALE_SERVE_DEADLINE": "5",
            "PATH": "/",
        }
    )
    assert (str(found.run), found.cache_bytes, found.deadline, found.step) == ("runs/a", 2 * 10**9, 5.0, None)
    assert found.task_adapters == {}


def test_task_adapters_come_from_the_environment_as_json():
    variables = {"HL_SCALE_SERVE_RUN": "runs/a", "HL_SCALE_SERVE_TASK_ADAPTERS": '{"mood": "/adapters/mood"}'}
    assert settings_from_environment(variables).task_adapters == {"mood": Path("/adapters/mood")}


@pytest.mark.parametrize(
    "wrong", [{"DEADLINE": "0"}, {"CACHE_BYTES": "many"}, {"CASHE": "/x"}, {"TASK_ADAPTERS": "mood=/x"}]
)
def test_settings_that_cannot_be_right_are_named(wrong):
    variables = {f"HL_SCALE_SERVE_{name}": value for name, value in {"RUN": "runs/a", **wrong}.items()}
    with pytest.raises(ConfigError, match=f"HL_SCALE_SERVE_{next(iter(wrong))}: "):
        settings_from_environment(variables)


def test_adapters_of_a_run_whose_scale_or_tasks_were_changed_are_not_taken_from_the_cache(
    run, tiny_tasks, tiny_config, tmp_path
):
    manifest = b"{}"
    of_run = adapter_service._identity(load_config(run / "config.yaml", environment={}), manifest)
    stronger = load_config(run / "config.yaml", ["lora.alpha=99"], environment={})
    assert adapter_service._identity(stronger, manifest) != of_run
    moved = load_config(run / "config.yaml", ["run.directory=elsewhere"], environment={})
    assert adapter_service._identity(moved, manifest) == of_run
    tasks = tiny_config(tmp_path / "tasks", tiny_tasks)
    before = adapter_service._identity(tasks, manifest)
    prepared = Path(tasks.data.directory) / "manifest.json"
    told = prepared.read_bytes()
    try:
        prepared.write_bytes(told + b" ")
        assert adapter_service._identity(tasks, manifest) != before
    finally:
        prepared.write_bytes(told)
