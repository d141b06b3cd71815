"""The exact basis and its fallback."""

import pytest
import torch
from oracles.low_rank import low_rank_gradient

from lowrank_kernels.ops import Side
from lowrank_kernels.subspace import is_due
from lowrank_kernels.subspace.svd import svd_basis

SHAPES = [(40, 24), (24, 40), (32, 32), (1, 9), (9, 1)]


def captured(grad, basis, side):
    low = basis.T @ grad if side is Side.LEFT else grad @ basis
    return float(low.square().sum() / grad.square().sum())


def failing_svd(*_, **__):
    raise torch.linalg.LinAlgError("did not converge")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize("shape", SHAPES)
def test_basis_is_orthonormal_and_captures_the_leading_energy(
    shape, side, dtype, fails, rng, monkeypatch
):
    grad = low_rank_gradient(*shape, rng).to(dtype)
    rank = min(5, *shape)
    best = float(torch.linalg.svdvals(grad.double())[:rank].square().sum())
    best /= float(grad.double().square().sum())
    if fails:
        monkeypatch.setattr(torch.linalg, "svd", failing_svd)
    basis = svd_basis(grad, side, rank)
    assert basis.dtype is torch.promote_types(dtype, torch.float32)
    assert basis.shape == (shape[side], rank)
    overlap = basis.T @ basis
    torch.testing.assert_close(overlap, torch.eye(rank, dtype=basis.dtype), rtol=0, atol=1e-5)
    assert captured(grad.double(), basis.double(), side) == pytest.approx(best, rel=1e-5)


def test_directions_are_ordered_by_energy_in_both_ways(rng, monkeypatch):
    grad = low_rank_gradient(40, 24, rng)
    for _ in range(2):
        energies = (grad @ svd_basis(grad, Side.RIGHT, 6)).square().sum(0)
        assert (energies.diff() < 0).all()
        monkeypatch.setattr(torch.linalg, "svd", failing_svd)


def test_schedule_is_the_official_one_and_catches_up():
    refreshed, basis_step = [], -1
    for step in range(13):
        if is_due(step, basis_step, 4):
            refreshed.append(step)
            basis_step = step
    assert refreshed == [0, 4, 8, 12]
    assert is_due(7, -1, 200), "no basis yet"
    assert is_due(201, 0, 200), "missed at 200"
    assert not is_due(201, 200, 200)
