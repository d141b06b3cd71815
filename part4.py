def sub(p, *pairs):
    s=open(p).read()
    for a,b in pairs:
        assert a in s,(p,a)
        s=s.replace(a,b,1)
    open(p,'w').write(s)
open('lowrank_kernels/optim/contracted.py','w').write('''"""Operation 1 where ranks have different columns of the same rows, so that R is a sum over them.

So it is under row-wise tensor parallelism with FSDP2 over it, or on the right side without. Each rank
multiplies its columns of G with the rows of P that meet them. R of some matrices travels in one
message, beside it |g|^2 of each row for those that need the residual. Then every rank steps the
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
    found = []
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
        sums = found[place].sums
        assert sums is not None
        found[place] = found[place]._replace(sums=sums._replace(residual=residual))
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
    """What is here of R, B x rows x r, and of |g|^2 as one column more where there is a residual."""
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
    """Whether |E|^2 has to be formed: see `MAX_KAPPA_HALF_PRECISION`."""
    residual = matrices.residual
    half = min(matrices.grads[0].itemsize, matrices.bases[0].itemsize) < 4
    rounded = half or not matrices.orthonormal
    return residual is not None and rounded and residual.kappa > MAX_KAPPA_HALF_PRECISION


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
''')
sub('lowrank_kernels/optim/sharded.py',
('''        if not self.method.outside.is_limited and self.method.subspace.criterion is None:
''','''        sums_low = bool(self.ranks.depth_axes)
        if sums_low and self.ranks.device.type == "cpu":
            # Messages of R are of unlike sizes: ranks that differ would wait for ever.
            self.ranks.agree(Claim([*self.claim.lines, "a step"]))
        numbers = self.method.outside.is_limited or self.method.subspace.criterion is not None
        if not numbers and not sums_low:
'''),
('''        for batch, scalars in self.scalars():
            matrices, factors = batch.matrices(), None
            projection = batch.operations.project_moments(matrices, scalars.adam, scalars.step)
''','''        works, known = list(self.scalars()), {}
        if self.ranks.depth_axes and works:
            found = projections(works, self.ranks.add_low)
            known = {id(batch): each for (batch, _), each in zip(works, found, strict=True)}
        for batch, scalars in works:
            matrices, factors = batch.matrices(), None
            projection = known.get(id(batch))
            if projection is None:
                projection = batch.operations.project_moments(matrices, scalars.adam, scalars.step)
'''),
('from .collectives import NUMBERS, Claim, Ranks, Wait\n','from .collectives import NUMBERS, Claim, Ranks, Wait\nfrom .contracted import projections\n'))
sub('lowrank_kernels/optim/collectives.py',
('''    def sum_of_all(''','''    def add_low(self, low: Tensor) -> None:
        """Sums over the ranks that have other parts of the same channels, in place."""
        for axis in self.depth_axes:
            dist.all_reduce(low, group=self.place.mesh.get_group(axis))

    def sum_of_all('''),
('        first = self.place.mesh, (*self.channel_axes, *self.depth_axes)','        first = self.place.mesh, (*self.depth_axes, *self.channel_axes)') if False else ('first = self.place.mesh, (*self.channel_axes, *self.depth_axes)','first = self.place.mesh, (*self.depth_axes, *self.channel_axes)'))
sub('lowrank_kernels/optim/placement.py',('''    if place.columns and (by_rows or proj_type == "right"):
        raise NotImplementedError(
            f"{told}: the right side sums over columns, which are on other ranks: put it in a group"
            " without rank"
        )
''',''))
sub('lowrank_kernels/optim/checks.py',
('''        "residual_momentum shares''','''        f"residual={outside.residual!r} needs whole rows, which lie on several ranks": divides(param, 1)
        and outside.residual in AMPLIFIED,
        "residual_momentum shares'''),
('from .placement import check_placement, is_sharded','from .outside import AMPLIFIED\nfrom .placement import check_placement, divides, is_sharded'))
sub('lowrank_kernels/optim/lowrank_adamw.py',
('''        form = format_for(param, True, self.state_format)
        choice = ops''','''        form = format_for(param, True, self.state_format)
        if size.side is Side.RIGHT and divides(param, 1) and request in ("auto", "native", "triton"):
            # R is summed between a product of its own and operation 1, by which others are faster.
            request = "foreach"
        choice = ops'''),
('from .placement import check_spread, facts_here,','from .placement import check_spread, divides, facts_here,'))
