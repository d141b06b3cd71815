"""torch's matrix products around the compiled passes of `lowrank_kernels._native`.

The moments, the direction and two of the channel sums are one compiled pass over R. G and W are
touched only by torch's in-place products, so there is no temporary of W's size.
"""

from typing import Any

import torch
from torch import Tensor

from .contract import AdamScalars, ChannelSums, Projection, Residual, Side, rank_axis
from .reference import channel_scale as channel_scale

import_error: str | None = None
try:
    from .. import _native
except ImportError as error:
    import_error = str(error)

# Above this kappa the residual may be small against what a rounded basis gets wrong, and the exact
# back-projected norm is worth its product. With |P^T P - I| <= 2.4e-3 (bf16, 1024 x 256) the
# relative error of |S|^2 without it is at most 2.4e-3 (kappa / (1 - kappa))^2: 2.7e-4 at 0.25.
EXACT_NORM_KAPPA = 0.5


def build_info() -> dict[str, Any]:
    """What the compiled module was built with and runs on; empty if it does not load."""
    return _native.build_info() if import_error is None else {}


def project_moments(
    grad: Tensor,
    basis: Tensor,
    side: Side,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    adam: AdamScalars,
    residual: Residual | None,
) -> Projection:
    """As `reference.project_moments`."""
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
        bias_correction1=adam.bias_correction1,
        bias_correction2=adam.bias_correction2,
        threads=torch.get_num_threads(),
        device=projected.device.index if on_gpu else -1,
        stream=torch.cuda.current_stream(projected.device).cuda_stream if on_gpu else 0,
    )
    if residual is None:
        return Projection(direction, projected, None)
    grad_sq = torch.linalg.vector_norm(grad, dim=axis, dtype=exp_avg.dtype).square_()
    back_projected_sq = projected_sq
    if basis.dtype is not exp_avg.dtype and residual.kappa > EXACT_NORM_KAPPA:
        back_projected_sq = _back_projected_sq(projected, basis.to(exp_avg.dtype), side)
    sums = ChannelSums(direction_sq, projected_sq, back_projected_sq, grad_sq)
    return Projection(direction, projected, sums)


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
    """As `reference.back_project_update`, by one in-place product and one in-place axpy."""
    keep = 1 - decay
    combined = projection.direction * scale
    if residual is not None and factor is not None:
        factor = factor.unsqueeze(rank_axis(side))
        weight = residual.rho * factor
        combined.addcmul_(projection.projected, weight, value=-residual.kappa)
        # As in the reference; on a CPU the copy is saved when no channel was skipped, on a GPU
        # asking would wait for the device.
        usable = factor != 0
        if grad.device.type != "cpu" or not usable.all():
            grad = grad.where(usable, 0.0)
        param.addcmul_(grad, weight.to(param.dtype), value=-step_size)
    combined, basis = combined.to(param.dtype), basis.to(param.dtype)
    if side is Side.LEFT:
        param.addmm_(basis, combined, beta=keep, alpha=-keep * step_size)
    else:
        param.addmm_(combined, basis.T, beta=keep, alpha=-keep * step_size)


def _back_projected_sq(projected: Tensor, basis: Tensor, side: Side) -> Tensor:
    """|back(r)_j|^2 through the r x r Gram matrix, so that nothing of G's size is formed."""
    gram = basis.T @ basis
    mixed = gram @ projected if side is Side.LEFT else projected @ gram
    return mixed.mul_(projected).sum(rank_axis(side))
