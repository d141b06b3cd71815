"""The specification: the three operations in plain torch, in the dtype of the moments.

Everything is upcast to float32 (float64 for float64 weights) and W is rounded once, on the way
back. It makes full-size temporaries and is not meant to be fast.

A channel with a NaN or Inf gradient has a non-finite R, so it is left out: its moments stay as they
are and its update is zero. The rule is local to a channel, needs no look at the rest of the matrix
and no answer from the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .contract import (
    AdamScalars,
    Alike,
    ChannelSums,
    Noise,
    Projection,
    Residual,
    Scalar,
    Side,
    adam_of,
    moment_dtype,
    rank_axis,
    scalar_of,
)

# Fira: growth bound of the limiter, and the guard of both divisions (official code, both forms).
LIMITER_GROWTH = 1.01
NORM_EPS = 1e-8
# Of an ordinary step's norm. Of a gradient in the span of its basis, rounding leaves a residual of
# 0.003 of it in bfloat16, and of 0.0008 in float32.
STORABLE_SHARE = 2**-6
# In the place of a norm after a step that had none worth storing.
NOTHING_STORED = -1.0


def group_size(param: Tensor, grad: Tensor, rank: int) -> int:
    """Matrices a group: one, for the sake of the temporaries."""
    return 1


def workspace_bytes(alike: Alike, residual: Residual | None) -> int:
    """Bytes of temporaries at the peak, in the dtype of the moments.

    In matrices of W's size, of R's and in channels:

        project   copies of G and P, R, M, V, N and the root; with the residual S and its square
        update    N, R, B; the update, its product with the step size, the difference and a copy
                  of W; with the residual G without its skipped channels, and phi' G
    """
    itemsize = moment_dtype(alike.dtype).itemsize
    copied = alike.dtype.itemsize != itemsize
    full, low, channels = alike.numel, alike.rank * alike.channels, alike.channels
    basis = copied * alike.rank * alike.depth
    masks = low + 4 * itemsize  # one byte an element of R, and 0-d constants
    if residual is None:
        project = copied * full + basis + 6 * low
        update = 2 * low + basis + low + (3 + copied) * full
    else:
        project = copied * full + basis + 5 * low + 2 * full + 2 * channels
        update = 2 * low + 4 * channels + basis + low + (4 + copied) * full
    return itemsize * max(project, update) + masks


def project_moments(
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    side: Side,
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    adam: AdamScalars,
    residual: Residual | None,
) -> Projection:
    """R, the Adam moments of R in place, the direction N, and Fira's channel sums."""
    matrices = zip(grads, bases, exp_avgs, exp_avg_sqs, strict=True)
    results = [
        _project_one(grad, basis, side, exp_avg, exp_avg_sq, adam_of(adam, index), residual)
        for index, (grad, basis, exp_avg, exp_avg_sq) in enumerate(matrices)
    ]
    return stacked(results)


def stacked(results: Sequence[Projection]) -> Projection:
    """One projection of a group from those of its matrices."""
    directions, projected, sums = zip(*results, strict=True)
    every_sum = None if sums[0] is None else ChannelSums(*map(_stack, zip(*sums, strict=True)))
    return Projection(_stack(directions), _stack(projected), every_sum)


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """As torch.stack, but one tensor is not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def _project_one(
    grad: Tensor,
    basis: Tensor,
    side: Side,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    adam: AdamScalars,
    residual: Residual | None,
) -> Projection:
    grad, basis = grad.to(exp_avg.dtype), basis.to(exp_avg.dtype)
    projected = basis.T @ grad if side is Side.LEFT else grad @ basis
    # A finite entry whose square is not would make V infinite for ever.
    finite = projected.square().isfinite()
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


def channel_scale(sums: ChannelSums, limiter_norms: Sequence[Tensor]) -> Tensor:
    """phi' = lambda phi: Fira's channel factors under its norm-growth limiter.

        phi_j = |N_j| / (|R_j| + 1e-8)
        nu    = |S| = |phi (x) E|
        L     = max(nu / (nu_prev + 1e-8), 1.01) / 1.01,   lambda = 1 / L,   nu_prev <- lambda nu

    `limiter_norms` hold nu_prev. Stored is lambda nu only if it is finite and more than rounding
    errors or a vanishing gradient leave, nu > STORABLE_SHARE nu_ordinary:

        nu_ordinary^2 = sum_j max(|phi_j R_j|^2, 1) over the channels that move

    where phi_j R_j is as long as N_j, and 1 the ordinary step of an entry. After a stored zero the
    official limiter needs over 1,300 steps to let an ordinary residual through again, and after one
    of 1e-8 hardly fewer; a stored NaN stays for ever.

    0 means that no step was taken, and then lambda = 1. `NOTHING_STORED` means that there were
    steps, but no norm to remember: then phi may divide what momentum has left in N by an R of
    almost nothing, and lambda = min(1, nu_ordinary / nu).
    """
    direction_sq, projected_sq, residual_sq = (x.sum(1) if x.dim() == 3 else x for x in sums)
    phi = direction_sq.sqrt() / (projected_sq.sqrt() + NORM_EPS)
    scaled_sq = phi.square() * residual_sq
    finite = scaled_sq.isfinite()
    phi = phi.where(finite, 0.0)
    norm = scaled_sq.where(finite, 0.0).sum(1).sqrt()
    ordinary_sq = phi.square() * projected_sq
    large = ordinary_sq.isfinite() & (ordinary_sq > 1)
    ordinary_norm = ordinary_sq.where(large, 1.0).where(phi > 0, 0.0).sum(1).sqrt()

    previous = torch.stack(list(limiter_norms))
    growth = (norm / (previous + NORM_EPS)).clamp(min=LIMITER_GROWTH) / LIMITER_GROWTH
    bounded = torch.where(norm > ordinary_norm, ordinary_norm / norm, 1.0)
    limit = torch.where(previous > 0, 1 / growth, bounded.where(previous < 0, 1.0))
    limited = limit * norm
    storable = limited.isfinite() & (limited > 0) & (norm > STORABLE_SHARE * ordinary_norm)
    kept = previous.masked_fill((previous == 0) & (ordinary_norm > 0), NOTHING_STORED)
    for limiter_norm, value in zip(limiter_norms, limited.where(storable, kept), strict=True):
        limiter_norm.copy_(value)
    return limit.unsqueeze(1) * phi


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
    """W <- (1 - decay) (W - step_size (back(B) + rho phi' (x) G)), in place.

    B = scale N - rho kappa phi' (x) R for Fira, B = scale N for GaLore, which has no G term.
    """
    dtype = projection.direction.dtype
    for index, (param, grad, basis) in enumerate(zip(params, grads, bases, strict=True)):
        basis = basis.to(dtype)
        combined = scale * projection.direction[index]
        if residual is None or factor is None:
            update = back_project(combined, basis, side)
        else:
            phi = factor[index].unsqueeze(rank_axis(side))
            combined = combined - residual.rho * residual.kappa * phi * projection.projected[index]
            # A skipped channel has factor 0, and 0 * NaN would still be NaN.
            usable_grad = grad.to(dtype).where(phi != 0, 0.0)
            update = back_project(combined, basis, side) + residual.rho * phi * usable_grad
        keep = 1 - scalar_of(decay, index)
        weight = keep * (param.to(dtype) - scalar_of(step_size, index) * update)
        if noise is not None:
            weight = stochastically_rounded(weight, side, noise, index)
        param.copy_(weight)


def back_project(projected: Tensor, basis: Tensor, side: Side) -> Tensor:
    """P X on the left, X P^T on the right."""
    return basis @ projected if side is Side.LEFT else projected @ basis.T


def stochastically_rounded(weight: Tensor, side: Side, noise: Noise, index: int) -> Tensor:
    """A float32 matrix whose values bfloat16 holds, each of the two neighbours of the given one.

    The further a value is from a neighbour, the less probable is that neighbour, so the mean is the
    value itself. Inf and NaN stay. The counter is described in `Noise`.
    """
    axis, device = rank_axis(side), weight.device
    step = noise.step if isinstance(noise.step, int) else noise.step[index].long()
    key = _mix(noise.salts[index] + _mix(torch.zeros((), dtype=torch.int64, device=device) + step))
    channel = torch.arange(weight.shape[1 - axis], device=device)
    place = torch.arange(weight.shape[axis], device=device)
    row = _mix(key + channel)
    bits = _mix(row.unsqueeze(axis) + place.unsqueeze(1 - axis))
    raw = weight.contiguous().view(torch.int32)
    rounded = ((raw + (bits & 0xFFFF).int()) & -0x10000).view(torch.float32)
    return rounded.where(weight.isfinite(), weight)


def _mix(value: Tensor) -> Tensor:
    """A bijection of 32-bit integers, held in int64, that spreads each bit over all others.

    Source: C. Wellons, "Prospecting for hash functions", lowbias32.
    """
    value = value & 0xFFFFFFFF
    value = (value ^ value >> 16) * 0x7FEB352D & 0xFFFFFFFF
    value = (value ^ value >> 15) * 0x846CA68B & 0xFFFFFFFF
    return value ^ value >> 16
