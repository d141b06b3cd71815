"""Newton-Schulz against the singular value decomposition."""

import pytest
import torch
from oracles.outside import polar

from lowrank_kernels.ops import orthogonal
from lowrank_kernels.ops.orthogonal import orthogonalized


@pytest.fixture(autouse=True)
def in_bfloat16(request, monkeypatch):
    """Whether the iterations are, whatever this processor multiplies fast: not if not asked for."""
    asked = getattr(request, "param", False)
    monkeypatch.setattr(orthogonal, "fast_in_bfloat16", lambda device_type: asked)
    return asked


def one(matrix):
    return orthogonalized(matrix.unsqueeze(0))[0]


SHAPES = [(1, 1), (1, 7), (7, 1), (5, 5), (12, 33), (33, 12), (64, 64), (3, 200)]


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_polynomial_of_the_singular_values(shape, rng):
    matrix = torch.randn(shape, generator=rng, dtype=torch.float64)
    found = one(matrix)
    assert float((found - polar(matrix)).norm() / polar(matrix).norm()) < 1e-12
    single = one(matrix.float())
    assert single.dtype is torch.float32
    assert float((single.double() - polar(matrix.float())).norm() / polar(matrix).norm()) < 1e-4


@pytest.mark.parametrize("in_bfloat16", [False, True], indirect=True)
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 50)])
def test_it_is_near_the_polar_factor(shape, in_bfloat16, rng):
    """Of a well-conditioned matrix; singular values end between 0.68 and 1.14, or a rounding of
    bfloat16 beside.
    """
    left, values, right = torch.linalg.svd(
        torch.randn(shape, generator=rng, dtype=torch.float64), full_matrices=False
    )
    matrix = (left @ torch.diag(values.clamp(min=0.05 * float(values[0]))) @ right).float()
    found = one(matrix)
    assert found.dtype is (torch.bfloat16 if in_bfloat16 else torch.float32)
    found, beside = found.double(), 2**-6 if in_bfloat16 else 0
    ends = torch.linalg.svdvals(found)
    assert 0.68 - beside < float(ends.min()) <= float(ends.max()) < 1.14 + beside
    exact = left @ right
    assert float((found * exact).sum() / (found.norm() * exact.norm())) > 0.98


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_how_large_a_matrix_is_does_not_matter(size, rng):
    matrix = torch.randn(9, 14, generator=rng)
    found = one(matrix * size)
    expected = one(matrix)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_zero_gives_zero_and_a_matrix_of_low_rank_stays_in_its_span(rng):
    zero, low = torch.zeros(6, 8), torch.randn(6, 1, generator=rng) @ torch.ones(1, 8)
    found = orthogonalized(torch.stack([zero, low]))
    assert torch.equal(found[0], zero)
    assert torch.linalg.matrix_rank(found[1], atol=1e-4) == 1
    assert 0.68 < float(torch.linalg.matrix_norm(found[1], 2)) < 1.14


def test_half_precision_is_widened(rng):
    matrix = torch.randn(8, 12, generator=rng).bfloat16()
    found = one(matrix)
    assert found.dtype is torch.float32


@pytest.mark.parametrize("in_bfloat16", [True], indirect=True)
@pytest.mark.parametrize("shape", [(12, 33), (33, 12), (64, 64)])
def test_in_bfloat16_it_is_the_polynomial_up_to_rounding(shape, in_bfloat16, rng):
    """Each of five steps rounds thrice, by up to 2^-9."""
    matrix = torch.randn(shape, generator=rng)
    found = one(matrix)
    exact = polar(matrix)
    assert float((found.double() - exact).norm() / exact.norm()) < 15 * 2**-9
    double = one(matrix.double())
    assert double.dtype is torch.float64
