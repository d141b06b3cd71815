"""When the basis of a matrix is computed anew, and what happens when that fails."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops import Side
from .svd import svd_basis

ZERO_GRADIENT = "the gradient is zero"

RangeFinder = Callable[[Tensor, Side, int], Tensor]
RANGE_FINDERS: dict[str, RangeFinder] = {"svd": svd_basis}


def is_due(completed_steps: int, basis_step: int, gap: int) -> bool:
    """Whether the basis has to change before this step.

    It is so at every multiple of `gap` completed steps, as in the official code, and at every step
    after one where it should have changed and could not. The answer depends on nothing but the
    state, so a resumed run refreshes where the uninterrupted one does.

    Args:
        completed_steps: steps that this parameter has taken.
        basis_step: completed steps when its basis was computed, -1 for none.
        gap: T of the papers, in steps.
    """
    return basis_step < 0 or completed_steps // gap > basis_step // gap


def refresh_basis(grad: Tensor, basis: Tensor, side: Side, subspace: str) -> str | None:
    """Writes a new basis in place, or says why the old one stays.

    It waits for the device once, to look at the gradient: a factorization of NaN raises or returns
    NaN, and the basis of a zero gradient would be arbitrary.

    Args:
        grad: G, rows x cols.
        basis: P, in place.
        side: which side of G the basis multiplies.
        subspace: name of the range finder, a key of `RANGE_FINDERS`.

    Returns:
        None if the basis is new, else the reason why it is not.
    """
    energy = float(torch.linalg.vector_norm(grad, dtype=torch.float64))
    if energy == 0:
        return ZERO_GRADIENT
    if not energy < float("inf"):
        return "the gradient is not finite"
    try:
        fresh = RANGE_FINDERS[subspace](grad, side, basis.shape[1])
    except torch.linalg.LinAlgError as error:
        return f"the factorization failed: {error}"
    if not fresh.isfinite().all():
        return "the factorization is not finite"
    basis.copy_(fresh)
    return None
