"""The alignment objective: normalisation, masks, independence of samples, solvers and messages."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from hl_scale.config import AlignmentConfig
from hl_scale.objectives import AlignmentObjective, EmptyCloudError
from hl_scale.sinkhorn import sinkhorn_divergence

LENGTHS, TARGET_LENGTHS, WIDTH, TARGET_WIDTH, SIZE = (5, 2, 9), (4, 1, 6), 9, 6, 12


@pytest.fixture(autouse=True)
def _grad_mode() -> Iterator[None]:
    with torch.enable_grad():
        yield


def batch(extra: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, attention mask, target, target mask; `extra` columns of padding, rubbish in all padding."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, WIDTH, SIZE, generator=generator) * 4
    target = torch.randn(3, TARGET_WIDTH, SIZE, generator=generator)
    hidden = torch.nn.functional.pad(hidden, (0, 0, 0, extra), value=77.0)
    target = torch.nn.functional.pad(target, (0, 0, 0, extra), value=-77.0)
    attention_mask = (torch.arange(WIDTH + extra) < torch.tensor(LENGTHS)[:, None]).long()
    target_mask = torch.arange(TARGET_WIDTH + extra) < torch.tensor(TARGET_LENGTHS)[:, None]
    return hidden.requires_grad_(), attention_mask, target, target_mask


def objective(**options: object) -> AlignmentObjective:
    return AlignmentObjective(AlignmentConfig(**options))  # type: ignore[arg-type]


def test_sqrt_dim_divides_by_the_square_root_of_the_dimension() -> None:
    hidden = batch()[0].bfloat16()
    normalized = objective().normalize(hidden)
    assert normalized.dtype == torch.float32
    torch.testing.assert_close(normalized, hidden.float() / math.sqrt(SIZE))


def test_l2_puts_every_token_on_the_unit_sphere_and_none_changes_nothing() -> None:
    hidden = batch()[0]
    torch.testing.assert_close(objective(normalization="l2").normalize(hidden).norm(dim=-1), torch.ones(3, WIDTH))
    assert torch.equal(objective(normalization="none").normalize(hidden), hidden)


def test_token_mask_drops_the_first_real_token_under_either_padding() -> None:
    right, left = torch.tensor([[1, 1, 1, 0]]), torch.tensor([[0, 1, 1, 1]])
    assert objective().token_mask(right).tolist() == [[False, True, True, False]]
    assert objective().token_mask(left).tolist() == [[False, False, True, True]]
    assert objective(skip_first_token=False).token_mask(right).tolist() == [[True, True, True, False]]


def test_divergence_is_that_of_the_normalised_clouds_without_their_first_token() -> None:
    hidden, attention_mask, target, target_mask = batch()
    values = objective(blur=0.1).divergence(hidden, attention_mask, target, target_mask)
    for row, (n, m) in enumerate(zip(LENGTHS, TARGET_LENGTHS, strict=True)):
        expected = sinkhorn_divergence(hidden[row, 1:n] / math.sqrt(SIZE), target[row, :m], blur=0.1)
        torch.testing.assert_close(values[row], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver", ["native", "geomloss"])
def test_padding_and_batch_mates_never_change_a_sample(solver: str) -> None:
    aligned = objective(solver=solver)
    hidden, *others = batch()
    values = aligned.divergence(hidden, *others)
    (gradient,) = torch.autograd.grad(values.sum(), hidden)
    padded, *padded_others = batch(extra=20)
    for row in range(3):
        alone = aligned.divergence(padded[row : row + 1], *(tensor[row : row + 1] for tensor in padded_others))
        torch.testing.assert_close(alone[0], values[row], rtol=1e-5, atol=1e-6)
        (own,) = torch.autograd.grad(alone.sum(), padded)
        torch.testing.assert_close(own[row, :WIDTH], gradient[row], rtol=1e-4, atol=1e-6)
        assert (own[row, LENGTHS[row] :] == 0).all() and (own[row, 0] == 0).all()


@pytest.mark.parametrize("normalization", ["sqrt_dim", "l2", "none"])
def test_native_and_geomloss_solvers_agree(normalization: str) -> None:
    hidden, *others = batch()
    gradients, values = [], []
    for solver in ("native", "geomloss"):
        values.append(objective(solver=solver, normalization=normalization).divergence(hidden.double(), *others))
        gradients.append(torch.autograd.grad(values[-1].sum(), hidden)[0])
    torch.testing.assert_close(values[0], values[1], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver", ["native", "geomloss"])
def test_a_sentence_equal_to_its_target_costs_nothing_even_with_one_token(solver: str) -> None:
    aligned = objective(solver=solver)
    hidden, attention_mask, _, _ = batch()
    target = aligned.normalize(hidden.detach())[:, 1:]
    values = aligned.divergence(hidden, attention_mask, target, aligned.token_mask(attention_mask)[:, 1:])
    assert LENGTHS[1] == 2
    assert values.abs().max() < 1e-5
    assert torch.autograd.grad(values.sum(), hidden)[0].abs().max() < 1e-5


def test_loss_is_the_mean_over_samples_and_metrics_are_plain_floats() -> None:
    hidden, *others = batch()
    loss, metrics = objective()(hidden, *others)
    values = objective().divergence(hidden, *others)
    torch.testing.assert_close(loss, values.mean())
    assert all(type(value) is float for value in metrics.values())
    assert metrics["alignment_loss"] == pytest.approx(loss.item())
    assert metrics["alignment_max"] == pytest.approx(values.max().item())
    assert metrics["mean_tokens"] == pytest.approx(sum(n - 1 for n in LENGTHS) / 3)
    assert metrics["mean_target_tokens"] == pytest.approx(sum(TARGET_LENGTHS) / 3)
    loss.backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


def test_targets_receive_no_gradient() -> None:
    hidden, attention_mask, target, target_mask = batch()
    target.requires_grad_()
    objective()(hidden, attention_mask, target, target_mask)[0].backward()
    assert target.grad is None


@pytest.mark.parametrize("enabled", [True, False])
def test_the_geomloss_solver_restores_autograd_mode_also_when_it_fails(enabled: bool) -> None:
    aligned = objective(solver="geomloss")
    hidden, attention_mask, target, target_mask = batch()
    with torch.set_grad_enabled(enabled):
        values = aligned.divergence(hidden, attention_mask, target, target_mask)
        assert torch.is_grad_enabled() is enabled and values.requires_grad is enabled

        def fail(*_: object) -> None:
            torch.set_grad_enabled(not enabled)
            raise RuntimeError("inside")

        aligned._geomloss = fail  # type: ignore[assignment]
        with pytest.raises(RuntimeError, match="inside"):
            aligned.divergence(hidden, attention_mask, target, target_mask)
        assert torch.is_grad_enabled() is enabled


def test_an_empty_cloud_is_refused_by_row_with_the_reason() -> None:
    hidden, attention_mask, target, target_mask = batch()
    attention_mask[1, 1:] = 0
    with pytest.raises(EmptyCloudError, match=r"hidden states of row 1 of 3, after its first token was left out"):
        objective().divergence(hidden, attention_mask, target, target_mask)
    attention_mask[1, 1:2] = 1
    target_mask[2] = False
    with pytest.raises(EmptyCloudError, match=r"target of row 2 of 3: expected"):
        objective().divergence(hidden, attention_mask, target, target_mask)


def test_with_a_diameter_known_self_terms_of_targets_change_neither_value_nor_gradient() -> None:
    objective = AlignmentObjective(AlignmentConfig(diameter=4.0))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 7, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(7) < torch.tensor([7, 4, 6])[:, None]
    target = torch.randn(3, 5, 16, generator=generator, dtype=torch.float64) / 4
    target_mask = torch.arange(5) < torch.tensor([5, 1, 3])[:, None]
    terms = objective.self_terms(target, target_mask)
    assert terms is not None
    results = [objective.divergence(hidden, mask, target, target_mask, known) for known in (None, terms)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(values.sum(), hidden)[0] for values in results]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-8, atol=1e-12)
    assert AlignmentObjective(AlignmentConfig()).self_terms(target, target_mask) is None
