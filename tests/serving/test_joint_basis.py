"""Shared bases against dense matrices: theorems where the optimum is known, alternation and bounds where it is not."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from hl_scale.serving.joint_basis import joint_basis

TIGHT = {"tolerance": 1e-13, "maximum_iterations": 3000}


def factors(count, rank, inputs, outputs, seed=0):
    """A (n, r, in) and B (n, out, r), float64, with singular values that fall off."""
    generator = torch.Generator().manual_seed(seed)
    decay = 0.6 ** torch.arange(inputs, dtype=torch.float64)
    a = torch.randn(count, rank, inputs, generator=generator, dtype=torch.float64) * decay
    return a, torch.randn(count, outputs, rank, generator=generator, dtype=torch.float64)


def missed(updates, u, v):
    """Sum of |D - U U^T D V V^T|^2, dense."""
    return (updates - u @ u.mT @ updates @ v @ v.mT).square().sum().item()


def tail(matrix, rank):
    """What the best approximation of this rank misses (Eckart and Young)."""
    return torch.linalg.svdvals(matrix)[rank:].square().sum().item()


def shared(rank):
    """Updates within bases of this rank, and noise of a tenth of their size."""
    u, v = random_basis(8, rank, 1), random_basis(9, rank, 2)
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(6, *shape, generator=generator, dtype=torch.float64) for shape in ((rank, 2), (2, rank)))
    a, b = right @ v.mT, u @ left
    noise = [0.1 * torch.randn(factor.shape, generator=generator, dtype=torch.float64) for factor in (a, b)]
    return a + noise[0], b + noise[1]


def random_basis(size, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64)).Q


def alternation(updates, v):
    """What exact eigenvectors in turns miss, on dense updates, from a basis of the inputs."""
    rank = v.shape[1]
    for _ in range(60):
        u = torch.linalg.eigh((updates @ v @ v.mT @ updates.mT).sum(0)).eigenvectors[:, -rank:]
        v = torch.linalg.eigh((updates.mT @ u @ u.mT @ updates).sum(0)).eigenvectors[:, -rank:]
    return missed(updates, u, v)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_bases_of_one_adapter_are_its_leading_singular_vectors(rank):
    a, b = factors(1, 6, 13, 11)
    found = joint_basis(a, b, rank, **TIGHT)
    assert found.square_error.item() == pytest.approx(tail((b @ a)[0], rank), rel=1e-9)


def test_with_one_side_captured_in_full_the_other_is_that_of_all_updates_side_by_side():
    a, b = factors(7, 2, 4, 12)
    found = joint_basis(a, b, 4, **TIGHT)
    assert found.square_error.sum().item() == pytest.approx(tail(torch.cat(list(b @ a), dim=1), 4), rel=1e-9)
    mirrored = joint_basis(b.mT, a.mT, 4, **TIGHT)
    assert mirrored.square_error.sum().item() == pytest.approx(found.square_error.sum().item(), rel=1e-9)


@pytest.mark.parametrize("rank", [2, 3])
def test_no_dense_alternation_from_ten_starts_finds_shared_structure_better(rank):
    a, b = shared(rank)
    found = joint_basis(a, b, rank, **TIGHT).square_error.sum().item()
    best = min(alternation(b @ a, random_basis(9, rank, seed)) for seed in range(10))
    assert found == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_without_structure_the_error_is_stationary_and_within_twice_the_optimum(rank):
    a, b = factors(6, 2, 9, 8, seed=rank)
    updates = b @ a
    found = joint_basis(a, b, rank, **TIGHT)
    error = found.square_error.sum().item()
    assert alternation(updates, found.v) == pytest.approx(error, rel=1e-6)
    sides = [tail(torch.cat(list(updates), dim=dim), rank) for dim in (0, 1)]  # none can miss less than either
    assert max(sides) * (1 - 1e-9) <= error <= sum(sides)


def test_at_the_joint_rank_every_update_comes_back_exactly():
    a, b = factors(4, 3, 17, 14)
    found = joint_basis(a, b, 12)
    restored = found.u @ found.left @ found.right @ found.v.mT
    assert (restored - b @ a).abs().max() < 1e-12 * (b @ a).abs().max()
    assert found.square_error.max() < 1e-24 * found.square_norm.min()
    assert found.converged


def test_more_columns_never_miss_more_and_stop_at_the_joint_rank():
    a, b = factors(5, 2, 12, 13)
    errors = [joint_basis(a, b, rank, tolerance=1e-12).square_error.sum().item() for rank in range(1, 14)]
    assert all(more <= fewer * (1 + 1e-6) + 1e-20 for fewer, more in pairwise(errors))
    assert errors[0] > 0.01 > 1e-15 > errors[-1]
    assert joint_basis(a, b, 99).u.shape == (13, 10)


def test_errors_norms_and_spread_are_those_of_dense_matrices_and_cores_are_projections():
    a, b = factors(6, 2, 9, 8)
    updates = b @ a
    found = joint_basis(a, b, 3)
    cores = found.left @ found.right
    assert torch.allclose(cores, found.u.mT @ updates @ found.v, atol=1e-12)
    dense = (updates - found.u @ cores @ found.v.mT).square().sum((1, 2))
    assert torch.allclose(found.square_error, dense, rtol=1e-10)
    assert torch.allclose(found.square_norm, updates.square().sum((1, 2)), rtol=1e-10)
    assert torch.allclose(found.square_spread, (updates - updates.mean(0)).square().sum(), rtol=1e-10)
    for basis in (found.u, found.v):
        assert torch.allclose(basis.mT @ basis, torch.eye(3, dtype=torch.float64), atol=1e-12)


def test_the_spread_does_not_depend_on_how_many_rows_are_formed_at_a_time(monkeypatch):
    a, b = factors(6, 2, 9, 8)
    whole = joint_basis(a, b, 3).square_spread
    monkeypatch.setattr("hl_scale.serving.joint_basis.ROWS", 3)
    assert torch.allclose(joint_basis(a, b, 3).square_spread, whole, rtol=1e-12)


def test_only_the_products_of_factors_matter():
    a, b = factors(5, 3, 9, 8)
    mix = torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mix = mix + 3 * torch.eye(3, dtype=torch.float64)
    found = joint_basis(a, b, 4, **TIGHT)
    same = joint_basis(torch.linalg.solve(mix, a), b @ mix, 4, **TIGHT)
    assert torch.allclose(found.square_error, same.square_error, rtol=1e-5)


def test_adapters_that_do_nothing_are_compressed_without_error():
    found = joint_basis(torch.zeros(3, 2, 5), torch.zeros(3, 4, 2), 2)
    assert found.square_error.sum() == found.square_norm.sum() == found.square_spread == 0
    assert torch.isfinite(found.u).all()


def test_a_rank_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="must be positive"):
        joint_basis(*factors(2, 1, 3, 3), 0)
