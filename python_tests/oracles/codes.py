"""Codes of moments in float64, written from their formulas: what may a new code be?

It shares nothing with the package. A share x / scale has the place Q 2^16 sqrt(share), of which
2^16 make a code. Arithmetic in float32 finds a share that is some error off, and by it the next
code where the place is near a border.
"""

import torch
from torch import Tensor

SIGNED, UNSIGNED = 127, 255
NEAREST = 1 << 15
EPS = torch.finfo(torch.float32).eps
# Of the root and of the product with Q 2^16, in float32, where the place is below 2^24.
PLACES_OFF = 2


def spread(scales: Tensor, shape: tuple[int, ...], axis: int, size: int) -> Tensor:
    """The scale of each element, float64."""
    return scales.double().repeat_interleave(size, axis).narrow(axis, 0, shape[axis])


def largest(sizes: Tensor, axis: int, size: int) -> Tensor:
    """Of each group."""
    parts = torch.split(sizes, size, axis)
    return torch.stack([part.amax(axis) for part in parts], axis)


def decoded_avg(codes: Tensor, scales: Tensor) -> Tensor:
    share = codes.double() / SIGNED
    return share * share.abs() * scales


def decoded_avg_sq(codes: Tensor, scales: Tensor) -> Tensor:
    return ((codes.double() / UNSIGNED).square() * scales).square()


def avg_codes(share: Tensor, error: float) -> tuple[Tensor, Tensor]:
    """The least and the largest code of M for a share of its scale."""
    return tuple(
        _code(_place(share + side * error, SIGNED) + side * PLACES_OFF, NEAREST) for side in (-1, 1)
    )


def avg_sq_codes(share: Tensor, error: float, bits: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest code of V for a share of its root's scale, rounded by `bits`."""
    low, high = (
        _code((_place(share + side * error, UNSIGNED) + side * PLACES_OFF).clamp(min=0), bits)
        for side in (-1, 1)
    )
    return low.clamp(min=1).where(share > 0, 0), high.clamp(min=1).where(share > 0, 0)


def _place(share: Tensor, most: int) -> Tensor:
    share = share.clamp(-1, 1)
    return share.sign().long() * (most * 2**16 * share.abs().sqrt()).long()


def _code(place: Tensor, bits: Tensor | int) -> Tensor:
    return place.sign() * ((place.abs() + bits) >> 16)
