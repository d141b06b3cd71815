"""What an optimizer tells of itself: how each parameter is trained, what it takes, how it goes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..ops import Choice, Side
from .groups import Group, is_projected, learning_rate, named_params, side_of
from .state import state_bytes, subspace_stats

if TYPE_CHECKING:
    from .lowrank_adamw import LowRankAdamW

Row = dict[str, Any]


def explain(optimizer: LowRankAdamW) -> list[Row]:
    """See `LowRankAdamW.explain`."""
    return [
        {
            "name": name,
            "shape": tuple(param.shape),
            "dtype": param.dtype,
            **_who(optimizer, group, param),
            "lr": learning_rate(group),
            "state_bytes": state_bytes(optimizer.state.get(param, {})),
        }
        for name, group, param in _parameters(optimizer)
    ]


def plan(optimizer: LowRankAdamW) -> list[Row]:
    """See `LowRankAdamW.plan`."""
    return [_needs(optimizer, name, group, param) for name, group, param in _parameters(optimizer)]


def stats(optimizer: LowRankAdamW) -> list[Row]:
    """See `LowRankAdamW.stats`."""
    return [
        {"name": name, **subspace_stats(optimizer.state[param])}
        for name, group, param in _parameters(optimizer)
        if is_projected(group) and optimizer.state.get(param)
    ]


def _parameters(optimizer: LowRankAdamW) -> Iterator[tuple[str, Group, Tensor]]:
    for index, group in enumerate(optimizer.param_groups):
        for name, param in named_params(group, index):
            yield name, group, param


def _who(optimizer: LowRankAdamW, group: Group, param: Tensor) -> Row:
    if not is_projected(group):
        at = " at lr * scale" if "scale" in group else ""
        plain = Choice("torch", f"AdamW{at}: no rank in its group")
        return {"projected": False, "side": None, "rank": None, **plain._asdict()}
    rows, cols = param.shape
    side, rank = side_of(group["proj_type"], rows, cols), min(group["rank"], rows, cols)
    if state := optimizer.state.get(param):
        side, rank = Side(state["side"]), state["basis"].shape[1]
    choice = optimizer.choice(ops.requested_backend(optimizer.backend), param, param.grad)
    tiles = ops.tiles(param, side, rank, backend=choice.backend)
    reason = f"{choice.reason}; {tiles}" if tiles else choice.reason
    row = {"projected": True, "side": side.name.lower(), "rank": rank}
    return {**row, "backend": choice.backend, "reason": reason}


def _needs(optimizer: LowRankAdamW, name: str, group: Group, param: Tensor) -> Row:
    projected, size = is_projected(group), param.numel() * param.element_size()
    side = side_of(group["proj_type"], *param.shape) if projected else None
    state = 0
    if param.requires_grad:
        state = state_bytes(optimizer.new_state(group, torch.empty_like(param, device="meta")))
    return {
        "name": name,
        "shape": tuple(param.shape),
        "dtype": param.dtype,
        "projected": projected,
        "side": None if side is None else side.name.lower(),
        "rank": min(group["rank"], *param.shape) if projected else None,
        "weight_bytes": size,
        "gradient_bytes": size if param.requires_grad else 0,
        "state_bytes": state,
    }
