"""The formats in which a state holds a basis: the weight's dtype, or codes with scales.

    int8   P = q 2^-e, q from -127 to 127; a power of two for each column
    int4   P = q s,    q from -7 to 7, two in a byte; s for 64 entries of a column,
           of five significant bits

The scales have so few bits that every product q s is a number of bfloat16, and of every wider
dtype: a basis is decoded exactly, into whatever the weight has, and all that is computed from it
agrees. Of an orthonormal basis int8 keeps 98.8 % (P^T P - I has norm 0.02), int4 89 %.

Source: int4 bases are Q-GaLore's (arXiv 2407.08296), there with a scale and a zero point.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Of int4, that share a scale.
ENTRIES_A_SCALE = 64


class _Format(NamedTuple):
    """How the codes of a dtype are made."""

    largest: int  # code
    fractions: int  # that a scale may have between two powers of two
    entries: int | None  # of a column that share a scale; None for all


_FORMATS = {torch.int8: _Format(127, 1, None), torch.uint8: _Format(7, 16, ENTRIES_A_SCALE)}
BASIS_CODES = tuple(_FORMATS)
# Added to a code of four bits, so that none is negative.
_MIDDLE = 8


def code_shapes(shape: tuple[int, int], dtype: torch.dtype) -> tuple[tuple[int, int], ...]:
    """Shapes of the codes and the scales of a basis.

    Args:
        shape: d x r, d even for int4.
        dtype: of the codes: int8, or uint8 for int4.
    """
    rows, cols = shape
    size = _FORMATS[dtype].entries or max(1, rows)
    return (rows // 2 if dtype is torch.uint8 else rows, cols), (-(-rows // size), cols)


def encode_basis(basis: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and float32 scales of a basis, each entry to the nearest; see `code_shapes`."""
    form, basis = _FORMATS[dtype], basis.float()
    size = form.entries or max(1, len(basis))
    largest = [part.abs().amax(0) for part in torch.split(basis, size) if len(part)]
    bounds = torch.stack(largest) if largest else basis.new_zeros(0, basis.shape[1])
    fraction, exponent = torch.frexp(bounds / form.largest)
    steps = 2 * form.fractions
    scales = torch.ldexp((fraction * steps).ceil() / steps, exponent)
    scales = scales.where(bounds > 0, 1.0)
    codes = (basis / _spread(scales, len(basis))).round().to(torch.int8)
    if dtype is torch.uint8:
        pairs = (codes + _MIDDLE).to(torch.uint8).view(len(basis) // 2, 2, basis.shape[1])
        codes = pairs[:, 0] | pairs[:, 1] << 4
    return codes, scales


def decode_basis(codes: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    """The basis of these codes and scales, exactly, in `out`, d x r in any floating-point dtype."""
    if codes.dtype is torch.uint8:
        pairs = torch.stack([codes & 15, codes >> 4], 1).to(torch.int8) - _MIDDLE
        codes = pairs.view(out.shape)
    return torch.mul(codes, _spread(scales, len(out)), out=out)


def loaded_basis(state: Mapping[str, Any]) -> Tensor:
    """P of a projected parameter's state: a copy in float32, unless it is held as it is."""
    held: Tensor = state["basis"]
    if "basis_scale" not in state:
        return held
    rows = len(held) * (2 if held.dtype is torch.uint8 else 1)
    out = torch.empty(rows, held.shape[1], dtype=torch.float32, device=held.device)
    return decode_basis(held, state["basis_scale"], out)


def basis_entries(basis: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a state holds of P in a format: codes and scales, or P in a floating-point dtype."""
    if dtype.is_floating_point:
        return {"basis": basis.to(dtype)}
    return dict(zip(("basis", "basis_scale"), encode_basis(basis, dtype), strict=True))


def _spread(scales: Tensor, rows: int) -> Tensor:
    """The scale of each entry, or of each column if one serves all of it."""
    return scales if len(scales) == 1 else scales.repeat_interleave(ENTRIES_A_SCALE, 0)[:rows]
