"""Whether a backend computes what it should, on the very device and in the very dtype.

The rule is that of the tests: an error of at most twice that of plain torch in the same dtype, or
of one eps of the dtype where plain torch happens to be better; and the same bits twice, since a
race between a copy and a product shows in nothing else for certain.
"""

import functools
import logging
import math
import textwrap
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .contract import AdamScalars, Matrices, Residual, Scalars, Side, moment_dtype, projected_shape
from .dispatch import CapturedStream, load

logger = logging.getLogger("lowrank_kernels")

# Shapes and ranks. Odd sizes of either orientation, so that no row is aligned and tiles are cut.
ODD = (((37, 61), 13), ((61, 37), 13))
# Aligned rows and long reductions, whose loops Triton pipelines on a GPU.
PIPELINED = (((256, 1024), 128), ((1024, 256), 128))

METHODS = {"fira": Residual(kappa=0.5, rho=1.0), "galore": None}
SCALE = 0.5
STEPS = 2


class Case(NamedTuple):
    """Steps of one method on one matrix."""

    backend: str
    device: str
    dtype: torch.dtype
    method: str
    shape: tuple[int, int]
    rank: int
    side: Side


class Outcome(NamedTuple):
    """The relative error that comes nearest to its bound, or is furthest beyond it."""

    error: float
    bound: float
    worst: str
    repeats: bool

    @property
    def passed(self) -> bool:
        """A NaN is no error below a bound."""
        return self.repeats and self.error <= self.bound

    def __str__(self) -> str:
        """In words, for people who have to decide what to do about it."""
        if not self.repeats:
            return "two runs differ"
        return f"{self.worst} is off by {self.error:.1e}, at most {self.bound:.1e} is right"


class Start(NamedTuple):
    """Where a case begins, in float64: weight, orthonormal basis and the gradients of the steps."""

    weight: Tensor
    basis: Tensor
    grads: list[Tensor]


@functools.cache
def fault_of(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with a backend on a device in a dtype, None if nothing is.

    It is found once in a process, and a fault is logged then. The caller's modes and settings of
    torch, random numbers and memory stay as they are; the host waits for the device.

    Args:
        backend: by name; it has to serve the dtype on this device.
        device: with an index.
        dtype: of weights and gradients.

    Raises:
        CapturedStream: now is no time to look.
        torch.OutOfMemoryError: there is no room for some MB; nothing was found out.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise CapturedStream
    (wide, tall), odd = PIPELINED, ODD[0]
    sizes = ((*wide, Side.RIGHT), (*tall, Side.LEFT), (*odd, Side.RIGHT))
    cases = [
        Case(backend, str(device), dtype, method, *size) for method in METHODS for size in sizes
    ]
    found = next(filter(None, map(_fault_in, cases)), None)
    if found is not None:
        found = (
            f"{backend} fails its check on {device} in {str(dtype).removeprefix('torch.')}: {found}"
        )
        logger.warning("%s; backend='auto' does without it", found)
    return found


def _fault_in(case: Case) -> str | None:
    where = f"{case.method}, {case.shape[0]} x {case.shape[1]}, rank {case.rank}"
    autocast = torch.autocast(torch.device(case.device).type, enabled=False)
    try:
        with autocast, _disable_current_modes():
            outcome = judge(case)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler raises what it likes
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 240, placeholder=" ...")
        return f"{where}: {reason}"
    return None if outcome.passed else f"{where}: {outcome}"


def judge(case: Case) -> Outcome:
    """Takes the steps of a case by its backend, twice, and by plain torch in its dtype and in
    float64.
    """
    start = start_of(case)
    exact = _steps(case, start, "reference", torch.float64)
    plain = _steps(case, start, "reference", case.dtype)
    tried, again = (_steps(case, start, case.backend, case.dtype) for _ in range(2))
    floor = torch.finfo(case.dtype).eps
    errors = {name: _distance(tried[name], exact[name]) for name in exact}
    bounds = {name: max(2 * _distance(plain[name], exact[name]), floor) for name in exact}

    def share(name: str) -> float:
        return math.inf if math.isnan(errors[name]) else errors[name] / bounds[name]

    worst = max(exact, key=share)
    repeats = all(tried[name].equal(again[name]) for name in exact)
    # A NaN differs from itself, and is told as an error.
    return Outcome(errors[worst], bounds[worst], worst, repeats or math.isnan(errors[worst]))


def start_of(case: Case) -> Start:
    """Numbers that the dtype of the case holds, so that all runs begin at the same ones.

    The weight is small beside the steps: an error of a step is then one of the new weight. The
    projected gradients stay away from zero: M / sqrt(V) of an entry that nearly cancels would hang
    on the rounding of one product, and the error of a case on that entry.
    """
    rng = torch.Generator("cpu").manual_seed(sum(case.shape))
    left = case.side is Side.LEFT
    channels, size = reversed(case.shape) if left else case.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64, device="cpu")

    basis = torch.linalg.qr(normal(size, case.rank))[0]

    def grad() -> Tensor:
        low = normal(channels, case.rank)
        low = low + low.sign()
        full = normal(channels, size)
        full = full + (low - full @ basis) @ basis.T
        return full.T if left else full

    tensors = (0.1 * normal(*case.shape), basis, *(grad() for _ in range(STEPS)))
    weight, basis, *grads = (tensor.to(case.dtype).double() for tensor in tensors)
    return Start(weight, basis, grads)


def _steps(case: Case, start: Start, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weight and the moments after the steps, in float64 on the CPU."""

    def placed(tensor: Tensor) -> Tensor:
        return tensor.to(case.device, dtype).contiguous()

    low = projected_shape(case.shape, case.side, case.rank)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=moment_dtype(dtype), device=case.device)

    residual = METHODS[case.method]
    weight, exp_avg, exp_avg_sq = placed(start.weight).clone(), zeros(*low), zeros(*low)
    matrices = Matrices(
        case.side,
        residual,
        [weight],
        [placed(start.grads[0])],
        [placed(start.basis)],
        [exp_avg],
        [exp_avg_sq],
        [] if residual is None else [zeros()],
    )
    operations = load(backend).Operations(matrices)
    beta1, beta2 = 0.9, 0.999
    for step, grad in enumerate(start.grads, 1):
        matrices = matrices._replace(grads=[placed(grad)])
        step_size = (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        scalars = Scalars(AdamScalars(beta1, beta2, 1e-6), SCALE, step_size, 0.1, step)
        projection = operations.project_moments(matrices, scalars.adam)
        factor = None
        if projection.sums is not None:
            factor = operations.channel_scale(matrices, projection.sums)
        operations.back_project_update(matrices, projection, factor, scalars)
    found = {"weight": weight, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    return {name: tensor.double().cpu() for name, tensor in found.items()}


def _distance(value: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.vector_norm(value - exact) / torch.linalg.vector_norm(exact))
