"""The specification: the three operations in plain torch, in the dtype of the moments.

Everything is upcast to float32 (float64 for float64 weights) and W is rounded once, on the way
back. It makes full-size temporaries and is not meant to be fast.

A channel with a NaN or Inf gradient has a non-finite R, so it is left out: its moments stay as they
are and its update is zero. The rule is local to a channel, needs no look at the rest of the matrix
and no answer from the device.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .contract import (
    AdamScalars,
    ChannelSums,
    Matrices,
    Projection,
    Scalars,
    Side,
    adam_of,
    rank_axis,
    scalar_of,
)
from .noise import noise, rounded_to_bfloat16
from .products import factors, project, stacked

# Of moments that the operations take as they are stored.
MOMENTS = (torch.float32, torch.float64)

# Fira: growth bound of the limiter, and the guard of both divisions (official code, both forms).
LIMITER_GROWTH = 1.01
NORM_EPS = 1e-8
# Of an ordinary step's norm. Of a gradient in the span of its basis, rounding leaves a residual of
# 0.003 of it in bfloat16, and of 0.0008 in float32.
STORABLE_SHARE = 2**-6
# Of a squared norm, what is added to others.
SQUARE_SHARE = 2.0**-32
# In the place of a norm after a step that had none worth storing.
NOTHING_STORED = -1.0


def batch_size(param: Tensor, grad: Tensor, rank: int) -> int:
    """Matrices a batch: one, for the sake of the temporaries."""
    return 1


class Operations:
    """See `contract.Operations`; nothing is prepared."""

    def __init__(self, matrices: Matrices) -> None:
        """Takes any matrices that `check_matrices` lets through."""

    def project_moments(
        self, matrices: Matrices, adam: AdamScalars, step: int | Tensor = 0
    ) -> Projection:
        tensors = zip(
            matrices.grads, matrices.bases, matrices.exp_avgs, matrices.exp_avg_sqs, strict=True
        )
        results = [
            _project_one(*of_one, matrices, adam_of(adam, index))
            for index, of_one in enumerate(tensors)
        ]
        direction, projected, sums, _ = zip(*results, strict=True)
        every_sum = None
        if matrices.residual is not None:
            every_sum = ChannelSums(*map(stacked, zip(*sums, strict=True)))
        return Projection(stacked(direction), stacked(projected), every_sum)

    def channel_scale(self, matrices: Matrices, sums: ChannelSums) -> Tensor:
        return channel_scale(sums, matrices.limiter_norms)

    def back_project_update(
        self,
        matrices: Matrices,
        projection: Projection,
        factor: Tensor | None,
        scalars: Scalars,
    ) -> None:
        side, residual, dtype = matrices.side, matrices.residual, projection.direction.dtype
        tensors = zip(matrices.params, matrices.grads, matrices.bases, strict=True)
        for index, (param, grad, basis) in enumerate(tensors):
            basis = basis.to(dtype)
            combined = scalars.scale * projection.direction[index]
            if residual is None or factor is None:
                update = back_project(combined, basis, side)
            else:
                phi = factor[index].unsqueeze(rank_axis(side))
                combined -= residual.rho * residual.kappa * phi * projection.projected[index]
                # A skipped channel has factor 0, and 0 * NaN would still be NaN.
                usable_grad = grad.to(dtype).where(phi != 0, 0.0)
                update = back_project(combined, basis, side)
                update = update + residual.rho * phi * usable_grad
            keep = 1 - scalar_of(scalars.decay, index)
            weight = keep * (param.to(dtype) - scalar_of(scalars.step_size, index) * update)
            if matrices.salts is not None:
                step = scalar_of(scalars.step, index)
                weight = stochastically_rounded(weight, side, matrices.salts[index], step)
            param.copy_(weight)


def _project_one(
    grad: Tensor,
    basis: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    matrices: Matrices,
    adam: AdamScalars,
) -> Projection:
    side, residual = matrices.side, matrices.residual
    grad, basis = grad.to(exp_avg.dtype), basis.to(exp_avg.dtype)
    projected = grad if matrices.projected else project(grad, basis, side)
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
    phi, scaled_sq, ordinary_sq = channel_factors(sums)
    limit = limited(_norm(scaled_sq), _norm(ordinary_sq), limiter_norms)
    return limit.unsqueeze(1) * phi


def channel_factors(sums: ChannelSums) -> tuple[Tensor, Tensor, Tensor]:
    """phi, and the squares of which nu and nu_ordinary are the norms; B x channels each.

    See `channel_scale`. All are finite, and 0 for a channel whose gradient is not.
    """
    direction_sq, projected_sq, residual_sq = (x.sum(1) if x.dim() == 3 else x for x in sums)
    phi = direction_sq.sqrt() / (projected_sq.sqrt() + NORM_EPS)
    scaled_sq = phi.square() * residual_sq
    finite = scaled_sq < math.inf
    phi = phi.where(finite, 0.0)
    ordinary_sq = phi.square() * projected_sq
    large = (ordinary_sq > 1) & (ordinary_sq < math.inf)
    ordinary_sq = ordinary_sq.where(large, 1.0).where(phi > 0, 0.0)
    return phi, scaled_sq.where(finite, 0.0), ordinary_sq


def limited(norm: Tensor, ordinary_norm: Tensor, limiter_norms: Sequence[Tensor]) -> Tensor:
    """lambda of each matrix, from nu and nu_ordinary; keeps lambda nu. See `channel_scale`."""
    previous = torch.stack(list(limiter_norms))
    growth = (norm / (previous + NORM_EPS)).clamp(min=LIMITER_GROWTH) / LIMITER_GROWTH
    bounded = torch.where(norm > ordinary_norm, ordinary_norm / norm, 1.0)
    limit = torch.where(previous > 0, 1 / growth, bounded.where(previous < 0, 1.0))
    reached = limit * norm
    storable = (reached > 0) & (reached < math.inf) & (norm > STORABLE_SHARE * ordinary_norm)
    kept = previous.masked_fill((previous == 0) & (ordinary_norm > 0), NOTHING_STORED)
    torch._foreach_copy_(list(limiter_norms), list(reached.where(storable, kept).unbind()))
    return limit


def _norm(squares: Tensor) -> Tensor:
    """Of the channels of each matrix: finite if the squares are, of up to 2^32 channels.

    Their sum need not be. Powers of two change no bit of a number that is not subnormal.
    """
    return (squares * SQUARE_SHARE).sum(1).sqrt() * SQUARE_SHARE**-0.5


def back_project(projected: Tensor, basis: Tensor, side: Side) -> Tensor:
    """P X on the left, X P^T on the right."""
    return torch.mm(*factors(projected, basis, side))


def stochastically_rounded(
    weight: Tensor,
    side: Side,
    salt: int,
    step: int | Tensor,
    first: tuple[int, int] = (0, 0),
) -> Tensor:
    """A float32 weight as `noise.rounded_to_bfloat16`; a part of one begins at its row and column
    `first`.
    """
    axis, device = rank_axis(side), weight.device
    channels = first[1 - axis] + torch.arange(weight.shape[1 - axis], device=device)
    places = first[axis] + torch.arange(weight.shape[axis], device=device)
    bits = noise(channels.unsqueeze(axis), places.unsqueeze(1 - axis), salt, step)
    return rounded_to_bfloat16(weight, bits)
