"""What `monitor=True` counts for `stats`, on the device."""

import torch
from torch import Tensor

from ..ops import Matrices
from ..ops.reference import LIMITER_GROWTH
from .state import State


def count(states: list[State], matrices: Matrices, norms_before: list[Tensor]) -> None:
    """Counts gradients of which something was left out, being infinite or NaN or too large to be
    squared, and steps that Fira's limiter held back.

    The limiter stores what it let through: of a step that it held back, 1.01 times the norm before.
    """
    largest = torch._foreach_norm(matrices.grads, float("inf"))
    for state, value in zip(states, largest, strict=True):
        state["nonfinite"] += ~value.to(matrices.dtype).square().isfinite()
    bound = LIMITER_GROWTH * (1 - 1e-5)
    for state, norm, before in zip(states, matrices.limiter_norms, norms_before, strict=False):
        state["limited"] += (before > 0) & (norm >= bound * before)
