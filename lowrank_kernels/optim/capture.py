"""What a CUDA graph can hold of a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from ..subspace import is_due
from .batches import phase_of
from .groups import is_projected, named_params

if TYPE_CHECKING:
    from .lowrank_adamw import LowRankAdamW


def check_capture(optimizer: LowRankAdamW, counted: Mapping[Tensor, int]) -> None:
    """Raises RuntimeError if a CUDA graph cannot hold this step; nothing was changed.

    Args:
        optimizer: whose step it is.
        counted: steps that its projected parameters had taken when an eager step last read them.
    """
    if not optimizer.capturable:
        raise RuntimeError("a CUDA graph can capture a step of capturable=True only")
    for index, group in enumerate(optimizer.param_groups):
        if not isinstance(group["lr"], Tensor):
            raise RuntimeError(
                f"group {index}: the graph would keep lr={group['lr']} for ever; pass"
                " lr=torch.tensor(..., device='cuda') and change it in place"
            )
        for name, param in named_params(group, index):
            if param.grad is None:
                continue
            state, count = optimizer.state.get(param), counted.get(param, 0)
            if not state or (is_projected(group) and not count):
                raise RuntimeError(f"{name}: take an eager step before capturing one")
            if not is_projected(group):
                continue
            gap, subspace = group["update_proj_gap"], optimizer.subspace
            if is_due(count, state["basis_step"], gap, phase_of(state, gap, subspace)):
                raise RuntimeError(
                    f"{name}: its basis is due after {count} steps, and a CUDA graph cannot"
                    " compute one; take this step eagerly and capture a later one"
                )
