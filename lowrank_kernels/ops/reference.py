"""The specification: the three operations in plain torch, in the dtype of the moments.

Everything is upcast to float32 (float64 for float64 weights) and W is rounded once, on the way
back. It makes full-size temporaries and is not meant to be fast.

A channel with a NaN or Inf gradient has a non-finite R, so it is left out: its moments stay as they
are and its update is zero. The rule is local to a channel, needs no look at the rest of the matrix
and no answer from the device.
"""

import torch
from torch import Tensor

from .contract import AdamScalars, ChannelSums, Projection, Residual, Side, rank_axis

# Fira: growth bound of the limiter, and the guard of both divisions (official code, both forms).
LIMITER_GROWTH = 1.01
NORM_EPS = 1e-8


def project_moments(
    grad: Tensor,
    basis: Tensor,
    side: Side,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    adam: AdamScalars,
    residual: Residual | None,
) -> Projection:
    """R, the Adam moments of R in place, the direction N, and Fira's channel sums."""
    grad, basis = grad.to(exp_avg.dtype), basis.to(exp_avg.dtype)
    projected = basis.T @ grad if side is Side.LEFT else grad @ basis
    finite = projected.isfinite()
    projected = projected.where(finite, 0.0)

    decayed = exp_avg * adam.beta1 + projected * (1 - adam.beta1)
    decayed_sq = exp_avg_sq * adam.beta2 + projected.square() * (1 - adam.beta2)
    exp_avg.copy_(decayed.where(finite, exp_avg))
    exp_avg_sq.copy_(decayed_sq.where(finite, exp_avg_sq))

    denominator = (exp_avg_sq / adam.bias_correction2).sqrt() + adam.eps
    direction = (exp_avg / adam.bias_correction1 / denominator).where(finite, 0.0)
    if residual is None:
        return Projection(direction, projected, None)
    outside = grad - residual.kappa * back_project(projected, basis, side)
    axis = rank_axis(side)
    sums = ChannelSums(*(x.square().sum(axis) for x in (direction, projected, outside)))
    return Projection(direction, projected, sums)


def channel_scale(sums: ChannelSums, limiter_norm: Tensor) -> Tensor:
    """phi' = lambda phi: Fira's channel factors under its norm-growth limiter.

        phi_j = |N_j| / (|R_j| + 1e-8)
        nu    = |S| = |phi (x) E|
        L     = max(nu / (nu_prev + 1e-8), 1.01) / 1.01,   lambda = 1 / L,   nu_prev <- lambda nu

    `limiter_norm` holds nu_prev; 0 means that none was stored yet, and then lambda = 1. A zero or
    non-finite norm is never stored: after a stored zero the official limiter needs over 1,300 steps
    to let an ordinary residual through again, and a stored NaN stays for ever.
    """
    direction_sq, projected_sq, residual_sq = (x.sum(0) if x.dim() == 2 else x for x in sums)
    phi = direction_sq.sqrt() / (projected_sq.sqrt() + NORM_EPS)
    scaled_sq = phi.square() * residual_sq
    finite = scaled_sq.isfinite()
    phi = phi.where(finite, 0.0)
    norm = scaled_sq.where(finite, 0.0).sum().sqrt()

    growth = (norm / (limiter_norm + NORM_EPS)).clamp(min=LIMITER_GROWTH) / LIMITER_GROWTH
    limit = torch.where(limiter_norm > 0, 1 / growth, 1.0)
    limited = limit * norm
    storable = limited.isfinite() & (limited > 0)
    limiter_norm.copy_(limited.where(storable, limiter_norm))
    return limit * phi


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
    """W <- (1 - decay) (W - step_size (back(B) + rho phi' (x) G)), in place.

    B = scale N - rho kappa phi' (x) R for Fira, B = scale N for GaLore, which has no G term.
    """
    dtype = projection.direction.dtype
    basis = basis.to(dtype)
    combined = scale * projection.direction
    if residual is None or factor is None:
        update = back_project(combined, basis, side)
    else:
        factor = factor.unsqueeze(rank_axis(side))
        combined = combined - residual.rho * residual.kappa * factor * projection.projected
        # A skipped channel has factor 0, and 0 * NaN would still be NaN.
        usable_grad = grad.to(dtype).where(factor != 0, 0.0)
        update = back_project(combined, basis, side) + residual.rho * factor * usable_grad
    param.copy_((1 - decay) * (param.to(dtype) - step_size * update))


def back_project(projected: Tensor, basis: Tensor, side: Side) -> Tensor:
    """P X on the left, X P^T on the right."""
    return basis @ projected if side is Side.LEFT else projected @ basis.T
