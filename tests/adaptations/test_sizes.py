"""Parameter counts by formula, and sizes from a budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import RobertaConfig

from hl_scale.adaptations import KINDS, AdaptationError, build_adaptation, parameter_count, size_for_budget
from hl_scale.base import AdaptedModel
from hl_scale.base.loading import outline_base
from hl_scale.config import BaseModelConfig, LoraConfig

C = 5
SMALL = {"condition_width": 6, "embedding_width": 4, "hidden_width": 8}


@pytest.fixture(scope="module")
def roberta_base(tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    """The shape of RoBERTa-base (12 layers, hidden size 768), without weights."""
    directory = tmp_path_factory.mktemp("roberta-base")
    RobertaConfig().save_pretrained(directory)
    config = BaseModelConfig(model=str(directory), architecture="encoder")
    return outline_base(config, LoraConfig(target_modules=("query", "value")))


@pytest.mark.parametrize("model", ["gemma", "llama", "roberta"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adaptation_has_as_many_parameters_as_its_formula_says(
    make_base: Callable[..., AdaptedModel], kind: str, model: str
) -> None:
    base = make_base(model)
    for size in (1, 5):
        settings: dict[str, Any] = {KINDS[kind].size: size} | (SMALL if kind == "hyper_adapter" else {})
        built = build_adaptation(kind, base, settings, C)
        assert built.parameter_count == parameter_count(kind, base, settings, C)


def test_counts_on_roberta_base_are_those_worked_out_by_hand(roberta_base: AdaptedModel) -> None:
    count = lambda kind, **settings: parameter_count(kind, roberta_base, settings, 235)  # noqa: E731
    assert count("lora", rank=8) == 24 * 8 * (768 + 768) == 294_912
    assert count("prefix", prefix_length=16) == 12 * 2 * 16 * 768 == 294_912
    assert count("bottleneck", width=64) == 24 * (2 * 64 * 768 + 64 + 768) == 2_379_264
    network = 236 * 128 + 14 * 64 + 257 * 8 + 8 * 2 + 2 * 9 * 8
    assert count("hyper_adapter", width=4, hidden_width=8) == network + 9 * (2 * 4 * 768 + 4 + 768)


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_for_a_budget_is_the_largest_that_fits(roberta_base: AdaptedModel, kind: str) -> None:
    name, rest = KINDS[kind].size, SMALL if kind == "hyper_adapter" else {}
    for budget in (100_000, 224_976, 2_379_264):
        size = size_for_budget(kind, roberta_base, budget, rest, C)
        counts = [parameter_count(kind, roberta_base, rest | {name: n}, C) for n in (size, size + 1)]
        assert counts[0] <= budget < counts[1]
        assert size_for_budget(kind, roberta_base, counts[0], rest, C) == size
        assert size_for_budget(kind, roberta_base, counts[0] - 1, rest, C) == size - 1


def test_a_lora_never_gets_a_rank_that_its_slots_do_not_allow(make_base: Callable[..., AdaptedModel]) -> None:
    base = make_base()
    rank = size_for_budget("lora", base, 10**9)
    assert rank == 24
    build_adaptation("lora", base, {"rank": rank})


def test_a_budget_below_the_smallest_size_is_refused(roberta_base: AdaptedModel) -> None:
    with pytest.raises(AdaptationError, match=r"18,432 parameters \(prefix_length = 1\), the budget is 18,431"):
        size_for_budget("prefix", roberta_base, 18_431)
    assert size_for_budget("prefix", roberta_base, 18_432) == 1
