"""Reconstruction of a library's adapters: both distances against formed updates, normalisation, metrics, messages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hl_scale.config import ReconstructionConfig
from hl_scale.data.library import LibraryStatistics
from hl_scale.lora import LoraFactors, Slot
from hl_scale.objectives import ReconstructionObjective
from hl_scale.objectives.reconstruction import factor_error

SLOTS = (Slot(0, "q_proj", "layers.0.q_proj", 9, 6), Slot(0, "v_proj", "layers.0.v_proj", 9, 5))
TASKS = 4


@pytest.fixture(autouse=True)
def _grad_mode() -> Iterator[None]:
    with torch.enable_grad():
        yield


def factors(seed: int, rank: int = 3, scale: float = 2.0, conditions: int = TASKS) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    a = {s.path: torch.randn(conditions, rank, s.in_features, generator=generator) for s in SLOTS}
    b = {s.path: torch.randn(conditions, s.out_features, rank, generator=generator) for s in SLOTS}
    return LoraFactors(SLOTS, a, b, scale)


def times(made: LoraFactors, number: float) -> LoraFactors:
    return LoraFactors(SLOTS, made.a, {path: number * b for path, b in made.b.items()}, made.scale)


def updates(made: LoraFactors) -> Tensor:
    """(E, out in of all slots)"""
    return torch.cat([(made.scale * made.b[s.path] @ made.a[s.path]).flatten(1) for s in SLOTS], dim=1)


def statistics(library: LoraFactors) -> LibraryStatistics:
    def each(what: str) -> LoraFactors:
        options = {"correction": 0} if what == "std" else {}
        a, b = (
            {path: getattr(value, what)(0, keepdim=True, **options) for path, value in side.items()}
            for side in (library.a, library.b)
        )
        return LoraFactors(SLOTS, a, b, library.scale)

    return LibraryStatistics(each("mean"), each("std"), float(updates(library).square().sum(1).mean()))


def objective(library: LoraFactors, **options: object) -> ReconstructionObjective:
    config = ReconstructionConfig(kind="reconstruction", library="LIBRARY", **options)  # type: ignore[arg-type]
    return ReconstructionObjective(config, statistics(library))


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_the_distance_is_that_of_all_updates_relative_to_the_librarys_mean(rank: int) -> None:
    library, generated = factors(0), factors(1, rank, scale=0.5)
    leaves = [value.requires_grad_() for side in (generated.a, generated.b) for value in side.values()]
    losses = objective(library)(generated, library)
    norm = updates(library).square().sum(1).mean()
    expected = (updates(generated) - updates(library)).square().sum(1) / norm
    assert losses.shape == (TASKS,) and losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(
        torch.autograd.grad(losses.mean(), leaves), torch.autograd.grad(expected.mean(), leaves), rtol=1e-4, atol=1e-6
    )


def test_no_update_costs_one_on_average_and_the_right_update_nothing_in_any_factors() -> None:
    library = factors(0)
    compare = objective(library)
    assert float(compare(times(library, 0), library).mean()) == pytest.approx(1.0)
    mixed = LoraFactors(
        SLOTS, {p: -3 * a for p, a in library.a.items()}, {p: b / -3 for p, b in library.b.items()}, 2.0
    )
    assert compare(mixed, library).abs().max() < 1e-6


@pytest.mark.parametrize("z_score", [False, True])
def test_the_factor_loss_is_the_mean_absolute_error_of_z_scores_half_for_a_and_half_for_b(z_score: bool) -> None:
    library, generated = factors(0), factors(1)
    losses = objective(library, targets="factors", z_score=z_score)(generated, library)
    expected = torch.zeros(TASKS)
    for slot in SLOTS:
        for side in ("a", "b"):
            ours, theirs = getattr(generated, side)[slot.path], getattr(library, side)[slot.path]
            if z_score:
                mean, std = theirs.mean(0), theirs.std(0, correction=0)
                std = std + 1e-3 * std.square().mean().sqrt()
                ours, theirs = (ours - mean) / std, (theirs - mean) / std
            expected += 0.5 * (ours - theirs).abs().mean((1, 2)) / len(SLOTS)
    torch.testing.assert_close(losses, expected)


def test_the_factor_loss_reaches_both_factors_and_not_the_target() -> None:
    library, generated = factors(0), factors(1)
    leaves = [value.requires_grad_() for side in (generated.a, generated.b) for value in side.values()]
    objective(library, targets="factors")(generated, library).sum().backward()
    assert all(leaf.grad is not None and leaf.grad.any() for leaf in leaves)


def test_an_entry_that_never_varies_does_not_dominate_the_factor_loss() -> None:
    library = factors(0)
    path = SLOTS[0].path
    library.a[path][:, 0, 0] = 1.0
    generated = factors(1)
    share = objective(library, targets="factors")(generated, library)
    assert share.max() < 100


def test_low_precision_factors_are_compared_in_float32_or_wider() -> None:
    library, generated = factors(0), factors(1)
    low = LoraFactors(
        SLOTS, {p: a.bfloat16() for p, a in generated.a.items()}, {p: b.bfloat16() for p, b in generated.b.items()}, 2.0
    )
    wide = LoraFactors(SLOTS, {p: a.float() for p, a in low.a.items()}, {p: b.float() for p, b in low.b.items()}, 2.0)
    for targets in ("delta", "factors"):
        compare = objective(library, targets=targets)
        torch.testing.assert_close(compare(low, library), compare(wide, library))


def test_the_error_of_one_slot_needs_no_spread() -> None:
    library, generated = factors(0), factors(1)
    path = SLOTS[0].path
    error = factor_error(generated.a[path], generated.b[path], library.a[path], library.b[path])
    a, b = (x[path] - y[path] for x, y in ((generated.a, library.a), (generated.b, library.b)))
    torch.testing.assert_close(error, 0.5 * a.abs().mean((1, 2)) + 0.5 * b.abs().mean((1, 2)))


@pytest.mark.parametrize("targets", ["delta", "factors"])
def test_metrics_are_those_of_the_updates_whatever_the_loss(targets: str) -> None:
    library, generated = factors(0), factors(1)
    compare = objective(library, targets=targets)
    found = compare.metrics(generated, library)
    ours, theirs = updates(generated), updates(library)
    error = float((ours - theirs).square().sum() / theirs.square().sum())
    assert found["delta_relative_error"] == pytest.approx(error, rel=1e-5)
    cosine = float(torch.cosine_similarity(ours, theirs, dim=1).mean())
    assert found["delta_cosine"] == pytest.approx(cosine, abs=1e-6)
    assert all(type(value) is float for value in found.values())


def test_metrics_of_no_update_and_of_a_scaled_one_are_known() -> None:
    library = factors(0)
    compare = objective(library)
    assert compare.metrics(times(library, 0), library) == {"delta_relative_error": 1.0, "delta_cosine": 0.0}
    half = compare.metrics(times(library, -0.5), library)
    assert half["delta_relative_error"] == pytest.approx(2.25) and half["delta_cosine"] == pytest.approx(-1.0)


def test_what_cannot_be_compared_is_refused() -> None:
    library = factors(0)
    with pytest.raises(ValueError, match="3 conditions in 2 slots against targets of 4"):
        objective(library)(factors(1, conditions=3), library)
    for other in (factors(1, rank=2), factors(1, scale=1.0)):
        with pytest.raises(ValueError, match=r"rank 3 and scale 2, .* cannot be compared\n  fix"):
            objective(library, targets="factors")(other, library)
        objective(library)(other, library)


def test_a_library_without_updates_or_without_spread_is_refused() -> None:
    with pytest.raises(ValueError, match=r"LIBRARY change nothing.*\n  fix"):
        objective(times(factors(0), 0))
    alone = factors(0, conditions=1)
    with pytest.raises(
        ValueError, match=rf"the same factors in {SLOTS[0].path}.*\n  fix: set objective.z_score = false"
    ):
        objective(alone, targets="factors")
    objective(alone, targets="factors", z_score=False)
