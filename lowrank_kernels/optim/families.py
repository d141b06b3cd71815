"""Matrices that share one basis, as those of q, k and v may, which multiply the same input.

Their states hold the same tensors, and say so to a checkpoint by two numbers:

    family    int, the same in all of them
    siblings  int, how many there are

They also share the salt, so that their bases are due together. All are on the right side, and the
basis is that of their gradients below each other, each of norm 1: Adam steps by as much where a
gradient is small, as those of q and k are beside v's.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..ops.contract import moment_dtype
from ..subspace import Due

State = dict[str, Any]
BASIS = ("basis", "basis_scale")


def share(states: list[State], family: int) -> None:
    """Gives all of some states, which have taken no step, the basis of the first."""
    lead = states[0]
    for state in states:
        state |= {name: lead[name] for name in BASIS if name in lead}
        for name in ("salt", "basis_step", "refreshes", "rank"):
            state[name] = lead[name]
        state |= {"family": family, "siblings": len(states)}


def tie(states: Iterable[State]) -> None:
    """Lets states hold the same tensors again that were loaded or converted one by one."""
    leads: dict[int, State] = {}
    for state in states:
        lead = leads.setdefault(state["family"], state) if "family" in state else state
        if lead is not state and lead["basis"] is not state["basis"] and _agree(lead, state):
            state |= {name: lead[name] for name in BASIS if name in lead}


def joined(due: list[Due], *, apart: bool = False) -> list[Due]:
    """One for each family that is due as a whole; what is due without its siblings leaves them, and
    all do that are to be `apart`.
    """
    families: dict[int, list[Due]] = {}
    for place, item in enumerate(due):
        families.setdefault(item.state.get("family", -1 - place), []).append(item)
    result = []
    for items in families.values():
        lead, *others = items
        if lead.state.get("siblings", 1) == len(items) and not (apart and others):
            if others:
                grad = torch.cat([_of_norm_1(item.grad) for item in items])
                states = tuple(item.state for item in others)
                lead = lead._replace(grad=grad, others=states)
            result.append(lead)
            continue
        for item in items:
            _leave(item.state)
            result.append(item)
    return result


def _of_norm_1(grad: Tensor) -> Tensor:
    """At least in float32; zero stays zero."""
    wide = grad.to(moment_dtype(grad.dtype))
    tiny = torch.finfo(wide.dtype).tiny
    # In two steps, since the square of what is finite need not be.
    wide = wide / wide.abs().amax().clamp_(min=tiny)
    return wide / torch.linalg.vector_norm(wide).clamp_(min=tiny)


def _agree(lead: State, state: State) -> bool:
    same_age = lead["basis_step"] == state["basis_step"]
    return same_age and all(
        lead[name].shape == state[name].shape and lead[name].dtype is state[name].dtype
        for name in BASIS
        if name in lead and name in state
    )


def _leave(state: State) -> None:
    state |= {name: state[name].clone() for name in BASIS if name in state}
    del state["family"], state["siblings"]
