"""torch's matrix products around the compiled passes of `lowrank_kernels._native`.

The moments, the direction and two of the channel sums are one compiled pass over R. G and W are
touched only by torch's in-place products, so there is no temporary of W's size.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .contract import (
    AdamScalars,
    ChannelSums,
    Noise,
    Projection,
    Residual,
    Scalar,
    Side,
    number,
    rank_axis,
)
from .notices import notice_once
from .reference import channel_scale as channel_scale

import_error: str | None = None
try:
    from .. import _native
except ImportError as error:
    import_error = str(error)

# Above this kappa |S| is a small difference of large sums when the gradient lies near the span of
# the basis, and bf16 products round away what is left. Below it the difference keeps at least a
# quarter of either, and the error of |S|^2 from one rounding of R stays under 1.2e-2, systematic
# signs assumed; random ones average out.
MAX_KAPPA_HALF_PRECISION = 0.5


def build_info() -> dict[str, Any]:
    """What the compiled module was built with and runs on; empty if it does not load."""
    return _native.build_info() if import_error is None else {}


def group_size(param: Tensor, grad: Tensor, rank: int) -> int:
    """Matrices a group: one, since each has a product of its own."""
    return 1


def project_moments(
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    side: Side,
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    adam: AdamScalars,
    residual: Residual | None,
) -> Projection:
    """As `reference.project_moments`."""
    grad = grads[0]
    if grad.dtype.itemsize < 4 and residual and residual.kappa > MAX_KAPPA_HALF_PRECISION:
        notice_once(
            logging.WARNING,
            f"{grad.dtype} gradients with Fira's paper form or a scale above"
            f" {MAX_KAPPA_HALF_PRECISION}: the projection runs in float32, on the reference path",
        )
        return reference.project_moments(grads, bases, side, exp_avgs, exp_avg_sqs, adam, residual)
    matrices = zip(grads, bases, exp_avgs, exp_avg_sqs, strict=True)
    return reference.stacked([_project_one(*m, side, adam, residual) for m in matrices])


def _project_one(
    grad: Tensor,
    basis: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    side: Side,
    adam: AdamScalars,
    residual: Residual | None,
) -> Projection:
    factor = basis.to(grad.dtype)
    projected = factor.T @ grad if side is Side.LEFT else grad @ factor
    projected = projected.to(exp_avg.dtype).contiguous()
    direction = torch.empty_like(projected)
    axis = rank_axis(side)
    direction_sq, projected_sq = projected.new_empty(2, projected.shape[1 - axis])
    on_gpu = projected.device.type == "cuda"
    _native.adam_moments(
        projected=projected.data_ptr(),
        exp_avg=exp_avg.data_ptr(),
        exp_avg_sq=exp_avg_sq.data_ptr(),
        direction=direction.data_ptr(),
        direction_sq=direction_sq.data_ptr(),
        projected_sq=projected_sq.data_ptr(),
        rows=projected.shape[0],
        cols=projected.shape[1],
        channels_are_rows=side is Side.RIGHT,
        beta1=adam.beta1,
        beta2=adam.beta2,
        eps=adam.eps,
        bias_correction1=number("bias_correction1", adam.bias_correction1),
        bias_correction2=number("bias_correction2", adam.bias_correction2),
        threads=torch.get_num_threads(),
        device=projected.device.index if on_gpu else -1,
        stream=torch.cuda.current_stream(projected.device).cuda_stream if on_gpu else 0,
    )
    if residual is None:
        return Projection(direction, projected, None)
    # The identity of `ChannelSums`. Rounding can leave a channel in the span a little below 0.
    kappa = residual.kappa
    grad_sq = torch.linalg.vector_norm(grad, dim=axis, dtype=exp_avg.dtype).square_()
    residual_sq = grad_sq.sub_(projected_sq, alpha=2 * kappa - kappa**2).clamp_(min=0.0)
    sums = ChannelSums(direction_sq, projected_sq, residual_sq)
    return Projection(direction, projected, sums)


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
    """As `reference.back_project_update`, by one in-place product and one in-place axpy.

    Raises:
        TypeError: a scalar is a tensor; nothing was written.
        NotImplementedError: rounding is stochastic; nothing was written.
    """
    if noise is not None:
        raise NotImplementedError("the native backend rounds to nearest")
    step_size, keep = number("step_size", step_size), 1 - number("decay", decay)
    combined = projection.direction * scale
    if residual is not None and factor is not None:
        weights = residual.rho * factor.unsqueeze(1 + rank_axis(side))
        combined.addcmul_(projection.projected, weights, value=-residual.kappa)
        for param, grad, weight in zip(params, grads, weights, strict=True):
            # As in the reference; on a CPU the copy is saved when no channel was skipped, on a GPU
            # asking would wait for the device.
            usable = weight != 0
            if grad.device.type != "cpu" or not usable.all():
                grad = grad.where(usable, 0.0)
            param.addcmul_(grad, weight.to(param.dtype), value=-step_size)
    for param, basis, low in zip(params, bases, combined, strict=True):
        low, basis = low.to(param.dtype), basis.to(param.dtype)
        if side is Side.LEFT:
            param.addmm_(basis, low, beta=keep, alpha=-keep * step_size)
        else:
            param.addmm_(low, basis.T, beta=keep, alpha=-keep * step_size)
