"""The exact basis and its fallback."""

import pytest
import torch
from oracles.low_rank import low_rank_gradient

from lowrank_kernels.subspace.range_finders import left_singular

SHAPES = [(40, 24), (24, 40), (32, 32), (1, 9), (9, 1)]


def failing_svd(*_, **__):
    raise torch.linalg.LinAlgError("did not converge")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_basis_is_orthonormal_and_captures_the_leading_energy(
    shape, dtype, transposed, fails, rng, monkeypatch
):
    matrix = low_rank_gradient(*shape, rng).to(dtype)
    matrix = matrix.T if transposed else matrix
    rank = min(5, *shape)
    best = torch.linalg.svdvals(matrix.double())[:rank]
    if fails:
        monkeypatch.setattr(torch.linalg, "svd", failing_svd)
    basis, values, fallback = left_singular(matrix, rank)
    assert fallback is fails
    assert basis.dtype is torch.promote_types(dtype, torch.float32)
    assert basis.shape == (matrix.shape[0], rank)
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank).to(basis), rtol=0, atol=1e-5)
    norms = torch.linalg.vector_norm(basis.double().T @ matrix.double(), dim=1)
    torch.testing.assert_close(norms, best, rtol=1e-5, atol=1e-5 * float(best[0]))
    torch.testing.assert_close(values.double(), best, rtol=1e-5, atol=1e-5 * float(best[0]))


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_signs_are_those_of_the_official_call(shape, rng):
    """Which factors the gradient as it lies, for either side; kept moments depend on the signs."""
    grad = low_rank_gradient(*shape, rng).float()
    left, _, right = torch.linalg.svd(grad, full_matrices=False)
    assert torch.equal(left_singular(grad, 5)[0], left[:, :5])
    assert torch.equal(left_singular(grad.T, 5)[0], right[:5].T)
