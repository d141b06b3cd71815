"""The rival that needs no kernel of ours: torch's products, in-place passes, `addmm_`.

The same functions as a backend, so that the benches treat it as one. It is what a careful user
writes by hand: no temporary of W's size in GaLore, one in Fira (the scaled gradient), every other
pass in place. Its error is also "plain torch at this precision", twice which a kernel may have.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_kernels.ops import AdamScalars, ChannelSums, Projection, Residual, Side
from lowrank_kernels.ops.contract import rank_axis
from lowrank_kernels.ops.reference import channel_scale as channel_scale


def project_moments(
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    side: Side,
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    adam: AdamScalars,
    residual: Residual | None,
) -> Projection:
    low = [p.T @ g if side is Side.LEFT else g @ p for g, p in zip(grads, bases, strict=True)]
    projected = [r.to(m.dtype) for r, m in zip(low, exp_avgs, strict=True)]
    torch._foreach_lerp_(list(exp_avgs), projected, 1 - adam.beta1)
    torch._foreach_mul_(list(exp_avg_sqs), adam.beta2)
    torch._foreach_addcmul_(list(exp_avg_sqs), projected, projected, 1 - adam.beta2)
    direction = torch._foreach_sqrt(list(exp_avg_sqs))
    torch._foreach_add_(direction, adam.eps)
    direction = torch._foreach_div(list(exp_avgs), direction)
    stacked = torch.stack(list(direction)), torch.stack(projected)
    if residual is None:
        return Projection(*stacked, None)
    axis, kappa = rank_axis(side), residual.kappa
    norms = [torch.linalg.vector_norm(x, dim=1 + axis) for x in stacked]
    wide = stacked[0].dtype
    grad_norms = torch.stack([torch.linalg.vector_norm(g, dim=axis, dtype=wide) for g in grads])
    direction_sq, projected_sq, grad_sq = (norm.square_() for norm in (*norms, grad_norms))
    residual_sq = grad_sq.sub_(projected_sq, alpha=2 * kappa - kappa**2).clamp_(min=0.0)
    return Projection(*stacked, ChannelSums(direction_sq, projected_sq, residual_sq))


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
    step_size: float,
    decay: float,
    noise: None = None,
) -> None:
    keep = 1 - decay
    combined = projection.direction * scale
    if residual is not None and factor is not None:
        phi = residual.rho * factor.unsqueeze(1 + rank_axis(side))
        combined.addcmul_(projection.projected, phi, value=-residual.kappa)
        for param, grad, weight in zip(params, grads, phi, strict=True):
            param.addcmul_(grad, weight.to(param.dtype), value=-step_size)
    for param, basis, low in zip(params, bases, combined.to(params[0].dtype), strict=True):
        left, right = (basis, low) if side is Side.LEFT else (low, basis.T)
        param.addmm_(left, right, beta=keep, alpha=-keep * step_size)
