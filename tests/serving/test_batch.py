"""Many adapters at once: the same as one by one, whole or absent, resumable, and no file of conditions is trusted."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from hl_scale import cli
from hl_scale.conditions import typology
from hl_scale.hypernetwork import PlainLora
from hl_scale.serving import ExportError, OutputError, batch, generate_adapter, staging
from hl_scale.serving.batch import Request, RequestError, generate_adapters, read_requests

NAMES = ("standard", "nigerian", "appalachian", "indian", "scottish")
CONDITIONS = dict(
    zip(NAMES, ("standard", *(f"dialect:{name.title()} English" for name in NAMES[1:])), strict=True),
)


def requests(*names):
    return [Request(name, typology.parse_condition(CONDITIONS[name])) for name in names or NAMES]


def entries(directory):
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def inodes(directory):
    return {path.parent.name: path.stat().st_ino for path in directory.glob("*/adapter_model.safetensors")}


@pytest.fixture
def two_per_pass(monkeypatch):
    monkeypatch.setattr(batch, "conditions_per_pass", lambda slots, rank: 2)


@pytest.fixture
def file_of(tmp_path):
    """file_of(line, ...) -> a file of conditions; a line is bytes, a string, or (name, condition)."""

    def write(*lines):
        path = tmp_path / "conditions.jsonl"
        with path.open("wb") as file:
            for line in lines:
                if isinstance(line, tuple):
                    line = json.dumps({"name": line[0], "condition": line[1]})
                file.write((line if isinstance(line, bytes) else line.encode()) + b"\n")
        return path

    return write


@pytest.mark.parametrize("profile", ["plain", "portable"])
def test_each_adapter_of_many_is_the_one_generated_alone_up_to_rounding(make_run, tmp_path, two_per_pass, profile):
    run = make_run("gemma")
    made = generate_adapters(run, requests(), tmp_path / "many", profile=profile)
    assert (made.written, made.kept, entries(tmp_path / "many")) == (NAMES, (), sorted(NAMES))
    for name in NAMES:
        many, alone = (
            tmp_path / "many" / name,
            generate_adapter(run, CONDITIONS[name], tmp_path / name, profile=profile),
        )
        assert entries(many) == entries(alone)
        found, expected = (load_file(path / "adapter_model.safetensors") for path in (many, alone))
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[key], expected[key], rtol=1e-6, atol=1e-7) for key in found)
        assert (many / "adapter_config.json").read_text() == (alone / "adapter_config.json").read_text()
        facts, facts_alone = (json.loads((path / "hl_provenance.json").read_text()) for path in (many, alone))
        assert facts.keys() == facts_alone.keys()
        different = {key for key in facts if facts[key] != facts_alone[key]}
        assert different <= {"created", "files"}


def test_one_pass_of_the_hypernetwork_serves_as_many_conditions_as_fit(make_run, tmp_path, monkeypatch):
    run = make_run("gemma")
    passes = []
    run.hypernetwork.register_forward_hook(lambda module, inputs, output: passes.append(len(inputs[0])))
    monkeypatch.setattr(batch, "conditions_per_pass", lambda slots, rank: 3)
    generate_adapters(run, requests(), tmp_path)
    assert passes == [3, 2]


def test_the_conditions_of_a_pass_follow_from_the_memory_of_their_factors(make_run):
    slots = make_run("gemma").base.slots
    adapter = sum(4 * 8 * (slot.in_features + slot.out_features) for slot in slots)
    assert batch.conditions_per_pass(slots, 8, memory=4 * adapter * 10) == 10
    assert batch.conditions_per_pass(slots, 8, memory=1) == 1
    assert batch.conditions_per_pass(slots, 8, memory=10**15) == 256


def test_a_plain_lora_is_written_for_every_condition(make_run, tmp_path):
    run = make_run("gemma")
    run.hypernetwork = PlainLora(run.config.lora, run.base.slots, typology.NUM_FEATURES)
    generate_adapters(run, requests(), tmp_path)
    first, *others = (load_file(tmp_path / name / "adapter_model.safetensors") for name in NAMES)
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)


def test_a_repeated_call_keeps_what_is_whole_and_writes_what_is_missing(make_run, tmp_path):
    run = make_run("gemma")
    generate_adapters(run, requests("standard", "nigerian"), tmp_path)
    before = inodes(tmp_path)
    made = generate_adapters(run, requests(), tmp_path)
    assert (made.kept, made.written) == (NAMES[:2], NAMES[2:])
    assert before.items() <= inodes(tmp_path).items()


@pytest.mark.parametrize("damage", ["truncated", "changed", "no weights", "other config", "no json"])
def test_damaged_adapters_are_refused_together_and_replaced_on_demand(make_run, tmp_path, damage):
    run = make_run("gemma")
    generate_adapters(run, requests("nigerian", "indian"), tmp_path)
    for name in ("nigerian", "indian"):
        path = tmp_path / name / "adapter_model.safetensors"
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:-1])
        elif damage == "changed":
            path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
        elif damage == "no weights":
            path.unlink()
        elif damage == "other config":
            path.with_name("adapter_config.json").write_text('{"r": 5}')
        else:
            path.with_name("hl_provenance.json").write_text("{" if name == "indian" else "[" * 10**5)
    with pytest.raises(RequestError, match=r"(?s)nigerian exists already.*indian exists already"):
        generate_adapters(run, requests(), tmp_path)
    assert entries(tmp_path) == ["indian", "nigerian"]
    assert generate_adapters(run, requests(), tmp_path, force=True).written == NAMES
    assert generate_adapters(run, requests(), tmp_path).kept == NAMES
    assert entries(tmp_path) == sorted(NAMES)


def test_adapters_of_another_checkpoint_are_refused_with_what_differs(make_run, tmp_path):
    run = make_run("gemma")
    generate_adapters(run, requests("nigerian"), tmp_path)
    run.step = 20
    with pytest.raises(RequestError, match="nigerian exists already, and it differs in step"):
        generate_adapters(run, requests("nigerian"), tmp_path)


def test_a_directory_of_someone_else_is_never_replaced(make_run, tmp_path):
    (tmp_path / "nigerian").mkdir()
    (tmp_path / "nigerian" / "chapter1.tex").write_text("years of work")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "indian").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RequestError, match=r"(?s)nigerian was not written by hl_scale.*indian was not written"):
        generate_adapters(make_run("gemma"), requests(), tmp_path, force=True)
    assert entries(tmp_path) == ["elsewhere", "indian", "nigerian"]
    assert entries(tmp_path / "elsewhere") == []
    assert (tmp_path / "nigerian" / "chapter1.tex").read_text() == "years of work"


@pytest.mark.parametrize("fails_at", ["files", "flush", "rename"])
def test_a_failure_leaves_whole_adapters_alone_and_the_same_call_goes_on(
    make_run, tmp_path, monkeypatch, two_per_pass, fails_at
):
    run = make_run("gemma")
    place, name = {
        "files": (batch, "write_adapter_files"), "flush": (staging, "flush"), "rename": (os, "rename")
    }[fails_at]  # fmt: skip
    real, count = getattr(place, name), [0]
    last = {"files": 3, "flush": 16, "rename": 3}[fails_at]

    def full_disk(*arguments, **options):
        count[0] += 1
        if count[0] == last + 1:
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(place, name, full_disk)
        with pytest.raises(OSError, match="No space left"):
            generate_adapters(run, requests(), tmp_path)
    there = entries(tmp_path)
    assert 2 <= len(there) < len(NAMES) and set(there) <= set(NAMES)
    made = generate_adapters(run, requests(), tmp_path)
    assert sorted(made.kept) == there and len(made.kept) + len(made.written) == len(NAMES)


def test_every_file_is_on_disk_before_a_directory_of_its_pass_has_its_name(make_run, tmp_path, monkeypatch):
    events = []
    flush, rename = staging.flush, os.rename
    monkeypatch.setattr(staging, "flush", lambda path: (events.append("flush"), flush(path)))
    monkeypatch.setattr(os, "rename", lambda *paths: (events.append("rename"), rename(*paths)))
    generate_adapters(make_run("gemma"), requests(), tmp_path)
    files_and_directories = len(NAMES) * 5
    assert events == ["flush"] * files_and_directories + ["rename"] * len(NAMES) + ["flush"]


def test_factors_with_nan_are_named_and_their_pass_is_not_written(make_run, tmp_path, two_per_pass):
    run = make_run("gemma")
    healthy, slot = run.hypernetwork.forward, run.base.slots[1].path
    scottish = torch.tensor(typology.vector("Scottish English"))

    def broken(conditions):
        factors = healthy(conditions)
        factors.b[slot][(conditions == scottish).all(1), 0, 0] = float("nan")
        return factors

    run.hypernetwork.forward = broken
    with pytest.raises(ExportError, match="scottish: the generated factors hold NaN"):
        generate_adapters(run, requests(), tmp_path)
    assert entries(tmp_path) == sorted(NAMES[:4])


def test_all_dialects_are_the_varieties_of_ewave_in_directories_named_as_they_are(make_run):
    found = batch.all_dialects(make_run("gemma"))
    assert [request.condition.name for request in found] == list(typology.varieties())
    names = [request.name for request in found]
    assert {"nigerian-english", "colloquial-singapore-english-singlish"} <= set(names)
    assert len(set(names)) == len(names)


def test_a_file_of_conditions_is_read_in_order_and_its_feature_files_lie_beside_it(file_of, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "one.json").write_text('{"3": 0.6}')
    path = file_of(("a", "standard"), "", ("B-2.x_y", "dialect:NgE"), ("c", "features:mine/one.json"))
    monkeypatch.chdir("/")
    found = read_requests(path, typology.parse_condition)
    assert [(request.name, request.condition.name) for request in found] == [
        ("a", typology.STANDARD), ("B-2.x_y", "Nigerian English"), ("c", "one")
    ]  # fmt: skip
    assert found[2].condition.vector[2] == pytest.approx(0.6)


@pytest.mark.parametrize(
    "name",
    [
        "../up",
        "a/b",
        "/etc/x",
        "..",
        ".",
        ".hidden",
        "",
        " ",
        "a b",
        "a\x00b",
        "a\nb",
        "ünïcode",
        "x" * 129,
        "a\\b",
        "-a",
    ],
)
def test_names_that_could_lead_elsewhere_are_refused(file_of, tmp_path, name):
    with pytest.raises(RequestError, match=r"line 1: .*cannot name a directory"):
        read_requests(file_of((name, "standard")), typology.parse_condition)
    with pytest.raises(RequestError, match="cannot name a directory"):
        generate_adapters(None, [Request(name, typology.parse_condition("standard"))], tmp_path / "out")
    assert entries(tmp_path) == ["conditions.jsonl"]


def test_feature_files_outside_the_folder_are_not_opened(file_of, tmp_path):
    outside = tmp_path.parent / "outside.json"
    outside.write_text('{"3": 0.6}')
    (tmp_path / "link.json").symlink_to(outside)
    path = file_of(("a", "features:../outside.json"), ("b", f"features:{outside}"), ("c", " features:link.json"))
    with pytest.raises(RequestError) as caught:
        read_requests(path, typology.parse_condition)
    assert str(caught.value).count("leads out of the folder") == 3


def test_all_bad_lines_are_reported_at_once(file_of):
    path = file_of(
        ("a", "dialect:Nigerian Englsh"), "nope", ("b", "standard"), '["a", "b"]', '{"name": "c"}',
        '{"name": 3, "condition": "standard"}', ("B", "standard"), b'{"name": "d", "condition": "\xff"}', b"[" * 5000,
        ("../e", "what:ever"), ("f", "features:huge.json"), ("g", "features:deep.json"),
    )  # fmt: skip
    (path.parent / "huge.json").write_text('{"3": 1' + "0" * 400 + "}")
    (path.parent / "deep.json").write_text("[" * 10**5)
    with pytest.raises(RequestError) as caught:
        read_requests(path, typology.parse_condition)
    message = str(caught.value)
    for number in (1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12):
        assert f"line {number}: " in message
    assert "line 3: " not in message
    assert "the name 'B' is taken by line 3" in message


def test_hundreds_of_bad_lines_are_counted_and_a_line_without_end_is_refused(file_of):
    with pytest.raises(RequestError, match="and 480 more") as caught:
        read_requests(file_of(*["nope"] * 500), typology.parse_condition)
    assert len(str(caught.value).splitlines()) == 22
    with pytest.raises(RequestError, match="line 2 is longer than"):
        read_requests(file_of(("a", "standard"), "x" * 70_000), typology.parse_condition)
    with pytest.raises(RequestError, match="no line"):
        read_requests(file_of(""), typology.parse_condition)


@pytest.mark.parametrize("many", [("--all-dialects",), ("--conditions", "conditions.jsonl")])
def test_the_command_writes_many_adapters_and_says_how_many(make_run, file_of, tmp_path, monkeypatch, capsys, many):
    file_of(("a", "standard"), ("b", "dialect:NgE"))
    run = make_run("gemma")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hl_scale.engine.run.load_generator", lambda *arguments, **options: run)
    monkeypatch.setattr("sys.argv", ["hl-scale", "generate", "run", *many, "--out", "out"])
    count = 50 if many[0] == "--all-dialects" else 2
    for summary in (f"({count} written, 0 kept)", f"(0 written, {count} kept)"):
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 0
        assert summary in capsys.readouterr().out
    assert len(entries(tmp_path / "out")) == count


@pytest.mark.parametrize("renames", [1, 2])
def test_an_interruption_between_the_renames_of_a_replacement_leaves_the_old_or_the_new(tmp_path, monkeypatch, renames):
    for name, text in (("a", "old"), ("new", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "hl_provenance.json").write_text(text)
    rename, left = os.rename, [renames]

    def interrupted(*paths):
        rename(*paths)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        staging.publish([tmp_path / "new"], [tmp_path / "a"], force=True)
    assert (tmp_path / "a" / "hl_provenance.json").read_text() == ("old" if renames == 1 else "new")
    assert entries(tmp_path) == (["a", "new"] if renames == 1 else ["a"])


def test_publishing_over_an_unforced_target_keeps_it(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "new" / name).mkdir(parents=True)
    (tmp_path / "b").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        staging.publish([tmp_path / "new" / "a", tmp_path / "new" / "b"], [tmp_path / "a", tmp_path / "b"])
    assert entries(tmp_path) == ["a", "b", "new"]
