"""The step of projected weights that are spread over processes.

A rank steps what it has of a weight by the batches of whole ones. The right side contracts columns,
of which every rank has all, so that between two refreshes ranks need of each other only numbers:
two or three a matrix for the limiter, one where a criterion looks at |R|. Those of some matrices, a
bucket, travel together, while the next bucket is projected.

Residuals that are changed as whole matrices travel to owners and back: see `gathered`.

Local shapes decide what is launched, and only global ones what is sent: a rank without rows sends
zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..ops import Matrices, Projection, Scalars, Side
from ..ops.contract import moment_dtype, rank_axis
from ..ops.tensors import READER
from ..subspace import Due, Readback, Subspace, measure, measures_at
from .agreement import agree_by_store
from .batches import Batch, Member, MemoryOf, batches_of, due_of_member, scalars_of
from .collectives import NUMBERS, Claim, Ranks, Wait
from .contracted import projections
from .gathered import Wholes, needs_wholes, parts_dtype
from .groups import Group
from .outside import TRANSFORMED_BYTES
from .owners import refresh_shared
from .parts import Method
from .placement import (
    Placement,
    depth_here,
    local,
    local_grad,
    local_state,
    put_back,
    spread_of,
)
from .state import State

if TYPE_CHECKING:
    from .lowrank_adamw import LowRankAdamW

# Of N and R of a bucket, in float32, on the rank that has most.
BUCKET_BYTES = 2**26

Idle = tuple[Group, str, Tensor, Side]

# Of a group, what ranks compare; the rate changes at each step, and nobody waits for it.
AGREED = (
    "rank",
    "update_proj_gap",
    "proj_type",
    "scale",
    "betas",
    "eps",
    "weight_decay",
    "maximize",
)


def collectives_of(param: Tensor, side: Side, method: Method) -> str:
    """What ranks do together for a projected DTensor, in words."""
    place = Placement.of(param)
    if place.mesh.size() == 1:
        return ""
    ranks = Ranks(place, torch.device(place.mesh.device_type), side)
    both = "G and M" if method.subspace.interpolation else "G"
    gather = f"all-to-all of {both} to an owner and " if place.parts > 1 else ""
    every: list[str] = []
    if ranks.depth_axes:
        every.append("all-reduce of R")
    if needs_wholes(method.outside, place):
        every.append("all-reduce of a claim and two all-to-alls of what is outside")
    elif ranks.channel_axes and (method.outside.is_limited or method.subspace.criterion):
        every.append("all-reduce of norms")
    steps = f"; in every step {' and '.join(every)}" if every else ""
    return f"at a refresh {gather}broadcast of P{steps}"


class Matrix(NamedTuple):
    """A weight that is spread, and what is here of it.

    Attributes:
        group: its options.
        name: of the parameter.
        param: the DTensor.
        whole: its state.
        here: local parts of the weight, which holds that of the gradient, and of the state.
    """

    group: Group
    name: str
    param: Tensor
    whole: State
    here: Member

    @classmethod
    def of(cls, group: Group, member: Member) -> Matrix:
        twin = local(member.param).detach()
        whole, side = tuple(member.param.shape), Side(member.state["side"])
        depth = depth_here(member.param, side)
        own = Member(member.name, twin, {}, member.place, member.backend, whole, depth)
        return cls(group, member.name, member.param, member.state, own)

    def load(self) -> None:
        """Takes the gradient, and the state as it is now."""
        grad, twin = local_grad(self.param), self.here.param
        if grad.dtype is not twin.dtype:
            # torch then takes any; older versions let no such gradient exist.
            twin.grad_dtype = None
        twin.grad = grad
        self.here.state.clear()
        self.here.state.update(local_state(self.whole))

    def store(self) -> None:
        """Puts back what has become of the state."""
        put_back(self.whole, self.here.state, self.param)

    @property
    def side(self) -> Side:
        """Of its basis."""
        return Side(self.whole["side"])

    @property
    def described(self) -> str:
        """What has to be the same on every rank."""
        return _described(self.group, self.name, self.param)


def bytes_between(rows: int, cols: int, rank: int, *, gathered: bool) -> int:
    """What a shard of so many rows takes from operation 1 to the others: N and R, and, where it is
    gathered, E and what is made of it.
    """
    return 8 * rows * rank + (TRANSFORMED_BYTES * rows * cols if gathered else 0)


def bucketed(sizes: Sequence[int], least: int = 1, most: int = NUMBERS) -> list[range]:
    """Places of matrices that travel together, in order.

    Args:
        sizes: in bytes, of which `BUCKET_BYTES` are in a bucket, or those of one matrix.
        least: so many matrices are in a bucket in any case, to keep as many owners busy.
        most: not more.
    """
    found: list[range] = []
    start, room = 0, BUCKET_BYTES
    for place, size in enumerate(sizes):
        count = place - start
        if count and ((room < size and count >= least) or count >= most):
            found.append(range(start, place))
            start, room = place, BUCKET_BYTES
        room -= size
    return [*found, range(start, len(sizes))] if sizes else found


class Team:
    """Matrices that are spread in one way, in the order of the groups.

    Args:
        like: a weight of one placement and dtype.
        side: of their bases.
        matrices: like it, with gradients, loaded.
        idle: what is said of those without a gradient.
        method: the optimizer's parts.
        memory_of: see `batches_of`.
    """

    def __init__(
        self,
        like: Tensor,
        side: Side,
        matrices: list[Matrix],
        idle: list[str],
        method: Method,
        memory_of: MemoryOf,
    ) -> None:
        self.matrices, self.method, self._kind = matrices, method, _kind((like, side))
        place = Placement.of(like)
        self.ranks = Ranks(place, torch.device(place.mesh.device_type), side)
        self.gathers = needs_wholes(method.outside, place)
        lines = sorted([matrix.described for matrix in matrices] + idle)
        if self.gathers:
            lines.append(f"residuals in {parts_dtype(like.dtype, self.ranks.device)}")
        order = "the order " + ", ".join(matrix.name for matrix in matrices)
        self.claim = Claim([*lines, method.described(), f"bases in {method.basis}", order])
        most = NUMBERS // (method.outside.shared + 1)
        sizes = [self._size(matrix) for matrix in matrices]
        parts = bucketed(sizes, place.parts if self.gathers else 1, most)
        self.buckets = [Bucket([matrices[i] for i in part], self, memory_of) for part in parts]

    def _size(self, matrix: Matrix) -> int:
        """Bytes that a matrix takes between operations on the rank that has most of it."""
        place, shape = self.ranks.place, matrix.param.shape
        most = [place.most(shape[dim], place.axes(dim)) for dim in (0, 1)]
        depth = rank_axis(self.ranks.side)
        rank = min(matrix.group["rank"], *shape)
        return bytes_between(most[1 - depth], most[depth], rank, gathered=self.gathers)

    def agree(self, before: Sequence[str] | None) -> None:
        """Raises RuntimeError if these are not the same matrices on all ranks.

        Args:
            before: the lines that all had agreed on, at an earlier step; None if there are none.
        """
        if before is None:
            rates = [f"{matrix.name} at lr {matrix.group['lr']}" for matrix in self.matrices]
            self.ranks.agree(Claim([*self.claim.lines, *rates]))
        elif before != self.claim.lines:
            if self._speaks_in_every_step():
                self.ranks.agree(self.claim)
            else:
                mesh = self.ranks.place.mesh
                agree_by_store(self.claim.lines, before, mesh.mesh.flatten().tolist(), self._kind)

    def _speaks_in_every_step(self) -> bool:
        """Whether ranks that see no change send a message like that of `Ranks.agree`, and look."""
        told = self.method.outside.is_limited or self.gathers or bool(self.ranks.depth_axes)
        return told and self.ranks.device.type == "cpu" and not self.ranks.copies

    def refresh(self, subspace: Subspace, readback: Readback) -> bool:
        """Gives new bases to all that are due; whether there were any."""
        due: list[Due] = []
        shapes: list[tuple[int, int]] = []
        for matrix in self.matrices:
            if not matrix.param.numel():
                continue
            steps = int(matrix.here.state["step"])
            found = due_of_member(matrix.group, matrix.here, steps, subspace, readback)
            if found is not None:
                due.append(found)
                shapes.append((matrix.param.shape[0], matrix.param.shape[1]))
        if not due:
            return False
        lines = [f"{item.name}, due for a basis after {item.completed} steps" for item in due]
        self.ranks.agree(Claim(self.claim.lines + lines))
        refresh_shared(due, shapes, self.ranks, subspace)
        return True

    def step(self, optimizer: LowRankAdamW) -> None:
        """Project, scale, update, a bucket while the numbers of the one before travel."""
        contracts = bool(self.ranks.depth_axes)
        if contracts and self.ranks.device.type == "cpu":
            # Messages of R are of unlike sizes: ranks that differ would wait for ever.
            self.ranks.agree(Claim([*self.claim.lines, "a step"]))
        told = self.method.outside.is_limited or self.method.subspace.criterion is not None
        if not told and not self.gathers and not contracts:
            for bucket in self.buckets:
                for batch, scalars in bucket.scalars():
                    optimizer._step_batch(batch, scalars)
            return
        under_way: list[Bucket] = []
        # Where ranks look at what the others claim, they do before they send anything else.
        ahead = 0 if self.ranks.device.type == "cpu" else 1
        for bucket in self.buckets:
            bucket.begin()
            under_way.append(bucket)
            if len(under_way) > ahead:
                under_way.pop(0).end(optimizer._readback)
        for bucket in under_way:
            bucket.end(optimizer._readback)


class Work(NamedTuple):
    """A batch between operation 1 and the others."""

    batch: Batch
    scalars: Scalars
    matrices: Matrices
    projection: Projection
    factors: Tensor | None


class Bucket:
    """Matrices whose numbers travel together.

    Args:
        matrices: of a team.
        team: the team.
        memory_of: see `batches_of`.
    """

    def __init__(self, matrices: list[Matrix], team: Team, memory_of: MemoryOf) -> None:
        self.matrices, self.method, self.ranks = matrices, team.method, team.ranks
        self.by_group: list[list[Batch]] = []
        for group in {id(matrix.group): matrix.group for matrix in matrices}.values():
            own = [matrix.here for matrix in matrices if matrix.group is group]
            if here := [member for member in own if member.param.numel()]:
                self.by_group.append(batches_of(group, here, self.method, memory_of))
        names = ", ".join(matrix.name for matrix in matrices)
        self._claim = Claim([*team.claim.lines, f"a step of {names}"])
        self._place_of = {id(matrix.here.state): place for place, matrix in enumerate(matrices)}
        device = matrices[0].here.param.device
        # On the device, so that no step waits for them.
        self._places = {
            id(batch): torch.tensor(self._places_in(batch), device=device)
            for batches in self.by_group
            for batch in batches
        }
        self._wholes: Wholes | None = None
        if team.gathers:
            shapes = [(matrix.param.shape[0], matrix.param.shape[1]) for matrix in matrices]
            transformation = self.method.outside.transformation
            self._wholes = Wholes(shapes, matrices[0].param.dtype, self.ranks, transformation)
        self._works: list[Work] = []
        self._wait: Wait | None = None

    def _places_in(self, batch: Batch) -> list[int]:
        """Of a batch's matrices in the bucket."""
        return [self._place_of[id(state)] for state in batch.states]

    def scalars(self) -> Iterator[tuple[Batch, Scalars]]:
        """The batches with the scalars of this step."""
        for batches in self.by_group:
            yield from zip(batches, scalars_of(batches, self.method), strict=True)

    def begin(self) -> None:
        """Operation 1; sends what the others have to know."""
        outside, subspace = self.method.outside, self.method.subspace
        shared = outside.shared
        measured = any(
            measures_at(matrix.here.state, self._steps(matrix), subspace)
            for matrix in self.matrices
        )
        like = self.matrices[0].here.param
        numbers = like.new_zeros((len(self.matrices), shared + 1), dtype=torch.float64)
        outsides: dict[int, Tensor] = {}
        for (batch, scalars), projection in self._projections():
            matrices, factors = batch.matrices(), None
            places = self._places[id(batch)]
            if shared:
                assert projection.sums is not None
                factors, numbers[places, :shared] = outside.shares(projection.sums)
            if measured:
                low = projection.projected
                norms = torch.linalg.vector_norm(low, dim=(1, 2), dtype=torch.float64)
                numbers[places, shared] = norms.square()
            if self._wholes is not None:
                assert batch.updater is not None
                own = batch.updater.begin(matrices, batch.states, projection)
                outsides |= zip(self._places_in(batch), own, strict=True)
            self._works.append(Work(batch, scalars, matrices, projection, factors))
        # Before anything of another size travels ranks look whether they are about to do the same.
        whole = self._wholes is not None
        sent = numbers if measured or whole else numbers[:, :shared]
        self._wait = None
        if sent.numel():
            waits = self.ranks.sum(sent.flatten(), self._claim)
            self._wait = lambda: waits().view(len(self.matrices), -1)
        if self._wholes is not None:
            totals = waits().view(len(self.matrices), -1)
            self._wait = (lambda: totals) if measured else None
            self._wholes.gather(outsides, like)

    def _projections(self) -> Iterator[tuple[tuple[Batch, Scalars], Projection]]:
        """Operation 1 of each batch."""
        works = list(self.scalars())
        if self.ranks.depth_axes:
            yield from zip(works, projections(works, self.ranks.add_low), strict=True)
            return
        for batch, scalars in works:
            matrices = batch.matrices()
            found = batch.operations.project_moments(matrices, scalars.adam, scalars.step)
            yield (batch, scalars), found

    def end(self, readback: Readback) -> None:
        """Operations 2 and 3, with the numbers of all ranks."""
        outside, shared = self.method.outside, self.method.outside.shared
        totals = self._wait() if self._wait is not None else None
        limits = None
        if totals is not None and shared:
            norms = [matrix.here.state["limiter_norm"] for matrix in self.matrices]
            limits = outside.limits(totals[:, :shared], norms)
        if totals is not None and totals.shape[1] > shared:
            self._measure(totals[:, shared].sqrt(), readback)
        works, self._works = self._works, []
        factors = self._wholes.factors() if self._wholes is not None else []
        for work in works:
            factor = None
            if limits is not None and work.factors is not None:
                own = limits[self._places[id(work.batch)]]
                factor = own.unsqueeze(1) * work.factors
            # Batches decode their bases in turn in one memory.
            matrices = work.batch.matrices() if work.batch.room.bases else work.matrices
            if factors:
                assert work.batch.updater is not None
                own_factors = [factors[place] for place in self._places_in(work.batch)]
                work.batch.updater.end(
                    matrices, work.batch.states, work.projection, work.scalars, own_factors
                )
            else:
                work.batch.update(matrices, work.projection, work.scalars, factor)

    def _measure(self, norms: Tensor, readback: Readback) -> None:
        """Of all matrices, also of those of which nothing is here."""
        subspace = self.method.subspace
        projected: dict[int, Tensor] = {}
        for work in self._works:
            every = zip(work.batch.states, work.projection.projected, strict=True)
            projected |= {id(state): low for state, low in every}
        for matrix, norm in zip(self.matrices, norms, strict=True):
            state, steps = matrix.here.state, self._steps(matrix)
            low = projected.get(id(state))
            if low is None:
                exp_avg = state["exp_avg"]
                low = exp_avg.new_zeros(exp_avg.shape, dtype=moment_dtype(exp_avg.dtype))
            if measure(state, low, steps, subspace, norm.to(low.dtype), self._total):
                readback.start(matrix.here.param, state["measured"])

    def _total(self, norm: Tensor) -> Tensor:
        squares = self.ranks.sum(norm.double().square().view(1), self._claim)()
        return squares.sqrt().to(norm.dtype).view(())

    @staticmethod
    def _steps(matrix: Matrix) -> int:
        """Before this one, which is counted by now."""
        return int(matrix.here.state["step"]) - 1


class Sharded:
    """All projected weights of an optimizer that are spread over processes.

    Args:
        members: of each group, those that are spread and have a gradient.
        idle: group, name, parameter and side of those that have none: other ranks may have one.
        method: the optimizer's parts.
        memory_of: see `batches_of`.
    """

    def __init__(
        self,
        members: list[tuple[Group, list[Member]]],
        idle: list[Idle],
        method: Method,
        memory_of: MemoryOf,
    ) -> None:
        self.matrices = [Matrix.of(group, member) for group, own in members for member in own]
        self.load()
        alike: dict[Any, tuple[Tensor, Side, list[Matrix], list[str]]] = {}
        # Teams go by all parameters, in an order that does not depend on gradients.
        spread = [(matrix.param, matrix.side) for matrix in self.matrices]
        spread += [(param, side) for *_, param, side in idle]
        for param, side in sorted(spread, key=_kind):
            alike.setdefault(_team(param, side), (param, side, [], []))
        for matrix in self.matrices:
            alike[_team(matrix.param, matrix.side)][2].append(matrix)
        for group, name, param, side in idle:
            line = f"{_described(group, name, param)}, without a gradient"
            alike[_team(param, side)][3].append(line)
        self.teams = [Team(*team, method, memory_of) for team in alike.values()]
        self.batches = [
            batch
            for team in self.teams
            for bucket in team.buckets
            for batches in bucket.by_group
            for batch in batches
        ]

    @property
    def claims(self) -> list[list[str]]:
        """Of each team, what has to be the same on all of its ranks."""
        return [team.claim.lines for team in self.teams]

    def agree(self, before: list[list[str]] | None) -> None:
        """Raises RuntimeError if these are not the same matrices on all ranks.

        Args:
            before: earlier `claims`, on which all had agreed; None if there are none.
        """
        for place, team in enumerate(self.teams):
            known = before is not None and len(before) == len(self.teams)
            team.agree(before[place] if known and before is not None else None)

    def load(self) -> None:
        """Before a step: gradients, and states as they are now."""
        for matrix in self.matrices:
            matrix.load()

    def refresh(self, subspace: Subspace, readback: Readback) -> bool:
        """Gives new bases to all that are due; whether there were any."""
        changed = [team.refresh(subspace, readback) for team in self.teams]
        for matrix in self.matrices:
            matrix.store()
        return any(changed)

    def step(self, optimizer: LowRankAdamW) -> None:
        """One step, but for the bases."""
        if not self.matrices:
            return
        READER.add_one([matrix.here.state["step"] for matrix in self.matrices])
        for team in self.teams:
            team.step(optimizer)
        for matrix in self.matrices:
            matrix.store()
            # A gradient that is set to None is free then.
            matrix.here.param.grad = None
        increment_version([m.param for m in self.matrices if not m.param.is_inference()])


def _described(group: Group, name: str, param: Tensor) -> str:
    """What has to be the same of a weight on every rank."""
    told = ", ".join(f"{key} {group[key]}" for key in AGREED)
    _, placements = spread_of(param)
    return f"{name} {tuple(param.shape)}, {param.dtype}, {placements}, {told}"


def _team(param: Tensor, side: Side) -> Any:
    """Equal for weights of one team."""
    mesh, placements = spread_of(param)
    return mesh, placements, side, param.dtype, local(param).device


def _kind(weight: tuple[Tensor, Side]) -> str:
    """What a team goes by, in words that are the same on every rank."""
    param, side = weight
    mesh, placements = spread_of(param)
    names = mesh.mesh_dim_names
    # Its ranks, too: a total order of groups, in which none waits for another one in a circle.
    return f"{mesh.mesh.shape} {placements} {side.name} {param.dtype} {names} {mesh.mesh.tolist()}"
