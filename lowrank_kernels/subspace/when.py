"""When the basis of a matrix is computed anew."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .options import Subspace

# Q-GaLore looks at so many refreshes, and its interval has no bound; ours stays in an int.
LAZY_REFRESHES = 5
MAX_GAP_FACTOR = 2**16


def is_due(
    completed_steps: int, basis_step: int, gap: int, phase: int = 0, gap_factor: int = 1
) -> bool:
    """Whether the basis has to change before this step.

    It is so at every multiple of `gap` completed steps, as in the official code, or `phase` steps
    before it; and at every step after one where it should have changed and could not. A longer
    interval counts from the last change, so that it is never cut short by a multiple of its own.
    The answer depends on nothing but the state, so a resumed run refreshes where the uninterrupted
    one does.

    Args:
        completed_steps: steps that this parameter has taken.
        basis_step: completed steps when its basis was computed, -1 for none.
        gap: T of the papers, in steps.
        phase: by how many steps the changes come early, 0 to gap - 1: staggers the matrices.
        gap_factor: by how much lazy refreshes have lengthened the interval.
    """
    if basis_step < 0:
        return True
    if gap_factor > 1:
        return completed_steps - basis_step >= gap * gap_factor
    return (completed_steps + phase) // gap > (basis_step + phase) // gap


def new_measures(projected: Tensor, subspace: Subspace) -> dict[str, Any]:
    """What a criterion and lazy refreshes keep in a matrix' state, before the first of them.

    Args:
        projected: of the shape, dtype and device of R.
        subspace: its criterion and laziness.
    """
    measures = {}
    if subspace.criterion is not None:
        # The last one; infinite before there was one.
        measures["measured"] = projected.new_full((), float("inf"))
    # What later ones are compared with: |R|, or R / |R|, at the first step with this basis.
    if subspace.criterion == "relative_norm":
        measures["first_norm"] = projected.new_zeros(())
    elif subspace.criterion == "displacement":
        measures["first_direction"] = torch.zeros_like(projected)
    if subspace.lazy is not None:
        # Of the last refreshes, on the host.
        measures["overlaps"] = torch.zeros(LAZY_REFRESHES, dtype=torch.float32, device="cpu")
    return measures


def is_measured(state: Mapping[str, Any], completed_steps: int, subspace: Subspace) -> bool:
    """Whether the criterion is looked at before this step: `check_gap` steps after the basis."""
    age = completed_steps - int(state["basis_step"])
    return subspace.criterion is not None and age > 0 and age % subspace.check_gap == 0


def next_look(
    state: Mapping[str, Any], completed_steps: int, gap: int, phase: int, subspace: Subspace
) -> int:
    """The first count from `completed_steps` on at which the basis is due or a criterion asked."""
    basis_step = state["basis_step"]
    if basis_step < 0:
        return completed_steps
    look: int = ((basis_step + phase) // gap + 1) * gap - phase
    if state["gap_factor"] > 1:
        look = basis_step + gap * state["gap_factor"]
    if subspace.criterion is not None:
        age = max(1, completed_steps - basis_step)
        look = min(look, basis_step + -(-age // subspace.check_gap) * subspace.check_gap)
    return max(look, completed_steps)


def measures_at(state: Mapping[str, Any], completed_steps: int, subspace: Subspace) -> bool:
    """Whether `measure` takes something of this step: the next one looks at it, or it is the first
    with its basis.
    """
    first = completed_steps == state["basis_step"] and subspace.criterion is not None
    return first or is_measured(state, completed_steps + 1, subspace)


def measure(
    state: dict[str, Any],
    projected: Tensor,
    completed_steps: int,
    subspace: Subspace,
    norm: Tensor | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> bool:
    """Takes the criterion's measure of a step that has just been computed; it stays on the device.

    It is written into the state if the next step looks at it; at a basis' first step, so is what
    later ones are compared with.

    Args:
        state: of the matrix.
        projected: R, or the part of it that is here.
        completed_steps: before this step.
        subspace: its criterion.
        norm: |R| of the whole, if only a part is here.
        total: then brings the norm of a part to that of the whole.

    Returns:
        Whether the next step looks at it.
    """
    age = completed_steps - int(state["basis_step"])
    if not measures_at(state, completed_steps, subspace):
        return False
    norm = torch.linalg.vector_norm(projected) if norm is None else norm
    if subspace.criterion == "norm":
        state["measured"] = norm
    elif subspace.criterion == "relative_norm":
        if age == 0:
            state["first_norm"] = norm
        first = state["first_norm"]
        state["measured"] = torch.where(first > 0, norm / first, torch.zeros_like(norm))
    else:
        direction = torch.where(norm > 0, projected / norm, torch.zeros_like(projected))
        if age == 0:
            state["first_direction"] = direction
        distance = torch.linalg.vector_norm(direction - state["first_direction"])
        distance = distance if total is None else total(distance)
        # At the first step nothing can have moved, which is no sign of a standstill: 2, the most.
        state["measured"] = distance / age if age else torch.full_like(distance, 2.0)
    return is_measured(state, completed_steps + 1, subspace)


class Readback:
    """Brings measures to the host while the device goes on working."""

    def __init__(self) -> None:
        self._under_way: dict[Tensor, tuple[Tensor, torch.cuda.Event]] = {}

    def start(self, param: Tensor, value: Tensor) -> None:
        """Called at the step that measured."""
        if value.device.type != "cuda":
            return
        on_host = torch.empty((), dtype=value.dtype, device="cpu", pin_memory=True)
        on_host.copy_(value, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(value.device))
        self._under_way[param] = on_host, event

    def finish(self, param: Tensor, value: Tensor) -> float:
        """Called at the next step: waits for the last one only, or for `value` after a resume."""
        on_host, event = self._under_way.pop(param, (value, None))
        if event is not None:
            event.synchronize()
        return float(on_host)


def note_overlap(state: dict[str, Any], overlap: float, subspace: Subspace) -> None:
    """Lazy refreshes: doubles the factor on the interval if the last bases overlapped enough.

    Source: Q-GaLore (arXiv 2407.08296), with an overlap that no sign of a vector changes.
    """
    if subspace.lazy is None:
        return
    overlaps = state["overlaps"].roll(-1)
    overlaps[-1] = overlap
    state["overlaps"] = overlaps
    if state["refreshes"] >= LAZY_REFRESHES and float(overlaps.mean()) >= subspace.lazy:
        state["gap_factor"] = min(2 * state["gap_factor"], MAX_GAP_FACTOR)
