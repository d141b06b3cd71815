"""Orthogonal factors of what is outside, for matrices whose rows are on several ranks.

    owners    of a bucket's matrices, the largest first, to the rank that has the least to do
    gather    one all-to-all: to each owner the rows of E, or of its mean, of all of its matrices
    compute   on whole matrices, as one process does
    back      one all-to-all: to each rank its rows of the factors

Rows travel in the dtype in which the iterations multiply, which rounds them once more than one
process does where that is bfloat16. Of HSDP each replica serves itself.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..ops.orthogonal import factor_dtype
from .collectives import Ranks, owners_of
from .outside import Outside
from .placement import Placement
from .transformed import Transformation


def needs_wholes(outside: Outside, place: Placement) -> bool:
    """Whether a step has to gather matrices that are spread in this way."""
    return outside.residual == "orthogonal" and place.axis is not None


def rows_dtype(weights: torch.dtype, device: torch.device) -> torch.dtype:
    """In which rows of a weight's E travel."""
    return factor_dtype(weights, device.type)


class Wholes:
    """The matrices of a bucket.

    Args:
        shapes: of whole matrices, the same on all ranks.
        dtype: of the weights.
        ranks: among whom they are spread by rows.
        transformation: what becomes of E.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        ranks: Ranks,
        transformation: Transformation,
    ) -> None:
        self._shapes, self._ranks, self._transformation = list(shapes), ranks, transformation
        self._dtype = rows_dtype(dtype, ranks.device)
        owners = owners_of([rows * cols for rows, cols in shapes], ranks.place.parts)
        self._owners = list(map(ranks.shard_index, owners))
        self._gathered: dict[int, Tensor] = {}

    def gather(self, parts: Mapping[int, Tensor], like: Tensor) -> None:
        """Sends rows to their owners.

        Args:
            parts: of each matrix, by its place, the rows of E that are here, if there are any.
            like: on the device where they are.
        """
        every = [
            parts[place].to(self._dtype)
            if place in parts
            else like.new_empty((0, cols), dtype=self._dtype)
            for place, (_, cols) in enumerate(self._shapes)
        ]
        rows = [count for count, _ in self._shapes]
        self._gathered = self._ranks.to_owners(every, rows, self._owners)

    def factors(self) -> list[Tensor]:
        """Of each matrix the rows of its factor that are here; what was gathered is freed."""
        found: dict[int, Tensor] = {}
        for place in list(self._gathered):
            whole = self._gathered.pop(place)
            found[place] = self._transformation.factor(whole.unsqueeze(0))[0].to(self._dtype)
        return self._ranks.from_owners(found, self._shapes, self._owners, self._dtype)
