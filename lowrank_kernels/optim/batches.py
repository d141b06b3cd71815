"""Equal matrices of a parameter group, prepared once and stepped together."""

import functools
import itertools
import operator
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops import AdamScalars, Matrices, Projection, Scalars, Side
from ..ops.contract import adam_of, scalar_of
from ..ops.tensors import READER
from ..subspace import Due, Readback, Subspace, is_due, is_measured, measure, next_look
from .checks import check_projector, check_shared, extent, is_unresolved, overlap, resolved
from .families import joined
from .groups import OPTIONS, Group, is_projected
from .outside import AS_THEY_ARE, Updater
from .parts import Method
from .placement import is_sharded
from .plain import Plain
from .projected_gradient import (
    GRAD,
    ProjectedGradient,
    grads_of,
    held,
    is_projected_gradient,
)
from .room import Room
from .state import State

if TYPE_CHECKING:
    from .sharded import Sharded

# Called by `map` over all matrices before each step, without a Python function a matrix.
_MEMORY_LAYOUT = attrgetter("layout")
_BASIS_STEP = itemgetter("basis_step")
STEP = itemgetter("step")
_MOMENTS = itemgetter("exp_avg", "exp_avg_sq")
_SCALES = itemgetter("exp_avg_scale", "exp_avg_sq_scale")
_LOW_BITS = itemgetter("low_bits")
_NUMBERS = itemgetter("side", "salt", "moments_step", "gap_factor")

MemoryOf = Callable[[int, torch.device], Tensor]


@functools.cache
def _low_rank(limited: bool, coded: bool, coded_basis: bool) -> Callable[[State], tuple[Any, ...]]:
    """Takes out of a projected state the tensors that a step is prepared for."""
    scales = ("exp_avg_scale", "exp_avg_sq_scale") if coded else ()
    others = (("basis_scale",) if coded_basis else ()) + (("limiter_norm",) if limited else ())
    return itemgetter("basis", "exp_avg", "exp_avg_sq", *scales, *others)


class Member(NamedTuple):
    """A parameter with a gradient: its name, state, place in its group, and, if it is projected,
    its backend; the shape of the whole that it is a shard of, if it is one; and where the rows of
    its basis begin that meet what is here of it and how many they are, if that is not all of them.
    """

    name: str
    param: Tensor
    state: State
    place: int = 0
    backend: str = ""
    whole: tuple[int, ...] = ()
    depth: tuple[int, int] | None = None


class Batch:
    """Equal matrices with the operations that a backend has prepared for them.

    Between steps it keeps parameters and their states, but neither gradients nor a tensor of a
    state: what is replaced in a state is freed at once, a state as a whole at the next step.

    Args:
        group: the options.
        members: parameters that are equal in all that `batches_of` compares.
        method: the optimizer's parts.
        room: for what is decoded.
    """

    def __init__(self, group: Group, members: list[Member], method: Method, room: Room) -> None:
        self.group, self.members = group, members
        self.params = [member.param for member in members]
        self.states = [member.state for member in members]
        self.side = Side(self.states[0]["side"])
        alpha, shape = float(group["scale"]), members[0].whole or self.params[0].shape
        self.residual = method.outside.numbers(alpha, shape)
        rounds = method.rounding == "stochastic" and self.params[0].dtype is torch.bfloat16
        salts = tuple(state["salt"] for state in self.states)
        self.salts = salts if rounds else None
        self._coded = self.states[0]["exp_avg"].dtype is torch.int8
        low = self.states[0]["exp_avg"].dtype.itemsize < 4
        self.moment_salts = salts if low else None
        self.projected = is_projected_gradient(self.params[0].grad)
        self._resolves = any(map(is_unresolved, grads_of(self.params)))
        self._tensors = _low_rank(method.outside.is_limited, self._coded, bool(room.bases))
        self.room, self.depth = room, members[0].depth
        backend = members[0].backend
        self.operations = ops.prepare(self.matrices(), backend=backend)
        self.updater: Updater | None = None
        if method.outside.residual not in AS_THEY_ARE:
            self.updater = Updater(method.outside, self.operations, backend)
        self.counts: list[int] = []  # steps that each matrix has taken, set before each step
        self._basis_steps: list[int] = []
        self._looked_from: list[int] = []
        self._looks: list[int] = []

    def matrices(self) -> Matrices:
        """The tensors of this step."""
        grads = list(map(GRAD, self.params))
        if self.projected:
            grads = grads_of(self.params)
        if self._resolves:
            grads = [resolved(grad) for grad in grads]
        if self.group["maximize"]:
            grads = [-grad for grad in grads]
        tensors = map(list, zip(*map(self._tensors, self.states), strict=True))
        bases, exp_avgs, exp_avg_sqs, *others = tensors
        scales: list[list[Tensor]] = [others.pop(0), others.pop(0)] if self._coded else [[], []]
        if self.room.bases:
            bases = self.room.load_bases(bases, others.pop(0))
        if self.depth is not None:
            bases = [basis.narrow(0, *self.depth) for basis in bases]
        return Matrices(
            self.side,
            self.residual,
            self.room.weights or self.params,
            grads,
            bases,
            exp_avgs,
            exp_avg_sqs,
            others[0] if others else [],
            self.salts,
            scales[0],
            scales[1],
            self.moment_salts,
            not self.room.bases,
            self.projected,
        )

    def is_looked_at(self, subspace: Subspace) -> bool:
        """Whether a basis may be due, or a criterion asked, before this step."""
        basis_steps = list(map(_BASIS_STEP, self.states))
        went_back = any(map(operator.lt, self.counts, self._looked_from))
        if went_back or basis_steps != self._basis_steps:
            gap = self.group["update_proj_gap"]
            self._looks = [
                next_look(state, steps, gap, phase_of(state, gap, subspace), subspace)
                for state, steps in zip(self.states, self.counts, strict=True)
            ]
            self._basis_steps, self._looked_from = basis_steps, self.counts
        return any(map(operator.ge, self.counts, self._looks))

    def due(self, subspace: Subspace, readback: Readback) -> Iterator[tuple[int, Due]]:
        """Those whose interval is over, or whose basis has done its work by the criterion, with
        their places in the group.
        """
        for member, steps in zip(self.members, self.counts, strict=True):
            found = due_of_member(self.group, member, steps, subspace, readback)
            if found is not None and not self.projected:
                yield member.place, found
        # A refresh that failed leaves its basis and looks again at the next step.
        self._basis_steps = []

    def update(
        self,
        matrices: Matrices,
        projection: Projection,
        scalars: Scalars,
        factor: Tensor | None,
    ) -> None:
        """Operation 3, and what comes before it, with channels' factors that are known.

        Args:
            matrices: of this step.
            projection: of operation 1.
            scalars: of this step.
            factor: of operation 2; None of a form without a limiter.
        """
        if self.updater is not None:
            self.updater.update(matrices, self.states, projection, scalars, factor)
        else:
            self.operations.back_project_update(matrices, projection, factor, scalars)

    def measure(self, projection: Projection, subspace: Subspace, readback: Readback) -> None:
        """What the criterion wants to know of this step, for a decision at the next one."""
        every = zip(self.params, self.states, self.counts, projection.projected, strict=True)
        for param, state, steps, projected in every:
            if measure(state, projected, steps, subspace):
                readback.start(param, state["measured"])


class Prepared:
    """All batches of a step, and what they were prepared for.

    Attributes:
        facts: equal before a step for which these batches may serve.
        method: the optimizer's parts.
        by_group: the batches of a group on one device, a list for each.
        batches: all of them.
        empty: states of projected parameters without elements, which are in no batch.
        plain: groups of AdamW parameters.
        sharded: projected parameters that are spread over processes; None if there are none.
    """

    def __init__(
        self,
        facts: object,
        members: list[tuple[Group, list[Member]]],
        method: Method,
        memory_of: MemoryOf,
        idle: Sequence[tuple[Group, str, Tensor, Side]] = (),
    ) -> None:
        self.facts, self.method = facts, method
        self.by_group: list[list[Batch]] = []
        self.empty: list[State] = []
        self.plain: list[Plain] = []
        sharded: list[tuple[Group, list[Member]]] = []
        for group, own in members:
            states = [member.state for member in own]
            if not is_projected(group):
                params = [member.param for member in own]
                self.plain.append(Plain(group, params, states, method.capturable))
                continue
            if spread := [member for member in own if is_sharded(member.param)]:
                sharded.append((group, spread))
                own = [member for member in own if not is_sharded(member.param)]
            self.empty += [member.state for member in own if not member.param.numel()]
            with_elements = [member for member in own if member.param.numel()]
            for device in dict.fromkeys(member.param.device for member in with_elements):
                there = [member for member in with_elements if member.param.device == device]
                self.by_group.append(batches_of(group, there, method, memory_of))
        self.batches = [batch for batches in self.by_group for batch in batches]
        self.sharded = None
        if sharded or idle:
            self.sharded = _sharded(sharded, idle, method, memory_of)
        here: dict[Tensor, Tensor] = {}
        if self.sharded is not None:
            self.batches += self.sharded.batches
            here = {matrix.param: matrix.here.param for matrix in self.sharded.matrices}
        self._owners = [
            (member.name, here.get(member.param, member.param), is_projected(group))
            for group, own in members
            for member in own
        ]
        self._params = [param for _, param, _ in self._owners]
        grads = grads_of(self._params)
        self._extents = list(map(extent, self._params + grads))
        self._addresses: list[int] = list(map(Tensor.data_ptr, grads))

    def check_gradients(self) -> None:
        """Raises if a gradient moved into memory that a step writes, or is of an old basis."""
        for batch in self.batches:
            if batch.projected:
                for member in batch.members:
                    check_projector(member.name, member.param, member.state)
        grads = list(map(GRAD, self._params))
        if ProjectedGradient in map(type, grads):
            grads = grads_of(self._params)
        now = list(map(Tensor.data_ptr, grads))
        if now != self._addresses:
            if overlap(list(map(Tensor.data_ptr, self._params)) + now, self._extents):
                check_shared(self._owners)
            self._addresses = now


def _sharded(
    members: list[tuple[Group, list[Member]]],
    idle: Sequence[tuple[Group, str, Tensor, Side]],
    method: Method,
    memory_of: MemoryOf,
) -> "Sharded":
    # Imported for those who have shards.
    from .sharded import Sharded

    return Sharded(members, list(idle), method, memory_of)


def new_memory(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def batches_of(
    group: Group, members: list[Member], method: Method, memory_of: MemoryOf = new_memory
) -> list[Batch]:
    """A group's matrices that one launch can serve, as many together as suit their backend.

    Args:
        group: the options.
        members: on one device, with elements.
        method: the optimizer's parts.
        memory_of: gives memory to decode in, of so many bytes on a device.
    """
    alike: dict[Hashable, list[Member]] = {}
    for member in members:
        alike.setdefault(_kind(member, method), []).append(member)
    parts: list[list[Member]] = []
    for equal in alike.values():
        param, state, backend = equal[0].param, equal[0].state, equal[0].backend
        assert param.grad is not None
        rank = state["basis"].shape[1]
        size = ops.batch_size(param, held(param.grad), rank, backend=backend)
        size = min(size, Room.matrices(param, state), method.outside.matrices(param) or size)
        parts += [equal[start : start + size] for start in range(0, len(equal), size)]
    memory = memory_of(room_bytes(parts), members[0].param.device)
    return [
        Batch(
            group,
            part,
            method,
            Room.within(memory, [member.param for member in part], part[0].state),
        )
        for part in parts
    ]


def room_bytes(parts: Sequence[Sequence[Member]]) -> int:
    """Of the memory in which each of some batches, one at a time, decodes what it holds."""
    return max(len(part) * Room.bytes_of(part[0].param, part[0].state) for part in parts)


def _kind(member: Member, method: Method) -> Hashable:
    """Equal for matrices that one launch can serve.

    Their steps have to be the same in a batch, too, unless the device counts them.
    """
    param, state = member.param, member.state
    assert param.grad is not None
    layouts = (
        (tensor.shape, tensor.stride(), tensor.dtype, is_unresolved(tensor))
        for tensor in (param, held(param.grad), state["basis"])
    )
    projected = is_projected_gradient(param.grad)
    age = None if method.capturable else (int(state["step"]), state["moments_step"])
    kept = state["side"], state["exp_avg"].dtype, age
    return member.backend, member.whole, member.depth, *kept, projected, *layouts


class Facts(NamedTuple):
    """All that batches are prepared for, to be compared before each step; no tensor is held.

    Attributes:
        groups: of each group, what is prepared with it, and its parameters that have a gradient.
        written: which tensors weights and states are, where and how they lie.
        grads: their layouts, which are projected, and whose values are not in memory, weights' too.
        states: which they are, how many entries they have, and their numbers.
    """

    groups: list[object]
    written: object
    grads: list[object]
    states: list[object]


def facts_of(
    groups: list[Group],
    states: Mapping[Tensor, State],
    *,
    limited: bool,
    coded: bool,
    coded_basis: bool,
    low_bits: bool,
) -> Facts | None:
    """The facts as they are; None where a state is not complete, or holds something else than
    tensors, or a gradient has no strides.

    Args:
        groups: of the optimizer.
        states: of its parameters.
        limited: whether Fira's limiter keeps a norm.
        coded: whether moments are codes.
        coded_basis: whether bases are.
        low_bits: whether bits are held beside the weights.
    """
    low_rank = _low_rank(limited, coded, coded_basis)
    by_group: list[object] = []
    params: list[Tensor] = []
    own: list[State] = []
    held: list[Tensor] = []
    numbers: list[object] = []
    for group in groups:
        trained = [param for param in group["params"] if param.grad is not None]
        projected = "rank" in group
        by_group += [id(group), projected, float(group.get("scale", 1.0)), group["maximize"]]
        by_group += [group.get("update_proj_gap"), len(trained)]
        params += trained
        if trained and not all(map(states.__contains__, trained)):
            return None
        found = list(map(states.__getitem__, trained))
        own += found
        try:
            held += map(STEP, found)
            held += itertools.chain.from_iterable(map(low_rank if projected else _MOMENTS, found))
            if coded and not projected:
                # Small ones have none.
                scaled = filter(operator.methodcaller("__contains__", "exp_avg_scale"), found)
                held += itertools.chain.from_iterable(map(_SCALES, scaled))
            if low_bits:
                longer = filter(operator.methodcaller("__contains__", "low_bits"), found)
                held += map(_LOW_BITS, longer)
            numbers += map(_NUMBERS, found) if projected else ()
        except KeyError:
            return None
    grads: list[Tensor] = list(map(GRAD, params))
    given: list[bool] = []
    # Asked here, so that other gradients are asked no more.
    if ProjectedGradient in map(type, grads):
        given, grads = list(map(is_projected_gradient, grads)), grads_of(params)
    if any(map(operator.is_not, map(_MEMORY_LAYOUT, grads), itertools.repeat(torch.strided))):
        return None
    try:
        written = READER.places(params + held)
    except (AttributeError, TypeError, NotImplementedError, RuntimeError):
        return None
    return Facts(
        by_group,
        written,
        [
            READER.layouts(grads),
            *given,
            *map(Tensor.is_neg, params + grads),
            *map(Tensor._is_zerotensor, grads),
        ],
        [*map(id, own), *map(len, own), *numbers],
    )


def options_of(groups: list[Group]) -> list[object]:
    """What the options of groups are now, to be compared later: a tensor may change in place, and
    4.0, which equals 4, is no rank.
    """
    options: list[object] = []
    for group in groups:
        for value in map(group.get, OPTIONS):
            for each in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(each, Tensor):
                    on_host = each.device.type == "cpu" and each.numel() == 1
                    each = (id(each), float(each) if on_host else None)
                options += (type(each), each)
    return options


def phase_of(state: State, gap: int, subspace: Subspace) -> int:
    """By how many steps the refreshes of a matrix come early, so that matrices take turns."""
    wave = int(subspace.stagger)
    return (state["salt"] * gap >> 32) // wave * wave if wave else 0


def due_of_member(
    group: Group, member: Member, steps: int, subspace: Subspace, readback: Readback
) -> Due | None:
    """A matrix that needs a new basis before this step, or None.

    Args:
        group: its options.
        member: with a gradient.
        steps: that it has taken.
        subspace: its criterion.
        readback: where the criterion's measure is under way.
    """
    param, state, gap = member.param, member.state, group["update_proj_gap"]
    phase = phase_of(state, gap, subspace)
    due = is_due(steps, state["basis_step"], gap, phase, state["gap_factor"])
    if is_measured(state, steps, subspace):
        value = readback.finish(param, state["measured"])
        due = due or value <= subspace.threshold
    if not due or param.grad is None:
        return None
    seed = seed_of(state["salt"], steps)
    betas = (float(group["betas"][0]), float(group["betas"][1]))
    found = Due(member.name, param.grad, state, group["rank"], steps, seed, betas)
    return found._replace(maximize=group["maximize"])


def seed_of(salt: int, steps: int) -> int:
    """Of a new basis: 32 bits, since torch's generator on a CPU takes no more of a seed."""
    return zlib.crc32(f"{salt} {steps}".encode())


def due_of(batches: list[Batch], subspace: Subspace, readback: Readback) -> list[Due]:
    """Of some batches of a group on one device, in the order of the group: the last bits of a
    batched factorization may depend on it.
    """
    found: list[tuple[int, Due]] = []
    for batch in batches:
        if batch.is_looked_at(subspace):
            found += batch.due(subspace, readback)
    if not found:
        return []
    due = [each for _, each in sorted(found, key=itemgetter(0))]
    return joined(due, apart=subspace.interpolation > 0)


def scalars_of(batches: list[Batch], method: Method) -> list[Scalars]:
    """The scalars of each of some batches of a group on one device.

    Where the device counts the steps they are tensors, made for all batches at once: a dozen small
    launches a step, not a dozen a batch.
    """
    group, found = batches[0].group, []
    if not method.capturable:
        for batch in batches:
            step, moments_step = batch.counts[0] + 1, batch.states[0]["moments_step"]
            found.append(step_scalars(group, step, method.corrected, moments_step))
        return found
    steps = torch.stack([state["step"] for batch in batches for state in batch.states])
    scalars, start = step_scalars(group, steps, method.corrected), 0
    for batch in batches:
        part = slice(start, start + len(batch.states))
        found.append(_some(scalars, part))
        start = part.stop
    return found


def _some(scalars: Scalars, matrices: slice) -> Scalars:
    """Those of some of the matrices."""
    assert isinstance(scalars.step, Tensor)
    return scalars._replace(
        adam=adam_of(scalars.adam, matrices),
        step_size=scalar_of(scalars.step_size, matrices),
        decay=scalar_of(scalars.decay, matrices),
        step=scalars.step[matrices],
    )


def step_scalars(
    group: Group, step: int | Tensor, corrected: bool, moments_step: int = 0
) -> Scalars:
    """Scalars of the 1-based `step`, a number, or a tensor with one number a matrix.

    The official GaLore and Fira code takes the moments uncorrected and corrects the step size,
    which therefore also scales Fira's residual. `corrected` corrects the moments themselves, as
    torch's AdamW and both papers do; the paper form of Fira measures the corrected ones.

    Args:
        group: options of the parameters.
        step: this one included.
        corrected: where the bias correction goes.
        moments_step: the step after which the moments began anew.
    """
    beta1, beta2 = map(float, group["betas"])
    scale, eps = float(group["scale"]), float(group["eps"])
    seen, lr = step - moments_step, group["lr"]
    if isinstance(seen, Tensor) and isinstance(step, Tensor):
        seen, step = seen.double(), step.int()  # in float32, 1 - beta2^t loses four digits
        lr = torch.ones_like(seen) * lr
    else:
        lr = float(lr)
    correction1, correction2 = 1 - beta1**seen, 1 - beta2**seen
    decay = lr * float(group["weight_decay"])
    if corrected:
        adam = AdamScalars(beta1, beta2, eps, correction1, correction2)
        return Scalars(adam, scale, lr, decay, step)
    step_size = lr * correction2**0.5 / correction1
    return Scalars(AdamScalars(beta1, beta2, eps), scale, step_size, decay, step)
