"""What a step holds for a while beside weights, gradients and state, told without taking one."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import ops, subspace
from ..ops import Alike
from ..ops.dispatch import Kind, choose_kind
from . import plain
from .groups import Group, is_projected, side_of
from .schedule import step_scalars

if TYPE_CHECKING:
    from .lowrank_adamw import LowRankAdamW


class Workspace(NamedTuple):
    """Bytes at the peak of a step between two refreshes, and of the refresh before a step."""

    step: int
    refresh: int


def planned_workspace(optimizer: LowRankAdamW, device_type: str) -> Workspace:
    """The largest set of temporaries of an optimizer; nothing is allocated.

    Gradients have the dtype of their weights, weights are dense and rounded to nearest, and bases
    come from sketches ("randomized" or "power"). What `maximize`, `monitor` and a criterion take
    besides is not counted.

    Args:
        optimizer: its parameters may lie on the meta device.
        device_type: where they would be trained, "cpu" or "cuda".

    Raises:
        ValueError, BackendUnavailable: the backend was asked for by name and does not serve them.
    """
    request = ops.requested_backend(optimizer.backend)
    step, refresh = [0], [0]
    for group in optimizer.param_groups:
        trained = [param for param in group["params"] if param.requires_grad]
        if not is_projected(group):
            step.append(plain.workspace_bytes(trained, device_type))
            continue
        residual = step_scalars(group, 1, optimizer.residual, optimizer.corrected).residual
        for alike in _alike(group, trained, device_type):
            kind = Kind(device_type, alike.dtype, alike.dtype, optimizer.capturable)
            backend = choose_kind(request, kind).backend
            step.append(ops.workspace_bytes(alike, residual, backend=backend))
            refresh.append(subspace.workspace_bytes(alike, optimizer.subspace))
    return Workspace(max(step), max(refresh))


def _alike(group: Group, params: list[Tensor], device_type: str) -> list[Alike]:
    """The kinds of matrices of a group, each with how many there are."""
    counts: Counter[tuple[tuple[int, int], torch.dtype]] = Counter(
        ((param.shape[0], param.shape[1]), param.dtype) for param in params if param.numel()
    )
    return [
        Alike(
            shape,
            side_of(group["proj_type"], *shape),
            min(group["rank"], *shape),
            dtype,
            device_type,
            matrices,
        )
        for (shape, dtype), matrices in counts.items()
    ]
