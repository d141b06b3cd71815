"""Matrices that are spread over ranks: put together on one rank each, its owner, and dealt out.

Parts come together along one axis of the mesh after another, in an all-to-all each: the rows first,
and of several axes that divide the same dimension the innermost first, since what is then put
together lies together. Dealt out they go the other way.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import Ranks

Shape = tuple[int, int]


def to_owners(
    ranks: Ranks, parts: Sequence[Tensor], shapes: Sequence[Shape], owners: Sequence[int]
) -> dict[int, Tensor]:
    """Gathers matrices, each on its owner.

    Args:
        ranks: over which they are spread.
        parts: of each matrix what is here; they travel in a dtype that holds all.
        shapes: of the whole matrices.
        owners: an `index` for each. Of several copies that one serves an owner, in which it is.

    Returns:
        The matrices that this rank owns, by their places.
    """
    travel = _Travel(ranks, shapes, owners)
    held = {i: parts[i] for i in travel.met(0)}
    like = parts[0].new_empty(0, dtype=functools.reduce(torch.promote_types, _dtypes(parts)))
    for done in range(len(travel.lines)):
        held = travel.gathered(held, done, like)
    return held


def from_owners(
    ranks: Ranks,
    wholes: Mapping[int, Tensor],
    shapes: Sequence[Shape],
    owners: Sequence[int],
    like: Tensor,
) -> list[Tensor]:
    """Deals matrices out.

    Args:
        ranks: over which they are to be spread.
        wholes: those that this rank owns, by their places, of the dtype of `like`.
        shapes: of all of them.
        owners: an `index` for each, in the same copy as this rank.
        like: empty, of one dtype on all ranks.

    Returns:
        Of each matrix what belongs here.
    """
    travel = _Travel(ranks, shapes, owners)
    held = dict(wholes)
    for done in reversed(range(len(travel.lines))):
        held = travel.dealt(held, done, like)
    return [held[i] for i in range(len(shapes))]


class _Line(NamedTuple):
    """Along which parts come together.

    Attributes:
        dim: of the matrices, 0 or 1.
        axes: of the mesh, that divide it, outermost first: along the last one.
    """

    dim: int
    axes: tuple[int, ...]


class _Travel:
    """How some matrices come together: see `to_owners`."""

    def __init__(self, ranks: Ranks, shapes: Sequence[Shape], owners: Sequence[int]) -> None:
        self._place, self._here, self._shapes = ranks.place, ranks.coordinates, shapes
        self._targets = [ranks.coordinates_of(owner) for owner in owners]
        self._copies = ranks.copies
        self.lines = [
            _Line(dim, axes[:count])
            for dim, axes in enumerate((self._place.rows, self._place.columns))
            for count in range(len(axes), 0, -1)
        ]

    def met(self, done: int) -> list[int]:
        """Places of those matrices of which this rank holds something after so many lines."""
        axes = [*self._copies, *(line.axes[-1] for line in self.lines[:done])]
        every = enumerate(self._targets)
        return [i for i, target in every if all(target[a] == self._here[a] for a in axes)]

    def gathered(self, held: dict[int, Tensor], done: int, like: Tensor) -> dict[int, Tensor]:
        """Puts what is held after so many lines together along the next one."""
        line, own = self.lines[done], self.met(done + 1)
        outgoing = [[held[i] for i in theirs] for theirs in self._by_target(done)]
        shapes = [[self._part(i, done, there) for i in own] for there in self._along(line)]
        received = self._exchanged(line, outgoing, shapes, like)
        return {i: torch.cat([of[n] for of in received], line.dim) for n, i in enumerate(own)}

    def dealt(self, held: dict[int, Tensor], done: int, like: Tensor) -> dict[int, Tensor]:
        """Divides again what `gathered` has put together."""
        line, own = self.lines[done], self.met(done + 1)
        every = list(self._along(line))
        sizes = {i: [self._part(i, done, there)[line.dim] for there in every] for i in own}
        divided = {i: torch.split(held[i], sizes[i], line.dim) for i in own}
        outgoing = [[divided[i][rank] for i in own] for rank in range(len(every))]
        served = self._by_target(done)
        shapes = [[self._part(i, done, self._here) for i in theirs] for theirs in served]
        received = self._exchanged(line, outgoing, shapes, like)
        pairs = zip(served, received, strict=True)
        return {i: part for theirs, of in pairs for i, part in zip(theirs, of, strict=True)}

    def _along(self, line: _Line) -> list[list[int]]:
        """Coordinates of the ranks of a line."""
        axis = line.axes[-1]
        size = int(self._place.mesh.size(axis))
        return [
            [rank if a == axis else x for a, x in enumerate(self._here)] for rank in range(size)
        ]

    def _by_target(self, done: int) -> list[list[int]]:
        """What is met after so many lines, by who of the next one has it then."""
        axis, met = self.lines[done].axes[-1], self.met(done)
        size = int(self._place.mesh.size(axis))
        return [[i for i in met if self._targets[i][axis] == rank] for rank in range(size)]

    def _part(self, matrix: int, done: int, there: Sequence[int]) -> Shape:
        """The shape of what a rank holds of a matrix after so many lines."""
        left = self.lines[done:]
        axes = [next((line.axes for line in left if line.dim == dim), ()) for dim in (0, 1)]
        rows, cols = self._shapes[matrix]
        return self._place.span(rows, axes[0], there)[1], self._place.span(cols, axes[1], there)[1]

    def _exchanged(
        self,
        line: _Line,
        outgoing: Sequence[Sequence[Tensor]],
        shapes: Sequence[Sequence[Shape]],
        like: Tensor,
    ) -> list[list[Tensor]]:
        """What the ranks of a line send to this one, of these shapes, for what it sends to them."""
        flat = torch.cat([like, *(part.reshape(-1) for theirs in outgoing for part in theirs)])
        counts = [list(map(math.prod, theirs)) for theirs in shapes]
        received = like.new_empty(sum(map(sum, counts)))
        dist.all_to_all_single(
            received,
            flat,
            list(map(sum, counts)),
            [sum(part.numel() for part in theirs) for theirs in outgoing],
            group=self._place.mesh.get_group(line.axes[-1]),
        )
        parts = iter(torch.split(received, [count for theirs in counts for count in theirs]))
        return [[next(parts).view(shape) for shape in theirs] for theirs in shapes]


def _dtypes(parts: Sequence[Tensor]) -> list[torch.dtype]:
    return [part.dtype for part in parts]
