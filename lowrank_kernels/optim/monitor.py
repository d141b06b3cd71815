"""What `monitor=True` keeps for `stats`, on the device: counters, and the gradient's noise.

Of a projected gradient R with mean g and, at the batch's size, noise sigma^2 = tr Var(R), the means

    A = mean of |R|^2,   weights (1 - beta1) beta1^k / (1 - beta1^t) of the last t steps
    B = |M / (1 - beta1^t)|^2

have the expectations g^2 + sigma^2 and g^2 + q sigma^2 for a gradient that stays and noise that is
independent from step to step, with g^2 = |g|^2 and

    q = (1 - beta1) / (1 + beta1) (1 + beta1^t) / (1 - beta1^t)

the sum of the squared weights. So sigma^2 = (A - B) / (1 - q) and g^2 = A - sigma^2: one number a
matrix is kept beside M.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import Matrices
from ..ops.reference import LIMITER_GROWTH
from .formats import moments_of
from .state import State


def count(states: list[State], matrices: Matrices, norms_before: list[Tensor]) -> list[Tensor]:
    """Counts gradients of which something was left out, being infinite or NaN or too large to be
    squared, and steps that Fira's limiter held back.

    The limiter stores what it let through: of a step that it held back, 1.01 times the norm before.

    Returns:
        Of each gradient whether nothing was left out.
    """
    largest = torch._foreach_norm(matrices.grads, float("inf"))
    finite = [value.to(matrices.dtype).square().isfinite() for value in largest]
    for state, whole in zip(states, finite, strict=True):
        state["nonfinite"] += ~whole
    bound = LIMITER_GROWTH * (1 - 1e-5)
    for state, norm, before in zip(states, matrices.limiter_norms, norms_before, strict=False):
        state["limited"] += (before > 0) & (norm >= bound * before)
    return finite


def note_norms(
    states: list[State],
    projected: Sequence[Tensor] | Tensor,
    finite: Sequence[Tensor],
    beta1: float,
) -> None:
    """Takes |R|^2 of a step into the running means, which begin anew with the moments.

    Args:
        states: of the matrices.
        projected: R of each.
        finite: as `count` tells it. Of a gradient that was not whole no norm is taken.
        beta1: of the first moment.
    """
    for state, low, whole in zip(states, projected, finite, strict=True):
        if state["norm_step"] < state["moments_step"]:
            state["norm_step"] = state["moments_step"]
            state["norm_sq"].zero_()
        square = torch.linalg.vector_norm(low).square()
        square = square.where(whole & square.isfinite(), state["norm_sq"])
        state["norm_sq"].lerp_(square, 1 - beta1)


def noise_and_signal(state: State, beta1: float) -> tuple[float | None, float | None]:
    """sigma^2 and g^2 of a matrix, in the unit of |R|^2; None of both where nothing tells them.

    Each is right in the mean, so that sums over matrices and steps are, too; one alone scatters,
    and g^2 may be below 0. What the gradient moves counts as noise. While M is of two bases, for
    some 1 / (1 - beta1) steps after a change of the basis, what it lost by that does, too.

    Args:
        state: of a projected parameter.
        beta1: of the first moment.

    Source: the noise scale tr Var / |g|^2 of arXiv 1812.06162, by a mean over steps in place of two
    batches.
    """
    step = int(state["step"])
    # States of older versions, before their next step, lack both.
    seen, age = step - state.get("norm_step", step), step - state.get("moments_step", 0)
    if seen < 1 or age < 2 or not beta1:
        return None, None
    weights_sq = (1 - beta1) / (1 + beta1) * (1 + beta1**age) / (1 - beta1**age)
    mean_sq = float(state["norm_sq"]) / (1 - beta1**seen)
    exp_avg, _ = moments_of(state)
    sq_of_mean = (float(torch.linalg.vector_norm(exp_avg)) / (1 - beta1**age)) ** 2
    noise = (mean_sq - sq_of_mean) / (1 - weights_sq)
    return noise, mean_sq - noise
