"""What a configuration needs: its base, its data, encoder and library, its run directory, and code it would run."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from hl_scale.base.adapted import BaseModelError
from hl_scale.base.packages import check_package, needs_conversion
from hl_scale.conditions.descriptions import EncoderError, encoder_directory, encoder_width
from hl_scale.config import Config, ConfigError
from hl_scale.data.corpus import load_corpus
from hl_scale.data.library import Library, LibraryError
from hl_scale.data.shards import CorpusError
from hl_scale.data.tasks import open_tasks
from hl_scale.doctor.findings import Finding, ok, problem, warning
from hl_scale.engine import checkpoint
from hl_scale.engine.progress import check_loggers
from hl_scale.engine.run import check_run_directory
from hl_scale.planning import checkpoint_bytes
from hl_scale.planning.outline import outline
from hl_scale.planning.preparation import loads_encoder

CHECKPOINTS = "run.directory"
"""Name of the storage that checkpoints go to."""
_PACKAGED = "package:"
_RANKS = 2  # where no configuration says how many


def storage_paths(config: Config) -> dict[str, Path]:
    """Every directory that all ranks read or write: key -> path."""
    paths = {CHECKPOINTS: Path(config.run.directory), "data.directory": Path(config.data.directory)}
    if config.cluster.storage_path is not None:
        paths["cluster.storage_path"] = Path(config.cluster.storage_path)
    return paths


def local_ranks(config: Config | None) -> int:
    """Processes that would train on this machine's CPU."""
    return _RANKS if config is None else min(_workers(config), os.cpu_count() or 1)


def exceeds_machine(config: Config) -> bool:
    """Whether the workers of `cluster` need more devices than this machine has."""
    if config.cluster.use_gpu:
        return _workers(config) > torch.cuda.device_count()
    return _workers(config) * config.cluster.cpus_per_worker > (os.cpu_count() or 1)


def _workers(config: Config) -> int:
    workers = config.cluster.num_workers
    return workers[1] if isinstance(workers, tuple) else workers


def check_base(config: Config) -> tuple[Finding, int | None]:
    """Whether the base's configuration can be had, and bytes of one checkpoint that follow from it.

    A packaged model is not converted for that: the size is then None, as it is while conditions have no known width.
    """
    base, check = config.base, "base model"
    name = base.model.removeprefix(_PACKAGED)
    if base.model.startswith(_PACKAGED) and not (Path(base.cache_directory) / name / "config.json").is_file():
        try:
            check_package(name)
        except BaseModelError as error:
            return _split(check, error), None
        if needs_conversion(name):
            return ok(check, f"{base.model} is installed, and converted when it is first loaded"), None
    try:
        size = checkpoint_bytes(config)
    except (EncoderError, CorpusError):  # of which other checks tell
        return ok(check, f"{base.model} is found"), None
    except ValueError as error:
        return _split(check, error), None
    return ok(check, f"{base.model} is found; a checkpoint takes {size / 1e9:.2f} GB"), size


def check_corpus(config: Config) -> Finding:
    """Whether the corpus or task set is there and every file of it is what its manifest says."""
    try:
        if config.data.kind == "tasks":
            tasks = open_tasks(config.tasks)
            counts = f"{len(tasks.seen)} tasks to train on and {len(tasks.heldout)} held out"
            return ok("tasks", f"{tasks.directory}: {counts}, every file verified")
        corpus = load_corpus(config.data.directory)
    except ValueError as error:
        return _split("tasks" if config.data.kind == "tasks" else "corpus", error)
    return ok("corpus", f"{corpus.directory}: {corpus.manifest['rows']['written']} pairs, every file verified")


def check_encoder(config: Config) -> Iterator[Finding]:
    """Whether the encoder of descriptions can be had; nothing for a run without one."""
    check = "encoder"
    if not loads_encoder(config):
        return
    if importlib.util.find_spec("sentence_transformers") is None:
        yield problem(check, "sentence-transformers is not installed", "pip install 'hl_scale[tasks]'")
        return
    for name in config.conditions.sentence_encoders:
        settings = config.conditions.only(name)
        try:
            width, directory = encoder_width(settings), encoder_directory(settings)
        except EncoderError as error:
            yield _split(check, error)
            continue
        if directory is not None and not any(directory.glob("*.safetensors")):
            fix = "download the whole model, or name its hub id as conditions.encoder"
            yield problem(check, f"{directory} has no safetensors weights", fix)
        else:
            yield ok(check, f"{name} is found; embeddings have {width} entries")


def check_library(config: Config) -> Iterator[Finding]:
    """Whether the library of a reconstruction run has adapters for its base; nothing for other runs."""
    if config.objective.kind != "reconstruction":
        return
    try:
        base, _ = outline(config)
        library = Library(config.reconstruction.library, base.slots)
    except LibraryError as error:
        yield _split("library", error)
    except ValueError:  # of base, encoder or tasks, of which other checks tell
        return
    else:
        yield ok("library", f"{library.directory}: {len(library.names)} adapters of rank {library.rank}")


def check_run(config: Config) -> Finding:
    """Whether the run directory belongs to this configuration, and its newest checkpoint verifies."""
    check = "run"
    try:
        check_run_directory(config)
        check_loggers(config.training.loggers)
    except ConfigError as error:
        return _split(check, error)
    found, damaged = checkpoint.newest(Path(config.run.directory) / "checkpoints")
    if found is None and damaged:
        fix = "restore it from a copy, or choose another run.directory to start over"
        return problem(check, f"no checkpoint verifies: {'; '.join(damaged)}", fix)
    if found is None:
        return ok(check, f"{config.run.directory} has no checkpoint yet")
    if damaged:
        fix = f"restore it from a copy, or train on from step {found.step}"
        return warning(check, f"passed over: {'; '.join(damaged)}", fix)
    return ok(check, f"checkpoint of step {found.step} verified")


def check_remote_code(config: Config) -> Finding:
    """Whether Python that comes with the model would run."""
    base = config.base
    if base.trust_remote_code:
        found = f"Python in the repository of {base.model} runs, at revision {base.revision}"
        fix = "review that revision, or use a model that needs no code of its own (base.trust_remote_code=false)"
        return warning("trust_remote_code", found, fix)
    return ok("trust_remote_code", "off")


def _split(check: str, error: Exception) -> Finding:
    """A problem from an error whose message ends with how to fix it."""
    found, _, fix = str(error).partition("fix: ")
    return problem(check, " ".join(found.split()), " ".join(fix.split()) or "correct the configuration")
