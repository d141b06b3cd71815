"""What every range finder promises: orthonormal, leading, ordered, repeatable, and in batches."""

import pytest
import torch
from oracles.low_rank import low_rank_gradient

from lowrank_kernels.subspace import orthonormal, range_finders
from lowrank_kernels.subspace.orthonormal import (
    orthonormalized,
    reorthonormalized,
    well_conditioned,
)
from lowrank_kernels.subspace.range_finders import RANGE_FINDERS, Request

SHAPES = [(40, 64), (64, 40), (32, 32), (1, 9), (9, 1), (37, 53)]
ORTHONORMAL = [name for name in RANGE_FINDERS if name != "gaussian"]
LEADING = ["svd", "randomized", "power"]
FORMS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def request(*matrices, rank, previous=None, seeds=None, power_iterations=1):
    stack = torch.stack(matrices)
    return Request(
        matrices=stack,
        norms=torch.linalg.vector_norm(stack.double(), dim=(1, 2)),
        rank=rank,
        previous=previous or [None] * len(matrices),
        seeds=seeds or list(range(len(matrices))),
        power_iterations=power_iterations,
    )


def spectrum_matrix(values, rows, cols, rng, dtype=torch.float64):
    """A matrix with these singular values and random directions."""
    left, right = (
        torch.linalg.qr(torch.randn(size, len(values), generator=rng, dtype=torch.float64))[0]
        for size in (rows, cols)
    )
    return (left * torch.as_tensor(values, dtype=torch.float64) @ right.T).to(dtype)


def captured(matrix, basis):
    low = basis.double().T @ matrix.double()
    return float(low.square().sum() / matrix.double().square().sum())


@pytest.mark.parametrize("dtype", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ORTHONORMAL)
def test_bases_are_orthonormal_and_their_energies_true(name, shape, dtype, rng):
    matrices = [low_rank_gradient(*shape, rng).to(dtype) for _ in range(3)]
    rank = min(5, *shape)
    found = RANGE_FINDERS[name](request(*matrices, rank=rank))
    assert found.bases.shape == (3, shape[0], rank)
    assert found.bases.dtype is torch.promote_types(dtype, torch.float32)
    for matrix, basis, energies in zip(matrices, found.bases, found.energies, strict=True):
        overlap = basis.T @ basis
        torch.testing.assert_close(overlap, torch.eye(rank).to(basis), rtol=0, atol=1e-5)
        low = basis.double().T @ matrix.double()
        exact = low.square().sum(1) / matrix.double().square().sum()
        # Sketches may run in bfloat16, where a product of unit vectors has an error of 2^-9.
        torch.testing.assert_close(energies.double(), exact, rtol=2**-7, atol=2**-9 / shape[0])
        if name in LEADING:
            assert (energies.diff() <= 2**-9 * energies[0]).all(), "largest first"


@pytest.mark.parametrize("name", ["randomized", "power"])
@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_iterations_capture_nearly_what_an_svd_does(name, iterations, power, rng):
    values = torch.arange(1, 97).double() ** -power
    matrix = spectrum_matrix(values, 96, 200, rng, torch.float32)
    basis = RANGE_FINDERS[name](request(matrix, rank=24, power_iterations=iterations)).bases[0]
    best = float(values[:24].square().sum() / values.square().sum())
    least = {(0.5, 1): 0.95, (0.5, 2): 0.98, (1.0, 1): 0.995, (1.0, 2): 0.999}
    assert captured(matrix, basis) >= least[power, iterations] * best


def test_directions_are_singular_ones_and_not_only_their_span(rng):
    """Adam is not the same in a rotated basis."""
    values = 2.0 ** -torch.arange(12)
    matrix = spectrum_matrix(values, 40, 70, rng, torch.float32)
    exact = RANGE_FINDERS["svd"](request(matrix, rank=8)).bases[0]
    found = RANGE_FINDERS["randomized"](request(matrix, rank=8)).bases[0]
    alike = (exact.T @ found).abs()
    torch.testing.assert_close(alike, torch.eye(8), rtol=0, atol=0.02)


def test_a_warm_start_goes_on_from_the_previous_basis(rng):
    values = torch.arange(1, 97).double() ** -0.3
    matrix = spectrum_matrix(values, 96, 200, rng, torch.float32)
    basis, shares = None, []
    for seed in range(6):
        asked = request(matrix, rank=24, previous=[basis], seeds=[seed])
        basis = RANGE_FINDERS["power"](asked).bases[0]
        shares.append(captured(matrix, basis))
    best = float(values[:24].square().sum() / values.square().sum())
    assert shares[-1] > 0.99 * best > shares[0]


def test_a_warm_start_takes_the_leading_columns_of_a_basis_that_is_wider_than_the_sketch(rng):
    """As after the largest rank was lowered. Iterations cannot leave a span without them."""
    values = torch.arange(1, 65).double() ** -0.5
    matrix = spectrum_matrix(values, 64, 150, rng, torch.float32)
    previous = torch.linalg.svd(matrix)[0][:, :40]
    basis = RANGE_FINDERS["power"](request(matrix, rank=4, previous=[previous])).bases[0]
    best = float(values[:4].square().sum() / values.square().sum())
    assert captured(matrix, basis) > 0.999 * best


@pytest.mark.parametrize("name", ["randomized", "power"])
def test_the_columns_beside_a_large_basis_grow_with_it(name, rng):
    """A sketch as wide as the rank of the matrix finds its whole range: what an SVD would."""
    rank, true_rank = 256, 268
    values = torch.linspace(1, 0.5, true_rank, dtype=torch.float64)
    matrix = spectrum_matrix(values, 280, 300, rng)
    basis = RANGE_FINDERS[name](request(matrix, rank=rank)).bases[0]
    best = float(values[:rank].square().sum() / values.square().sum())
    assert captured(matrix, basis) == pytest.approx(best, rel=1e-9)


def test_a_warm_start_finds_what_the_previous_basis_misses(rng):
    """The random columns beside it: without them the span of an invariant basis never changes."""
    matrix = torch.diag(torch.tensor([1.0, 1.0, 1.0, 5.0, 0.5, 0.5, 0.5, 0.5]))
    previous = torch.eye(8)[:, :3]
    basis = RANGE_FINDERS["power"](request(matrix, rank=3, previous=[previous])).bases[0]
    assert float(basis[3].square().sum()) > 0.99


@pytest.mark.parametrize("name", RANGE_FINDERS)
def test_only_the_seed_decides(name, rng):
    matrix = low_rank_gradient(24, 40, rng).float()
    state = torch.get_rng_state()
    first, again, other = (
        RANGE_FINDERS[name](request(matrix, rank=5, seeds=[seed])).bases for seed in (7, 7, 8)
    )
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (name == "svd")
    assert torch.equal(torch.get_rng_state(), state), "the global generator is the user's"


@pytest.mark.parametrize("name", RANGE_FINDERS)
def test_a_batch_is_its_matrices_one_by_one(name, rng):
    matrices = [low_rank_gradient(24, 40, rng).float() for _ in range(3)]
    previous = [torch.linalg.qr(torch.randn(24, 4 + i, generator=rng))[0] for i in range(3)]
    together = RANGE_FINDERS[name](request(*matrices, rank=4, previous=previous))
    for index, matrix in enumerate(matrices):
        alone = RANGE_FINDERS[name](
            request(matrix, rank=4, previous=[previous[index][:, :4]], seeds=[index])
        )
        torch.testing.assert_close(
            together.energies[index], alone.energies[0], rtol=2**-7, atol=2**-9
        )


@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("name", LEADING)
def test_neither_tiny_nor_huge_gradients_overflow(name, scale, rng):
    matrix = low_rank_gradient(24, 40, rng)
    found = RANGE_FINDERS[name](request((matrix * scale).float(), rank=5))
    best = RANGE_FINDERS["svd"](request(matrix, rank=5)).energies.sum()
    assert captured(matrix, found.bases[0]) > 0.95 * float(best)
    assert found.energies.sum() <= 1.02


def test_float16_gradients_are_not_multiplied_in_float16(rng):
    matrix = (low_rank_gradient(24, 40, rng) * 2e4).clamp(-6e4, 6e4).half()
    found = RANGE_FINDERS["randomized"](request(matrix, rank=5))
    assert found.bases.isfinite().all()
    assert captured(matrix, found.bases[0]) > 0.3


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("true_rank", [1, 3])
@pytest.mark.parametrize("name", LEADING)
def test_a_gradient_of_lower_rank_is_spanned_and_the_rest_filled_up(
    name, true_rank, bfloat16, rng, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bfloat16)
    matrix = spectrum_matrix([1.0] * true_rank, 24, 40, rng, torch.float32)
    found = RANGE_FINDERS[name](request(matrix, rank=6))
    basis = found.bases[0]
    torch.testing.assert_close(basis.T @ basis, torch.eye(6), rtol=0, atol=1e-5)
    assert captured(matrix, basis) > 0.9999
    assert float(found.energies[0, true_rank:].max()) <= found.noise
    assert float(found.energies[0, true_rank - 1]) > found.noise


def test_gaussian_directions_have_the_right_length_in_the_mean(rng):
    matrices = [torch.randn(400, 8, generator=rng) for _ in range(4)]
    bases = RANGE_FINDERS["gaussian"](request(*matrices, rank=100)).bases
    mean = torch.stack([basis @ basis.T for basis in bases]).mean(0)
    assert float(mean.diagonal().mean()) == pytest.approx(1.0, abs=0.02)
    assert float((mean - torch.diag(mean.diagonal())).mean().abs()) < 1e-3


# The factorizations beneath.


@pytest.mark.parametrize("condition", [1e0, 1e2, 1e3, 1e5, 1e8])
def test_orthonormal_columns_at_any_condition_number(condition, rng):
    values = torch.logspace(0, -float(torch.tensor(condition).log10()), 32)
    tall = spectrum_matrix(values, 200, 32, rng, torch.float32)
    basis, slow = orthonormalized(tall.unsqueeze(0))
    torch.testing.assert_close(basis[0].T @ basis[0], torch.eye(32), rtol=0, atol=1e-5)
    kept = basis[0].double() @ (basis[0].double().T @ tall.double())
    torch.testing.assert_close(kept, tall.double(), rtol=0, atol=1e-5)
    assert bool(slow) == (condition > 1e4)


def test_columns_that_one_pass_cannot_separate_take_householder(rng, monkeypatch):
    """Cholesky may succeed on a Gram matrix that is all rounding errors; its result tells."""
    tall = torch.randn(1, 50, 6, generator=rng)
    skewed = orthonormalized(tall)[0].clone()
    skewed[0, :, 5] += 0.5 * skewed[0, :, 0]
    basis, slow = reorthonormalized(skewed)
    assert slow.tolist() == [True]
    assert reorthonormalized(orthonormalized(tall)[0])[1].tolist() == [False]
    results = iter([(tall, torch.tensor([True]), None), (skewed, torch.tensor([True]), None)])
    grams = iter([torch.eye(6).unsqueeze(0), (skewed.mT @ skewed)])
    monkeypatch.setattr(
        orthonormal, "_cholesky_qr", lambda _: (*next(results)[:2], next(grams).double())
    )
    basis, slow = orthonormalized(tall)
    assert slow.tolist() == [True]
    torch.testing.assert_close(basis[0].T @ basis[0], torch.eye(6), rtol=0, atol=1e-5)


def test_a_failing_cholesky_takes_householder_for_that_matrix_only(rng, monkeypatch):
    cholesky = torch.linalg.cholesky_ex

    def second_fails(gram):
        factor, info = cholesky(gram)
        return factor, info.index_fill(0, torch.tensor(1), 3)

    tall = torch.randn(3, 50, 6, generator=rng)
    right, _ = orthonormalized(tall)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", second_fails)
    for function, given in (
        (orthonormalized, tall),
        (well_conditioned, tall),
        (reorthonormalized, right),
    ):
        basis, slow = function(given)
        assert slow.tolist() == [False, True, False]
        torch.testing.assert_close(basis[1].T @ basis[1], torch.eye(6), rtol=0, atol=1e-5)
        spanned = basis[1] @ (basis[1].T @ given[1])
        torch.testing.assert_close(spanned, given[1], rtol=0, atol=1e-5)
    basis, _ = orthonormalized(tall)
    assert torch.equal(basis[::2], right[::2])


def test_householder_is_counted_as_slow_by_the_range_finder(rng, monkeypatch):
    matrix = low_rank_gradient(24, 40, rng).float()
    assert RANGE_FINDERS["randomized"](request(matrix, rank=5)).slow.tolist() == [False]
    monkeypatch.setattr(
        range_finders, "well_conditioned", lambda tall: (tall, torch.ones(1, dtype=torch.bool))
    )
    assert RANGE_FINDERS["randomized"](request(matrix, rank=5)).slow.tolist() == [True]
