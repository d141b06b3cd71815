"""Orthogonal factors of what is outside, for matrices that are spread over ranks.

    owners    of a bucket's matrices, the largest first, to the rank that has the least to do
    gather    an all-to-all an axis: to each owner the parts of E, or of its mean, of its matrices
    compute   on whole matrices, as one process does
    back      an all-to-all an axis: to each rank its parts of the factors

Parts travel in the dtype in which the iterations multiply, which rounds them once more than one
process does where that is bfloat16. Of HSDP each replica serves itself.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..ops.orthogonal import factor_dtype
from .collectives import Ranks, owners_of
from .exchange import from_owners, to_owners
from .outside import Outside
from .placement import Placement
from .transformed import Transformation


def needs_wholes(outside: Outside, place: Placement) -> bool:
    """Whether a step has to gather matrices that are spread in this way."""
    return outside.residual == "orthogonal" and place.parts > 1


def parts_dtype(weights: torch.dtype, device: torch.device) -> torch.dtype:
    """In which parts of a weight's E travel."""
    return factor_dtype(weights, device.type)


class Wholes:
    """The matrices of a bucket.

    Args:
        shapes: of whole matrices, the same on all ranks.
        dtype: of the weights.
        ranks: among whom they are spread.
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
        self._dtype = parts_dtype(dtype, ranks.device)
        owners = owners_of([rows * cols for rows, cols in shapes], ranks.place.parts)
        self._owners = list(map(ranks.shard_index, owners))
        self._gathered: dict[int, Tensor] = {}

    def gather(self, parts: Mapping[int, Tensor], like: Tensor) -> None:
        """Sends parts to their owners.

        Args:
            parts: of each matrix, by its place, what is here of E, if there is any.
            like: on the device where they are.
        """
        empty = like.new_empty(0, dtype=self._dtype)
        every = [parts.get(place, empty).to(self._dtype) for place in range(len(self._shapes))]
        self._gathered = to_owners(self._ranks, every, self._shapes, self._owners)

    def factors(self) -> list[Tensor]:
        """Of each matrix what belongs here of its factor; what was gathered is freed.

        Raises:
            RuntimeError: an owner could not compute one. On GPUs, where the others would have to
                wait for the device to know, on that owner alone.
        """
        found: dict[int, Tensor] = {}
        error: Exception | None = None
        for place in list(self._gathered):
            whole = self._gathered.pop(place)
            try:
                found[place] = self._transformation.factor(whole.unsqueeze(0))[0].to(self._dtype)
            except Exception as failure:  # whatever it is, the others wait
                error, found[place] = failure, torch.full_like(whole, self._failed)
        empty = torch.empty(0, dtype=self._dtype, device=self._ranks.device)
        parts = from_owners(self._ranks, found, self._shapes, self._owners, empty)
        on_host = self._ranks.device.type == "cpu"
        if error is not None or (on_host and any(map(_is_failed, parts))):
            raise RuntimeError("the orthogonal factor of a matrix could not be computed") from error
        return parts

    @property
    def _failed(self) -> float:
        """What an owner sends that has no factor."""
        return math.nan if self._ranks.device.type == "cpu" else 0.0


def _is_failed(part: Tensor) -> bool:
    return bool(part.numel()) and bool(part.isnan().all())
