"""Random bits from a counter, for stochastic rounding: no generator's state, any order, any device.

Element (c, d) of a matrix, c its channel and d its place in the channel, draws the lower 16 bits of

    mix(mix(key + c) + d),   key = mix(salt + mix(step)),   in 32-bit unsigned arithmetic.
"""

import torch
from torch import Tensor

# Added to a salt, for the moments to draw other numbers than their weight.
MOMENTS_SALT = 2**31


def noise(channels: Tensor, places: Tensor, salt: int, step: int | Tensor) -> Tensor:
    """16 random bits for each element.

    Args:
        channels: int64.
        places: int64, on the same device; they are broadcast against each other.
        salt: keeps equal matrices apart.
        step: 1-based.

    Returns:
        int32, from 0 to 2^16 - 1.
    """
    key = _mix(salt + _mix(torch.zeros((), dtype=torch.int64, device=channels.device) + step))
    return (_mix(_mix(key + channels) + places) & 0xFFFF).int()


def rounded_to_bfloat16(values: Tensor, bits: Tensor) -> Tensor:
    """A float32 tensor whose values bfloat16 holds, each of the two neighbours of the given one.

    With random bits, the further a value is from a neighbour, the less probable is that neighbour,
    so the mean is the value itself. Beyond the largest of bfloat16 there is no second neighbour:
    what is finite stays finite. Inf and NaN stay.

    Args:
        values: float32.
        bits: int32, below 2^16, of the shape of the values: what is added to the bits that
            bfloat16 drops; from 2^16 on their sum rounds away from zero.
    """
    raw = values.contiguous().view(torch.int32)
    rounded = ((raw + bits) & -0x10000).view(torch.float32)
    largest = torch.finfo(torch.bfloat16).max
    return rounded.clamp_(-largest, largest).where(values.isfinite(), values)


def _mix(value: Tensor) -> Tensor:
    """A bijection of 32-bit integers, held in int64, that spreads each bit over all others.

    Source: C. Wellons, "Prospecting for hash functions", lowbias32.
    """
    value = value & 0xFFFFFFFF
    value = (value ^ value >> 16) * 0x7FEB352D & 0xFFFFFFFF
    value = (value ^ value >> 15) * 0x846CA68B & 0xFFFFFFFF
    return value ^ value >> 16
