"""The dialect evaluation: how much closer an adapter brings a dialect's hidden states to Standard English, and why.

For every held-out variety: the divergence between the hidden states of its sentences under an adapter and the frozen
base's states of their Standard English originals, divided by the same divergence without an adapter. A ratio below 1
says little on its own: the controls (`hl_scale.evaluation.controls`) say what is reached without the dialect's own
vector, and the damage to Standard English says at what price. Nothing is trained or selected on these sentences.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hl_scale.conditions.sources import Typology
from hl_scale.data.durable import write_text
from hl_scale.engine.run import LoadedRun, environment
from hl_scale.evaluation import provenance, summaries
from hl_scale.evaluation.controls import CONTROLS, OWN, PLAIN, TrainingConditions, condition_vectors, wrong_variety
from hl_scale.evaluation.measurement import (
    Array,
    CloudStatistics,
    EvaluationError,
    Measurer,
    Tokens,
    cloud_statistics,
    delta_gram,
)
from hl_scale.evaluation.statistics import SentenceBootstrap
from hl_scale.evaluation.summaries import BASE, DialectValues
from hl_scale.objectives.alignment import AlignmentObjective
from hl_scale.progress import counting_bar

if TYPE_CHECKING:
    from hl_scale.data.corpus import Corpus, Pair
    from hl_scale.lora import LoraFactors

CAVEATS = (
    "Intervals are over sentences; they do not include the variance between training seeds.",
    "The divergence of hidden states is a proxy: it does not measure task accuracy on dialect text.",
)
BY_RULES = "Dialect text is made by rules (Multi-VALUE) from eWAVE features, not by speakers."


@dataclass(frozen=True)
class _HeldOut:
    """What is evaluated: dialect pairs by variety, and the Standard English sentences, each once, by id."""

    pairs: dict[str, list[Pair]]
    standard: list[Pair]
    available: int

    @property
    def sentence_ids(self) -> list[int]:
        return [pair.sentence_id for pair in self.standard]


@dataclass(frozen=True)
class _Standard:
    """Tokens and frozen clouds of the Standard English sentences, in order."""

    tokens: Tokens
    clouds: list[Tensor]


@dataclass(frozen=True)
class _Arm:
    """A run and the measurer over its base."""

    run: LoadedRun
    measurer: Measurer

    def factors(self, vectors: np.ndarray[Any, Any]) -> LoraFactors:
        """Factors for vectors (235,) or (E, 235)."""
        conditions = torch.tensor(np.atleast_2d(vectors), dtype=torch.float32).to(self.measurer.device)
        with torch.inference_mode():
            return self.run.hypernetwork(conditions)


def evaluate_dialects(
    run: LoadedRun, corpus: Corpus, *, control: LoadedRun | None = None, progress: bool = True
) -> dict[str, Any]:
    """Evaluate a run on the held-out sentences of ``config.data.evaluation_varieties``.

    Args:
        run: the trained hypernetwork with its base.
        corpus: the prepared corpus of that run.
        control: a run of kind ``plain_lora`` on the same base and data; its column is missing without it.
        progress: show a progress bar.

    Returns:
        A JSON-serialisable result: one row per dialect (ratios, paired differences to the own vector, changed and
        unchanged sentences apart, coverage), averages over seen and unseen dialects, the damage done to Standard
        English, collapse diagnostics, provenance and caveats. Divergences are those of the training objective.

    Raises:
        EvaluationError: a variety has no held-out sentences, a sentence is too long, or the control does not fit.
    """
    started = time.perf_counter()
    settings = run.config.evaluation
    heldout = _select(corpus, run.config.dialects.evaluation_varieties, settings.sentences, settings.seed)
    _check_corpus(run, control, corpus)
    _check_control(run, control)
    bootstrap = SentenceBootstrap(len(heldout.standard), samples=settings.bootstrap_samples, seed=settings.seed)
    passes = _passes(heldout, control is not None, run.base.has_head)
    with counting_bar("evaluating", passes, progress, unit="sentences") as advance:
        objective = AlignmentObjective(run.config.alignment)

        def measurer(each: LoadedRun) -> Measurer:
            return Measurer(each.base, objective, settings.batch_size, advance, each.task_adapter)

        arm = _Arm(run, measurer(run))
        plain = _Arm(control, measurer(control)) if control else None
        tokens = arm.measurer.tokenize([pair.standard for pair in heldout.standard])
        standard = _Standard(tokens, arm.measurer.frozen_clouds(tokens))
        training = TrainingConditions.of(corpus.train, corpus.source)
        rows, values = [], []
        for name in heldout.pairs:
            row, measured = _dialect_row(name, heldout, standard, training, arm, plain, bootstrap)
            rows.append(row)
            values.append(measured)
        damage = _standard_damage(standard, arm, plain, bootstrap, corpus.source)
    seen = [bool(row["seen"]) for row in rows]
    result: dict[str, Any] = {
        "evaluation": "dialects",
        "format": 1,
        "sentences": {"used": len(heldout.standard), "available": heldout.available},
        "reduced": _reductions(run, heldout),
        "controls": {name: text for name, text in CONTROLS.items() if name != PLAIN or control is not None},
        "dialects": rows,
        "averages": {
            "unseen": summaries.averages([v for v, s in zip(values, seen, strict=True) if not s], bootstrap),
            "seen": summaries.averages([v for v, s in zip(values, seen, strict=True) if s], bootstrap),
        },
        "standard_english": damage,
        "adapters": _adapters(list(heldout.pairs), arm, corpus.source),
        "caveats": [
            *([] if run.config.dialects.mode == "parallel" else [BY_RULES]),
            *CAVEATS,
            *_control_caveats(run, control),
        ],
        "provenance": _provenance(run, control, corpus, arm.measurer.device),
    }
    result["provenance"]["wall_seconds"] = round(time.perf_counter() - started, 1)
    return result


def save(result: Mapping[str, Any], run_directory: str | os.PathLike[str]) -> Path:
    """Write ``evaluation.json`` into a run directory, whole or not at all, and return its path."""
    path = Path(run_directory) / "evaluation.json"
    write_text(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
    return path


def _select(corpus: Corpus, varieties: Sequence[str], limit: int | None, seed: int) -> _HeldOut:
    """Held-out pairs of the varieties on at most ``limit`` sentences, the same sentences for every variety."""
    names = [corpus.source.resolve(name) for name in varieties]
    if not names:
        raise EvaluationError("data.evaluation_varieties is empty\n  fix: name the varieties to evaluate, then prepare")
    missing = [name for name in names if name not in corpus.heldout_varieties]
    if missing:
        raise EvaluationError(
            f"the corpus has no held-out sentences for: {', '.join(missing)}\n"
            f"  it has: {', '.join(corpus.heldout_varieties) or 'none'}\n"
            "  fix: run `hl-scale prepare` with these names in data.evaluation_varieties"
        )
    standard = corpus.heldout(corpus.source.STANDARD)
    available = len(standard)
    if limit is not None and limit < available:
        rows = np.random.default_rng(seed).choice(available, size=limit, replace=False)
        standard = [standard[row] for row in sorted(rows.tolist())]
    kept = {pair.sentence_id for pair in standard}
    pairs = {name: [pair for pair in corpus.heldout(name) if pair.sentence_id in kept] for name in names}
    empty = [name for name, chosen in pairs.items() if not chosen]
    if empty:
        raise EvaluationError(
            f"no held-out sentence is left for: {', '.join(empty)}\n  fix: raise evaluation.sentences"
        )
    return _HeldOut(pairs, standard, available)


def _check_corpus(run: LoadedRun, control: LoadedRun | None, corpus: Corpus) -> None:
    """Refuse a corpus that another split made: its held-out sentences may have been trained on."""
    current = corpus.manifest.get("fingerprint")
    for loaded in (run, control):
        if loaded is not None and loaded.data_fingerprint not in (None, current):
            raise EvaluationError(
                f"{loaded.directory} was trained on corpus {str(loaded.data_fingerprint)[:12]}, but "
                f"{loaded.config.data.directory} now holds {str(current)[:12]}: sentences held out there may have been "
                "trained on\n  fix: prepare the corpus with the run's own config.yaml, or train again"
            )


def _check_control(run: LoadedRun, control: LoadedRun | None) -> None:
    if control is None:
        return
    kind = control.config.hypernetwork.kind
    if kind != PLAIN:
        raise EvaluationError(
            f"the control run {control.directory} has hypernetwork.kind {kind!r}, expected 'plain_lora'\n"
            "  fix: train one with hypernetwork.kind=plain_lora"
        )
    if control.base.fingerprint != run.base.fingerprint:
        raise EvaluationError(
            f"the control run {control.directory} was trained on another base ({control.base.fingerprint[:12]} instead "
            f"of {run.base.fingerprint[:12]})\n  fix: train the control with the same base section"
        )
    if control.task_adapter_fingerprint != run.task_adapter_fingerprint:
        raise EvaluationError(
            f"the control run {control.directory} was trained on task adapter "
            f"{str(control.task_adapter_fingerprint)[:12]}, the run on {str(run.task_adapter_fingerprint)[:12]}\n"
            "  fix: train the control with the same lora.task_adapter"
        )


def _dialect_row(
    name: str,
    heldout: _HeldOut,
    standard: _Standard,
    training: TrainingConditions,
    arm: _Arm,
    plain: _Arm | None,
    bootstrap: SentenceBootstrap,
) -> tuple[dict[str, Any], DialectValues]:
    """Measure one variety under every condition."""
    pairs = heldout.pairs[name]
    number = {sentence_id: row for row, sentence_id in enumerate(heldout.sentence_ids)}
    rows = np.array([number[pair.sentence_id] for pair in pairs], dtype=np.intp)
    targets = [standard.clouds[row] for row in rows]
    tokens = arm.measurer.tokenize([pair.dialect for pair in pairs])
    vectors = condition_vectors(name, list(heldout.pairs), training, arm.run.config.evaluation.seed)
    measured: dict[str, Array] = {}
    clouds: dict[str, CloudStatistics] = {}
    measured[BASE], clouds[BASE] = arm.measurer.divergences(tokens, targets, None)
    for condition, vector in vectors.items():
        measured[condition], clouds[condition] = arm.measurer.divergences(tokens, targets, arm.factors(vector))
    if plain is not None:
        factors = plain.factors(vectors["zero"])
        measured[PLAIN], clouds[PLAIN] = plain.measurer.divergences(tokens, targets, factors)
    shown = {condition: clouds[condition] for condition in (BASE, OWN, PLAIN) if condition in clouds}
    originals = cloud_statistics(targets)
    values = DialectValues(name, rows, np.array([pair.changed for pair in pairs]), measured)
    row = {
        "variety": name,
        "seen": name in training.varieties,
        "wrong": wrong_variety(name, list(heldout.pairs), training.source),
        "coverage": training.coverage(vectors[OWN]),
        "nearest": training.nearest(name),
        "base_divergence": bootstrap.mean(measured[BASE], rows).to_dict(),
        **summaries.comparison(values, bootstrap),
        "changed": summaries.comparison(values.part(values.changed), bootstrap),
        "unchanged": summaries.added_divergence(values.part(~values.changed), bootstrap),
        "share_made_worse": float(np.mean(measured[OWN] > measured[BASE])),
        "token_variance": summaries.relative_variances(shown, originals),
        "retrieval": {
            condition: bootstrap.mean(summaries.retrieved(cloud, originals), rows).to_dict()
            for condition, cloud in shown.items()
        },
    }
    return row, values


def _standard_damage(
    standard: _Standard, arm: _Arm, plain: _Arm | None, bootstrap: SentenceBootstrap, source: Typology
) -> dict[str, Any]:
    """What Standard English loses: divergence to the base's own states, and language-model loss if there is a head."""
    zero = source.vector(source.STANDARD)
    arms = {"zero": arm} if plain is None else {"zero": arm, PLAIN: plain}
    values = {
        name: each.measurer.divergences(standard.tokens, standard.clouds, each.factors(zero))[0]
        for name, each in arms.items()
    }
    result: dict[str, Any] = {
        "sentences": len(standard.tokens),
        "divergence": {
            name: {**bootstrap.mean(value).to_dict(), "maximum": float(value.max())} for name, value in values.items()
        },
        "language_model_loss": None,
    }
    if plain is not None and values[PLAIN].mean() > 0:
        result["zero_over_plain_lora"] = bootstrap.ratio(values["zero"], values[PLAIN]).to_dict()
    if arm.run.base.has_head:
        losses, predicted = {}, np.ones(len(standard.tokens))
        losses[BASE], predicted = arm.measurer.language_model_losses(standard.tokens, None)
        for name, each in arms.items():
            losses[name], _ = each.measurer.language_model_losses(standard.tokens, each.factors(zero))
        added = {name: loss - losses[BASE] for name, loss in losses.items() if name != BASE}
        result["language_model_loss"] = {
            "unit": "nats per token",
            "tokens": int(predicted.sum()),
            "loss": {name: bootstrap.ratio(loss, predicted).to_dict() for name, loss in losses.items()},
            "added": {name: bootstrap.ratio(loss, predicted).to_dict() for name, loss in added.items()},
        }
    return result


def _adapters(names: Sequence[str], arm: _Arm, source: Typology) -> dict[str, Any]:
    """Norm of the generated delta W (all slots together) per condition, and the cosines between them."""
    vectors = np.stack([source.vector(name) for name in (*names, source.STANDARD)])
    gram = delta_gram(arm.factors(vectors))
    norms = np.sqrt(np.diag(gram).clip(min=0))
    outer = np.outer(norms, norms)
    cosine = np.divide(gram, outer, out=np.zeros_like(gram), where=outer > 0)
    return {
        "conditions": [*names, "zero"],
        "delta_norm": norms.tolist(),
        "delta_cosine": [
            [c if o > 0 else None for c, o in zip(*rows, strict=True)]
            for rows in zip(cosine.tolist(), outer, strict=True)
        ],
    }


def _passes(heldout: _HeldOut, with_control: bool, causal: bool) -> int:
    """Sentences that go through a model, for the progress bar."""
    conditions = 1 + len(CONTROLS) + with_control
    standard = 2 + with_control + (2 + with_control) * causal
    return conditions * sum(len(pairs) for pairs in heldout.pairs.values()) + standard * len(heldout.standard)


def _reductions(run: LoadedRun, heldout: _HeldOut) -> list[str]:
    """In what this evaluation is smaller than the run's own recipe; empty for a full one."""
    reductions = []
    if len(heldout.standard) < heldout.available:
        reductions.append(f"{len(heldout.standard)} of {heldout.available} held-out sentences")
    if run.step < run.config.training.steps:
        reductions.append(f"checkpoint of step {run.step} of {run.config.training.steps}")
    return reductions


def _control_caveats(run: LoadedRun, control: LoadedRun | None) -> list[str]:
    if control is None:
        return ["No plain LoRA to compare with: what one shared adapter gains is not told apart from conditioning."]
    ours, theirs = run.config, control.config
    caveats = []
    budgets = [run.step * ours.training.global_batch_size, control.step * theirs.training.global_batch_size]
    if budgets[0] != budgets[1]:
        caveats.append(f"Budgets differ: {budgets[0]} training pairs for this run, {budgets[1]} for the plain LoRA.")
    for section, left, right in (("lora", ours.lora, theirs.lora), ("data", ours.data, theirs.data)):
        if left != right:
            caveats.append(f"The plain LoRA was trained with another {section} section.")
    return caveats


def _provenance(run: LoadedRun, control: LoadedRun | None, corpus: Corpus, device: torch.device) -> dict[str, Any]:
    return {
        "run": provenance.describe_run(run),
        "control": provenance.describe_run(control) if control else None,
        "corpus": {
            "fingerprint": corpus.manifest.get("fingerprint"),
            "manifest_sha256": provenance.content_hash(corpus.manifest),
            "rules_unavailable": len(corpus.manifest.get("unavailable_rules", ())),
        },
        "evaluation": run.config.evaluation.model_dump(mode="json"),
        "objective": run.config.objective.model_dump(mode="json"),
        "device": str(device),
        "environment": environment(),
    }
