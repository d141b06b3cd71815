"""Ranks that leave a small share of the energy outside, on CPUs and GPUs that multiply bfloat16."""

import pytest
import torch
from subspace.test_range_finders import request, spectrum_matrix

from lowrank_kernels.subspace import Subspace
from lowrank_kernels.subspace.range_finders import RANGE_FINDERS
from lowrank_kernels.subspace.refresh import adaptive_rank

LARGEST = 64
SPECTRA = {
    "power": torch.arange(1, 129).double() ** -1.5,
    "geometric": 2.0 ** -torch.arange(128).double(),
    "rank 5": torch.cat([torch.ones(5), torch.zeros(123)]).double(),
}


def exact_rank(values, share):
    energies = values.square() / values.square().sum()
    outside = [float(energies[rank:].sum()) for rank in range(LARGEST)]
    return next((rank for rank, left in enumerate(outside) if left <= share), LARGEST)


@pytest.mark.parametrize("share", [1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", ["randomized", "power"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_does_not_depend_on_what_the_device_multiplies_fast(
    name, spectrum, share, dtype, rng, monkeypatch
):
    """Of a bfloat16 gradient its own rounding is part of it: only that bfloat16 adds none."""
    values = SPECTRA[spectrum]
    matrix = spectrum_matrix(values, 128, 200, rng, torch.float32).to(dtype)
    ranks = []
    for fast in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        asked = request(matrix, rank=LARGEST, power_iterations=2)._replace(measured=True)
        energies = RANGE_FINDERS[name](asked).energies[0].tolist()
        ranks.append(adaptive_rank(energies, Subspace(residual_energy=share)))
    assert ranks[0] == ranks[1]
    if dtype is torch.float32:
        assert abs(ranks[0] - exact_rank(values, share)) <= 1
