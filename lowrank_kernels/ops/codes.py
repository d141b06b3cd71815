"""The formats in which a state holds moments: float32, bfloat16, and codes of 8 bits with scales.

A code holds the root of what is largest in a group as Q, and of all else in proportion:

    M = sign(q) (q / 127)^2 A,        A = max |M| of the group,        q from -127 to 127
    V = S^2,   S = (p / 255)^2 B,     B = max sqrt(V) of the group,    p from 0 to 255

So M follows a square law, and V one of the fourth power: at beta2 = 0.999 V moves by less than half
a code a step, and what counts is that a small V is never taken for a still smaller one. p is
rounded stochastically, in bfloat16 too, since to the nearest most of V would never move again; a
V > 0 never becomes 0, and M = 0 stays 0. Scales are float32: in bfloat16 they would not decay.

A group is 64 channels of one direction of a projected parameter, 256 neighbours in a row of what
has its weight's shape, and 256 elements in row-major order of another one; the last may be short.

All of it is products, a division, a root and integers, none of which is followed by an addition, so
that every backend computes the same bits from the same moments.

Source: the dynamic codes of 8-bit optimizers (arXiv 2110.02861), FlashOptim's companding (arXiv
2602.23349), stochastic rounding of V against what arXiv 2505.00347 calls signal swamping.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .contract import CHANNELS_A_SCALE, Matrices, Side, rank_axis
from .noise import MOMENTS_SALT, noise, rounded_to_bfloat16

ELEMENTS_A_SCALE = 256

# Codes in units of 2^-16, so that rounding is an addition of integers.
_UNIT = 16
_SIGNED, _UNSIGNED = 127, 255
_NEAREST = 1 << (_UNIT - 1)

FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


class Stored(NamedTuple):
    """M and V of one parameter as a state holds them; codes, and nothing else, have scales."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_scale: Tensor | None = None
    exp_avg_sq_scale: Tensor | None = None

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Stored":
        """Those of a parameter's state."""
        return cls(*map(state.get, cls._fields))  # type: ignore[arg-type]


class Groups(NamedTuple):
    """Which elements share a scale: so many neighbours along an axis of a matrix, or, without an
    axis, in row-major order.
    """

    axis: int | None
    size: int

    def scales(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scales of a tensor."""
        if self.axis is None:
            return (-(-math.prod(shape) // self.size),)
        return tuple(-(-n // self.size) if i == self.axis else n for i, n in enumerate(shape))


# Of parameters that are not projected.
FLAT_GROUPS = Groups(None, ELEMENTS_A_SCALE)
# Of what has a projected weight's shape: whoever has some of its rows has their scales.
ROW_GROUPS = Groups(1, ELEMENTS_A_SCALE)


def channel_groups(side: Side) -> Groups:
    """Those of a projected parameter's moments, of R's shape."""
    return Groups(1 - rank_axis(side), CHANNELS_A_SCALE)


def new_stored(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, groups: Groups
) -> Stored:
    """M = V = 0; with int8 as dtype in codes."""
    if dtype is not torch.int8:
        return Stored(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))
    codes = (torch.zeros(shape, dtype=d, device=device) for d in (torch.int8, torch.uint8))
    scales = (
        torch.zeros(groups.scales(shape), dtype=torch.float32, device=device) for _ in range(2)
    )
    return Stored(*codes, *scales)


def stored_of(matrices: Matrices) -> list[Stored]:
    """Those of a batch."""
    tensors: list[Sequence[Tensor]] = [matrices.exp_avgs, matrices.exp_avg_sqs]
    if matrices.exp_avgs[0].dtype is torch.int8:
        tensors += [matrices.exp_avg_scales, matrices.exp_avg_sq_scales]
    return [Stored(*each) for each in zip(*tensors, strict=True)]


def loaded(stored: Stored, groups: Groups) -> tuple[Tensor, Tensor]:
    """M and V in the dtype of arithmetic: copies, unless they are held in it."""
    if stored.exp_avg_scale is None or stored.exp_avg_sq_scale is None:
        wide = torch.promote_types(stored.exp_avg.dtype, torch.float32)
        return stored.exp_avg.to(wide), stored.exp_avg_sq.to(wide)
    exp_avg = decoded(stored.exp_avg, stored.exp_avg_scale, groups)
    return exp_avg, decoded(stored.exp_avg_sq, stored.exp_avg_sq_scale, groups).square_()


def store(
    stored: Stored, exp_avg: Tensor, exp_avg_sq: Tensor, groups: Groups, bits: Tensor | None = None
) -> None:
    """Writes M and V into a state.

    Args:
        stored: where.
        exp_avg: M, in the dtype of arithmetic.
        exp_avg_sq: V, likewise.
        groups: of codes.
        bits: int32, below 2^16, of the shape of V, which decide how it is rounded; None rounds to
            the nearest.
    """
    if stored.exp_avg_scale is not None and stored.exp_avg_sq_scale is not None:
        encode(stored.exp_avg, stored.exp_avg_scale, exp_avg, groups, None)
        encode(stored.exp_avg_sq, stored.exp_avg_sq_scale, _root(exp_avg_sq), groups, bits)
        return
    stored.exp_avg.copy_(exp_avg)
    if stored.exp_avg_sq.dtype is torch.bfloat16 and bits is not None:
        exp_avg_sq = rounded_to_bfloat16(exp_avg_sq, bits)
    stored.exp_avg_sq.copy_(exp_avg_sq)


def decoded(codes: Tensor, scales: Tensor, groups: Groups) -> Tensor:
    """M of its codes, int8, or the root of V of its codes, uint8: float32, a new tensor."""
    share = codes.float() * (1 / _largest(codes))
    return share.mul_(share.abs()).mul_(_spread(scales, codes.shape, groups))


def encode(
    codes: Tensor, scales: Tensor, values: Tensor, groups: Groups, bits: Tensor | None
) -> None:
    """Writes M or the root of V as codes, each group's largest into `scales`."""
    sizes = values.abs()
    scales.copy_(_largest_of_groups(sizes, groups))
    shares = sizes / _spread(scales.where(scales > 0, 1.0), values.shape, groups)
    places = (_root(shares) * float(_largest(codes) << _UNIT)).int()
    found = (places + (_NEAREST if bits is None else bits)) >> _UNIT
    if codes.dtype is torch.uint8:
        found = torch.where(values > 0, found.clamp_(min=1), 0)
    codes.copy_(torch.where(values < 0, -found, found))


def _root(values: Tensor) -> Tensor:
    """Correctly rounded: torch's root of float32 is not, on CPUs where it is MKL's."""
    return values.double().sqrt_().float()


def _largest(codes: Tensor) -> int:
    return _SIGNED if codes.dtype is torch.int8 else _UNSIGNED


def _largest_of_groups(sizes: Tensor, groups: Groups) -> Tensor:
    matrix, axis = (sizes, groups.axis) if groups.axis is not None else (sizes.reshape(1, -1), 1)
    whole = matrix.shape[axis] // groups.size * groups.size
    rest = matrix.shape[axis] - whole
    cut = [*matrix.shape[:axis], whole // groups.size, groups.size, *matrix.shape[axis + 1 :]]
    parts = [matrix.narrow(axis, 0, whole).reshape(cut)]
    if rest:
        parts.append(matrix.narrow(axis, whole, rest).unsqueeze(axis))
    # Only in a group of some elements there is a largest one.
    found = [part.amax(axis + 1) for part in parts if part.shape[axis]]
    scales = torch.cat(found, axis) if found else sizes.new_empty(0)
    return scales.view(groups.scales(sizes.shape))


def _spread(scales: Tensor, shape: Sequence[int], groups: Groups) -> Tensor:
    """The scale of each element."""
    if groups.axis is None:
        return scales.repeat_interleave(groups.size)[: math.prod(shape)].view(shape)
    spread = scales.repeat_interleave(groups.size, groups.axis)
    return spread.narrow(groups.axis, 0, shape[groups.axis])


def channel_noise(exp_avg_sq: Tensor, side: Side, salt: int, step: int | Tensor) -> Tensor:
    """What rounds V of a projected parameter."""
    axis, device = rank_axis(side), exp_avg_sq.device
    channels = torch.arange(exp_avg_sq.shape[1 - axis], device=device).unsqueeze(axis)
    places = torch.arange(exp_avg_sq.shape[axis], device=device).unsqueeze(1 - axis)
    return noise(channels, places, salt + MOMENTS_SALT, step)


def flat_noise(
    first: int, count: int, salt: int, step: int | Tensor, device: torch.device
) -> Tensor:
    """What rounds elements `first` and following of V of another parameter, in row-major order.

    Their channel is the group that they are of, of which `first` has to be a multiple.
    """
    number = torch.arange(first, first + count, device=device)
    channels, places = number // ELEMENTS_A_SCALE, number % ELEMENTS_A_SCALE
    return noise(channels, places, salt + MOMENTS_SALT, step)
