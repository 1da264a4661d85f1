"""Baselines learn what they are trained for, on the pairs of the hypernetwork, and leave the base alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hl_scale.adaptations import Adaptation, build_adaptation
from hl_scale.base import AdaptedModel, load_base
from hl_scale.conditions import typology
from hl_scale.config import Config, TaskAdapterConfig
from hl_scale.data.corpus import load_corpus
from hl_scale.data.labelled import LabelledExample, TaskFacts
from hl_scale.engine.alignment import AlignmentWorkload
from hl_scale.engine.targets import tokenize
from hl_scale.evaluation.dialect_tasks.fitting import (
    DialectPairs,
    fit_by_alignment,
    fit_by_labels,
    fit_by_tada,
    open_workload,
)
from hl_scale.evaluation.labelled import ClassifierHead, TaskAdapter, measure
from hl_scale.evaluation.measurement import EvaluationError
from hl_scale.lora import LoraFactors, sum_factors
from hl_scale.objectives.tada import sentence_state_of, sentence_states

SIZES = {"lora": {"rank": 4}, "prefix": {"prefix_length": 8}, "bottleneck": {"width": 4}, "hyper_adapter": {"width": 4}}
RATES = {"lora": 1e-2, "prefix": 5e-2, "bottleneck": 1e-2, "hyper_adapter": 3e-3}


@pytest.fixture(scope="module")
def config(tiny_config, tmp_path_factory) -> Config:
    return tiny_config(tmp_path_factory.mktemp("unused"), {"training.steps": 30})


@pytest.fixture(scope="module")
def base(config: Config) -> AdaptedModel:
    return load_base(config.base, config.lora)


@pytest.fixture(scope="module")
def workload(config: Config, base: AdaptedModel, tiny_corpus) -> AlignmentWorkload:
    return open_workload(config, base, load_corpus(tiny_corpus), lambda text: None)


def divergence(adaptation: Adaptation, workload: AlignmentWorkload) -> float:
    batch = workload.collate(np.arange(48))
    conditions = batch.conditions[batch.condition_index] if adaptation.conditional else None
    with torch.no_grad(), adaptation.attached(workload.base, conditions):
        states = workload.base.hidden_states(batch.input_ids, batch.attention_mask)
        loss, _ = workload.objective(states, batch.attention_mask, batch.target, batch.target_mask, batch.target_self)
    return float(loss)


@pytest.mark.parametrize("kind", SIZES)
def test_alignment_brings_dialect_states_closer_whatever_is_trained(kind, base, workload) -> None:
    before = base.checksums()
    adaptation = build_adaptation(kind, base, SIZES[kind], typology.NUM_FEATURES, seed=0)
    first, told = divergence(adaptation, workload), []
    facts = fit_by_alignment(adaptation, workload, RATES[kind], lambda step, loss: told.append(step))
    assert divergence(adaptation, workload) < 0.95 * first
    assert base.checksums() == before and told == list(range(1, 31))
    assert (facts["steps"], facts["pairs_seen"], facts["distinct_pairs"]) == (30, 240, 48)


def test_tada_brings_sentence_states_closer(base, workload) -> None:
    adaptation = build_adaptation("bottleneck", base, {"width": 4}, seed=0)

    def distance() -> float:
        found = []
        for texts, context in (("dialect", adaptation.attached(base)), ("standard", None)):
            ids, mask = tokenize(base, [getattr(pair, texts) for pair in workload.pairs])
            with torch.no_grad():
                if context is None:
                    states = base.hidden_states(ids, mask)
                else:
                    with context:
                        states = base.hidden_states(ids, mask)
            found.append(sentence_states(states, mask, sentence_state_of(base)))
        return float((found[0] - found[1]).square().mean())

    first = distance()
    fit_by_tada(adaptation, workload, 1e-2, 0, lambda step, loss: None)
    assert distance() < 0.95 * first


def test_the_same_seed_gives_the_same_adapter_and_the_callers_random_state_is_its_own(base, workload) -> None:
    found = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        expected = torch.rand(1) if seed == 6 else None
        torch.manual_seed(seed)
        adaptation = build_adaptation("bottleneck", base, {"width": 2}, seed=0)
        fit_by_tada(adaptation, workload, 1e-3, 0, lambda step, loss: None)
        assert expected is None or torch.equal(torch.rand(1), expected)
        found.append(list(adaptation.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def annotated(count: int) -> list[LabelledExample]:
    words = ["garden film working here", "nobody old man said that"]
    return [
        LabelledExample(n, (f"{words[n % 2]} {'any ' * (n % 3)}now",), float(n % 2), ("the film",))
        for n in range(count)
    ]


def test_labels_of_a_dialect_teach_the_lora_and_leave_task_adapter_and_head_alone(base, config) -> None:
    torch.manual_seed(0)
    head = ClassifierHead(base.hidden_size, TaskFacts("t", "classification", ("a", "b")), "last").requires_grad_(False)
    zeros = build_adaptation("lora", base, {"rank": 2}, seed=1)
    with torch.no_grad():
        factors: LoraFactors = zeros.factors()
    kept = [tensor.clone() for tensor in (*head.parameters(), *factors.a.values())]
    adaptation = build_adaptation("lora", base, {"rank": 4}, seed=0)
    examples = annotated(12)
    first = measure(base, head, examples, factors).metrics["loss"]
    task, settings = TaskAdapter(factors, head, {}), TaskAdapterConfig()
    facts = fit_by_labels(adaptation, base, task, examples, config, settings, 1e-2, lambda step, loss: None)
    with torch.no_grad():
        both = sum_factors(adaptation.factors(), factors)
    assert measure(base, head, examples, both).metrics["loss"] < 0.8 * first
    assert all(torch.equal(a, b) for a, b in zip(kept, (*head.parameters(), *factors.a.values()), strict=True))
    assert facts["distinct_pairs"] == 12 and facts["pairs_seen"] == 30 * 8


def test_fewer_sentences_than_a_batch_make_batches_of_their_own_size(base, config) -> None:
    pairs = DialectPairs("Nigerian English", annotated(3), "f" * 64)
    small = open_workload(config, base, pairs, lambda text: None)
    assert len(small.sampler.batch(0)) == 3 and small.config.training.steps == config.training.steps
    assert {pair.variety for pair in small.pairs} == {"Nigerian English"}
    assert np.array_equal(small.pairs[0].vector, typology.vector("Nigerian English"))
    assert (small.pairs[0].standard, small.pairs[0].dialect) == ("the film", annotated(1)[0].texts[0])


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_a_loss_that_is_not_finite_ends_the_training_and_leaves_nothing_attached(kind, base, workload) -> None:
    adaptation = build_adaptation(kind, base, SIZES[kind], seed=0)
    ids, mask = tokenize(base, ["nobody said that"])
    expected = base.hidden_states(ids, mask)
    with torch.no_grad():
        next(adaptation.parameters()).fill_(float("inf"))
    with pytest.raises(EvaluationError, match="the loss of a baseline is not finite at step 1"):
        fit_by_alignment(adaptation, workload, 1e-2, lambda step, loss: None)
    assert torch.equal(base.hidden_states(ids, mask), expected)
