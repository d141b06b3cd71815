"""Bases in 8 and 4 bits: every dtype decodes them exactly."""

import pytest
import torch

from lowrank_kernels.ops.bases import basis_entries, code_shapes, encode_basis, loaded_basis

FORMATS = pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=["int8", "int4"])
SHAPES = pytest.mark.parametrize("shape", [(2, 1), (64, 3), (130, 5), (512, 40), (0, 3)], ids=str)


def orthonormal(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(matrix)[0].float() if shape[0] else matrix.float()


@FORMATS
@SHAPES
def test_a_basis_is_decoded_exactly_by_every_dtype(shape, dtype):
    entries = basis_entries(orthonormal(shape), dtype)
    assert tuple(x.shape for x in entries.values()) == code_shapes(shape, dtype)
    wide = loaded_basis(entries)
    assert wide.shape == shape
    for narrow in (torch.bfloat16, torch.float16):
        assert torch.equal(wide.to(narrow).float(), wide)
    again = basis_entries(wide, dtype)
    assert all(torch.equal(entries[key], again[key]) for key in entries)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.int8, 0.02), (torch.uint8, 0.13)])
def test_a_basis_is_held_nearly(dtype, bound):
    basis = orthonormal((512, 64))
    error = loaded_basis(basis_entries(basis, dtype)) - basis
    assert float(error.norm() / basis.norm()) < bound


@FORMATS
def test_a_column_of_zeros_stays_so(dtype):
    basis = torch.zeros(128, 2)
    basis[:, 1] = orthonormal((128, 1))[:, 0]
    wide = loaded_basis(basis_entries(basis, dtype))
    assert not wide[:, 0].any()
    assert wide[:, 1].any()


def test_an_odd_number_of_rows_is_not_for_pairs():
    with pytest.raises(RuntimeError):
        encode_basis(torch.zeros(5, 2), torch.uint8)
