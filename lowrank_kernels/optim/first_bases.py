"""First bases of parameters that have no gradient yet, for layers that never form one."""

import zlib
from contextlib import nullcontext

import torch
from torch import Tensor

from ..subspace import Due, Subspace, refresh_bases
from .batches import seed_of
from .families import share
from .groups import Group, named_groups
from .lowrank_adamw import LowRankAdamW
from .projected_gradient import Projector
from .state import State, new_state


def can_begin(optimizer: LowRankAdamW, param: Tensor) -> bool:
    """Whether `begin` can give a parameter its first basis: it has none, and has taken no step."""
    state = optimizer.state.get(param)
    return not state or (int(state["step"]) == 0 and state.get("basis_step", 0) < 0)


@torch.no_grad()
def begin(
    optimizer: LowRankAdamW,
    param: Tensor,
    *,
    gradient: Tensor | None = None,
    like: Tensor | None = None,
) -> Projector | None:
    """Gives a projected parameter its first basis, and a state to hold it.

    Args:
        optimizer: of the parameter.
        param: the weight, rows x cols.
        gradient: its own, rows x cols, as at any refresh.
        like: instead, for the right side d x cols, for the left rows x d with any d: the basis
            holds the leading directions of that. With neither, or with a d below the rank, they
            are random and depend on the parameter's name alone.

    Returns:
        What projects its gradients from now on; None if there is no finite basis.
    """
    name, group, _ = _place_of(optimizer, param)
    state = _state_of(optimizer, param)
    subspace, matrix = optimizer.subspace, gradient
    if matrix is None:
        # All of its rank: those directions say nothing about how many a gradient has.
        subspace, matrix = Subspace(), like
    if matrix is None or min(matrix.shape) < state["basis"].shape[1]:
        subspace, matrix = Subspace("random"), param.new_ones(()).expand(param.shape)
    betas = (float(group["betas"][0]), float(group["betas"][1]))
    due = Due(name, matrix, state, group["rank"], 0, seed_of(state["salt"], 0), betas)
    kind = param.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    with torch.autocast(kind, enabled=False) if casts else nullcontext():
        refresh_bases([due], subspace)
    if gradient is None:
        state["captured"] = 0.0  # of a gradient, which nobody has seen
    return Projector.of(state) if state["basis_step"] >= 0 else None


def share_first(optimizer: LowRankAdamW, params: list[Tensor]) -> bool:
    """Lets parameters on the right side share the first one's basis from now on, if they are alike:
    in one group, of one rank, and before their first step. The first has its basis.

    Returns:
        Whether they do.
    """
    places = [_place_of(optimizer, param) for param in params]
    states = [_state_of(optimizer, param) for param in params]
    lead = states[0]
    alike = all(
        state["basis"].shape == lead["basis"].shape
        and int(state["step"]) == 0
        and state["basis_step"] <= lead["basis_step"] == 0
        for state in states
    )
    shared = alike and len({id(group) for _, group, _ in places}) == 1
    if shared:
        share(states, zlib.crc32(places[0][0].encode()))
    return shared


def _state_of(optimizer: LowRankAdamW, param: Tensor) -> State:
    """A parameter's state, which is made if there is none."""
    state = optimizer.state[param]
    if not state:
        _, group, salt = _place_of(optimizer, param)
        state.update(new_state(param, group, salt, optimizer.method))
    return state


def _place_of(optimizer: LowRankAdamW, param: Tensor) -> tuple[str, Group, int]:
    """A parameter's name, group and salt."""
    for _, group, named in named_groups(optimizer.param_groups):
        for name, other, salt in named:
            if other is param:
                return name, group, salt
    raise KeyError(f"a parameter of shape {tuple(param.shape)} is not in this optimizer")
