"""Weights of 24 bits: a bfloat16 weight, which the model computes with, and 8 bits beside it.

Of the magnitude's 31 bits of a float32 the upper 23 are kept, rounded: 15 in the bfloat16 weight,
which is the nearest but for ties, and the difference in a signed byte. So a weight is held to
2^-16 of its size, and steps below 2^-9 of it, which bfloat16 alone loses, add up. By integers only,
so that every backend gets the same bits.

Source: FlashOptim (arXiv 2602.23349), which forms the correction in floating point.
"""

import torch
from torch import Tensor

_MAGNITUDE = 0x7FFFFFFF
_INF = 0x7F800000


def joined(weight: Tensor, low_bits: Tensor) -> Tensor:
    """The float32 weight of a bfloat16 one and its low bits, int8, of any equal shape."""
    bits = weight.contiguous().view(torch.int16).int()
    high = bits & 0x7FFF
    # A weight that was changed elsewhere may have become Inf, or smaller than what is taken off it.
    low = low_bits.where(high < _INF >> 16, 0)
    size = ((high << 8) + low).clamp_(min=0) << 8
    return torch.where(bits < 0, size | ~_MAGNITUDE, size).view(torch.float32)


def split(wide: Tensor, weight: Tensor, low_bits: Tensor) -> None:
    """Writes a float32 weight as a bfloat16 one and its low bits; Inf and NaN have none."""
    bits = wide.contiguous().view(torch.int32)
    size = bits & _MAGNITUDE
    rounded = (size + 0x80) >> 8
    high = (rounded + 0x80) >> 8
    low = rounded - (high << 8)
    special = size >= _INF
    high = torch.where(special, (size | (size > _INF).int() * 0x400000) >> 16, high)
    low_bits.copy_(low.where(~special, 0))
    weight.copy_(torch.where(bits < 0, high | 0x8000, high).to(torch.int16).view(torch.bfloat16))
