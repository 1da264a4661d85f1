"""What restoring adapters from shared bases does to a model's predictions: divergence of next-token distributions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from hl_scale.data.corpus import load_corpus
from hl_scale.data.library import Library
from hl_scale.data.tasks import open_tasks
from hl_scale.lora import LoraFactors
from hl_scale.progress import counting_bar
from hl_scale.serving.compression import CompressedAdapters, CompressionError

if TYPE_CHECKING:
    from hl_scale.engine.run import LoadedRun

_Item = TypeVar("_Item")

TEXTS = 16
ADAPTERS = 8
_ROWS = 16
"""Positions compared at a time, in float64: a vocabulary may have 262,144 entries."""


@dataclass(frozen=True)
class Divergence:
    """Kullback-Leibler divergence of next-token distributions in nats, mean over all positions.

    Attributes:
        restored: from the original adapters to the restored ones, mean over adapters.
        worst: the same of the adapter with the largest.
        effect: from the original adapters to the bare base: what the adapters do at all.
        top1_agreement: share of positions at which original and restored have the same most likely token.
        adapters, texts, positions: how many were compared; positions of one adapter.
    """

    restored: float
    worst: float
    effect: float
    top1_agreement: float
    adapters: int
    texts: int
    positions: int


def heldout_texts(run: LoadedRun, count: int = TEXTS) -> list[str]:
    """Texts that the run was not trained on: held-out sentences of all its varieties, or inputs of test examples.

    Raises:
        CorpusError: the run's data is not there.
    """
    if run.config.data.kind == "dialects":
        corpus = load_corpus(run.config.data.directory)
        texts = [pair.dialect for variety in corpus.heldout_varieties for pair in corpus.heldout(variety)]
    else:
        tasks = open_tasks(run.config.tasks).tasks
        texts = [example.input for task in tasks for example in task.test]
    return _spaced(texts, count)


@torch.no_grad()
def measure_divergence(
    run: LoadedRun,
    library: Library,
    compressed: CompressedAdapters,
    texts: Sequence[str],
    *,
    maximum_adapters: int = ADAPTERS,
    progress: bool = True,
) -> Divergence:
    """Compare original and restored adapters on the run's base.

    Args:
        run: whose base the adapters are for.
        library: the originals.
        compressed: the same adapters, compressed.
        texts: probe sentences; each is cut to the base's context.
        maximum_adapters: so many, evenly spaced by name, are compared.
        progress: show a progress bar on a terminal.

    Raises:
        CompressionError: the adapters are for another base, or there are no texts.
        BaseModelError: the base is an encoder, which predicts no next token.
    """
    _check(run, library, texts)
    base, device = run.base, next(run.base.model.parameters()).device
    names = _spaced(library.names, maximum_adapters)
    pairs = [(_on(device, library.read(name)), _on(device, compressed.read(name))) for name in names]
    restored, effect = torch.zeros(2, len(names), dtype=torch.float64)
    agreeing = positions = 0
    with counting_bar("comparing", len(texts), progress) as advance:
        for text in texts:
            encoded = base.tokenizer(text, return_tensors="pt", truncation=True, max_length=base.context_length)
            inputs = {key: encoded[key].to(device) for key in ("input_ids", "attention_mask")}
            bare = base.logits(**inputs)[0]
            positions += len(bare)
            for number, (original, compact) in enumerate(pairs):
                ours = base.logits(**inputs, factors=original)[0]
                theirs = base.logits(**inputs, factors=compact)[0]
                restored[number] += _divergence(ours, theirs)
                effect[number] += _divergence(ours, bare)
                agreeing += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            advance(1)
    return Divergence(
        restored=restored.mean().item() / positions,
        worst=restored.max().item() / positions,
        effect=effect.mean().item() / positions,
        top1_agreement=agreeing / (positions * len(names)),
        adapters=len(names),
        texts=len(texts),
        positions=positions,
    )


def _check(run: LoadedRun, library: Library, texts: Sequence[str]) -> None:
    known = {(slot.path, slot.in_features, slot.out_features) for slot in run.base.slots}
    strange = [s.path for s in library.slots if (s.path, s.in_features, s.out_features) not in known]
    if library.base_fingerprint not in (None, run.base.fingerprint) or strange:
        what = f"its layer {strange[0]}" if strange else f"base {str(library.base_fingerprint)[:12]}"
        raise CompressionError(
            f"the adapters of {library.directory} are not for the base of {run.directory}: {what} is unknown there\n"
            "  fix: pass the run that they come from"
        )
    if not texts:
        raise CompressionError("there are no texts to compare adapters on\n  fix: write one sentence per line")


def _on(device: torch.device, factors: LoraFactors) -> LoraFactors:
    a, b = ({path: factor.to(device) for path, factor in side.items()} for side in (factors.a, factors.b))
    return replace(factors, a=a, b=b)


def _divergence(p_logits: Tensor, q_logits: Tensor) -> float:
    """Sum over positions of KL(p || q); logits (T, V)."""
    total = 0.0
    for p, q in zip(p_logits.split(_ROWS), q_logits.split(_ROWS), strict=True):
        p, q = (logits.double().log_softmax(-1) for logits in (p, q))
        total += (p.exp() * (p - q)).sum().item()
    return total


def _spaced(items: Sequence[_Item], count: int) -> list[_Item]:
    """At most `count` of the items, evenly spaced."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
