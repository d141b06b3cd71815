"""The three operations of a low-rank step: checked here, computed by a backend.

Each takes a group of equal matrices and `backend`, a name out of `dispatch.choose`. Shapes and
notation are in `contract`, the mathematics in `reference`. Eager calls go straight to the backend;
a compiler sees the operators of `library` instead.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import library
from .contract import (
    AdamScalars,
    Alike,
    ChannelSums,
    Noise,
    Projection,
    Residual,
    Scalar,
    Side,
    check_back_project_update,
    check_channel_scale,
    check_project_moments,
)
from .dispatch import BackendUnavailable, Choice, backends, choose, load, requested_backend

__all__ = [
    "AdamScalars",
    "Alike",
    "BackendUnavailable",
    "ChannelSums",
    "Choice",
    "Noise",
    "Projection",
    "Residual",
    "Side",
    "back_project_update",
    "backends",
    "channel_scale",
    "choose",
    "group_size",
    "project_moments",
    "requested_backend",
    "tiles",
    "workspace_bytes",
]


def group_size(param: Tensor, grad: Tensor, rank: int, *, backend: str = "reference") -> int:
    """How many matrices like this one the backend takes best in one group, at least 1.

    The workspace of a step, N and R of a group, grows with it.
    """
    size: int = load(backend).group_size(param, grad, rank)
    return size


def workspace_bytes(
    alike: Alike, residual: Residual | None = None, *, backend: str = "reference"
) -> int:
    """Bytes of the temporaries that a step of a group holds at its peak.

    It is what this package allocates through torch, with weights rounded to nearest and scalars
    from the host; not what a product of torch keeps for itself.

    Args:
        alike: the matrices, of which a group takes as many as suit the backend.
        residual: Fira's residual form, or None for GaLore.
        backend: who computes the step.
    """
    size: int = load(backend).workspace_bytes(alike, residual)
    return size


def tiles(param: Tensor, side: Side, rank: int, *, backend: str) -> str:
    """Where the backend's tile sizes for a matrix come from; empty if it has none to choose."""
    explain = getattr(load(backend), "explain", None)
    if explain is None:
        return ""
    sources = explain(param, param, side, rank)
    return ", ".join(f"{operation}: {source}" for operation, source in sources.items())


def project_moments(
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    side: Side,
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    adam: AdamScalars,
    residual: Residual | None = None,
    *,
    backend: str = "reference",
) -> Projection:
    """Operation 1: project the gradients and update the low-rank Adam moments in place.

    Args:
        grads: G of each matrix, rows x cols, real floating point, any strides.
        bases: P, rows x r on the left, cols x r on the right.
        side: which side of G the basis multiplies.
        exp_avgs: M, r x cols on the left, rows x r on the right; float32 or float64; in place.
        exp_avg_sqs: V, as `exp_avgs`; in place.
        adam: betas, eps and bias corrections.
        residual: Fira's residual form; None leaves the channel sums out.
        backend: who computes it.

    Returns:
        The directions N and the projected gradients R, a stack of the shape of the moments each,
        and the channel sums.

    Raises:
        ValueError: a shape, device or stride does not fit; nothing was written.
        TypeError: a dtype does not fit; nothing was written.

    Source: GaLore (arXiv 2403.03507), algorithm 2; Fira (arXiv 2410.01623), algorithm 1.
    """
    check_project_moments(grads, bases, side, exp_avgs, exp_avg_sqs)
    module = _module(backend)
    return module.project_moments(grads, bases, side, exp_avgs, exp_avg_sqs, adam, residual)


def channel_scale(
    sums: ChannelSums, limiter_norms: Sequence[Tensor], *, backend: str = "reference"
) -> Tensor:
    """Operation 2: Fira's channel factors, limited; no look at G or W, no host synchronization.

    Args:
        sums: the channel sums of operation 1.
        limiter_norms: 0-d each, the norm that the limiter stored last, 0 or -1 for none (see
            `reference.channel_scale`); in place.
        backend: who computes it.

    Returns:
        phi', matrices x channels, in the dtype of the sums. It is 0 for a channel whose gradient
        was not finite.

    Raises:
        ValueError: a shape or device does not fit; nothing was written.
        TypeError: a dtype does not fit; nothing was written.

    Source: Fira (arXiv 2410.01623), equations of norm-based scaling and norm-growth limiter.
    """
    check_channel_scale(sums, limiter_norms)
    factor: Tensor = _module(backend).channel_scale(sums, limiter_norms)
    return factor


def back_project_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    side: Side,
    projection: Projection,
    residual: Residual | None = None,
    factor: Tensor | None = None,
    *,
    scale: float,
    step_size: Scalar,
    decay: Scalar,
    noise: Noise | None = None,
    backend: str = "reference",
) -> None:
    """Operation 3: back-project the direction, add the scaled residual, decay, write W.

    W <- (1 - decay) (W - step_size (back(B) + rho phi' (x) G)), with
    B = scale N - rho kappa phi' (x) R for Fira and B = scale N, without the G term, for GaLore.

    Args:
        params: W of each matrix, rows x cols; in place, rounded once by the reference.
        grads: G, rows x cols.
        bases: P of operation 1.
        side: side of operation 1.
        projection: what operation 1 returned.
        residual: Fira's residual form, or None for GaLore.
        factor: phi' of operation 2, or None for GaLore.
        scale: alpha of the papers.
        step_size: learning rate, with the bias correction where the moments do not carry it.
        decay: learning rate times weight decay.
        noise: rounds bfloat16 weights stochastically; None rounds to nearest.
        backend: who computes it.

    Raises:
        ValueError: a shape or device does not fit; nothing was written.
        TypeError: a dtype does not fit; nothing was written.

    Source: the two products of Fira's update in one, W - s (alpha P N + S), S = phi' (x) (G - kappa
    P R).
    """
    check_back_project_update(params, grads, bases, side, projection, residual, factor, noise)
    _module(backend).back_project_update(
        params,
        grads,
        bases,
        side,
        projection,
        residual,
        factor,
        scale=scale,
        step_size=step_size,
        decay=decay,
        noise=noise,
    )


def _module(backend: str) -> Any:
    """The backend, or, under a compiler, the operators that stand for it: a dispatch costs tens of
    microseconds, which only a compiler needs.
    """
    if torch.compiler.is_compiling():
        return library.Operators(backend)
    return load(backend)
