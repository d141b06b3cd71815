"""Real steps by every backend that can run here, against float64 on the same bases.

The rule is that of the tests: an error of at most twice that of plain torch in the same dtype, or
of one eps of the dtype where plain torch happens to be better.
"""

import argparse
import itertools
import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import Side, backends, requested_backend
from ..ops.dispatch import ENVIRONMENT_VARIABLE, Kind, choose_kind
from ..optim import FiraAdamW, GaLoreAdamW, LowRankAdamW
from ..optim.state import new_projected_state
from ..subspace import Subspace
from .text import table, user_errors

SUMMARY = "take steps with every available backend and compare them with float64"

STEPS = 2
# Shapes and ranks. Odd sizes of either orientation, so that no row is aligned and tiles are cut.
ODD = (((37, 61), 13), ((61, 37), 13))
# On a GPU also aligned rows and long reductions, whose loops Triton pipelines.
PIPELINED = (((256, 1024), 128), ((1024, 256), 128))
DTYPES = (torch.float32, torch.bfloat16)
OPTIMIZERS: tuple[type[LowRankAdamW], ...] = (FiraAdamW, GaLoreAdamW)
COMPARED = ("weight", "exp_avg", "exp_avg_sq")


class Case(NamedTuple):
    """One optimizer on one matrix."""

    backend: str
    device: str
    dtype: torch.dtype
    optimizer: type[LowRankAdamW]
    shape: tuple[int, int]
    rank: int
    side: Side


class Start(NamedTuple):
    """Where a case begins, in float64: weight, orthonormal basis and the gradients of the steps."""

    weight: Tensor
    basis: Tensor
    grads: list[Tensor]


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """Whether all cases passed, the cases, and the backends that could not be tried.

    Raises:
        UserError, BackendUnavailable: `LOWRANK_BACKEND` names none that can run, so that every step
            outside of here would fail.
    """
    with user_errors():
        requested_backend("auto")
    # It would put one backend in the place of all.
    override = os.environ.pop(ENVIRONMENT_VARIABLE, None)
    try:
        results = [_result(case) for case in _cases()]
    finally:
        if override is not None:
            os.environ[ENVIRONMENT_VARIABLE] = override
    return {
        "passed": all(result["passed"] for result in results),
        "cases": results,
        "unavailable": {
            name: reason for name, (available, reason) in backends().items() if not available
        },
    }


def as_text(facts: dict[str, Any]) -> str:
    """A line a case, then what could not be tried, then the verdict."""
    rows = []
    for result in facts["cases"]:
        *case, error, bound, worst, passed = result.values()
        rows.append((*case, f"{error:.1e}", f"{bound:.1e}", worst, "ok" if passed else "WRONG"))
    parts = [table((*Case._fields, "error", "bound", "of", ""), rows), ""]
    parts += [f"{name}: not tried, {reason}" for name, reason in facts["unavailable"].items()]
    wrong = sum(not result["passed"] for result in facts["cases"])
    return "\n".join([*parts, f"{len(rows)} cases, {wrong} wrong"])


def _cases() -> Iterator[Case]:
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    names = [name for name, (available, _) in backends().items() if available]
    for name, device, dtype in itertools.product(names, devices, DTYPES):
        try:
            choose_kind(name, Kind(torch.device(device).type, dtype, dtype))
        except ValueError:
            continue  # not served
        sizes = ODD if device == "cpu" else ODD + PIPELINED
        for optimizer, (shape, rank), side in itertools.product(OPTIMIZERS, sizes, Side):
            yield Case(name, device, dtype, optimizer, shape, rank, side)


def _result(case: Case) -> dict[str, Any]:
    """The relative error that comes nearest to its bound, or is furthest beyond it."""
    start = _start(case)
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # on matrices this small a second one of torch only waits for the first
    try:
        exact = _steps(case, start, "reference", torch.float64)
        plain = _steps(case, start, "reference", case.dtype)
    finally:
        torch.set_num_threads(threads)
    tried = _steps(case, start, case.backend, case.dtype)
    floor = torch.finfo(case.dtype).eps
    errors = {name: _distance(tried[name], exact[name]) for name in COMPARED}
    bounds = {name: max(2 * _distance(plain[name], exact[name]), floor) for name in COMPARED}
    # A NaN is no error below a bound, so it has to be looked for.
    shares = {
        name: float("inf") if math.isnan(error) else error / bounds[name]
        for name, error in errors.items()
    }
    worst = max(shares, key=shares.__getitem__)
    return {
        **case._asdict(),
        "dtype": str(case.dtype).removeprefix("torch."),
        "optimizer": case.optimizer.__name__,
        "side": case.side.name.lower(),
        "error": errors[worst],
        "bound": bounds[worst],
        "worst": worst,
        "passed": shares[worst] <= 1,
    }


def _distance(value: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.vector_norm(value - exact) / torch.linalg.vector_norm(exact))


def _start(case: Case) -> Start:
    """Numbers that the dtype of the case holds, so that all runs begin at the same ones.

    The weight is small beside the steps: an error of a step is then one of the new weight. The
    projected gradients stay away from zero: M / sqrt(V) of an entry that nearly cancels would hang
    on the rounding of one product, and the error of a case on that entry.
    """
    rng = torch.Generator().manual_seed(sum(case.shape))
    left = case.side is Side.LEFT
    channels, size = reversed(case.shape) if left else case.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

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
        return tensor.to(case.device, dtype, copy=True)

    param = nn.Parameter(placed(start.weight))
    group = {
        "params": [param],
        "rank": case.rank,
        "scale": 0.5,
        "proj_type": case.side.name.lower(),
        "update_proj_gap": STEPS + 1,
    }
    limited = ("limiter_norm",) if case.optimizer is FiraAdamW else ()
    optimizer = case.optimizer([group], lr=1.0, weight_decay=0.1, backend=backend)
    state = new_projected_state(param, case.rank, case.side, 0, Subspace(), *limited)
    state["basis"].copy_(start.basis)
    state["basis_step"] = 0
    optimizer.state[param] = state
    for grad in start.grads:
        param.grad = placed(grad)
        optimizer.step()
    found = {"weight": param.detach(), **state}
    return {name: found[name].double().cpu() for name in COMPARED}
