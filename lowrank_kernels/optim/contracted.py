"""Operation 1 where ranks have different columns of the same rows, so that R is a sum over them.

So it is under row-wise tensor parallelism with FSDP2 over it, or on the right side without. Each
rank multiplies its columns of G with the rows of P that meet them. R of some matrices travels in
one message, beside it |g|^2 of each row for those that need the residual. Then every rank steps the
moments of its rows, alike on all that have them, as of gradients that arrive projected.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import ops
from ..ops import ChannelSums, Matrices, Projection, Scalars
from ..ops.contract import MAX_KAPPA_HALF_PRECISION
from .batches import Batch

# Sums over the ranks that have other columns, in place.
Add = Callable[[Tensor], None]


def projections(works: Sequence[tuple[Batch, Scalars]], add: Add) -> list[Projection]:
    """Operation 1 of some batches on the right side; moments are stepped.

    Args:
        works: batches of which every rank has the same matrices in the same order, and scalars.
        add: one call for all batches, and another where |E|^2 has to be formed.
    """
    shares = _added([_shares(batch.matrices()) for batch, _ in works], add)
    found: list[Projection] = []
    for (batch, scalars), share in zip(works, shares, strict=True):
        matrices = batch.matrices()
        rank = matrices.bases[0].shape[1]
        low = list(share[..., :rank].contiguous().unbind())
        given = matrices._replace(grads=low, residual=None, projected=True, limiter_norms=[])
        operations = ops.prepare(given, backend=batch.members[0].backend)
        projection = operations.project_moments(given, scalars.adam, scalars.step)
        if matrices.residual is not None:
            kappa = matrices.residual.kappa
            direction, spanned = (
                x.square().sum(2) for x in (projection.direction, projection.projected)
            )
            outside = share[..., rank] - (2 * kappa - kappa**2) * spanned
            sums = ChannelSums(direction, spanned, outside.clamp_(min=0.0))
            projection = projection._replace(sums=sums)
        found.append(projection)
    formed = [place for place, (batch, _) in enumerate(works) if _forms(batch.matrices())]
    squares = [_outside_sq(works[place][0].matrices(), found[place]) for place in formed]
    for place, residual in zip(formed, _added(squares, add), strict=True):
        formula = found[place].sums
        assert formula is not None
        found[place] = found[place]._replace(sums=formula._replace(residual=residual))
    return found


def _added(parts: Sequence[Tensor], add: Add) -> list[Tensor]:
    """The sums over ranks, in one message."""
    if not parts:
        return []
    flat = torch.cat([part.reshape(-1) for part in parts])
    add(flat)
    sizes = [part.numel() for part in parts]
    every = zip(torch.split(flat, sizes), parts, strict=True)
    return [total.view(part.shape) for total, part in every]


def _shares(matrices: Matrices) -> Tensor:
    """What is here of R, B x rows x r, and of |g|^2, one column more, where there is a residual."""
    found = []
    for grad, basis in zip(matrices.grads, matrices.bases, strict=True):
        # A product in half precision is rounded once, before the sum.
        wide = grad.to(matrices.dtype)
        low = wide @ basis.to(matrices.dtype)
        if matrices.residual is not None:
            low = torch.cat([low, wide.square().sum(1, keepdim=True)], dim=1)
        found.append(low)
    return torch.stack(found)


def _forms(matrices: Matrices) -> bool:
    """Whether |E|^2 has to be formed, from which kappa of half precision on too."""
    residual = matrices.residual
    if residual is None:
        return False
    half = min(matrices.grads[0].itemsize, matrices.bases[0].itemsize) < 4
    return not matrices.orthonormal or (half and residual.kappa > MAX_KAPPA_HALF_PRECISION)


def _outside_sq(matrices: Matrices, projection: Projection) -> Tensor:
    """What is here of |e|^2, B x rows."""
    assert matrices.residual is not None
    found = []
    every = zip(matrices.grads, matrices.bases, projection.projected, strict=True)
    for grad, basis, low in every:
        wide = low.to(matrices.dtype) @ basis.to(matrices.dtype).T
        outside = grad.to(matrices.dtype) - matrices.residual.kappa * wide
        found.append(outside.square().sum(1))
    return torch.stack(found)
