"""The training loop, the same under every launcher.

Each process calls `train(config)` after its launcher set RANK, WORLD_SIZE and MASTER_*. The global batch of every step
follows from the seed and the step number alone, so launchers and world sizes see the same data in the same order.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hl_scale.config import Config, TrainingConfig
from hl_scale.data.sampling import BatchPlan, plan_batches
from hl_scale.engine import checkpoint, health, zero3
from hl_scale.engine.checkpoint_writer import CheckpointWriter, Retention, restore_random_states
from hl_scale.engine.health import TrainingAborted
from hl_scale.engine.inputs import Workload, check_agreement, find_checkpoint, load_inputs
from hl_scale.engine.interruption import stop_on_signal
from hl_scale.engine.memory import peak_bytes, return_large_blocks
from hl_scale.engine.progress import Reporter, check_loggers
from hl_scale.engine.run import check_run_directory, fingerprint_of, open_run_directory, settings_fingerprint
from hl_scale.engine.run_lock import Claim, check_shared, exclusive
from hl_scale.engine.watchdog import Watchdog
from hl_scale.engine.zero3 import World
from hl_scale.hypernetwork import build_hypernetwork


@dataclass(frozen=True)
class TrainingResult:
    """Where a call to `train` got to: steps done, last loss, whether it was interrupted, newest checkpoint, and the
    most bytes a rank has held (see `peak_bytes`)."""

    step: int
    loss: float
    interrupted: bool
    checkpoint: Path
    peak_memory_bytes: int


@dataclass(frozen=True)
class Hooks:
    """What a launcher adds to the loop.

    Attributes:
        on_step: called on every rank after each step, with step and metrics; True asks for a checkpoint now, and must
            be the same on all ranks.
        on_checkpoint: called on every rank after a checkpoint is committed, with step, directory and last metrics.
    """

    on_step: Callable[[int, dict[str, float]], bool] = lambda step, metrics: False
    on_checkpoint: Callable[[int, Path, dict[str, float]], None] = lambda step, directory, metrics: None


def train(config: Config, *, hooks: Hooks | None = None, stop_at: int | None = None) -> TrainingResult:
    """Train to `config.training.steps`, resuming from the newest good checkpoint of the run directory.

    Args:
        config: the whole configuration.
        hooks: of the launcher.
        stop_at: stop early after this step, as an interruption would (the schedule is unchanged).

    Raises:
        ConfigError: settings that cannot work, before anything is trained.
        TrainingAborted: too many non-finite steps in a row, nothing was learnt, or ranks that differ.
    """
    world = zero3.join_world()
    directory = Path(config.run.directory)
    with Watchdog(config.training.hang_timeout_seconds, directory, world.rank) as watchdog:
        if config.base.placement == "zero3":
            return_large_blocks()
        watchdog.beat("loading the base and the corpus")
        with zero3.together(world):
            check_loggers(config.training.loggers)
            inputs = load_inputs(config, world)
        check_agreement(config, inputs, world)
        watchdog.beat("taking the run directory")
        with exclusive(directory, world) as claim:
            check_shared(directory, world)
            watchdog.beat("verifying checkpoints")
            found = find_checkpoint(config, inputs, world)
            reporter = None
            with zero3.together(world):
                if world.is_main:
                    check_run_directory(config)  # again, for another run may have been there first
                    open_run_directory(config)
                    reporter = _open_reporter(config, found)
            try:
                loop = _prepare(config, world, inputs, found, watchdog, claim)
                result = loop.run(reporter, hooks or Hooks(), stop_at)
                with zero3.together(world):
                    inputs.base.verify(loop.checksums)
                return result
            finally:
                if reporter is not None:
                    reporter.close()


def _prepare(
    config: Config, world: World, inputs: Workload, found: checkpoint.Found, watchdog: Watchdog, claim: Claim
) -> _Loop:
    """Frozen targets, hypernetwork and engine, at the checkpoint's state if there is one; collective."""

    def progress(what: str) -> None:
        watchdog.beat(what)
        if world.is_main:
            print(what, flush=True)

    inputs.prepare(world, progress)
    watchdog.beat("building the engine")
    torch.manual_seed(config.run.seed)
    hypernetwork = build_hypernetwork(config.hypernetwork, config.lora, inputs.base.slots, inputs.condition_size)
    module = inputs.module(hypernetwork).to(world.device)
    zero3.gather_at_once(mlp.module for mlp in inputs.base.tiled_mlps)
    last = found.checkpoint
    with zero3.together(world):
        if last is not None:
            checkpoint.load_weights(module, last)
    plan = plan_batches(config.training.global_batch_size, config.training.micro_batch_size, world.size)
    engine = zero3.build_engine(module, config.base, config.training, config.zero3, plan)
    watchdog.beat("restoring the optimizer")
    with zero3.together(world):
        if last is not None:
            with checkpoint.Shards(last) as shards:
                zero3.restore_partitions(engine, shards.read, last.step - last.skipped_steps, world)
                states = shards.random_states(world.rank) if last.manifest.world_size == world.size else {}
            if states:
                restore_random_states(states)
    writer = CheckpointWriter(
        Path(config.run.directory) / "checkpoints",
        world,
        Retention(config.training.keep_checkpoints, config.training.keep_every),
        claim,
        config.training.commit,
        found.damaged,
    )
    return _Loop(config, world, plan, engine, inputs, last, watchdog, writer)


def _open_reporter(config: Config, found: checkpoint.Found) -> Reporter:
    training, start = config.training, found.checkpoint.step if found.checkpoint is not None else 0
    reporter = Reporter(
        Path(config.run.directory), training.steps, start, training.loggers, config.model_dump(mode="json")
    )
    for problem in found.damaged.values():
        reporter.say(f"checkpoint passed over: {problem}")
    if start:
        reporter.say(f"resuming from step {start}")
    return reporter


class _Loop:
    """State of one call to `train`."""

    def __init__(
        self,
        config: Config,
        world: World,
        plan: BatchPlan,
        engine: Any,
        inputs: Workload,
        found: checkpoint.Checkpoint | None,
        watchdog: Watchdog,
        writer: CheckpointWriter,
    ) -> None:
        self.config, self.world, self.plan, self.engine = config, world, plan, engine
        self.inputs, self.found, self.watchdog = inputs, found, watchdog
        self.directory = Path(config.run.directory)
        self.writer = writer
        self.checksums = inputs.base.checksums()
        self.saved = found.directory if found is not None else self.directory
        self.skipped_steps = found.skipped_steps if found is not None else 0
        self.consecutive_skips = 0
        self.interrupted = self.all_written = False

    def run(self, reporter: Reporter | None, hooks: Hooks, stop_at: int | None) -> TrainingResult:
        training, found = self.config.training, self.found
        metrics = {"loss": found.loss if found is not None else math.nan}
        step = found.step if found is not None else 0
        end = min(training.steps, stop_at) if stop_at is not None else training.steps
        say = reporter.say if reporter is not None else lambda text: None
        with stop_on_signal() as stop_requested, closing(self.writer):
            while step < end:
                metrics = self.step(step, stop_requested)
                step += 1
                asked = hooks.on_step(step, metrics)
                last = step == end or self.interrupted
                due = step % training.save_every == 0 or asked or last
                if due:
                    metrics |= self._examine(step, say)
                if reporter is not None:
                    reporter.show(step, metrics)
                    if step % training.log_every == 0 or due:
                        reporter.log(step, metrics)
                if self.writer.pending_step is not None and (due or self.all_written):
                    self._commit(hooks, metrics)
                if due:
                    self._save(step, metrics["loss"], say)
                    if last or asked or not training.save_in_background:
                        self._commit(hooks, metrics)
                if self.interrupted:
                    say(f"interrupted: saved step {step}; run the same command to go on")
                    break
        (peak,) = zero3.reduce_max([peak_bytes(self.world.device)], self.world)
        return TrainingResult(step, metrics["loss"], self.interrupted, self.saved, int(peak))

    def _save(self, step: int, loss: float, say: Callable[[str], None]) -> None:
        """Begin the checkpoint after `step` optimizer steps; collective."""
        self.watchdog.beat(f"writing the checkpoint of step {step}")
        partitions = zero3.local_partitions(self.engine)
        self._refuse_idle(health.untouched_parameters(partitions, self.world), step, say)
        details = {
            "base_fingerprint": self.inputs.base.fingerprint,
            "data_fingerprint": self.inputs.data_fingerprint,
            "settings_fingerprint": settings_fingerprint(self.config),
            "task_adapter_fingerprint": fingerprint_of(self.inputs.task_adapter),
            "seed": self.config.run.seed,
            "skipped_steps": self.skipped_steps,
            "loss": loss,
            "version": importlib.metadata.version("hl_scale"),
        }
        self.writer.begin(self.engine, partitions, step, details)

    def _commit(self, hooks: Hooks, metrics: dict[str, float]) -> None:
        """Commit the checkpoint under way; collective."""
        step = self.writer.pending_step
        assert step is not None
        self.watchdog.beat(f"committing the checkpoint of step {step}")
        self.saved = self.writer.finish()
        hooks.on_checkpoint(step, self.saved, metrics)

    def _examine(self, step: int, say: Callable[[str], None]) -> dict[str, float]:
        """Look for what shows no error, before a checkpoint is written; collective."""
        health.check_replicas(self.engine, self.world)
        if not self.config.hypernetwork.learns_conditions:
            return {}
        probe = self.inputs.sampler.batch(step - 1)[: self.plan.micro_batch]
        own, other = health.condition_effect(self.engine, self.inputs.collate(probe).to(self.world.device), self.world)
        if math.isnan(own):
            return {}
        learnt = step > max(10, self.config.training.warmup_ratio * self.config.training.steps)
        if learnt and abs(other - own) <= health.NO_EFFECT * abs(own):
            say(
                f"warning: the loss is {own:.6f} under the right conditions and under others alike: the adapter does "
                "not depend on its condition\n  fix: if this stays, raise training.learning_rate or "
                "hypernetwork.condition_width, or look whether the corpus has more than one condition"
            )
        return {"condition_effect": other - own}

    def _refuse_idle(self, untouched: list[str], step: int, say: Callable[[str], None]) -> None:
        """Warn of parameters that were never changed; all of them are an error."""
        updates = step - self.skipped_steps
        if updates < 2 or not untouched:  # in the first step B = 0 keeps gradients from what makes A
            return
        if len(untouched) == len(zero3.full_shapes(self.engine.module)):
            raise TrainingAborted(
                f"no gradient has reached any parameter in {updates} steps: nothing is learnt\n"
                "  fix: look whether lora.target_modules are part of the path to the objective, and whether the corpus "
                "has pairs that differ"
            )
        say(f"warning: no gradient has reached {len(untouched)} parameters: {', '.join(untouched[:4])}")

    def step(self, step: int, stop_requested: Callable[[], bool]) -> dict[str, float]:
        """One optimizer step on global batch number `step`; returns metrics that are equal on every rank.

        Raises:
            TrainingAborted: too many steps in a row were skipped; on every rank at once.
        """
        started, communicated = time.perf_counter(), zero3.communication()
        rate = learning_rate(self.config.training, step)
        zero3.set_learning_rate(self.engine, rate)
        skipped_before = self.engine.skipped_steps
        passes, tokens = [], 0
        for samples in self.inputs.sampler.micro_batches(step, self.world.rank, self.plan):
            self.watchdog.beat(f"step {step + 1}")
            weight = self.plan.weight(len(samples))
            # A rank without a sample takes part in every collective with one that does not count.
            samples = samples if len(samples) else self.inputs.sampler.batch(step)[:1]
            batch = self.inputs.collate(samples).to(self.world.device)
            loss = self.engine(batch) * weight
            self.engine.backward(loss)
            self.engine.step()
            passes.append((self.inputs.names(samples), loss.item()))
            tokens += batch.tokens if weight else 0
        loss_sum = sum(loss for _, loss in passes) / self.plan.accumulation
        mine = [loss_sum / self.world.size, float(tokens), float(stop_requested()), float(self.writer.is_written)]
        loss_sum, token_sum, stops, written = zero3.reduce_sum(mine, self.world)
        self.interrupted, self.all_written = stops > 0, written == self.world.size
        skipped = self.engine.skipped_steps > skipped_before
        assert skipped or math.isfinite(loss_sum), "the engine applied a step whose loss is not finite"
        self._count_skips(skipped, step, loss_sum, passes)
        seconds, peak = zero3.reduce_max([time.perf_counter() - started, peak_bytes(self.world.device)], self.world)
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
            "peak_memory_bytes": peak,
        }
        if hypernetwork.trunk_gradient_norm is not None:
            metrics["trunk_gradient_norm"] = hypernetwork.trunk_gradient_norm
        return metrics | zero3.communication_metrics(communicated, self.world)

    def _count_skips(self, skipped: bool, step: int, loss: float, passes: list[tuple[list[Any], float]]) -> None:
        self.skipped_steps += skipped
        self.consecutive_skips = self.consecutive_skips + 1 if skipped else 0
        if not skipped:
            return
        dump = health.write_nonfinite(self.directory, step + 1, loss, passes, self.world)
        if self.consecutive_skips >= self.config.training.maximum_consecutive_skips:
            raise TrainingAborted(
                f"step {step + 1}: loss {loss}, {self.consecutive_skips} non-finite steps in a row; "
                f"they changed no weight. The pairs of each: {dump} and others beside it\n"
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


def limit_threads(processes_per_host: int) -> None:
    """Share the host's cores between its processes unless OMP_NUM_THREADS already says how."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // max(1, processes_per_host)))
