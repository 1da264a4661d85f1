"""The command line answers a user's mistakes with one screen of text, exit status 2, and nothing half-written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hl_scale import cli


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A complete configuration, in an empty directory that is also the working directory."""
    monkeypatch.chdir(tmp_path)
    tree: dict[str, Any] = {
        "run": {"directory": "run"},
        "base": {"model": "./no-such-model"},
        "data": {"directory": "corpus", "sources": [{"kind": "text", "path": "no-such-file.txt"}]},
        "training": {"steps": 3, "global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "config.yaml"


@pytest.fixture
def error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """error("train", "config.yaml") -> what the command wrote to stderr, after it ended with status 2."""

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["hl-scale", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 2
        text = capsys.readouterr().err
        assert "Traceback" not in text and len(text.splitlines()) <= 24
        return text

    return call


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("command", ["prepare", "train"])
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lora.rnk=4", "did you mean 'rank'?"),
        ("training.steps=0", "training.steps = 0"),
        ("steps=4", "is not of the form section.key=value"),
        ("lora.target_modules=[q", "does not hold a YAML value"),
    ],
)
def test_a_wrong_setting_is_explained_and_nothing_is_written(
    config: Path, error: Any, command: str, override: str, expected: str
) -> None:
    assert expected in error(command, str(config), override)
    assert files(config.parent) == ["config.yaml"]


def test_a_missing_configuration_is_named(config: Path, error: Any) -> None:
    assert "configuration file not found: absent.yaml" in error("train", "absent.yaml")


def test_missing_sentences_are_named_and_no_corpus_is_left(config: Path, error: Any) -> None:
    assert "no file matches 'no-such-file.txt'" in error("prepare", str(config))
    assert not list(config.parent.glob("corpus/*"))


def test_a_corpus_of_too_few_sentences_says_how_many_there_are(config: Path, error: Any) -> None:
    (config.parent / "few.txt").write_text("This one sentence has more than eight words in it today.\n")
    message = error("prepare", str(config), "data.sources=[{kind: text, path: few.txt}]")
    assert "1 distinct ones are there after filtering" in message and "fix: " in message


def test_an_unknown_dialect_gets_the_closest_names(config: Path, error: Any) -> None:
    (config.parent / "few.txt").write_text("This one sentence has more than eight words in it today.\n")
    message = error(
        "prepare",
        str(config),
        "data.sources=[{kind: text, path: few.txt}]",
        "data.training_sentences=1",
        "data.evaluation_varieties=[Nigerean English]",
    )
    assert "Nigerian English" in message


def test_training_without_a_corpus_says_what_is_missing(config: Path, error: Any) -> None:
    message = error("train", str(config))
    assert "corpus" in message and "fix: " in message


@pytest.mark.parametrize(
    "arguments",
    [
        ("evaluate", "nowhere"),
        ("generate", "nowhere", "--condition", "standard", "--out", "adapter"),
        ("export", "nowhere", "--merged", "--condition", "standard", "--out", "merged"),
        ("report", "nowhere"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_directory_that_is_no_run_is_refused_and_nothing_is_written(
    config: Path, error: Any, arguments: tuple[str, ...]
) -> None:
    assert "nowhere" in error(*arguments)
    assert files(config.parent) == ["config.yaml"]


@pytest.mark.parametrize("which", [(), ("--condition", "standard", "--all-dialects")])
def test_generate_takes_one_source_of_conditions(config: Path, error: Any, which: tuple[str, ...]) -> None:
    assert "one of --condition, --all-dialects and --conditions" in error("generate", "run", "--out", "out", *which)


def test_export_without_merged_points_to_generate(config: Path, error: Any) -> None:
    assert "hl-scale generate" in error("export", "run", "--condition", "standard", "--out", "out")


def test_an_unknown_export_type_is_answered_with_the_known_ones(config: Path, error: Any) -> None:
    message = error("export", "run", "--merged", "--condition", "standard", "--out", "out", "--dtype", "int8")
    assert "bfloat16, float16, float32" in message


def test_the_schema_holds_the_help_text_of_the_keys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["hl-scale", "schema"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    assert "Rank r of every generated adapter." in capsys.readouterr().out


@pytest.mark.parametrize("option", [("--dtype", "float16"), ("--merge-base", "original")])
def test_what_only_merging_knows_is_refused_for_a_gguf_adapter(
    config: Path, error: Any, option: tuple[str, str]
) -> None:
    text = error("export", "run", "--gguf", "--condition", "dialect:Irish English", "--out", "a.gguf", *option)
    assert "go with --merged" in text and not (config.parent / "a.gguf").exists()
