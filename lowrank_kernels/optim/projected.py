"""One step of projected matrices: bases that are due, then the three operations, group by group."""

import zlib
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops import Noise, Projection, Side
from ..ops.reference import LIMITER_GROWTH
from ..subspace import Due, Readback, Subspace, is_due, is_measured, measure, refresh_bases
from .groups import Group
from .schedule import ResidualForm, StepScalars, step_scalars
from .state import State


class Matrix(NamedTuple):
    """A projected parameter with its gradient, its state and who computes its step."""

    name: str
    param: Tensor
    grad: Tensor
    state: State
    backend: str


class Method(NamedTuple):
    """The parts that the optimizer was built with."""

    residual: ResidualForm | None
    corrected: bool
    subspace: Subspace
    stochastic: bool
    capturable: bool
    monitor: bool
    readback: Readback


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
    refresh_bases(list(_due(matrices, completed, group, method)), method.subspace)
    torch._foreach_add_([matrix.state["step"] for matrix in matrices], 1)

    alike: dict[Hashable, list[Matrix]] = {}
    for matrix, steps in zip(matrices, completed, strict=True):
        if matrix.param.numel():
            counts = None if method.capturable else (steps, matrix.state["moments_step"])
            alike.setdefault((_kind(matrix), counts), []).append(matrix)
    chunks = [chunk for equal in alike.values() for chunk in _chunks(equal)]
    if method.capturable and chunks:
        _step_with_device_scalars(chunks, group, method)
        return
    for chunk in chunks:
        step = int(chunk[0].state["step"])
        moments_step = step - int(chunk[0].state["moments_step"])
        scalars = step_scalars(group, moments_step, method.residual, method.corrected)
        _step_group(chunk, step, scalars, group, method)


def _step_with_device_scalars(chunks: list[list[Matrix]], group: Group, method: Method) -> None:
    """The scalars of all chunks at once: a dozen small launches a step, not a dozen a chunk."""
    steps = torch.stack([matrix.state["step"] for chunk in chunks for matrix in chunk])
    scalars, counts = step_scalars(group, steps, method.residual, method.corrected), steps.int()
    start = 0
    for chunk in chunks:
        part = slice(start, start + len(chunk))
        _step_group(chunk, counts[part], scalars.of(part), group, method)
        start = part.stop


def _due(
    matrices: Sequence[Matrix], completed: Sequence[int], group: Group, method: Method
) -> Iterator[Due]:
    """Those whose interval is over, or whose basis has done its work by the criterion."""
    gap, betas = group["update_proj_gap"], (float(group["betas"][0]), float(group["betas"][1]))
    for matrix, steps in zip(matrices, completed, strict=True):
        state, subspace = matrix.state, method.subspace
        phase = phase_of(state, gap, subspace)
        due = is_due(steps, state["basis_step"], gap, phase, state["gap_factor"])
        if is_measured(state, steps, subspace):
            value = method.readback.finish(matrix.param, state["measured"])
            due = due or value <= subspace.threshold
        if due:
            # 32 bits, since torch's generator on a CPU takes no more of a seed.
            seed = zlib.crc32(f"{state['salt']} {steps}".encode())
            yield Due(matrix.name, matrix.grad, state, group["rank"], steps, seed, betas)


def phase_of(state: State, gap: int, subspace: Subspace) -> int:
    """By how many steps the refreshes of a matrix come early, so that matrices take turns."""
    return state["salt"] * gap >> 32 if subspace.stagger else 0


def _measure(matrices: list[Matrix], projection: Projection, method: Method) -> None:
    """What the criterion wants to know of this step, for a decision at the next one."""
    for matrix, projected in zip(matrices, projection.projected, strict=True):
        steps = int(matrix.state["step"]) - 1
        if measure(matrix.state, projected, steps, method.subspace):
            method.readback.start(matrix.param, matrix.state["measured"])


def _watch(
    matrices: list[Matrix], grads: Sequence[Tensor], norms: list[Tensor], before: list[Tensor]
) -> None:
    """Counts, on the device, gradients of which something was left out, being infinite or NaN or
    too large to be squared, and steps that the limiter held back.

    The limiter stores what it let through: of a step that it held back, 1.01 times the norm before.
    """
    largest = torch._foreach_norm(list(grads), float("inf"))
    for matrix, value in zip(matrices, largest, strict=True):
        usable = value.to(matrix.state["exp_avg"].dtype).square().isfinite()
        matrix.state["nonfinite"] += ~usable
    bound = LIMITER_GROWTH * (1 - 1e-5)
    for matrix, norm, old in zip(matrices, norms, before, strict=False):
        matrix.state["limited"] += (old > 0) & (norm >= bound * old)


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
    _, params, grads, states, backends = zip(*matrices, strict=True)
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
    norms = [state["limiter_norm"] for state in states] if projection.sums is not None else []
    before = [norm.clone() for norm in norms] if method.monitor else []
    if projection.sums is not None:
        factor = ops.channel_scale(projection.sums, norms, backend=backend)
    if method.monitor:
        _watch(matrices, grads, norms, before)
    if method.subspace.criterion is not None:
        _measure(matrices, projection, method)
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
        noise=Noise(tuple(state["salt"] for state in states), step) if rounds else None,
        backend=backend,
    )
