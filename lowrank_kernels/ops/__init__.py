"""The three operations of a low-rank step: checked here, computed by a backend.

Each takes `backend`, a name out of `dispatch.choose`. Shapes and notation are in `contract`, the
mathematics in `reference`.
"""

from torch import Tensor

from .contract import (
    AdamScalars,
    ChannelSums,
    Projection,
    Residual,
    Side,
    check_back_project_update,
    check_channel_scale,
    check_project_moments,
)
from .dispatch import BackendUnavailable, Choice, backends, choose, load, requested_backend

__all__ = [
    "AdamScalars",
    "BackendUnavailable",
    "ChannelSums",
    "Choice",
    "Projection",
    "Residual",
    "Side",
    "back_project_update",
    "backends",
    "channel_scale",
    "choose",
    "project_moments",
    "requested_backend",
]


def project_moments(
    grad: Tensor,
    basis: Tensor,
    side: Side,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    adam: AdamScalars,
    residual: Residual | None = None,
    *,
    backend: str = "reference",
) -> Projection:
    """Operation 1: project the gradient and update the low-rank Adam moments in place.

    Args:
        grad: G, rows x cols, real floating point, any strides.
        basis: P, rows x r on the left, cols x r on the right.
        side: which side of G the basis multiplies.
        exp_avg: M, r x cols on the left, rows x r on the right; float32 or float64; in place.
        exp_avg_sq: V, as `exp_avg`; in place.
        adam: betas, eps and bias corrections.
        residual: Fira's residual form; None leaves the channel sums out.
        backend: who computes it.

    Returns:
        The direction N and the projected gradient R, shaped as the moments, and the channel sums.

    Raises:
        ValueError: a shape, device or stride does not fit; nothing was written.
        TypeError: a dtype does not fit; nothing was written.

    Source: GaLore (arXiv 2403.03507), algorithm 2; Fira (arXiv 2410.01623), algorithm 1.
    """
    check_project_moments(grad, basis, side, exp_avg, exp_avg_sq)
    return load(backend).project_moments(grad, basis, side, exp_avg, exp_avg_sq, adam, residual)


def channel_scale(sums: ChannelSums, limiter_norm: Tensor, *, backend: str = "reference") -> Tensor:
    """Operation 2: Fira's channel factors, limited; no look at G or W, no host synchronization.

    Args:
        sums: the channel sums of operation 1, one value a channel each.
        limiter_norm: 0-d, the norm that the limiter stored last, 0 for none; in place.
        backend: who computes it.

    Returns:
        phi', one value a channel, in the dtype of the sums. It is 0 for a channel whose gradient
        was not finite.

    Raises:
        ValueError: a shape or device does not fit; nothing was written.
        TypeError: a dtype does not fit; nothing was written.

    Source: Fira (arXiv 2410.01623), equations of norm-based scaling and norm-growth limiter.
    """
    check_channel_scale(sums, limiter_norm)
    factor: Tensor = load(backend).channel_scale(sums, limiter_norm)
    return factor


def back_project_update(
    param: Tensor,
    grad: Tensor,
    basis: Tensor,
    side: Side,
    projection: Projection,
    residual: Residual | None = None,
    factor: Tensor | None = None,
    *,
    scale: float,
    step_size: float,
    decay: float,
    backend: str = "reference",
) -> None:
    """Operation 3: back-project the direction, add the scaled residual, decay, write W.

    W <- (1 - decay) (W - step_size (back(B) + rho phi' (x) G)), with
    B = scale N - rho kappa phi' (x) R for Fira and B = scale N, without the G term, for GaLore.

    Args:
        param: W, rows x cols; in place, rounded once by the reference.
        grad: G, rows x cols.
        basis: P of operation 1.
        side: side of operation 1.
        projection: what operation 1 returned.
        residual: Fira's residual form, or None for GaLore.
        factor: phi' of operation 2, or None for GaLore.
        scale: alpha of the papers.
        step_size: learning rate, with the bias correction where the moments do not carry it.
        decay: learning rate times weight decay.
        backend: who computes it.

    Raises:
        ValueError: a shape or device does not fit; nothing was written.
        TypeError: a dtype does not fit; nothing was written.

    Source: the two products of Fira's update in one, W - s (alpha P N + S), S = phi' (x) (G - kappa
    P R).
    """
    check_back_project_update(param, grad, basis, side, projection, residual, factor)
    load(backend).back_project_update(
        param,
        grad,
        basis,
        side,
        projection,
        residual,
        factor,
        scale=scale,
        step_size=step_size,
        decay=decay,
    )
