"""What ranks that hold parts of the same matrices send to each other.

Ranks have to call the same collectives in the same order. What they are about to do is therefore
hashed, and the hash h goes along with every sum, as h and h^2 beside the numbers: if the ranks
differ all of them see it, as w sum(h^2) != sum(h)^2. All sums are messages of one size, so that a
rank that is about to do something else still meets the others.
"""

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

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
    """

    place: Placement
    device: torch.device

    @property
    def axes(self) -> list[int]:
        """Of the mesh, that have several ranks; that of the shards comes first."""
        mesh, first = self.place.mesh, self.place.axis
        axes = [axis for axis in range(mesh.ndim) if mesh.size(axis) > 1]
        return sorted(axes, key=lambda axis: axis != first)

    @property
    def count(self) -> int:
        return int(self.place.mesh.size())

    @property
    def index(self) -> int:
        """This rank's, from 0 to `count`, row by row of the mesh."""
        return self._index_at(self._coordinates)

    def sum(self, numbers: Tensor, claim: Claim) -> Wait:
        """The sum over the shards, of float64 numbers of which there are as many on every rank.

        Returns:
            What waits for it. It raises RuntimeError if the other ranks claim something else; on a
            GPU, where that would wait for the device, only `agree` looks.
        """
        axis = self.place.axis
        if axis is None:
            return lambda: numbers
        messages = [self._message(part, claim) for part in torch.split(numbers, NUMBERS)]
        group = self.place.mesh.get_group(axis)
        works = [dist.all_reduce(message, group=group, async_op=True) for message in messages]

        def wait() -> Tensor:
            for work in works:
                work.wait()
            if self.device.type == "cpu" and any(_differ(m, group.size()) for m in messages):
                self._tell_difference(claim)
            parts = torch.split(numbers, NUMBERS)
            found = [message[2 : 2 + len(p)] for message, p in zip(messages, parts, strict=True)]
            return torch.cat(found).to(numbers.device)

        return wait

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
            self._tell_difference(claim)

    def _tell_difference(self, claim: Claim) -> NoReturn:
        known = [(dist.get_rank(), claim.lines)]
        # All axes before anybody raises.
        for axis in self.axes:
            group = self.place.mesh.get_group(axis)
            every: list[Any] = [None] * group.size()
            dist.all_gather_object(every, known, group=group)
            known = sorted(each for some in every for each in some)
        raise RuntimeError(f"the ranks do not take the same step: {_first_difference(known)}")

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Gives every rank what the owner has, in place.

        Args:
            tensor: contiguous, of one shape on all ranks.
            owner: an `index`.
        """
        mesh, here, there = self.place.mesh, self._coordinates, self._coordinates_of(owner)
        known: list[int] = []
        for axis in self.axes:
            # Along this axis are those who differ from the owner in no axis that is still to come.
            if all(here[a] == there[a] for a in self.axes if a not in (*known, axis)):
                group = mesh.get_group(axis)
                dist.broadcast(tensor, dist.get_global_rank(group, there[axis]), group=group)
            known.append(axis)

    def to_owners(
        self, parts: Sequence[Tensor], rows: Sequence[int], owners: Sequence[int]
    ) -> dict[int, Tensor]:
        """Gathers matrices, each on its owner.

        Args:
            parts: of each matrix the rows that are here; they travel in a dtype that holds all.
            rows: of each whole matrix.
            owners: an `index` for each. The shards of a matrix that are next to its owner, of all
                copies, serve it.

        Returns:
            The matrices that this rank owns, by their places.
        """
        axis = self.place.axis
        if axis is None:
            return {i: parts[i] for i, owner in enumerate(owners) if owner == self.index}
        columns = [part.shape[1] for part in parts]
        sent = self._served(owners)
        own = sent[self._coordinates[axis]]
        outgoing = [parts[i].reshape(-1) for places in sent for i in places]
        out_splits = [sum(parts[i].numel() for i in places) for places in sent]
        every_rows = [self.place.rows(count) for count in rows]
        in_splits = [
            sum(every_rows[i][shard] * columns[i] for i in own) for shard in range(self.place.parts)
        ]
        dtype = functools.reduce(torch.promote_types, [part.dtype for part in parts])
        like = parts[0].new_empty(0, dtype=dtype)
        flat = torch.cat([like, *outgoing])
        received = like.new_empty(sum(in_splits))
        group = self.place.mesh.get_group(axis)
        dist.all_to_all_single(received, flat, in_splits, out_splits, group=group)
        wholes: dict[int, list[Tensor]] = {i: [] for i in own}
        start = 0
        for shard in range(self.place.parts):
            for i in own:
                size = every_rows[i][shard] * columns[i]
                wholes[i].append(received[start : start + size].view(-1, columns[i]))
                start += size
        return {i: torch.cat(found) for i, found in wholes.items()}

    def from_owners(
        self,
        wholes: Mapping[int, Tensor],
        shapes: Sequence[tuple[int, int]],
        owners: Sequence[int],
        dtype: torch.dtype,
    ) -> list[Tensor]:
        """Deals matrices out again, which `to_owners` gathered.

        Args:
            wholes: those that this rank owns, by their places, of this dtype.
            shapes: of all matrices.
            owners: as `to_owners` took them.
            dtype: the same on all ranks.

        Returns:
            Of each matrix the rows that belong here.
        """
        axis = self.place.axis
        assert axis is not None
        here, group = self._coordinates[axis], self.place.mesh.get_group(axis)
        served = self._served(owners)
        every_rows = [self.place.rows(rows) for rows, _ in shapes]
        divided = {i: torch.split(wholes[i], every_rows[i]) for i in served[here]}
        outgoing = [divided[i][s] for s in range(self.place.parts) for i in served[here]]
        out_splits = [
            sum(every_rows[i][s] * shapes[i][1] for i in served[here])
            for s in range(self.place.parts)
        ]
        sizes = [rows[here] * cols for rows, (_, cols) in zip(every_rows, shapes, strict=True)]
        in_splits = [sum(sizes[i] for i in theirs) for theirs in served]
        empty = torch.empty(0, dtype=dtype, device=self.device)
        flat = torch.cat([empty, *(part.reshape(-1) for part in outgoing)])
        received = empty.new_empty(sum(in_splits))
        dist.all_to_all_single(received, flat, in_splits, out_splits, group=group)
        order = [i for theirs in served for i in theirs]
        parts = zip(order, torch.split(received, [sizes[i] for i in order]), strict=True)
        found = {i: part.view(-1, shapes[i][1]) for i, part in parts}
        return [found[i] for i in range(len(shapes))]

    def shard_index(self, shard: int) -> int:
        """The `index` of who has a shard, of this rank's copy."""
        here = enumerate(self._coordinates)
        return self._index_at([shard if axis == self.place.axis else x for axis, x in here])

    def _served(self, owners: Sequence[int]) -> list[list[int]]:
        """Of each shard of this copy the places of those matrices whose owner it has."""
        indices = map(self.shard_index, range(self.place.parts))
        return [[i for i, owner in enumerate(owners) if owner == index] for index in indices]

    def _message(self, numbers: Tensor, claim: Claim) -> Tensor:
        message = torch.zeros(MESSAGE, dtype=torch.float64, device=self.device)
        message[0], message[1] = claim.token, claim.token**2
        message[2 : 2 + len(numbers)] = numbers
        return message

    @property
    def _coordinates(self) -> list[int]:
        return list(self.place.mesh.get_coordinate())

    def _index_at(self, coordinates: Sequence[int]) -> int:
        index = 0
        for axis, place in enumerate(coordinates):
            index = index * int(self.place.mesh.size(axis)) + place
        return index

    def _coordinates_of(self, index: int) -> list[int]:
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


def _first_difference(every: Sequence[tuple[int, Sequence[str]]]) -> str:
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
