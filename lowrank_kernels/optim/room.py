"""Memory in which batches of equal matrices decode, in turn, what their states hold in codes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.bases import decode_basis, loaded_basis
from ..ops.weights24 import joined, split

State = dict[str, Any]


class Room(NamedTuple):
    """Of a batch; it stays where it is, as captured graphs need it.

    Attributes:
        bases: in the dtype of the weights, empty if states hold them so.
        weights: in float32, empty if there are no bits beside the weights.
    """

    bases: list[Tensor]
    weights: list[Tensor]

    @classmethod
    def of(cls, params: Sequence[Tensor], state: State) -> "Room":
        """For these parameters, whose states are like the given one."""
        bases, weights = [], []
        for param in params:
            if "basis_scale" in state:
                bases.append(torch.empty_like(loaded_basis(state), dtype=param.dtype))
            if "low_bits" in state:
                weights.append(torch.empty_like(param, dtype=torch.float32))
        return cls(bases, weights)

    def load_bases(self, codes: list[Tensor], scales: list[Tensor]) -> list[Tensor]:
        """Decodes a batch's bases."""
        return list(map(decode_basis, codes, scales, self.bases))

    def load_weights(self, params: list[Tensor], states: list[State]) -> None:
        """Joins a batch's weights with their low bits."""
        for wide, param, state in zip(self.weights, params, states, strict=False):
            wide.copy_(joined(param, state["low_bits"]))

    def store_weights(self, params: list[Tensor], states: list[State]) -> None:
        """Takes them apart again."""
        for wide, param, state in zip(self.weights, params, states, strict=False):
            split(wide, param, state["low_bits"])
