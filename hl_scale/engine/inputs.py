"""What training reads, checked before anything is written, and the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hl_scale.base import AdaptedModel, load_base
from hl_scale.config import Config, ConfigError
from hl_scale.data.corpus import Corpus, Pair, load_corpus
from hl_scale.data.sampling import GlobalSampler
from hl_scale.engine import checkpoint, zero3
from hl_scale.engine.run import check_run_directory, settings_fingerprint
from hl_scale.engine.zero3 import World


@dataclass(frozen=True)
class Inputs:
    """Base, pairs and their order."""

    base: AdaptedModel
    pairs: list[Pair]
    sampler: GlobalSampler
    data_fingerprint: str


def load_inputs(config: Config, world: World) -> Inputs:
    """Read and check everything, writing nothing; raises ValueErrors that say what to mend."""
    training = config.training
    check_run_directory(config)
    corpus = load_corpus(config.data.directory)
    base = load_base(config.base, config.lora, world.device)
    if training.packed:
        base.check_packing()
    lengths = token_lengths(base, corpus.train, config.data.maximum_tokens, 1 + config.alignment.skip_first_token)
    sampler = GlobalSampler(lengths, training.global_batch_size, config.run.seed, training.length_bucket_batches)
    return Inputs(base, corpus.train, sampler, corpus_fingerprint(corpus))


def check_agreement(config: Config, inputs: Inputs, world: World) -> None:
    """Ranks on several nodes read their own files and variables: all must have found the same; collective.

    Raises:
        ConfigError: on every rank, naming a rank that differs and in what.
    """
    paths = {"data.directory", "base.model", "base.cache_directory"}  # where things are may differ between nodes
    settings = {
        f"{section}.{key}": value
        for section, keys in config.model_dump(mode="json").items()
        for key, value in keys.items()
        if section not in ("run", "cluster") and f"{section}.{key}" not in paths
    }
    facts = {"base model": inputs.base.fingerprint, "corpus": inputs.data_fingerprint}
    everywhere = zero3.gather_objects((facts, {**settings, "run.seed": config.run.seed}), world)
    for rank, others in enumerate(everywhere):
        for own, first, kind in zip(others, everywhere[0], ("", "configuration"), strict=True):
            for name, value in first.items():
                if own[name] != value:
                    what, detail = (kind, f": {name} = {own[name]!r}") if kind else (name, f": {own[name]!r:.20}")
                    raise ConfigError(
                        f"rank {rank} has another {what} than rank 0{detail} instead of {value!r:.80}\n"
                        "  fix: give settings as section.key=value arguments (launchers do not pass variables to other "
                        "nodes), and put run.directory and data.directory on storage that every node shares"
                    )


def find_checkpoint(config: Config, inputs: Inputs, world: World) -> checkpoint.Found:
    """The checkpoint to go on from, and what was wrong with newer ones; the same on every rank; collective.

    Raises:
        CheckpointError: there are checkpoints and none can be used, or the newest is of another base, corpus or
            settings.
    """
    found = checkpoint.newest_together(Path(config.run.directory) / "checkpoints", world)
    if found.checkpoint is None and found.damaged:
        listed = "\n  ".join(found.damaged.values())
        raise checkpoint.CheckpointError(
            f"no checkpoint of {config.run.directory} can be used:\n  {listed}\n"
            "  fix: restore one of them, or choose another run.directory to start over; nothing was changed"
        )
    if found.checkpoint is not None:
        _check_origin(found.checkpoint, config, inputs)
    return found


def _check_origin(found: checkpoint.Checkpoint, config: Config, inputs: Inputs) -> None:
    manifest = found.manifest
    for name, saved, now in (
        ("base_fingerprint", manifest.base_fingerprint, inputs.base.fingerprint),
        ("data_fingerprint", manifest.data_fingerprint, inputs.data_fingerprint),
        ("settings_fingerprint", manifest.settings_fingerprint, settings_fingerprint(config)),
    ):
        if saved is not None and saved != now:
            raise checkpoint.CheckpointError(
                f"{found.directory} was trained with {name} {saved[:12]}, now it is {now[:12]}\n"
                "  fix: restore that model, corpus or configuration, or choose another run.directory"
            )


def token_lengths(base: AdaptedModel, pairs: list[Pair], maximum_tokens: int, minimum_tokens: int = 1) -> list[int]:
    """Tokens of each dialect sentence.

    Raises:
        ConfigError: a sentence is longer than `maximum_tokens` or the model's context, or has fewer than
            `minimum_tokens`, so that none is left to align.
    """
    limit = min(maximum_tokens, base.context_length)
    dialect = _token_counts(base, [pair.dialect for pair in pairs])
    standard = _token_counts(base, [pair.standard for pair in pairs])
    for pair, own, other in zip(pairs, dialect, standard, strict=True):
        if max(own, other) > limit:
            raise ConfigError(
                f"pair {pair.pair_id} has {max(own, other)} tokens, more than {limit} "
                f"(data.maximum_tokens = {maximum_tokens}, context of the base = {base.context_length}): "
                f"{pair.dialect[:60]!r}\n"
                "  fix: raise data.maximum_tokens, or lower data.maximum_words and prepare again"
            )
        if min(own, other) < minimum_tokens:
            raise ConfigError(
                f"pair {pair.pair_id} has a sentence of {min(own, other)} tokens where {minimum_tokens} are needed: "
                f"{pair.standard[:60]!r} / {pair.dialect[:60]!r}\n  fix: prepare again without empty sentences"
            )
    return dialect


def _token_counts(base: AdaptedModel, texts: list[str]) -> list[int]:
    """Tokens of each text; some texts at a time, for the encoding of one takes kilobytes."""
    chunks = (texts[start : start + 512] for start in range(0, len(texts), 512))
    return [len(ids) for chunk in chunks for ids in base.tokenizer(chunk)["input_ids"]]


def corpus_fingerprint(corpus: Corpus) -> str:
    """What identifies the training data: the settings fingerprint in its manifest."""
    return str(corpus.manifest["fingerprint"])
