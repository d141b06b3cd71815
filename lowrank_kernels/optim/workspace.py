"""What a step holds for a while beside weights, gradients and state: from a dry run."""

from __future__ import annotations

from collections.abc import Callable
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
from .state import planned_state

if TYPE_CHECKING:
    from .lowrank_adamw import LowRankAdamW


class Workspace(NamedTuple):
    """Bytes at the peak of a step between two refreshes, and of the refresh before a step."""

    step: int
    refresh: int


def planned_workspace(
    optimizer: LowRankAdamW, device_type: str, memory_bytes: int | None = None
) -> Workspace:
    """The largest set of temporaries of an optimizer; nothing is allocated.

    Gradients have the dtype of their weights, weights are dense, and no factorization fails. What
    an operation of torch keeps for itself is not seen.

    Args:
        optimizer: its parameters may lie on the meta device.
        device_type: where they would be trained, "cpu" or "cuda".
        memory_bytes: of the GPU; None for the one that is here, or a small one.

    Raises:
        ValueError, BackendUnavailable: the backend was asked for by name and does not serve them.
    """
    request = ops.requested_backend(optimizer.backend)
    step, refresh = [0], [0]
    rooms: dict[int, int] = {}  # of groups, held from the first step on
    with meta_stands_for(device_type, memory_bytes):
        for group in optimizer.param_groups:
            trained = [param for param in group["params"] if param.requires_grad and param.numel()]
            members = [_member_on_meta(param, group, optimizer.method) for param in trained]
            if not is_projected(group):
                step.append(_peak_of_plain(group, members))
                continue
            alike: dict[object, list[Member]] = {}
            for member in members:
                dtype = member.param.dtype
                size = size_of(group, member.param)
                kind = Kind(device_type, dtype, dtype, optimizer.capturable, size=size)
                member = member._replace(backend=choose_kind(request, kind).backend)
                alike.setdefault((kind, member.param.shape), []).append(member)
            for equal in alike.values():
                refresh.append(_peak_of_refresh(optimizer, group, equal))
                batches = batches_of(group, equal, optimizer.method)
                step.append(_peak_of_step(optimizer, batches))
                rooms[id(group)] = max(
                    rooms.get(id(group), 0), room_bytes([batch.members for batch in batches])
                )
    held = sum(rooms.values())
    return Workspace(max(step) + held, max(refresh) + held)


def _member_on_meta(param: Tensor, group: Group, method: Method) -> Member:
    """A dense parameter like this one, with a gradient and a state."""
    twin = torch.empty(param.shape, dtype=param.dtype, device="meta")
    twin.grad = torch.empty_like(twin)
    return Member("", twin, planned_state(param, group, method))


def _peak_of_plain(group: Group, members: list[Member]) -> int:
    """On the meta device torch's fused kernels take only a number as learning rate."""
    params, states = [member.param for member in members], [member.state for member in members]
    return _peak(Plain(group | {"lr": 0.0}, params, states, capturable=False).step)


def _peak_of_refresh(optimizer: LowRankAdamW, group: Group, members: list[Member]) -> int:
    """Of one batch that changes its bases; the others are like it."""
    due = []
    for name, param, state, *_ in members[: batch_size(members[0].param)]:
        assert param.grad is not None
        state["basis_step"] = 0
        due.append(Due(name, param.grad, state, group["rank"], 1, 0, group["betas"]))
    return _peak(lambda: refresh_bases(due, optimizer.subspace))


def _peak_of_step(optimizer: LowRankAdamW, batches: list[Batch]) -> int:
    """Of the first batch, which is the largest."""
    for batch in batches:
        batch.counts = [1] * len(batch.members)

    def step() -> None:
        scalars, *_ = scalars_of(batches, optimizer.method)
        optimizer._step_batch(batches[0], scalars)

    return _peak(step)


def _peak(run: Callable[[], object]) -> int:
    with Allocations() as allocations:
        run()
    return allocations.peak_bytes
