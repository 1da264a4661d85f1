"""TADA: what is aligned, what the critic learns, and what reaches the adapter with its sign changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hl_scale.objectives import EmptyCloudError, TadaObjective, reverse_gradient
from hl_scale.objectives.tada import sentence_states

SIZE = 12


def batch(shift: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dialect states and mask, standard states and mask, padded on the right with rubbish."""
    generator = torch.Generator().manual_seed(0)
    dialect = torch.randn(4, 7, SIZE, generator=generator)
    dialect[..., 0] += shift
    standard = torch.randn(4, 6, SIZE, generator=generator)
    masks = [(torch.arange(n) < torch.tensor([n, 3, 5, 1])[:, None]).long() for n in (7, 6)]
    return dialect.masked_fill(masks[0][..., None] == 0, 50.0), masks[0], standard, masks[1]


def objective(adversary_weight: float = 1.0, which: str = "first") -> TadaObjective:
    torch.manual_seed(0)
    return TadaObjective(SIZE, which, adversary_weight)  # type: ignore[arg-type]


def test_reversal_is_the_identity_and_changes_the_sign_of_gradients() -> None:
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    weights = torch.tensor([3.0, 5.0])
    y = reverse_gradient(x, 0.25)
    assert torch.equal(y, x)
    (y * weights).sum().backward()
    assert torch.equal(x.grad, -0.25 * weights)


@pytest.mark.parametrize("which", ["first", "last"])
def test_the_sentence_state_is_the_first_or_last_real_token_under_either_padding(which: str) -> None:
    hidden = torch.arange(2 * 5 * 3, dtype=torch.bfloat16).view(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    found = sentence_states(hidden, mask, which)  # type: ignore[arg-type]
    at = (0, 2) if which == "first" else (2, 4)
    assert found.dtype == torch.float32 and torch.equal(found, hidden[[0, 1], at].float())


@pytest.mark.parametrize("which", ["first", "last"])
def test_alignment_is_the_mean_square_of_the_difference_of_sentence_states(which: str) -> None:
    dialect, dialect_mask, standard, standard_mask = batch()
    _, metrics = objective(which=which)(dialect, dialect_mask, standard, standard_mask)
    rows = range(4)
    x = dialect.numpy()[rows, 0 if which == "first" else dialect_mask.sum(1).numpy() - 1]
    y = standard.numpy()[rows, 0 if which == "first" else standard_mask.sum(1).numpy() - 1]
    assert metrics["tada_alignment"] == pytest.approx(np.mean((x - y) ** 2), rel=1e-5)


def test_the_critics_part_is_the_cross_entropy_of_dialect_against_standard() -> None:
    dialect, dialect_mask, standard, standard_mask = batch()
    tada = objective()
    loss, metrics = tada(dialect, dialect_mask, standard, standard_mask)
    with torch.no_grad():
        ones = tada.critic(dialect, dialect_mask).double().numpy()
        zeros = tada.critic(standard, standard_mask).double().numpy()
    expected = (np.log1p(np.exp(-ones)).sum() + np.log1p(np.exp(zeros)).sum()) / 8
    assert metrics["tada_critic"] == pytest.approx(expected, rel=1e-5)
    assert metrics["tada_critic_accuracy"] == ((ones > 0).sum() + (zeros <= 0).sum()) / 8
    assert loss.item() == pytest.approx(metrics["tada_alignment"] + expected, rel=1e-5)


def test_the_adapter_gets_the_critics_gradient_reversed_and_weighted_the_critic_its_own() -> None:
    gradients, of_critic = {}, {}
    for weight in (0.0, 0.5, 2.0):
        tada = objective(weight)
        dialect, *rest = batch()
        dialect.requires_grad_()
        rest[1].requires_grad_()
        tada(dialect, *rest)[0].backward()
        assert rest[1].grad is None  # states of Standard English are targets
        gradients[weight] = dialect.grad
        of_critic[weight] = [parameter.grad for parameter in tada.parameters()]
    tada = objective()
    dialect, dialect_mask, standard, standard_mask = batch()
    dialect.requires_grad_()
    scores = torch.cat((tada.critic(dialect, dialect_mask), tada.critic(standard, standard_mask)))
    truth = torch.tensor([1.0] * 4 + [0.0] * 4)
    nn.functional.binary_cross_entropy_with_logits(scores, truth).backward()
    assert dialect.grad.abs().max() > 1e-5
    for weight in (0.5, 2.0):
        torch.testing.assert_close(gradients[weight] - gradients[0.0], -weight * dialect.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(of_critic[weight], [p.grad for p in tada.parameters()], rtol=1e-4, atol=1e-6)


def test_padding_decides_nothing() -> None:
    dialect, dialect_mask, standard, standard_mask = batch()
    tada = objective(which="last")
    expected, _ = tada(dialect, dialect_mask, standard, standard_mask)
    wider = nn.functional.pad(dialect, (0, 0, 0, 3), value=-9.0), nn.functional.pad(dialect_mask, (0, 3))
    torch.testing.assert_close(tada(*wider, standard, standard_mask)[0], expected)
    torch.testing.assert_close(tada(dialect * dialect_mask[..., None], *batch()[1:])[0], expected)


def test_the_critic_learns_to_tell_them_apart_and_an_adapter_to_be_taken_for_standard() -> None:
    """A critic alone learns a shift that marks dialect; an adapter trained against it takes the shift away."""
    rows = batch(shift=2.0)
    tada = objective(adversary_weight=0.0)
    optimizer = torch.optim.Adam(tada.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        loss, metrics = tada(*rows)
        loss.backward()
        optimizer.step()
    assert metrics["tada_critic"] < 0.3 and metrics["tada_critic_accuracy"] == 1.0
    adapter = torch.zeros(SIZE, requires_grad=True)
    tada.adversary_weight = 1.0
    optimizer = torch.optim.Adam([adapter], lr=0.1)
    for _ in range(20):  # of the critic's part alone: the sentence states are taken out
        optimizer.zero_grad()
        scores = tada.critic(reverse_gradient(rows[0] + adapter), rows[1])
        nn.functional.binary_cross_entropy_with_logits(scores, torch.ones(4)).backward()
        optimizer.step()
    taken_for = torch.sigmoid(tada.critic(rows[0] + adapter, rows[1]))
    assert (taken_for < torch.sigmoid(tada.critic(rows[0], rows[1]))).all() and taken_for.mean() < 0.5


def test_the_weight_is_one_over_d_unless_given_and_negative_ones_and_rows_without_tokens_are_refused() -> None:
    dialect, dialect_mask, standard, standard_mask = batch()
    dialect_mask[2] = 0
    with pytest.raises(EmptyCloudError, match="row 2 of 4 has no token"):
        objective()(dialect, dialect_mask, standard, standard_mask)
    assert TadaObjective(SIZE, "first").adversary_weight == 1 / SIZE
    with pytest.raises(ValueError, match="adversary_weight = -1"):
        objective(-1.0)
