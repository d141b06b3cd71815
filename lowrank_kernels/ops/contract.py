"""The contract of the three operations: shapes, dtypes, scalars and errors, for every backend.

Notation (GaLore, arXiv 2403.03507; Fira, arXiv 2410.01623), for a weight W of rows x cols:

    side    basis P    projected gradient R    a channel is      moments M, V, direction N
    LEFT    rows x r   R = P^T G, r x cols     a column of G, R  r x cols
    RIGHT   cols x r   R = G P,   rows x r     a row of G, R     rows x r

The rank axis of R is axis 0 on the left and axis 1 on the right. G is summed over that same axis
for its channel norms, so `rank_axis(side)` serves every channel sum.

All arithmetic is in float32, or in float64 for float64 weights. Moments are stored in that dtype,
in bfloat16 or in 8-bit codes (see `codes`), and N is formed of them before they are rounded.

An operation takes a batch: B matrices that are equal in shape, strides, dtypes, side and rank, so
that a backend can serve them in one launch. What passes between the operations is stacked, one
entry a matrix.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

# Above this kappa |S| is a small difference of large sums when the gradient lies near the span of
# the basis, and half precision rounds away what is left: of R, or of a basis that was orthonormal.
# Below it the difference keeps at least a quarter of either, and the error of |S|^2 from one
# rounding of R stays under 1.2e-2, systematic signs assumed; random ones average out.
MAX_KAPPA_HALF_PRECISION = 0.5


# Of a projected parameter, that share a scale where moments are codes of 8 bits: 64 divides every
# tile of operation 1, which therefore finds the largest of a group by itself.
CHANNELS_A_SCALE = 64


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


def moment_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the arithmetic for weights of a dtype: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


# A number for the whole batch, or a float64 tensor on its device with one value a matrix: what a
# captured CUDA graph reads anew at each replay.
Scalar = float | Tensor
Number = TypeVar("Number", int, float)


def scalar_of(scalar: Number | Tensor, index: int | slice) -> Number | Tensor:
    """The value for one matrix of the batch, or the values for some."""
    return scalar[index] if isinstance(scalar, Tensor) else scalar


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
    """The scalars for one matrix of the batch, or for some."""
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


class Scalars(NamedTuple):
    """Run-time scalars of one step.

    Attributes:
        adam: of operation 1.
        scale: alpha of the papers.
        step_size: learning rate, with the bias correction where the moments do not carry it.
        decay: learning rate times weight decay.
        step: the 1-based step, from which stochastic rounding draws; a tensor has one value a
            matrix, int32.
    """

    adam: AdamScalars
    scale: float
    step_size: Scalar
    decay: Scalar
    step: int | Tensor = 0


class Matrices(NamedTuple):
    """The tensors of a batch at one step, a list with an entry for each matrix.

    Attributes:
        side: which side of G the bases multiply.
        residual: Fira's form; None leaves the residual out (GaLore).
        params: W, rows x cols; operation 3 writes it.
        grads: G, rows x cols, real floating point, any strides.
        bases: P, rows x r on the left, cols x r on the right.
        exp_avgs: M, r x cols on the left, rows x r on the right; float32, float64, bfloat16 or
            codes in int8, contiguous; operation 1 writes it.
        exp_avg_sqs: V, as `exp_avgs`; codes in uint8.
        limiter_norms: 0-d, the norm that Fira's limiter stored last, 0 or -1 for none (see
            `reference.channel_scale`); operation 2 writes it. Empty where that is not asked for.
        salts: rounds bfloat16 weights stochastically; None rounds to nearest.
        exp_avg_scales: float32, contiguous, a scale for 64 channels of each direction:
            r x ceil(cols / 64) on the left, ceil(rows / 64) x r on the right. Empty without codes.
        exp_avg_sq_scales: as `exp_avg_scales`.
        moment_salts: rounds V stochastically where it is held in fewer than 32 bits; None rounds
            to nearest.
        orthonormal: whether the bases are, up to the rounding of their dtype. Of codes they are
            not: then |S|^2 has to be formed literally where it is a small difference, see
            `MAX_KAPPA_HALF_PRECISION`.
        projected: whether `grads` are R already: contiguous, in float32, half precision or the
            dtype of the arithmetic. Not with a residual, which is G's.

    Stochastic rounding draws from a counter, see `noise`: for element (c, d) of a matrix, c its
    channel and d its place in the channel. A bfloat16 weight is rounded away from zero if the 16
    bits that bfloat16 drops and those of the noise add up to 2^16 or more. Salts below 2^32, one a
    matrix, keep equal matrices apart.
    """

    side: Side
    residual: Residual | None
    params: list[Tensor]
    grads: list[Tensor]
    bases: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    limiter_norms: list[Tensor]
    salts: tuple[int, ...] | None = None
    exp_avg_scales: Sequence[Tensor] = ()
    exp_avg_sq_scales: Sequence[Tensor] = ()
    moment_salts: tuple[int, ...] | None = None
    orthonormal: bool = True
    projected: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic, and so of R, N, the sums and the limiter's norms."""
        return moment_dtype(self.exp_avgs[0].dtype)


class ChannelSums(NamedTuple):
    """Squared norms of each channel of N, R and E = G - kappa back(R), in the dtype of arithmetic.

    E need not be formed: for an orthonormal basis |e_j|^2 = |g_j|^2 - (2 kappa - kappa^2) |r_j|^2.
    B x channels each. A backend may hand over B x slots x channels instead, partial sums that add
    up in their order.
    """

    direction: Tensor
    projected: Tensor
    residual: Tensor


class Projection(NamedTuple):
    """What operation 1 hands to the other two.

    Attributes:
        direction: N, B x the shape of R; rounded to what operation 3 multiplies where nothing else
            reads it.
        projected: R, B x its shape.
        sums: for Fira.
        grads: G in another layout, if the backend has made a copy that operation 3 reads, too.
    """

    direction: Tensor
    projected: Tensor
    sums: ChannelSums | None
    grads: Tensor | None = None


class Operations(Protocol):
    """The three operations of a backend, prepared for a batch.

    `matrices` may be those that they were prepared for or, later, others with gradients elsewhere
    but of the same layout: nothing else is checked again. Notation as at the head of this file.
    """

    def project_moments(
        self, matrices: Matrices, adam: AdamScalars, step: int | Tensor = 0
    ) -> Projection:
        """Operation 1: R = P^T G or G P, the Adam moments of R in place, the direction N, and
        Fira's channel sums if there is a residual. From `step`, see `Scalars.step`, draws what
        rounds the moments. R that is given is not written.

        Source: GaLore (arXiv 2403.03507), algorithm 2; Fira (arXiv 2410.01623), algorithm 1.
        """

    def channel_scale(self, matrices: Matrices, sums: ChannelSums) -> Tensor:
        """Operation 2: Fira's channel factors phi', limited; no look at G or W, and the host waits
        for nothing.

        Returns:
            B x channels, in the dtype of the sums; 0 for a channel whose gradient was not finite.

        Source: Fira (arXiv 2410.01623), norm-based scaling and norm-growth limiter.
        """

    def back_project_update(
        self,
        matrices: Matrices,
        projection: Projection,
        factor: Tensor | None,
        scalars: Scalars,
    ) -> None:
        """Operation 3: W <- (1 - decay) (W - step_size (back(B) + rho phi' (x) G)), with
        B = scale N - rho kappa phi' (x) R for Fira and B = scale N, without the G term, for GaLore.

        Source: the two products of Fira's update in one, W - s (alpha P N + S), S = phi' (x) (G -
        kappa P R).
        """


def check_matrices(matrices: Matrices) -> None:
    """Raises ValueError or TypeError if the operations cannot run on these tensors."""
    count = len(matrices.params)
    param, grad, basis, exp_avg, exp_avg_sq = (
        _first(name, tensors, count)
        for name, tensors in (
            ("param", matrices.params),
            ("grad", matrices.grads),
            ("basis", matrices.bases),
            ("exp_avg", matrices.exp_avgs),
            ("exp_avg_sq", matrices.exp_avg_sqs),
        )
    )
    for name, matrix in (("param", param), ("grad", grad), ("basis", basis)):
        if matrix.dim() != 2 or not matrix.is_floating_point():
            raise ValueError(
                f"{name} must be a real floating-point matrix, got shape {tuple(matrix.shape)}"
                f" and {matrix.dtype}"
            )
    if any(size > 1 and not step for size, step in zip(param.shape, param.stride(), strict=True)):
        raise ValueError(f"param must not overlap itself, got strides {param.stride()}")
    shape, rank, device = (param.shape[0], param.shape[1]), basis.shape[1], param.device
    low = projected_shape(shape, matrices.side, rank)
    _check_like("grad", grad, low if matrices.projected else shape, grad.dtype, device)
    _check_like("basis", basis, basis_shape(shape, matrices.side, rank), basis.dtype, device)
    _check_like("exp_avg", exp_avg, low, exp_avg.dtype, device)
    if exp_avg.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.int8):
        raise TypeError(f"exp_avg must be float32, float64, bfloat16 or int8, got {exp_avg.dtype}")
    coded = exp_avg.dtype is torch.int8
    if torch.float64 in (param.dtype, grad.dtype) and exp_avg.dtype.itemsize < 4:
        raise TypeError(f"moments in {exp_avg.dtype} are for float32 and half precision")
    _check_like("exp_avg_sq", exp_avg_sq, low, torch.uint8 if coded else exp_avg.dtype, device)
    if coded:
        axis = 1 - rank_axis(matrices.side)
        scales = (
            (name, _first(name, tensors, count))
            for name, tensors in (
                ("exp_avg_scale", matrices.exp_avg_scales),
                ("exp_avg_sq_scale", matrices.exp_avg_sq_scales),
            )
        )
        expected = tuple(-(-n // CHANNELS_A_SCALE) if i == axis else n for i, n in enumerate(low))
        for name, scale in scales:
            _check_like(name, scale, expected, torch.float32, device)
            if not scale.is_contiguous():
                raise ValueError(f"{name} must be contiguous, got strides {scale.stride()}")
    for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if not moment.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {moment.stride()}")
    if matrices.projected:
        _check_projected(matrices)
    if matrices.limiter_norms:
        limiter_norm = _first("limiter_norm", matrices.limiter_norms, count)
        _check_like("limiter_norm", limiter_norm, (), matrices.dtype, device)
    if matrices.salts is not None and param.dtype is not torch.bfloat16:
        raise TypeError(f"stochastic rounding serves bfloat16 weights, param is {param.dtype}")
    for name, salts in (("salts", matrices.salts), ("moment_salts", matrices.moment_salts)):
        if salts is not None and len(salts) != count:
            raise ValueError(f"{name}: a batch needs {count}, got {len(salts)}")


def _check_projected(matrices: Matrices) -> None:
    grad = matrices.grads[0]
    if matrices.residual is not None:
        raise ValueError("a residual needs gradients that are not projected")
    if grad.dtype not in (torch.float32, torch.bfloat16, torch.float16, matrices.dtype):
        raise TypeError(f"a projected grad of {matrices.dtype} moments must not be {grad.dtype}")
    if not grad.is_contiguous():
        raise ValueError(f"a projected grad must be contiguous, got strides {grad.stride()}")


def _first(name: str, tensors: Sequence[Tensor], count: int) -> Tensor:
    """The first of a batch, after a check that the others are like it."""
    if len(tensors) != count or not count:
        needed = count or "at least 1"
        raise ValueError(f"{name}: a batch needs {needed} tensors, got {len(tensors)}")
    first, *others = tensors
    for index, other in enumerate(others, start=1):
        _check_like(f"{name} {index}", other, first.shape, first.dtype, first.device)
        if other.stride() != first.stride():
            raise ValueError(
                f"{name} {index} must have the strides of the batch's first, {first.stride()},"
                f" got {other.stride()}"
            )
    return first


def _check_like(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype is not dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")
