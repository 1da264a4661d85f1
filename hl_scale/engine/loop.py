"""The training loop, the same under every launcher.

Each process calls `train(config)` after its launcher set RANK, WORLD_SIZE and MASTER_*. The global batch of every step
follows from the seed and the step number alone, so launchers and world sizes see the same data in the same order.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hl_scale.base import AdaptedModel, load_base
from hl_scale.conditions import typology
from hl_scale.config import Config, ConfigError, TrainingConfig
from hl_scale.data.corpus import Corpus, Pair, load_corpus
from hl_scale.data.sampling import BatchPlan, GlobalSampler, plan_batches
from hl_scale.engine import checkpoint, zero3
from hl_scale.engine.interruption import stop_on_signal
from hl_scale.engine.memory import peak_bytes, return_large_blocks
from hl_scale.engine.progress import Reporter, check_loggers
from hl_scale.engine.run import check_run_directory, open_run_directory
from hl_scale.engine.targets import TargetCache, tokenize
from hl_scale.engine.training_module import AlignmentBatch, TrainingModule
from hl_scale.engine.zero3 import World
from hl_scale.hypernetwork import build_hypernetwork
from hl_scale.objectives.alignment import AlignmentObjective


class TrainingAborted(ValueError):
    """Training stopped because its numbers were no longer finite."""


@dataclass(frozen=True)
class TrainingResult:
    """Where a call to `train` got to: steps done, last loss, whether it was interrupted, newest checkpoint, and the
    most bytes a rank has held (see `peak_bytes`)."""

    step: int
    loss: float
    interrupted: bool
    checkpoint: Path
    peak_memory_bytes: int


def train(
    config: Config,
    *,
    on_checkpoint: Callable[[int, Path, dict[str, float]], None] | None = None,
    stop_at: int | None = None,
) -> TrainingResult:
    """Train to `config.training.steps`, resuming from the newest good checkpoint of the run directory.

    Args:
        config: the whole configuration.
        on_checkpoint: called on every rank after a checkpoint is committed, with step, directory and last metrics.
        stop_at: stop early after this step, as an interruption would (the schedule is unchanged).

    Raises:
        ConfigError: settings that cannot work, before anything is trained.
        TrainingAborted: too many non-finite steps in a row.
    """
    check_loggers(config.training.loggers)
    world = zero3.join_world()
    plan = plan_batches(config.training.global_batch_size, config.training.micro_batch_size, world.size)
    objective = AlignmentObjective(config.objective)
    if config.base.placement == "zero3":
        return_large_blocks()
    with zero3.together(world):
        inputs = _load_inputs(config, world)
    _check_agreement(config, inputs, world)
    with zero3.together(world):
        if world.is_main:
            open_run_directory(config)
    base, found = inputs.base, inputs.found
    targets = TargetCache(Path(f"{Path(config.data.directory)}-targets"), base, objective)
    targets.prepare([pair.standard for pair in inputs.pairs], world, _report_targets if world.is_main else None)

    torch.manual_seed(config.run.seed)
    hypernetwork = build_hypernetwork(config.hypernetwork, config.lora, base.slots, typology.NUM_FEATURES)
    partitioned, packed = config.base.placement == "zero3", config.training.packed
    module = TrainingModule(hypernetwork, base, objective, partitioned, packed).to(world.device)
    full = checkpoint.read_full(found) if found is not None else {}
    if found is not None:
        checkpoint.load_weights(module, found, full)
    engine = zero3.build_engine(module, config.base, config.training, config.zero3, plan)
    if found is not None:
        zero3.restore_partitions(engine, full, found.step - found.skipped_steps, world)
    del full
    reporter = None
    with zero3.together(world):
        if world.is_main:
            reporter = _open_reporter(config, inputs)
    try:
        checksums = base.checksums()
        result = _Loop(config, world, plan, engine, inputs, targets).run(reporter, on_checkpoint, stop_at)
        with zero3.together(world):
            base.verify(checksums)
        return result
    finally:
        if reporter is not None:
            reporter.close()


@dataclass(frozen=True)
class _Inputs:
    """What training reads: base, pairs and their order, the checkpoint to go on from, and what was passed over."""

    base: AdaptedModel
    pairs: list[Pair]
    sampler: GlobalSampler
    data_fingerprint: str
    found: checkpoint.Checkpoint | None
    problems: list[str]


def _load_inputs(config: Config, world: World) -> _Inputs:
    """Read and check everything, writing nothing; raises ValueErrors that say what to mend."""
    training = config.training
    check_run_directory(config)
    corpus = load_corpus(config.data.directory)
    base = load_base(config.base, config.lora, world.device)
    if training.packed:
        base.check_packing()
    lengths = token_lengths(base, corpus.train, config.data.maximum_tokens, 1 + config.objective.skip_first_token)
    sampler = GlobalSampler(lengths, training.global_batch_size, config.run.seed, training.length_bucket_batches)
    found, problems = checkpoint.newest(Path(config.run.directory) / "checkpoints")
    if found is None and problems:
        listed = "\n  ".join(problems)
        raise checkpoint.CheckpointError(
            f"no checkpoint of {config.run.directory} can be used:\n  {listed}\n"
            "  fix: restore one of them, or choose another run.directory to start over; nothing was changed"
        )
    inputs = _Inputs(base, corpus.train, sampler, corpus_fingerprint(corpus), found, problems)
    if found is not None:
        _check_origin(found, inputs)
    return inputs


def _check_agreement(config: Config, inputs: _Inputs, world: World) -> None:
    """Ranks on several nodes read their own files and variables: all must have found the same; collective.

    Raises:
        ConfigError: on every rank, naming a rank that differs and in what.
    """
    paths = {"run", "cluster"}  # where things are may differ between nodes
    tree = {name: section for name, section in config.model_dump(mode="json").items() if name not in paths}
    for section, key in (("data", "directory"), ("base", "model"), ("base", "cache_directory")):
        tree[section].pop(key)
    facts = {
        "configuration": hashlib.sha256(json.dumps([tree, config.run.seed], sort_keys=True).encode()).hexdigest(),
        "base model": inputs.base.fingerprint,
        "corpus": inputs.data_fingerprint,
        "checkpoint to resume from": None if inputs.found is None else inputs.found.step,
    }
    everywhere: list[Any] = [None] * world.size
    dist.all_gather_object(everywhere, facts)
    for rank, others in enumerate(everywhere):
        for name, value in everywhere[0].items():
            if others[name] != value:
                raise ConfigError(
                    f"rank {rank} has another {name} than rank 0 ({others[name]!r:.20} instead of {value!r:.20})\n"
                    "  fix: give settings as section.key=value arguments (launchers do not pass variables to other "
                    "nodes), and put run.directory and data.directory on storage that every node shares"
                )


def _open_reporter(config: Config, inputs: _Inputs) -> Reporter:
    training, start = config.training, inputs.found.step if inputs.found is not None else 0
    reporter = Reporter(
        Path(config.run.directory), training.steps, start, training.loggers, config.model_dump(mode="json")
    )
    for problem in inputs.problems:
        reporter.say(f"checkpoint passed over: {problem}")
    if start:
        reporter.say(f"resuming from step {start}")
    return reporter


class _Loop:
    """State of one call to `train`."""

    def __init__(
        self, config: Config, world: World, plan: BatchPlan, engine: Any, inputs: _Inputs, targets: TargetCache
    ) -> None:
        self.config, self.world, self.plan, self.engine = config, world, plan, engine
        self.inputs, self.targets = inputs, targets
        self.skipped_steps = inputs.found.skipped_steps if inputs.found is not None else 0
        self.consecutive_skips = 0
        self.interrupted = False

    def run(
        self,
        reporter: Reporter | None,
        on_checkpoint: Callable[[int, Path, dict[str, float]], None] | None,
        stop_at: int | None,
    ) -> TrainingResult:
        training, found = self.config.training, self.inputs.found
        saved = found.directory if found is not None else Path(self.config.run.directory)
        metrics = {"loss": found.loss if found is not None else math.nan}
        step = found.step if found is not None else 0
        end = min(training.steps, stop_at) if stop_at is not None else training.steps
        with stop_on_signal() as stop_requested:
            while step < end:
                metrics = self.step(step, stop_requested)
                step += 1
                if reporter is not None:
                    reporter.show(step, metrics)
                    if step % training.log_every == 0 or step == end:
                        reporter.log(step, metrics)
                if step % training.save_every == 0 or step == end or self.interrupted:
                    saved = self.save(step, metrics["loss"])
                    if on_checkpoint is not None:
                        on_checkpoint(step, saved, metrics)
                if self.interrupted:
                    if reporter is not None:
                        reporter.say(f"interrupted: saved step {step}; run the same command to go on")
                    break
        peak = zero3.reduce_max(peak_bytes(self.world.device), self.world)
        return TrainingResult(step, metrics["loss"], self.interrupted, saved, int(peak))

    def save(self, step: int, loss: float) -> Path:
        """Commit a checkpoint after `step` optimizer steps; collective."""
        details = {
            "base_fingerprint": self.inputs.base.fingerprint,
            "data_fingerprint": self.inputs.data_fingerprint,
            "seed": self.config.run.seed,
            "skipped_steps": self.skipped_steps,
            "loss": loss,
        }
        directory = Path(self.config.run.directory) / "checkpoints"
        return checkpoint.save(directory, self.engine, step, self.world, self.config.training.keep_checkpoints, details)

    def step(self, step: int, stop_requested: Callable[[], bool]) -> dict[str, float]:
        """One optimizer step on global batch number `step`; returns metrics that are equal on every rank.

        Raises:
            TrainingAborted: too many steps in a row were skipped; on every rank at once.
        """
        started, communicated = time.perf_counter(), zero3.communication()
        training = self.config.training
        rate = learning_rate(training, step)
        zero3.set_learning_rate(self.engine, rate)
        skipped_before = self.engine.skipped_steps
        loss_sum, tokens = 0.0, 0
        for samples in self.inputs.sampler.micro_batches(step, self.world.rank, self.plan):
            batch = self.collate(samples).to(self.world.device)
            loss = self.engine(batch)
            self.engine.backward(loss)
            self.engine.step()
            loss_sum += loss.item() / self.plan.accumulation
            tokens += int(batch.attention_mask.sum())
        loss_sum, token_sum, stops = zero3.reduce_sum(
            [loss_sum / self.world.size, float(tokens), float(stop_requested())], self.world
        )
        self.interrupted = stops > 0
        skipped = self.engine.skipped_steps > skipped_before
        assert skipped or math.isfinite(loss_sum), "the engine applied a step whose loss is not finite"
        self._count_skips(skipped, step, loss_sum)
        seconds = time.perf_counter() - started
        hypernetwork = self.engine.module.hypernetwork
        metrics = {
            "loss": loss_sum,
            "learning_rate": rate,
            "gradient_norm": zero3.gradient_norm(self.engine),
            "tokens": token_sum,
            "tokens_per_second": token_sum / seconds,
            "seconds": seconds,
            "skipped_steps": float(self.skipped_steps),
            "dead_unit_share": hypernetwork.dead_unit_share,
            "peak_memory_bytes": zero3.reduce_max(peak_bytes(self.world.device), self.world),
        }
        if hypernetwork.trunk_gradient_norm is not None:
            metrics["trunk_gradient_norm"] = hypernetwork.trunk_gradient_norm
        return metrics | zero3.communication_metrics(communicated, self.world)

    def collate(self, samples: np.ndarray) -> AlignmentBatch:
        """Sample numbers to a padded micro-batch with its distinct conditions."""
        pairs = [self.inputs.pairs[int(sample)] for sample in samples]
        input_ids, attention_mask = tokenize(self.inputs.base, [pair.dialect for pair in pairs])
        clouds = [self.targets.get(pair.standard) for pair in pairs]
        target = torch.nn.utils.rnn.pad_sequence(clouds, batch_first=True)
        sizes = torch.tensor([len(cloud) for cloud in clouds])
        self_terms = [self.targets.self_term(pair.standard) for pair in pairs]
        known = [term for term in self_terms if term is not None]  # all or none
        rows: dict[bytes, int] = {}
        index = [rows.setdefault(pair.vector.tobytes(), len(rows)) for pair in pairs]
        conditions = np.stack([np.frombuffer(row, dtype=np.float32) for row in rows])
        return AlignmentBatch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            conditions=torch.from_numpy(conditions.copy()),
            condition_index=torch.tensor(index),
            target=target,
            target_mask=torch.arange(target.shape[1])[None] < sizes[:, None],
            target_self=torch.cat(known) if known else None,
        )

    def _count_skips(self, skipped: bool, step: int, loss: float) -> None:
        self.skipped_steps += skipped
        self.consecutive_skips = self.consecutive_skips + 1 if skipped else 0
        if self.consecutive_skips >= self.config.training.maximum_consecutive_skips:
            pair_ids = [self.inputs.pairs[int(sample)].pair_id for sample in self.inputs.sampler.batch(step)]
            raise TrainingAborted(
                f"step {step + 1}: loss {loss}, {self.consecutive_skips} non-finite steps in a row; "
                f"they changed no weight. Pairs of the last batch: {pair_ids}\n"
                "  fix: lower training.learning_rate, set training.gradient_clipping, or look at these pairs"
            )


def learning_rate(training: TrainingConfig, step: int) -> float:
    """Rate of step `step` (from 0): linear warm-up, then the schedule down to the minimum at the last step."""
    warmup = round(training.warmup_ratio * training.steps)
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    if training.schedule == "constant":
        return training.learning_rate
    progress = (step - warmup) / max(training.steps - warmup, 1)
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if training.schedule == "cosine" else 1 - progress
    floor = training.minimum_learning_rate_ratio
    return training.learning_rate * (floor + (1 - floor) * remaining)


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


def _check_origin(found: checkpoint.Checkpoint, inputs: _Inputs) -> None:
    current = {"base_fingerprint": inputs.base.fingerprint, "data_fingerprint": inputs.data_fingerprint}
    for name, now in current.items():
        if found.manifest[name] != now:
            raise checkpoint.CheckpointError(
                f"{found.directory} was trained with {name} {found.manifest[name][:12]}, now it is {now[:12]}\n"
                "  fix: restore that model or corpus, or choose another run.directory"
            )


def _report_targets(done: int, total: int) -> None:
    if done % 4 == 0:
        print(f"computing frozen targets: {done}/{total} chunks", flush=True)


def limit_threads(processes_per_host: int) -> None:
    """Share the host's cores between its processes unless OMP_NUM_THREADS already says how."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // max(1, processes_per_host)))
