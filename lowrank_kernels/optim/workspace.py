"""What a step holds for a while beside weights, gradients and state: from a dry run."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops.dispatch import Kind, choose_kind
from ..ops.dry import meta_stands_for
from ..subspace import Due, batch_size, refresh_bases
from .allocations import Allocations
from .batches import Batch, Member, batches_of, room_bytes, scalars_of
from .groups import Group, is_projected, size_of
from .parts import Method
from .plain import Plain
from .projected_gradient import Projector, new_gradient
from .state import planned_state

if TYPE_CHECKING:
    from .lowrank_adamw import LowRankAdamW


class Workspace(NamedTuple):
    """Bytes at the peak of a step between two refreshes, and of the refresh before a step; and what
    of both is held between steps, too.
    """

    step: int
    refresh: int
    held: int = 0


def planned_workspace(
    optimizer: LowRankAdamW,
    device_type: str,
    memory_bytes: int | None = None,
    projected: Container[Tensor] = (),
) -> Workspace:
    """The largest set of temporaries of an optimizer; nothing is allocated.

    Gradients have the dtype of their weights, weights are dense, and no factorization fails. What
    an operation of torch keeps for itself is not seen.

    Args:
        optimizer: its parameters may lie on the meta device.
        device_type: where they would be trained, "cpu" or "cuda".
        memory_bytes: of the GPU; None for the one that is here, or a small one.
        projected: parameters of which R is the gradient, but where a basis is due.

    Raises:
        ValueError, BackendUnavailable: the backend was asked for by name and does not serve them.
    """
    every, rooms = [Workspace(0, 0)], [0]  # rooms are held from the first step on
    with meta_stands_for(device_type, memory_bytes):
        for group in optimizer.param_groups:
            found, room = _needs(optimizer, group, group["params"], device_type, projected)
            every.append(found)
            rooms.append(room)
    return _with_room(_most(every), sum(rooms))


def planned_alone(
    optimizer: LowRankAdamW,
    device_type: str,
    memory_bytes: int | None = None,
    projected: Container[Tensor] = (),
) -> dict[Tensor, Workspace]:
    """The temporaries of each parameter that is stepped by itself, as by `release_gradients`.

    Each with the memory to decode in, which all share. See `planned_workspace`.
    """
    known: dict[object, tuple[Workspace, int]] = {}
    keys: dict[Tensor, object] = {}
    with meta_stands_for(device_type, memory_bytes):
        for group in optimizer.param_groups:
            for param in group["params"]:
                key = id(group), param.shape, param.dtype, param.requires_grad, param in projected
                keys[param] = key
                if key not in known:
                    known[key] = _needs(optimizer, group, [param], device_type, projected)
    held = max((room for _, room in known.values()), default=0)
    return {param: _with_room(known[key][0], held) for param, key in keys.items()}


def _needs(
    optimizer: LowRankAdamW,
    group: Group,
    params: Iterable[Tensor],
    device_type: str,
    projected: Container[Tensor],
) -> tuple[Workspace, int]:
    """Of some parameters of a group, and bytes of the memory in which they decode."""
    request = ops.requested_backend(optimizer.backend)
    trained = [param for param in params if param.requires_grad and param.numel()]
    members = [
        _member_on_meta(param, group, optimizer.method, param in projected) for param in trained
    ]
    if not is_projected(group):
        return Workspace(_peak_of_plain(group, members), 0), 0
    alike: dict[object, list[Member]] = {}
    for member in members:
        dtype = member.param.dtype
        size = size_of(group, member.param)
        kind = Kind(device_type, dtype, dtype, optimizer.capturable, size=size)
        member = member._replace(backend=choose_kind(request, kind).backend)
        known_by = kind, member.param.shape, type(member.param.grad)
        alike.setdefault(known_by, []).append(member)
    every, rooms = [Workspace(0, 0)], [0]
    for equal in alike.values():
        batches = batches_of(group, equal, optimizer.method)
        step, refresh = _peak_of_step(optimizer, batches), _peak_of_refresh(optimizer, group, equal)
        every.append(Workspace(step, refresh))
        rooms.append(room_bytes([batch.members for batch in batches]))
    return _most(every), max(rooms)


def _most(every: Sequence[Workspace]) -> Workspace:
    return Workspace(*map(max, zip(*every, strict=True)))


def _with_room(found: Workspace, room: int) -> Workspace:
    return Workspace(found.step + room, found.refresh + room, room)


def _member_on_meta(param: Tensor, group: Group, method: Method, projected: bool) -> Member:
    """A dense parameter like this one, with a gradient and a state."""
    twin = torch.empty(param.shape, dtype=param.dtype, device="meta")
    state = planned_state(param, group, method)
    if projected:
        moments = state["exp_avg"].shape
        twin.grad = new_gradient(
            torch.empty(moments, device="meta"), Projector.of(state), twin.shape, twin.dtype
        )
    else:
        twin.grad = torch.empty_like(twin)
    return Member("", twin, state)


def _peak_of_plain(group: Group, members: list[Member]) -> int:
    """On the meta device torch's fused kernels take only a number as learning rate."""
    params, states = [member.param for member in members], [member.state for member in members]
    return _peak(Plain(group | {"lr": 0.0}, params, states, capturable=False).step)


def _peak_of_refresh(optimizer: LowRankAdamW, group: Group, members: list[Member]) -> int:
    """Of one batch that changes its bases; the others are like it."""
    due = []
    for name, param, state, *_ in members[: batch_size(members[0].param)]:
        state = {**state, "basis_step": 0}
        grad = torch.empty_like(param)
        due.append(Due(name, grad, state, group["rank"], 1, 0, group["betas"]))
    return _peak(lambda: refresh_bases(due, optimizer.subspace))


def _peak_of_step(optimizer: LowRankAdamW, batches: list[Batch]) -> int:
    """Of the first batch, which is the largest, with new bases, of which criteria measure most."""
    for batch in batches:
        batch.counts = [1] * len(batch.members)
        for state in batch.states:
            state["basis_step"] = 1

    def step() -> None:
        scalars, *_ = scalars_of(batches, optimizer.method)
        optimizer._step_batch(batches[0], scalars)

    return _peak(step)


def _peak(run: Callable[[], object]) -> int:
    with Allocations() as allocations:
        run()
    return allocations.peak_bytes
