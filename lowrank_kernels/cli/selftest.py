"""Real steps by every backend that can run here, against float64 on the same bases.

The rule is that of the tests: an error of at most twice that of plain torch in the same dtype, or
of one eps of the dtype where plain torch happens to be better.
"""

import argparse
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import Side, backends, requested_backend
from ..ops.dispatch import ENVIRONMENT_VARIABLE, Kind, choose_kind
from ..optim import FiraAdamW, GaLoreAdamW, LowRankAdamW
from ..optim.state import new_projected_state
from ..subspace import Subspace
from .errors import UserError
from .text import print_json, table

SUMMARY = "take steps with every available backend and compare them with float64"

STEPS = 2
RANK = 13
# Odd sizes of either orientation, so that no row is aligned and tiles are cut.
SHAPES = ((37, 61), (61, 37))
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
    side: Side


class Start(NamedTuple):
    """Where a case begins, in float64: weight, orthonormal basis and the gradients of the steps."""

    weight: Tensor
    basis: Tensor
    grads: list[Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none of its own."""


def run(args: argparse.Namespace) -> int:
    """Prints a line a case; 1 if one is wrong, else 0.

    Raises:
        UserError, BackendUnavailable: `LOWRANK_BACKEND` names none that can run, so that every step
            outside of here would fail.
    """
    try:
        requested_backend("auto")
    except ValueError as error:
        raise UserError(str(error)) from None
    with _no_override():
        results = [_result(case) for case in _cases()]
    missing = {name: reason for name, (available, reason) in backends().items() if not available}
    passed = all(result["passed"] for result in results)
    if args.json:
        print_json({"passed": passed, "cases": results, "unavailable": missing})
    else:
        print(as_text(results, missing))
    return 0 if passed else 1


def as_text(results: Sequence[dict[str, Any]], missing: dict[str, str]) -> str:
    """A line a case, then what could not be tried, then the verdict."""
    rows = [
        (
            result["backend"],
            result["device"],
            result["dtype"],
            result["optimizer"],
            " x ".join(map(str, result["shape"])),
            result["side"],
            f"{result['error']:.1e}",
            f"{result['bound']:.1e}",
            result["worst"],
            "ok" if result["passed"] else "WRONG",
        )
        for result in results
    ]
    header = ("backend", "device", "dtype", "optimizer", "shape", "side")
    parts = [table((*header, "error", "bound", "of", ""), rows), ""]
    parts += [f"{name}: not tried, {reason}" for name, reason in missing.items()]
    wrong = sum(not result["passed"] for result in results)
    parts.append(f"{len(results)} cases, {wrong} wrong")
    return "\n".join(parts)


def _cases() -> Iterator[Case]:
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    names = [name for name, (available, _) in backends().items() if available]
    for name, device, dtype in itertools.product(names, devices, DTYPES):
        if _serves(name, device, dtype):
            for rest in itertools.product(OPTIMIZERS, SHAPES, Side):
                yield Case(name, device, dtype, *rest)


def _serves(backend: str, device: str, dtype: torch.dtype) -> bool:
    try:
        choose_kind(backend, Kind(torch.device(device).type, dtype, dtype))
    except ValueError:
        return False
    return True


def _result(case: Case) -> dict[str, Any]:
    """The relative error that comes nearest to its bound, or is furthest beyond it."""
    start = _start(case)
    with _one_thread():
        exact = _steps(case, start, "reference", torch.float64)
        plain = _steps(case, start, "reference", case.dtype)
    tried = _steps(case, start, case.backend, case.dtype)
    floor = torch.finfo(case.dtype).eps
    errors = [_distance(tried[name], exact[name]) for name in COMPARED]
    bounds = [max(2 * _distance(plain[name], exact[name]), floor) for name in COMPARED]
    # A NaN is no error below a bound, so it has to be looked for.
    shares = [
        error / bound if error == error else float("inf")
        for error, bound in zip(errors, bounds, strict=True)
    ]
    worst = shares.index(max(shares))
    return {
        "backend": case.backend,
        "device": case.device,
        "dtype": str(case.dtype).removeprefix("torch."),
        "optimizer": case.optimizer.__name__,
        "shape": case.shape,
        "side": case.side.name.lower(),
        "error": errors[worst],
        "bound": bounds[worst],
        "worst": COMPARED[worst],
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

    basis = torch.linalg.qr(normal(size, RANK))[0]

    def grad() -> Tensor:
        low = normal(channels, RANK)
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
        "rank": RANK,
        "scale": 0.5,
        "proj_type": case.side.name.lower(),
        "update_proj_gap": STEPS + 1,
    }
    limited = ("limiter_norm",) if case.optimizer is FiraAdamW else ()
    optimizer = case.optimizer([group], lr=1.0, weight_decay=0.1, backend=backend)
    state = new_projected_state(param, RANK, case.side, 0, Subspace(), *limited)
    state["basis"].copy_(start.basis)
    state["basis_step"] = 0
    optimizer.state[param] = state
    for grad in start.grads:
        param.grad = placed(grad)
        optimizer.step()
    found = {"weight": param.detach(), **state}
    return {name: found[name].double().cpu() for name in COMPARED}


@contextmanager
def _one_thread() -> Iterator[None]:
    """On matrices this small a second thread of torch only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _no_override() -> Iterator[None]:
    """Without `LOWRANK_BACKEND`, which would put one backend in the place of all."""
    value = os.environ.pop(ENVIRONMENT_VARIABLE, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[ENVIRONMENT_VARIABLE] = value
