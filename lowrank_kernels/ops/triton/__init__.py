"""The Triton backend: three launches a matrix (four with split-K), no temporary of W's size.

In the channel coordinates of `project`, both sides are the same kernels with strides swapped.
"""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import (
    AdamScalars,
    ChannelSums,
    Projection,
    Residual,
    Side,
    rank_axis,
)
from ..reference import LIMITER_GROWTH, NORM_EPS
from .config import SCALE_BLOCK, SCALE_WARPS, project_config, update_config
from .project import finish_split_kernel, project_kernel
from .scale import channel_scale_kernel
from .update import update_kernel

_LANGUAGE_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def project_moments(
    grad: Tensor,
    basis: Tensor,
    side: Side,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    adam: AdamScalars,
    residual: Residual | None,
) -> Projection:
    """As `reference.project_moments`; the channel sums come as slots, one row a rank tile."""
    axis = rank_axis(side)
    channels, depth, rank = grad.shape[1 - axis], grad.shape[axis], basis.shape[1]
    stride_gc, stride_gd = _channel_strides(grad, side)
    stride_c, stride_k = _channel_strides(exp_avg, side)
    config = project_config(channels, depth, rank, _processors(grad.device))
    tiles = triton.cdiv(rank, config.rank)
    direction, projected = torch.empty_like(exp_avg), torch.empty_like(exp_avg)
    sums = exp_avg.new_empty((3, tiles, channels) if residual else 0)
    partial = exp_avg.new_empty((config.split, channels, rank) if config.split > 1 else 0)
    partial_sq = exp_avg.new_empty((config.split, channels) if config.split > 1 else 0)
    cancelled = 2 * residual.kappa - residual.kappa**2 if residual else 0.0
    epilogue = (
        adam.beta1,
        1 - adam.beta1,
        adam.beta2,
        1 - adam.beta2,
        adam.eps,
        1 / adam.bias_correction1,
        1 / adam.bias_correction2,
        cancelled,
    )
    outputs = (exp_avg, exp_avg_sq, direction, projected, sums, partial, partial_sq)
    programs = triton.cdiv(channels, config.channels) * tiles
    with _device_of(grad):
        if programs:
            project_kernel[(programs, config.split)](
                grad,
                basis,
                *outputs,
                channels,
                depth,
                rank,
                tiles,
                stride_gc,
                stride_gd,
                *basis.stride(),
                stride_c,
                stride_k,
                *epilogue,
                OPERAND=_operand(grad, basis),
                PRECISION=_precision(),
                SUMS=residual is not None,
                SPLIT=config.split,
                BC=config.channels,
                BR=config.rank,
                BD=config.depth,
                num_warps=config.warps,
                num_stages=config.stages,
            )
        if programs and config.split > 1:
            finish_split_kernel[(programs,)](
                *outputs,
                channels,
                rank,
                tiles,
                stride_c,
                stride_k,
                *epilogue,
                SUMS=residual is not None,
                SPLIT=config.split,
                BC=config.channels,
                BR=config.rank,
                num_warps=config.warps,
            )
    return Projection(direction, projected, ChannelSums(*sums) if residual else None)


def channel_scale(sums: ChannelSums, limiter_norm: Tensor) -> Tensor:
    """As `reference.channel_scale`, in one launch."""
    tiles, channels = sums.direction.shape
    factor = limiter_norm.new_empty(channels)
    with _device_of(limiter_norm):
        channel_scale_kernel[(1,)](
            *sums,
            factor,
            limiter_norm,
            channels,
            tiles,
            LIMITER_GROWTH,
            NORM_EPS,
            BC=SCALE_BLOCK,
            num_warps=SCALE_WARPS,
        )
    return factor


def back_project_update(
    param: Tensor,
    grad: Tensor,
    basis: Tensor,
    side: Side,
    projection: Projection,
    residual: Residual | None,
    factor: Tensor | None,
    *,
    scale: float,
    step_size: float,
    decay: float,
) -> None:
    """As `reference.back_project_update`, in one launch."""
    axis = rank_axis(side)
    channels, depth, rank = param.shape[1 - axis], param.shape[axis], basis.shape[1]
    config = update_config(channels, depth, rank)
    tiles_d = triton.cdiv(depth, config.depth)
    programs = triton.cdiv(channels, config.channels) * tiles_d
    if not programs:
        return
    with _device_of(param):
        update_kernel[(programs,)](
            param,
            grad,
            basis,
            projection.direction,
            projection.projected,
            projection.direction if factor is None else factor,
            channels,
            depth,
            rank,
            tiles_d,
            *_channel_strides(param, side),
            *_channel_strides(grad, side),
            *basis.stride(),
            *_channel_strides(projection.direction, side),
            scale,
            residual.rho if residual else 0.0,
            residual.rho * residual.kappa if residual else 0.0,
            step_size,
            1 - decay,
            OPERAND=_LANGUAGE_TYPES[basis.dtype],
            PRECISION=_precision(),
            RESIDUAL=residual is not None,
            BC=config.channels,
            BD=config.depth,
            BR=config.rank,
            num_warps=config.warps,
            num_stages=config.stages,
        )


def _channel_strides(matrix: Tensor, side: Side) -> tuple[int, int]:
    """Strides along the channels and along the other axis."""
    axis = rank_axis(side)
    return matrix.stride(1 - axis), matrix.stride(axis)


def _operand(grad: Tensor, basis: Tensor) -> tl.dtype:
    """Two half-precision operands of one kind stay as they are; anything mixed is float32."""
    return _LANGUAGE_TYPES[grad.dtype if grad.dtype is basis.dtype else torch.float32]


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


@functools.cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors; in the interpreter a number that makes small matrices split."""
    if device.type != "cuda":
        return 64
    return torch.cuda.get_device_properties(device).multi_processor_count


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Launches go to the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()
