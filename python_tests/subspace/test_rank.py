"""The rank that a gradient needs, against exact tail energies."""

import pytest
import torch
from subspace.test_range_finders import request, spectrum_matrix
from torch import nn

from lowrank_kernels import GaLoreAdamW, Subspace
from lowrank_kernels.subspace.range_finders import RANGE_FINDERS
from lowrank_kernels.subspace.refresh import adaptive_rank

SPECTRA = {
    "geometric": 0.8 ** torch.arange(64).double(),
    "power": torch.arange(1, 65).double() ** -1.0,
    "slow": torch.arange(1, 65).double() ** -0.5,
    "step": torch.cat([torch.ones(9), 0.05 * torch.ones(55)]).double(),
}


def exact_rank(values, share):
    """The smallest rank whose tail holds at most this share."""
    energies = values.square() / values.square().sum()
    return next(r for r in range(len(values) + 1) if float(energies[r:].sum()) <= share + 1e-12)


@pytest.mark.parametrize("share", [0.5, 0.3, 0.1, 0.03])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", ["svd", "randomized", "power"])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_rank_is_that_of_the_exact_tail_within_one(name, spectrum, share, transposed, rng):
    values = SPECTRA[spectrum]
    matrix = spectrum_matrix(values, 64, 150, rng, torch.float32)
    found = RANGE_FINDERS[name](
        request(matrix.T if transposed else matrix, rank=64, power_iterations=2)
    )
    rank = adaptive_rank(found.energies[0].tolist(), Subspace(residual_energy=share))
    assert abs(rank - exact_rank(values, share)) <= (0 if name == "svd" else 1)


@pytest.mark.parametrize("spectrum", ["geometric", "power", "step"])
def test_a_sketch_at_a_smaller_largest_rank_finds_it_too(spectrum, rng):
    values = SPECTRA[spectrum]
    matrix = spectrum_matrix(values, 64, 150, rng, torch.float32)
    energies = RANGE_FINDERS["randomized"](request(matrix, rank=20)).energies[0].tolist()
    assert (
        abs(adaptive_rank(energies, Subspace(residual_energy=0.1)) - exact_rank(values, 0.1)) <= 1
    )


@pytest.mark.parametrize("name", ["randomized", "power"])
def test_an_optimizer_resolves_a_small_tail_where_products_in_bfloat16_are_fast(
    name, rng, monkeypatch
):
    """Their errors of 2^-9 look like such a tail."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    values, share = 0.5 ** torch.arange(64).double(), 1e-5
    param = nn.Parameter(torch.zeros(64, 150))
    param.grad = spectrum_matrix(values, 64, 150, rng, torch.float32)
    subspace = Subspace(name, residual_energy=share)
    optimizer = GaLoreAdamW([{"params": [param], "rank": 48}], subspace=subspace)
    optimizer.step()
    assert abs(optimizer.stats()[0]["rank"] - exact_rank(values, share)) <= 1


def test_bounds_and_multiples():
    def rank(share, min_rank=1, rank_multiple=1, energies=(0.5, 0.2, 0.1, 0.05, 0.05)):
        subspace = Subspace(residual_energy=share, min_rank=min_rank, rank_multiple=rank_multiple)
        return adaptive_rank(energies, subspace)

    assert rank(0.25) == 3
    assert rank(0.25, 4) == 4
    assert rank(0.25, 9) == 5, "no more than there are"
    assert rank(0.25, 1, 4) == 4
    assert rank(0.11, 1, 4) == 5, "a multiple is cut, too"
    assert rank(0.0) == 5
    assert rank(1.0) == 1
    assert rank(1.0, 2) == 2
    assert rank(0.25, energies=[0.5, 0.25, 0.25]) == 2, "at most: the share itself will do"
    assert rank(None) == 5
