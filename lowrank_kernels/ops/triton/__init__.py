"""The Triton backend: three launches a group, two for GaLore, and no temporary of W's size.

In the channel coordinates of `project`, both sides are the same kernels with strides swapped.
"""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import (
    MAX_KAPPA_HALF_PRECISION,
    AdamScalars,
    Alike,
    ChannelSums,
    Noise,
    Projection,
    Residual,
    Scalar,
    Side,
    rank_axis,
)
from ..notices import notice_once
from ..reference import LIMITER_GROWTH, NORM_EPS, NOTHING_STORED, STORABLE_SHARE
from .config import (
    SCALE_BLOCK,
    SCALE_WARPS,
    gpu_of,
    group_matrices,
    project_config,
    project_source,
    update_config,
    update_source,
)
from .groups import Group, arrival_counters, device_table, group
from .project import project_kernel
from .scale import channel_scale_kernel
from .tuned import LARGEST_TILE, Problem
from .update import update_kernel

# Of the gradients whose residuals are formed at a time. The number was not measured.
RESIDUAL_ELEMENTS = 2**23

_LANGUAGE_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


class _Adam(NamedTuple):
    """`AdamScalars` for the kernel; 1 - beta is formed here, in float64."""

    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    eps: float
    bias_correction1: Scalar
    bias_correction2: Scalar


def obstacle(param: Tensor, grad: Tensor) -> str | None:
    """Why the kernels do not serve these matrices, None if they do.

    They would be right for any weight of short strides, but slow for one that is not dense: its
    lines are read in full, whatever share of them is the weight's.
    """
    if not (param.is_contiguous() or param.T.is_contiguous()):
        return f"the triton backend takes dense weights, not strides {param.stride()}"
    for name, matrix in (("weight", param), ("gradient", grad)):
        if not _fits_32_bits(matrix.stride()):
            return (
                f"the triton backend has 32-bit offsets within {LARGEST_TILE} rows and columns,"
                f" too few for the strides {matrix.stride()} of the {name}"
            )
    return None


def _fits_32_bits(strides: Sequence[int]) -> bool:
    return LARGEST_TILE * sum(abs(stride) for stride in strides) < 2**31


def group_size(param: Tensor, grad: Tensor, rank: int) -> int:
    """As many matrices as have their gradients in half of the L2 cache, unless a table knows.

    Operation 3 then reads most of G from L2, and the other half is left to everything else.
    """
    rows, cols = param.shape
    return group_matrices((rows, cols), rank, grad.dtype, gpu_of(param.device))


def workspace_bytes(alike: Alike, residual: Residual | None) -> int:
    """Bytes of temporaries at the peak: N, R and the sums; partial products, or phi'.

    The configurations are those of the GPU at hand, without one of the interpreter's.
    """
    gpu = gpu_of(torch.device(alike.device_type if torch.cuda.is_available() else "cpu"))
    count = min(alike.matrices, group_matrices(alike.shape, alike.rank, alike.dtype, gpu))
    sizes = (alike.side, alike.channels, alike.depth, alike.rank, count)
    problem = Problem(*sizes, (alike.dtype, alike.dtype))
    config = project_config(problem, gpu)
    tiles_k = triton.cdiv(alike.rank, config.rank)
    tiles = count * triton.cdiv(alike.channels, config.channels) * tiles_k
    pieces = tiles * config.split * config.channels if config.split > 1 else 0
    held = 2 * count * alike.rank * alike.channels
    scale = 0
    if residual is not None:
        held += 3 * count * tiles_k * alike.channels
        scale = count * (alike.channels + 2 * triton.cdiv(alike.channels, SCALE_BLOCK))
    formed = 0
    if residual is not None and _forms_residuals(residual, problem):
        formed = 2 * min(alike.numel, RESIDUAL_ELEMENTS) + alike.depth * alike.rank
    tables = 4 * 8 * count
    return 4 * (held + max(pieces * (config.rank + 1), scale, formed)) + tables


def explain(param: Tensor, grad: Tensor, side: Side, rank: int) -> dict[str, str]:
    """Where the configurations of operations 1 and 3 come from, the basis being like the weight."""
    axis, gpu = rank_axis(side), gpu_of(param.device)
    sizes = (side, param.shape[1 - axis], param.shape[axis], rank, 1)
    return {
        "project": project_source(Problem(*sizes, (grad.dtype, param.dtype)), gpu),
        "update": update_source(Problem(*sizes, (param.dtype, param.dtype)), gpu),
    }


def project_moments(
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    side: Side,
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    adam: AdamScalars,
    residual: Residual | None,
) -> Projection:
    """As `reference.project_moments`; the channel sums come as slots, one row a rank tile."""
    grads = _readable(grads)
    first, basis, moment = grads[0], bases[0], exp_avgs[0]
    groups = [group(tensors) for tensors in (grads, bases, exp_avgs, exp_avg_sqs)]
    problem = _problem(first, side, basis, (first.dtype, basis.dtype), groups)
    config = project_config(problem, gpu_of(first.device))
    tiles_k = triton.cdiv(problem.rank, config.rank)
    tiles = len(grads) * triton.cdiv(problem.channels, config.channels) * tiles_k
    stacked = (len(grads), *moment.shape)
    direction, projected = moment.new_empty(stacked), moment.new_empty(stacked)
    sums = moment.new_empty((3, len(grads), tiles_k, problem.channels) if residual else (0,))
    split = config.split > 1
    pieces = tiles * config.split * config.channels if split else 0
    partial, partial_sq = moment.new_empty(pieces * config.rank), moment.new_empty(pieces)
    if tiles:
        with _device_of(first):
            project_kernel[(tiles, config.split)](
                groups[0],
                _channel_strides(first, side),
                groups[1],
                basis.stride(),
                *groups[2:],
                _channel_strides(moment, side),
                direction,
                projected,
                sums,
                partial,
                partial_sq,
                arrival_counters(tiles if split else 0, first.device),
                problem.channels,
                problem.depth,
                problem.rank,
                config.split,
                _adam(adam),
                2 * residual.kappa - residual.kappa**2 if residual else 0.0,
                OPERAND=_LANGUAGE_TYPES[_operand(*problem.dtypes)],
                PRECISION=_precision(*problem.dtypes),
                SUMS=residual is not None,
                SPLIT=split,
                DEVICE_SCALARS=isinstance(adam.bias_correction1, Tensor),
                BC=config.channels,
                BR=config.rank,
                BD=config.depth,
                CUTS=config.cuts,
                num_warps=config.warps,
                num_stages=config.stages,
                maxnreg=config.registers,
            )
    if residual and _forms_residuals(residual, problem):
        _form_residuals(grads, bases, side, projected, residual.kappa, sums[2])
    return Projection(direction, projected, ChannelSums(*sums) if residual else None)


def _forms_residuals(residual: Residual, problem: Problem) -> bool:
    """Whether the kernel's difference is lost in what R and its basis were rounded to."""
    rounded = min(dtype.itemsize for dtype in problem.dtypes) < 4
    rounded = rounded or _precision(*problem.dtypes) == "tf32"
    return rounded and residual.kappa > MAX_KAPPA_HALF_PRECISION


def _form_residuals(
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    side: Side,
    projected: Tensor,
    kappa: float,
    residual_sq: Tensor,
) -> None:
    """|e|^2 of each channel, literally, in the place of the kernel's difference of large sums.

    A block of channels at a time, in float32 by torch: a gradient is read once more and multiplied
    once more.

    Args:
        grads: G of each matrix.
        bases: P of each matrix.
        side: of the basis.
        projected: R, stacked.
        kappa: of the residual G - kappa back(R).
        residual_sq: B x rank tiles x channels; the first slot gets the sum, the others 0.
    """
    axis = 1 - rank_axis(side)
    at_once = max(1, RESIDUAL_ELEMENTS // max(1, grads[0].shape[1 - axis]))
    residual_sq.zero_()
    for grad, basis, low, slots in zip(grads, bases, projected, residual_sq, strict=True):
        wide = basis.float()
        blocks = torch.split(grad, at_once, axis), torch.split(low, at_once, axis)
        for block, part, sums in zip(*blocks, torch.split(slots[0], at_once), strict=True):
            left, right = (wide, part) if side is Side.LEFT else (part, wide.T)
            outside = torch.addmm(block.float(), left, right, alpha=-kappa)
            torch.sum(outside.square_(), 1 - axis, out=sums)


def channel_scale(sums: ChannelSums, limiter_norms: Sequence[Tensor]) -> Tensor:
    """As `reference.channel_scale`, in one launch."""
    matrices, *slots, channels = sums.direction.shape
    device = sums.direction.device
    programs = triton.cdiv(channels, SCALE_BLOCK)
    factor = sums.direction.new_empty((matrices, channels))
    if programs:
        with _device_of(factor):
            channel_scale_kernel[(matrices * programs,)](
                *sums,
                factor,
                sums.direction.new_empty((2, matrices, programs)),
                group(limiter_norms),
                arrival_counters(matrices, device),
                channels,
                slots[0] if slots else 1,
                LIMITER_GROWTH,
                NORM_EPS,
                STORABLE_SHARE,
                NOTHING_STORED,
                BC=SCALE_BLOCK,
                num_warps=SCALE_WARPS,
            )
    return factor


def back_project_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    side: Side,
    projection: Projection,
    residual: Residual | None,
    factor: Tensor | None,
    *,
    scale: float,
    step_size: Scalar,
    decay: Scalar,
    noise: Noise | None,
) -> None:
    """As `reference.back_project_update`, in one launch."""
    if residual is not None:
        grads = _readable(grads)
    param, basis, direction = params[0], bases[0], projection.direction
    groups = [group(tensors) for tensors in (params, grads, bases)]
    problem = _problem(param, side, basis, (basis.dtype, basis.dtype), groups)
    config = update_config(problem, gpu_of(param.device))
    tiles_c = triton.cdiv(problem.channels, config.channels)
    tiles = len(params) * tiles_c * triton.cdiv(problem.depth, config.depth)
    if not tiles:
        return
    with _device_of(param):
        update_kernel[(tiles,)](
            groups[0],
            _channel_strides(param, side),
            groups[1],
            _channel_strides(grads[0], side),
            groups[2],
            basis.stride(),
            direction,
            projection.projected,
            _channel_strides(direction[0], side),
            direction if factor is None else factor,
            problem.channels,
            problem.depth,
            problem.rank,
            scale,
            residual.rho if residual else 0.0,
            residual.kappa if residual else 0.0,
            step_size,
            decay,
            device_table(noise.salts, param.device) if noise else direction,
            noise.step if noise else 0,
            OPERAND=_LANGUAGE_TYPES[basis.dtype],
            PRECISION=_precision(*problem.dtypes),
            RESIDUAL=residual is not None,
            DEVICE_SCALARS=isinstance(step_size, Tensor),
            NOISE=noise is not None,
            DEVICE_STEP=noise is not None and isinstance(noise.step, Tensor),
            BC=config.channels,
            BD=config.depth,
            BR=config.rank,
            CUTS=config.cuts,
            num_warps=config.warps,
            num_stages=config.stages,
            maxnreg=config.registers,
        )


def _problem(
    matrix: Tensor,
    side: Side,
    basis: Tensor,
    dtypes: tuple[torch.dtype, torch.dtype],
    groups: Sequence[Group],
) -> Problem:
    axis = rank_axis(side)
    wide = all(each.unit == 16 and each.base.data_ptr() % 16 == 0 for each in groups)
    return Problem(
        side,
        channels=matrix.shape[1 - axis],
        depth=matrix.shape[axis],
        rank=basis.shape[1],
        matrices=len(groups[0].offsets),
        dtypes=dtypes,
        wide=wide,
    )


def _readable(grads: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradients, copied if no axis of theirs is contiguous: each element would cost a line."""
    strides = grads[0].stride()
    if 1 in strides:
        return grads
    notice_once(
        logging.WARNING,
        f"gradients with strides {strides} are copied at every step: the triton backend reads rows"
        " or columns that are contiguous",
    )
    return [grad.contiguous() for grad in grads]


def _adam(adam: AdamScalars) -> _Adam:
    return _Adam(
        adam.beta1,
        1 - adam.beta1,
        adam.beta2,
        1 - adam.beta2,
        adam.eps,
        adam.bias_correction1,
        adam.bias_correction2,
    )


def _channel_strides(matrix: Tensor, side: Side) -> tuple[int, int]:
    """Strides along the channels and along the other axis."""
    axis = rank_axis(side)
    return matrix.stride(1 - axis), matrix.stride(axis)


def _operand(grad: torch.dtype, basis: torch.dtype) -> torch.dtype:
    """Two half-precision operands of one kind stay as they are; anything mixed is float32."""
    return grad if grad is basis else torch.float32


def _precision(grad: torch.dtype, basis: torch.dtype) -> str:
    """How float32 is multiplied: by what the user allows; the rest is of no effect.

    Triton 3.7.1 takes "ieee" for TF32 on sm_100 where it sees that an operand was half precision;
    three TF32 products, which keep 22 bits of either operand, it leaves alone.
    """
    matmul = torch.backends.cuda.matmul
    # torch raises on the old switch once the new one was set.
    switch = getattr(matmul, "fp32_precision", None)
    if matmul.allow_tf32 if switch is None else switch == "tf32":
        return "tf32"
    return "ieee" if grad is basis else "tf32x3"


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Launches go to the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()
