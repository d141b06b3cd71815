"""Whether a backend computes what it should, on the very device and in the very dtypes.

The rule is that of the tests: an error of at most twice that of plain torch in the same dtypes, or
of one eps where plain torch happens to be better; and the same bits twice, since a race between a
copy and a product shows in nothing else for certain.

Triton cuts every size into tiles of its own. So a size has a stand-in, whose rows begin where its
rows do, which is cut into the same tiles.
"""

import functools
import logging
import math
import textwrap
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .codes import channel_groups, loaded, new_stored
from .contract import (
    AdamScalars,
    Matrices,
    Residual,
    Scalars,
    Side,
    basis_shape,
    moment_dtype,
    projected_shape,
)
from .decoded import operations_of
from .dispatch import CapturedStream, Kind, load
from .times import Size

logger = logging.getLogger("lowrank_kernels")

# Shapes and ranks. Odd sizes of either orientation, so that no row is aligned and tiles are cut.
ODD = (((37, 61), 13), ((61, 37), 13))
# Aligned rows and long reductions, whose loops Triton pipelines on a GPU.
PIPELINED = (((320, 1024), 128), ((1024, 320), 128))

# Of a stand-in, at least, all multiples of 16: more channels than one program of operation 2 has, a
# last tile that is cut, more ranks than a tile of 128, and in two matrices so many elements that
# rows at odd places are copied.
CHANNELS, DEPTH, RANK = 528, 1040, 192
MATRICES = 2
# Matrices of a batch, whose tiles are tried.
COUNTS = tuple(2**power for power in range(11))

# The last is GaLore of gradients that arrive projected.
METHODS = {"fira": Residual(kappa=0.5, rho=1.0), "galore": None, "projected": None}
SCALE = 0.5
STEPS = 2


class Launch(NamedTuple):
    """What decides about the code that runs, besides sizes and dtypes.

    Attributes:
        grad: the dtype of gradients; None is that of the weights.
        capturable: step-dependent scalars are tensors.
        noise: bfloat16 weights are rounded stochastically.
        moments: the dtype that holds M; float32 stands for wide moments.
        tiles: Triton's, of operations 1 and 3; None leaves them to the launcher.
    """

    grad: torch.dtype | None = None
    capturable: bool = False
    noise: bool = False
    moments: torch.dtype = torch.float32
    tiles: tuple[Any, Any] | None = None


class Case(NamedTuple):
    """Steps of one method on equal matrices."""

    backend: str
    device: str
    dtype: torch.dtype
    method: str
    shape: tuple[int, int]
    rank: int
    side: Side
    launch: Launch = Launch()

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of weights and gradients."""
        return self.dtype, self.launch.grad or self.dtype

    @property
    def projected(self) -> bool:
        """Whether operation 1 is given R."""
        return self.method == "projected"

    def __str__(self) -> str:
        """As a fault tells it, without backend, device and dtypes."""
        more = "".join(f", tiles {tuple(each)}" for each in self.launch.tiles or ())
        if self.launch.moments is not torch.float32:
            more = f", moments in {str(self.launch.moments).removeprefix('torch.')}{more}"
        return f"{self.method}, {self.shape[0]} x {self.shape[1]}, rank {self.rank}{more}"


class KernelsFailed(RuntimeError):
    """What a backend raised where plain torch took its steps."""


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
    """Where a case begins, in float64: weight, orthonormal basis and the gradients of the steps,
    projected or not.
    """

    weight: Tensor
    basis: Tensor
    grads: list[Tensor]


def fault_of(backend: str, device: torch.device, kind: Kind) -> str | None:
    """What is wrong with a backend on a device for a kind of matrix, None if nothing is.

    A case is tried once in a process, and its fault is logged then. The caller's modes and settings
    of torch, random numbers and memory stay as they are; the host waits for the device.

    Args:
        backend: by name; it has to serve the dtypes on this device.
        device: with an index.
        kind: of which all but its device count.

    Raises:
        CapturedStream: now is no time to look.
        RuntimeError: there is no room for some MB, or plain torch fails; nothing was found out.
    """
    autocast = torch.autocast(device.type, enabled=False)
    with autocast, _disable_current_modes():
        try:
            return next(filter(None, map(fault_in, cases_of(backend, device, kind))), None)
        finally:
            _expected.cache_clear()


def cases_of(backend: str, device: torch.device, kind: Kind) -> Iterator[Case]:
    """What stands for a kind of matrix, the likely faults first."""
    launch = Launch(kind.grad, kind.capturable, moments=kind.moments)
    for method, residual in METHODS.items():
        if (method == "projected") is not kind.projected:
            continue
        of = backend, str(device), kind.param, method
        if backend == "triton" and kind.size is not None:
            rows, cols, rank, side = stand_in(kind.size)
            for tiles in _tiles(device, kind, kind.size, residual):
                yield Case(*of, (rows, cols), rank, side, launch._replace(tiles=tiles))
        else:
            for size, side in zip(PIPELINED, (Side.RIGHT, Side.LEFT), strict=True):
                yield Case(*of, *size, side, launch)
        # Rows of any place, read by elements.
        noise = kind.param is torch.bfloat16
        yield Case(*of, *ODD[0], Side.RIGHT, launch._replace(noise=noise))


def stand_in(size: Size) -> Size:
    """Few elements, at the same distances from multiples of 16 as in a weight of the size."""
    channels, depth = CHANNELS, DEPTH
    rows, cols = (channels, depth) if size.side is Side.RIGHT else (depth, channels)
    rank = size.rank if size.rank <= RANK else RANK + size.rank % 16
    return Size(rows + size.rows % 16, cols + size.cols % 16, max(rank, 1), size.side)


def _tiles(
    device: torch.device, kind: Kind, size: Size, residual: Residual | None
) -> list[tuple[Any, Any]]:
    """Those that Triton's launcher has for batches of such matrices, once each."""
    shape, rank, side = (size.rows, size.cols), size.rank, size.side

    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    low = projected_shape(shape, side, rank)
    weight, grad = empty(shape, kind.param), empty(low if kind.projected else shape, kind.grad)
    basis = empty(basis_shape(shape, side, rank), kind.param)
    moments = new_stored(low, kind.moments, torch.device("meta"), channel_groups(side))
    norm = empty((), moment_dtype(kind.param))
    found: dict[tuple[Any, Any], None] = {}
    # There the meta device stands for the GPU.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for count in COUNTS:
            params, grads, bases, exp_avgs, exp_avg_sqs, norms = (
                [each] * count for each in (weight, grad, basis, *moments[:2], norm)
            )
            scales = [[each] * count if each is not None else [] for each in moments[2:]]
            tensors = (params, grads, bases, exp_avgs, exp_avg_sqs, norms)
            batch = Matrices(side, residual, *tensors, None, scales[0], scales[1])
            batch = batch._replace(projected=kind.projected)
            found[load("triton").Operations(batch).tiles] = None
    return list(found)


@functools.cache
def fault_in(case: Case) -> str | None:
    """What is wrong with a case, None if nothing is."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise CapturedStream
    try:
        outcome = judge(case)
    except KernelsFailed as error:
        reason = str(error)
    else:
        if outcome.passed:
            return None
        reason = str(outcome)
    weights, grads = (str(dtype).removeprefix("torch.") for dtype in case.dtypes)
    dtypes = weights if weights == grads else f"{weights} with {grads} gradients"
    found = f"{case.backend} fails its check on {case.device} in {dtypes}: {case}: {reason}"
    logger.warning("%s; backend='auto' does without it", found)
    return found


def judge(case: Case) -> Outcome:
    """Takes the steps of a case by its backend, twice, and by plain torch in its dtypes and in
    float64.

    Raises:
        KernelsFailed: the backend raised something, other than that there is no memory.
    """
    launch = case.launch._replace(tiles=None, capturable=False)
    starts, exact, plain = _expected(case._replace(backend="reference", launch=launch))
    try:
        tried, again = (_steps(case, starts, case.backend, case.dtypes) for _ in range(2))
    except Exception as error:  # a compiler raises what it likes
        text = f"{type(error).__name__}: {error}"
        # Of torch, the driver, Triton and cuBLAS: none of them says so by its type alone.
        if any(words in text for words in ("out of memory", "OutOfMemory", "ALLOC_FAILED")):
            raise
        raise KernelsFailed(textwrap.shorten(text, 240, placeholder=" ...")) from error
    floor = max(torch.finfo(dtype).eps for dtype in case.dtypes)
    errors = {name: _distance(tried[name], exact[name]) for name in exact}
    bounds = {name: max(2 * _distance(plain[name], exact[name]), floor) for name in exact}

    def share(name: str) -> float:
        return math.inf if math.isnan(errors[name]) else errors[name] / bounds[name]

    worst = max(exact, key=share)
    repeats = all(tried[name].equal(again[name]) for name in exact)
    # A NaN differs from itself, and is told as an error.
    return Outcome(errors[worst], bounds[worst], worst, repeats or math.isnan(errors[worst]))


@functools.lru_cache(maxsize=1)
def _expected(case: Case) -> tuple[list[Start], dict[str, Tensor], dict[str, Tensor]]:
    """Where a case begins, and where plain torch ends in float64 and in the dtypes of the case."""
    starts = [start_of(case, index) for index in range(MATRICES)]
    exact = _steps(case, starts, "reference", (torch.float64, torch.float64))
    return starts, exact, _steps(case, starts, "reference", case.dtypes)


def start_of(case: Case, matrix: int = 0) -> Start:
    """Numbers that the dtypes of the case hold, so that all runs begin at the same ones.

    The weight is small beside the steps: an error of a step is then one of the new weight. The
    projected gradients stay away from zero: M / sqrt(V) of an entry that nearly cancels would hang
    on the rounding of one product, and the error of a case on that entry.
    """
    rng = torch.Generator("cpu").manual_seed(sum(case.shape) + matrix)
    left = case.side is Side.LEFT
    channels, size = reversed(case.shape) if left else case.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64, device="cpu")

    basis = torch.linalg.qr(normal(size, case.rank))[0]

    def grad() -> Tensor:
        low = normal(channels, case.rank)
        low = low + low.sign()
        if case.projected:
            return low.T if left else low
        full = normal(channels, size)
        full = full + (low - full @ basis) @ basis.T
        return full.T if left else full

    of_weights, of_grads = case.dtypes
    weight, basis = (x.to(of_weights).double() for x in (0.1 * normal(*case.shape), basis))
    return Start(weight, basis, [grad().to(of_grads).double() for _ in range(STEPS)])


def _steps(
    case: Case, starts: list[Start], backend: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> dict[str, Tensor]:
    """Weights and moments after the steps, in float64 on the CPU."""
    (dtype, of_grads), count = dtypes, len(starts)

    def placed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.to(case.device, dtype, copy=True).contiguous()

    moments = moment_dtype(dtype)
    wide, device = moments, torch.device(case.device)
    if wide is torch.float32:
        moments = case.launch.moments

    def number(value: float, dtype: torch.dtype = torch.float64) -> Any:
        if case.launch.capturable and backend == case.backend:
            return torch.full((count,), value, dtype=dtype, device=case.device)
        return value

    residual = METHODS[case.method]
    low, groups = projected_shape(case.shape, case.side, case.rank), channel_groups(case.side)
    held = [new_stored(low, moments, device, groups) for _ in starts]
    scales = [
        [x for x in every if x is not None]
        for every in zip(*(stored[2:] for stored in held), strict=True)
    ]
    matrices = Matrices(
        case.side,
        residual,
        [placed(start.weight, dtype) for start in starts],
        [placed(start.grads[0], of_grads) for start in starts],
        [placed(start.basis, dtype) for start in starts],
        [stored.exp_avg for stored in held],
        [stored.exp_avg_sq for stored in held],
        [] if residual is None else [torch.zeros((), dtype=wide, device=device) for _ in starts],
        tuple(range(count)) if case.launch.noise and dtype is torch.bfloat16 else None,
        scales[0],
        scales[1],
        None if moments.itemsize == wide.itemsize else tuple(range(count)),
        projected=case.projected,
    )
    operations = _prepared(case, backend, matrices)
    beta1, beta2 = 0.9, 0.999
    for index in range(STEPS):
        matrices = matrices._replace(
            grads=[placed(start.grads[index], of_grads) for start in starts]
        )
        step = index + 1
        step_size = (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        scalars = Scalars(
            AdamScalars(beta1, beta2, 1e-6),
            SCALE,
            number(step_size),
            number(0.1),
            number(step, torch.int32),
        )
        projection = operations.project_moments(matrices, scalars.adam, scalars.step)
        factor = None
        if projection.sums is not None:
            factor = operations.channel_scale(matrices, projection.sums)
        operations.back_project_update(matrices, projection, factor, scalars)
    exp_avgs, exp_avg_sqs = zip(*(loaded(stored, groups) for stored in held), strict=True)
    found = {"weight": matrices.params, "exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs}
    return {name: torch.stack(list(tensors)).double().cpu() for name, tensors in found.items()}


def _prepared(case: Case, backend: str, matrices: Matrices) -> Any:
    """The backend's operations, with the tiles of the case if they are its own."""
    module, tiles = load(backend), case.launch.tiles
    if tiles is None or backend != case.backend:
        return operations_of(module, matrices)
    with module.forced(project=tiles[0], update=tiles[1]):
        return operations_of(module, matrices)


def _distance(value: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.vector_norm(value - exact) / torch.linalg.vector_norm(exact))
