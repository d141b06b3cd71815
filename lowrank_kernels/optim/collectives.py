"""What ranks that hold parts of the same matrices send to each other.

Ranks have to call the same collectives in the same order. What they are about to do is therefore
hashed, and the hash h goes along with every sum, as h and h^2 beside the numbers: if the ranks
differ all of them see it, as w sum(h^2) != sum(h)^2. All sums are messages of one size, so that a
rank that is about to do something else still meets the others.
"""

import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.contract import Side, rank_axis
from .placement import Placement

# Of float64 in a message, with the two of the hash; 4 KiB travel as fast as 8 bytes.
MESSAGE = 512
NUMBERS = MESSAGE - 2
# Of a hash: its square, summed over 2^12 ranks, is exact in float64.
HASH_BITS = 20

Wait = Callable[[], Tensor]


def hashed(*what: object) -> int:
    """A hash of the texts of some things, of which every rank makes the same."""
    return zlib.crc32(repr(what).encode()) & ((1 << HASH_BITS) - 1)


class Claim:
    """What this rank is about to do, in lines that are to be equal on all ranks, and their hash."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines, self.token = list(lines), hashed(*lines)


@dataclass(frozen=True)
class Ranks:
    """Those of a mesh over which matrices are spread in one way.

    Attributes:
        place: how they are spread.
        device: where messages are made.
        side: of their bases.
    """

    place: Placement
    device: torch.device
    side: Side

    @property
    def channel_axes(self) -> tuple[int, ...]:
        """Of the mesh, over which ranks have different channels."""
        return self.place.axes(1 - rank_axis(self.side))

    @property
    def depth_axes(self) -> tuple[int, ...]:
        """Over which they have different parts of the same channels, so that R is a sum."""
        return self.place.axes(rank_axis(self.side))

    @property
    def copies(self) -> list[int]:
        """Over which they have the same."""
        mesh, divided = self.place.mesh, (*self.place.rows, *self.place.columns)
        return [a for a in range(mesh.ndim) if mesh.size(a) > 1 and a not in divided]

    @property
    def axes(self) -> list[int]:
        """Of the mesh, that have several ranks; those of the shards come first."""
        return [*self.channel_axes, *self.depth_axes, *self.copies]

    @property
    def of_moments(self) -> "Ranks":
        """The same ranks, with the moments in the place of the weights."""
        same = {("rows", "columns")[rank_axis(self.side)]: ()}
        return replace(self, place=self.place._replace(**same))

    @property
    def count(self) -> int:
        return int(self.place.mesh.size())

    @property
    def index(self) -> int:
        """This rank's, from 0 to `count`, row by row of the mesh."""
        return self._index_at(self.coordinates)

    def sum(self, numbers: Tensor, claim: Claim) -> Wait:
        """The sum over all channels, of float64 numbers of which there are as many on every rank.

        Returns:
            What waits for it. It raises RuntimeError if the other ranks claim something else; on a
            GPU, where that would wait for the device, only `agree` looks.
        """
        if not self.channel_axes:
            return lambda: numbers
        messages = [self._message(part, claim) for part in torch.split(numbers, NUMBERS)]
        first, *others = map(self.place.mesh.get_group, self.channel_axes)
        works = [dist.all_reduce(message, group=first, async_op=True) for message in messages]

        def wait() -> Tensor:
            for work in works:
                work.wait()
            for group, message in itertools.product(others, messages):
                dist.all_reduce(message, group=group)
            ranks = math.prod(group.size() for group in (first, *others))
            if self.device.type == "cpu" and any(_differ(m, ranks) for m in messages):
                self._tell_difference(claim, self.channel_axes)
            parts = torch.split(numbers, NUMBERS)
            found = [message[2 : 2 + len(p)] for message, p in zip(messages, parts, strict=True)]
            return torch.cat(found).to(numbers.device)

        return wait

    def add_low(self, low: Tensor) -> None:
        """Sums over the ranks that have other parts of the same channels, in place."""
        for axis in self.depth_axes:
            dist.all_reduce(low, group=self.place.mesh.get_group(axis))

    def sum_of_all(self, numbers: Tensor) -> Tensor:
        """The sum over all ranks, also over those that have copies."""
        for axis in self.axes:
            dist.all_reduce(numbers, group=self.place.mesh.get_group(axis))
        return numbers

    def agree(self, claim: Claim) -> None:
        """Raises RuntimeError on every rank, which names the first difference, if they are not
        about to do the same.
        """
        differ = 0.0
        for axis in self.axes:
            group = self.place.mesh.get_group(axis)
            message = self._message(torch.tensor([differ], device=self.device), claim)
            dist.all_reduce(message, group=group)
            differ = float(message[2]) + _differ(message, group.size())
        if differ:
            self._tell_difference(claim, self.axes)

    def _tell_difference(self, claim: Claim, axes: Sequence[int]) -> NoReturn:
        """Among the ranks along some axes, which all have seen that they differ."""
        known = [(dist.get_rank(), claim.lines)]
        # All axes before anybody raises.
        for axis in axes:
            group = self.place.mesh.get_group(axis)
            every: list[Any] = [None] * group.size()
            dist.all_gather_object(every, known, group=group)
            known = sorted(each for some in every for each in some)
        raise RuntimeError(f"the ranks do not take the same step: {first_difference(known)}")

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Gives every rank what the owner has, in place.

        Args:
            tensor: contiguous, of one shape on all ranks.
            owner: an `index`.
        """
        mesh, here, there = self.place.mesh, self.coordinates, self.coordinates_of(owner)
        known: list[int] = []
        for axis in self.axes:
            # Along this axis are those who differ from the owner in no axis that is still to come.
            if all(here[a] == there[a] for a in self.axes if a not in (*known, axis)):
                group = mesh.get_group(axis)
                dist.broadcast(tensor, dist.get_global_rank(group, there[axis]), group=group)
            known.append(axis)

    def shard_index(self, shard: int) -> int:
        """The `index` of who has a shard, of this rank's copy, from 0 to `place.parts`."""
        found = self.coordinates
        for axis in (*self.place.rows, *self.place.columns):
            shard, found[axis] = divmod(shard, int(self.place.mesh.size(axis)))
        return self._index_at(found)

    def _message(self, numbers: Tensor, claim: Claim) -> Tensor:
        message = torch.zeros(MESSAGE, dtype=torch.float64, device=self.device)
        message[0], message[1] = claim.token, claim.token**2
        message[2 : 2 + len(numbers)] = numbers
        return message

    @property
    def coordinates(self) -> list[int]:
        """This rank's in the mesh."""
        return list(self.place.mesh.get_coordinate())

    def _index_at(self, coordinates: Sequence[int]) -> int:
        index = 0
        for axis, place in enumerate(coordinates):
            index = index * int(self.place.mesh.size(axis)) + place
        return index

    def coordinates_of(self, index: int) -> list[int]:
        found: list[int] = []
        for axis in reversed(range(self.place.mesh.ndim)):
            index, place = divmod(index, int(self.place.mesh.size(axis)))
            found.insert(0, place)
        return found


def owners_of(sizes: Sequence[int], count: int) -> list[int]:
    """Who of so many ranks takes each of some matrices: the largest first, to whom has the least.

    Args:
        sizes: of the matrices.
        count: of the ranks.
    """
    loads, owners = [0] * count, [0] * len(sizes)
    for place in sorted(range(len(sizes)), key=lambda place: (-sizes[place], place)):
        owner = loads.index(min(loads))
        owners[place] = owner
        loads[owner] += sizes[place]
    return owners


def _differ(message: Tensor, ranks: int) -> bool:
    total, squares = map(float, message[:2])
    return ranks * squares != total**2


def first_difference(every: Sequence[tuple[int, Sequence[str]]]) -> str:
    """What two ranks have in the first place where not all have the same.

    Args:
        every: ranks with their lines.
    """
    for place in range(max(len(what) for _, what in every)):
        lines = [what[place] if place < len(what) else "nothing more" for _, what in every]
        for (rank, _), line in zip(every, lines, strict=True):
            if line != lines[0]:
                return f"rank {every[0][0]} has {lines[0]}, and rank {rank} has {line}"
    return "they did before, at another step"
