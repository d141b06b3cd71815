"""The contract of the three operations: shapes, dtypes, scalars and errors, for every backend.

Notation (GaLore, arXiv 2403.03507; Fira, arXiv 2410.01623), for a weight W of rows x cols:

    side    basis P    projected gradient R    a channel is      moments M, V, direction N
    LEFT    rows x r   R = P^T G, r x cols     a column of G, R  r x cols
    RIGHT   cols x r   R = G P,   rows x r     a row of G, R     rows x r

The rank axis of R is axis 0 on the left and axis 1 on the right. G is summed over that same axis
for its channel norms, so `rank_axis(side)` serves every channel sum.

Moments are float32, or float64 for float64 weights; that dtype is the dtype of all arithmetic.

An operation takes a group: lists of B matrices that are equal in shape, strides, dtypes, side and
rank, so that a backend can serve them in one launch. What passes between the operations is stacked,
one entry a matrix.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

# Above this kappa |S| is a small difference of large sums when the gradient lies near the span of
# the basis, and half precision rounds away what is left: of R, or of a basis that was orthonormal.
# Below it the difference keeps at least a quarter of either, and the error of |S|^2 from one
# rounding of R stays under 1.2e-2, systematic signs assumed; random ones average out.
MAX_KAPPA_HALF_PRECISION = 0.5


class Side(enum.IntEnum):
    """The side of the gradient that the basis multiplies. State stores it as a plain int."""

    LEFT = 0
    RIGHT = 1


def rank_axis(side: Side) -> int:
    """The axis of R that has length r; G is reduced over the same axis for channel sums."""
    return 0 if side is Side.LEFT else 1


def basis_shape(shape: tuple[int, int], side: Side, rank: int) -> tuple[int, int]:
    """Shape of the basis P of a weight of this shape."""
    return (shape[0] if side is Side.LEFT else shape[1], rank)


def projected_shape(shape: tuple[int, int], side: Side, rank: int) -> tuple[int, int]:
    """Shape of R, and so of the moments and the direction."""
    return (rank, shape[1]) if side is Side.LEFT else (shape[0], rank)


class Alike(NamedTuple):
    """Equal dense matrices, as a workspace depends on them; no tensor is needed to ask.

    Attributes:
        shape: rows and cols of W.
        side: of the basis.
        rank: r.
        dtype: of W, G and P.
        device_type: where they lie, "cpu" or "cuda".
        matrices: how many there are; a group takes no more.
    """

    shape: tuple[int, int]
    side: Side
    rank: int
    dtype: torch.dtype
    device_type: str
    matrices: int = 1

    @property
    def channels(self) -> int:
        return self.shape[1 - rank_axis(self.side)]

    @property
    def depth(self) -> int:
        return self.shape[rank_axis(self.side)]

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


def moment_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 weights, else float32: a bf16 V never decays at beta2 = 0.999."""
    return torch.promote_types(dtype, torch.float32)


# A number for the whole group, or a float64 tensor on its device with one value a matrix: what a
# captured CUDA graph reads anew at each replay.
Scalar = float | Tensor


def scalar_of(scalar: Scalar, index: int | slice) -> Scalar:
    """The value for one matrix of the group, or the values for some."""
    return scalar[index] if isinstance(scalar, Tensor) else scalar


def number(name: str, scalar: Scalar) -> float:
    """The scalar, where only a number will do.

    Raises:
        TypeError: it is a tensor.
    """
    if isinstance(scalar, Tensor):
        raise TypeError(
            f"{name} is a tensor, which only eager calls of the reference and triton backends take"
        )
    return scalar


@dataclass(frozen=True, slots=True)
class AdamScalars:
    """Run-time scalars of the moment update, N = (M / c1) / (sqrt(V / c2) + eps).

    The official GaLore and Fira code keeps c1 = c2 = 1 here and multiplies the step size by
    sqrt(1 - beta2^t) / (1 - beta1^t); the paper form of Fira corrects the moments themselves.
    """

    beta1: float
    beta2: float
    eps: float
    bias_correction1: Scalar = 1.0
    bias_correction2: Scalar = 1.0


def adam_of(adam: AdamScalars, index: int | slice) -> AdamScalars:
    """The scalars for one matrix of the group, or for some."""
    return replace(
        adam,
        bias_correction1=scalar_of(adam.bias_correction1, index),
        bias_correction2=scalar_of(adam.bias_correction2, index),
    )


@dataclass(frozen=True, slots=True)
class Residual:
    """Fira's residual S = phi (x) (G - kappa back(R)), which enters the update times rho.

    Official code: kappa = scale, rho = 1. Paper, algorithm 1: kappa = 1, rho = scale.
    """

    kappa: float
    rho: float


class Noise(NamedTuple):
    """What stochastic rounding of bfloat16 weights draws from: a counter, no generator's state.

    Element (c, d) of a matrix, c its channel and d its place in the channel, is rounded away from
    zero if the 16 bits that bfloat16 drops and the lower 16 bits of

        mix(mix(key + c) + d),   key = mix(salt + mix(step)),   in 32-bit unsigned arithmetic,

    add up to 2^16 or more. Salts below 2^32, one a matrix, keep equal matrices apart; a tensor
    `step` has one value a matrix, int32.
    """

    salts: tuple[int, ...]
    step: int | Tensor


class ChannelSums(NamedTuple):
    """Squared norms of each channel of N, R and E = G - kappa back(R), in the moments' dtype.

    E need not be formed: for an orthonormal basis |e_j|^2 = |g_j|^2 - (2 kappa - kappa^2) |r_j|^2.
    B x channels each. A backend may hand over B x slots x channels instead, partial sums that add
    up in their order.
    """

    direction: Tensor
    projected: Tensor
    residual: Tensor


class Projection(NamedTuple):
    """What operation 1 hands to the other two: N and R, B x the shape of R each, and the sums."""

    direction: Tensor
    projected: Tensor
    sums: ChannelSums | None


def check_project_moments(
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    side: Side,
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
) -> None:
    """Raises before anything is written if operation 1 cannot run on these tensors."""
    grad, basis = _group("grad", grads, len(grads)), _group("basis", bases, len(grads))
    exp_avg = _group("exp_avg", exp_avgs, len(grads))
    exp_avg_sq = _group("exp_avg_sq", exp_avg_sqs, len(grads))
    _check_matrix("grad", grad)
    _check_matrix("basis", basis)
    rank = basis.shape[1]
    _check_like("basis", basis, basis_shape(_shape(grad), side, rank), None, grad.device)
    expected = projected_shape(_shape(grad), side, rank)
    _check_like("exp_avg", exp_avg, expected, None, grad.device)
    if exp_avg.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"exp_avg must be float32 or float64, got {exp_avg.dtype}")
    _check_like("exp_avg_sq", exp_avg_sq, expected, exp_avg.dtype, grad.device)
    for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if not moment.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {moment.stride()}")


def check_channel_scale(sums: ChannelSums, limiter_norms: Sequence[Tensor]) -> None:
    """Raises before anything is written if operation 2 cannot run on these tensors."""
    first = sums.direction
    if first.dim() not in (2, 3):
        raise ValueError(f"sums.direction must have 2 or 3 dimensions, got {tuple(first.shape)}")
    for name, value in zip(ChannelSums._fields, sums, strict=True):
        _check_like(f"sums.{name}", value, tuple(first.shape), first.dtype, first.device)
    limiter_norm = _group("limiter_norm", limiter_norms, first.shape[0])
    _check_like("limiter_norm", limiter_norm, (), first.dtype, first.device)


def check_back_project_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    side: Side,
    projection: Projection,
    residual: Residual | None,
    factor: Tensor | None,
    noise: Noise | None,
) -> None:
    """Raises before anything is written if operation 3 cannot run on these tensors."""
    count = len(params)
    param, grad = _group("param", params, count), _group("grad", grads, count)
    basis = _group("basis", bases, count)
    _check_matrix("param", param)
    if any(
        size > 1 and stride == 0 for size, stride in zip(param.shape, param.stride(), strict=True)
    ):
        raise ValueError(f"param must not overlap itself, got strides {param.stride()}")
    _check_like("grad", grad, _shape(param), None, param.device)
    rank = basis.shape[1]
    _check_like("basis", basis, basis_shape(_shape(param), side, rank), None, param.device)
    expected = (count, *projected_shape(_shape(param), side, rank))
    dtype = projection.direction.dtype
    _check_like("direction", projection.direction, expected, dtype, param.device)
    _check_like("projected", projection.projected, expected, dtype, param.device)
    if (residual is None) != (factor is None):
        raise ValueError("residual and factor go together: give both (Fira) or neither (GaLore)")
    if factor is not None:
        channels = param.shape[1 - rank_axis(side)]
        _check_like("factor", factor, (count, channels), dtype, param.device)
    if noise is not None:
        if param.dtype is not torch.bfloat16:
            raise TypeError(f"stochastic rounding serves bfloat16 weights, param is {param.dtype}")
        if len(noise.salts) != count:
            raise ValueError(f"noise must have {count} salts, got {len(noise.salts)}")


def _shape(matrix: Tensor) -> tuple[int, int]:
    return (matrix.shape[0], matrix.shape[1])


def _group(name: str, tensors: Sequence[Tensor], count: int) -> Tensor:
    """The first of a group, after a check that the others are like it."""
    if len(tensors) != count or not count:
        raise ValueError(
            f"{name}: a group needs {count or 'at least 1'} tensors, got {len(tensors)}"
        )
    first, *others = tensors
    for index, other in enumerate(others, start=1):
        _check_like(f"{name} {index}", other, tuple(first.shape), first.dtype, first.device)
        if other.stride() != first.stride():
            raise ValueError(
                f"{name} {index} must have the strides of the group's first, {first.stride()},"
                f" got {other.stride()}"
            )
    return first


def _check_matrix(name: str, tensor: Tensor) -> None:
    if tensor.dim() != 2 or not tensor.is_floating_point():
        raise ValueError(
            f"{name} must be a real floating-point matrix, got shape {tuple(tensor.shape)}"
            f" and {tensor.dtype}"
        )


def _check_like(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype | None,
    device: torch.device,
) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if dtype is not None and tensor.dtype is not dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")
