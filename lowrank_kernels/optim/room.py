"""Memory in which batches decode, in turn, what their states hold in codes."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.bases import decode_basis
from ..ops.products import matrices_in_workspace
from ..ops.weights24 import joined, split

State = dict[str, Any]

# Where each tensor of a room begins, in bytes.
ALIGNMENT = 256
# A room takes at most this share of what a batch may keep between its operations.
WORKSPACE_SHARE = 4
# Of a weight that is joined or taken apart at a time.
BLOCK_ELEMENTS = 2**20


class Room(NamedTuple):
    """Of a batch: parts of one memory that serves all batches of a group on a device, and stays
    where it is, as captured graphs need it.

    Attributes:
        bases: in the dtype of the weights, empty if states hold them so.
        weights: in float32, empty if there are no bits beside the weights.
    """

    bases: list[Tensor]
    weights: list[Tensor]

    @staticmethod
    def bytes_of(param: Tensor, state: State) -> int:
        """What a matrix takes of it."""
        return sum(_padded(like.numel() * like.itemsize) for like in _decoded(param, state))

    @staticmethod
    def matrices(param: Tensor, state: State) -> int:
        """How many matrices like this one it has at most, at least 1."""
        return matrices_in_workspace(param.device, WORKSPACE_SHARE * Room.bytes_of(param, state))

    @classmethod
    def within(cls, memory: Tensor, params: Sequence[Tensor], state: State) -> "Room":
        """For these parameters, whose states are like the given one.

        Args:
            memory: uint8, large enough for all of them.
            params: of a batch.
            state: of one.
        """
        room, first = cls([], []), 0
        for param in params:
            for like in _decoded(param, state):
                size = like.numel() * like.itemsize
                part = memory[first : first + size].view(like.dtype)
                first += _padded(size)
                into = room.bases if like.dtype is param.dtype else room.weights
                into.append(part.as_strided(like.shape, like.stride()))
        return room

    def load_bases(self, codes: list[Tensor], scales: list[Tensor]) -> list[Tensor]:
        """Decodes a batch's bases."""
        return list(map(decode_basis, codes, scales, self.bases))

    def load_weights(self, params: list[Tensor], states: list[State]) -> None:
        """Joins a batch's weights with their low bits."""
        for wide, weight, low_bits in self._blocks(params, states):
            wide.copy_(joined(weight, low_bits))

    def store_weights(self, params: list[Tensor], states: list[State]) -> None:
        """Takes them apart again."""
        for wide, weight, low_bits in self._blocks(params, states):
            split(wide, weight, low_bits)

    def _blocks(
        self, params: list[Tensor], states: list[State]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Some rows of a wide weight, of the weight and of its low bits."""
        for wide, param, state in zip(self.weights, params, states, strict=True):
            rows = max(1, BLOCK_ELEMENTS // max(1, param.shape[1]))
            every = (torch.split(x, rows) for x in (wide, param, state["low_bits"]))
            yield from zip(*every, strict=True)


def _decoded(param: Tensor, state: State) -> list[Tensor]:
    """Tensors without memory like those that a matrix has in a room."""
    found = []
    if "basis_scale" in state:
        basis = state["basis"]
        # Two codes of int4 lie in a byte.
        size = len(basis) * (2 if basis.dtype is torch.uint8 else 1), basis.shape[1]
        found.append(torch.empty(size, dtype=param.dtype, device="meta"))
    if "low_bits" in state:
        found.append(torch.empty_like(param, dtype=torch.float32, device="meta"))
    return found


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
