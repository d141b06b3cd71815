"""One step of projected matrices: bases that are due, then the three operations, group by group."""

import logging
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops import Noise, Side
from ..ops.notices import notice_once
from ..subspace import ZERO_GRADIENT, is_due, refresh_basis
from .groups import Group
from .schedule import ResidualForm, StepScalars, step_scalars
from .state import State


class Matrix(NamedTuple):
    """A projected parameter with its gradient, its state and who computes its step."""

    param: Tensor
    grad: Tensor
    state: State
    backend: str
    salt: int


class Method(NamedTuple):
    """The parts that the optimizer was built with."""

    residual: ResidualForm | None
    subspace: str
    stochastic: bool
    capturable: bool


def step_projected(
    matrices: Sequence[Matrix], completed: Sequence[int], group: Group, method: Method
) -> None:
    """One step of a parameter group's matrices on one device.

    Args:
        matrices: those that have a gradient, on one device.
        completed: steps that each has taken, known on the host.
        group: its options.
        method: the optimizer's parts.
    """
    for matrix, steps in zip(matrices, completed, strict=True):
        if is_due(steps, matrix.state["basis_step"], group["update_proj_gap"]):
            _refresh(matrix, steps, group, method.subspace)
    torch._foreach_add_([matrix.state["step"] for matrix in matrices], 1)

    alike: dict[Hashable, list[Matrix]] = {}
    for matrix, steps in zip(matrices, completed, strict=True):
        if matrix.param.numel():
            kind = (_kind(matrix), None if method.capturable else steps)
            alike.setdefault(kind, []).append(matrix)
    chunks = [chunk for equal in alike.values() for chunk in _chunks(equal)]
    if method.capturable and chunks:
        _step_with_device_scalars(chunks, group, method)
        return
    for chunk in chunks:
        step = int(chunk[0].state["step"])
        scalars = step_scalars(group, step, method.residual)
        _step_group(chunk, step, scalars, group, method)


def _step_with_device_scalars(chunks: list[list[Matrix]], group: Group, method: Method) -> None:
    """The scalars of all chunks at once: a dozen small launches a step, not a dozen a chunk."""
    steps = torch.stack([matrix.state["step"] for chunk in chunks for matrix in chunk])
    scalars, counts = step_scalars(group, steps, method.residual), steps.int()
    start = 0
    for chunk in chunks:
        part = slice(start, start + len(chunk))
        _step_group(chunk, counts[part], scalars.of(part), group, method)
        start = part.stop


def _refresh(matrix: Matrix, completed: int, group: Group, subspace: str) -> None:
    grad = -matrix.grad if group["maximize"] else matrix.grad
    state = matrix.state
    if not grad.numel():
        return
    problem = refresh_basis(grad, state["basis"], Side(state["side"]), subspace)
    if problem is None:
        state["basis_step"] = completed
        return
    # Checkpoint libraries create the state by a step with zero gradients.
    level = logging.INFO if problem == ZERO_GRADIENT else logging.WARNING
    notice_once(level, f"a basis was not renewed: {problem}")


def _kind(matrix: Matrix) -> Hashable:
    """Equal for matrices that one launch can serve."""
    param, grad, basis = matrix.param, matrix.grad, matrix.state["basis"]
    tensors = (param, grad, basis)
    layout = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)
    return matrix.backend, matrix.state["side"], layout


def _chunks(equal: list[Matrix]) -> Iterator[list[Matrix]]:
    """As many matrices as the backend takes at a time."""
    first = equal[0]
    rank = first.state["basis"].shape[1]
    size = ops.group_size(first.param, first.grad, rank, backend=first.backend)
    for start in range(0, len(equal), size):
        yield equal[start : start + size]


def _step_group(
    matrices: list[Matrix],
    step: int | Tensor,
    scalars: StepScalars,
    group: Group,
    method: Method,
) -> None:
    params, grads, states, backends, salts = zip(*matrices, strict=True)
    if group["maximize"]:
        grads = tuple(-grad for grad in grads)
    side, backend = Side(states[0]["side"]), backends[0]
    bases = [state["basis"] for state in states]
    projection = ops.project_moments(
        grads,
        bases,
        side,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        scalars.adam,
        scalars.residual,
        backend=backend,
    )
    factor = None
    if projection.sums is not None:
        norms = [state["limiter_norm"] for state in states]
        factor = ops.channel_scale(projection.sums, norms, backend=backend)
    rounds = method.stochastic and params[0].dtype is torch.bfloat16
    ops.back_project_update(
        params,
        grads,
        bases,
        side,
        projection,
        scalars.residual,
        factor,
        scale=scalars.scale,
        step_size=scalars.step_size,
        decay=scalars.decay,
        noise=Noise(salts, step) if rounds else None,
        backend=backend,
    )
