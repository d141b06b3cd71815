"""Real steps by every backend that can run here, against float64 on the same bases.

The rule and the cases are those of `ops.selfcheck`.
"""

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

import torch

from ..ops import Side, backends, requested_backend
from ..ops.dispatch import Kind, choose_kind
from ..ops.selfcheck import METHODS, ODD, PIPELINED, Case, Launch, judge
from ..text import table
from .text import user_errors

SUMMARY = (
    "take steps with every available backend, moments in every format, and compare them with"
    " float64; bases and weights in fewer or more bits are not tried"
)

DTYPES = (torch.float32, torch.bfloat16)
MOMENTS = (torch.float32, torch.bfloat16, torch.int8)
# How a case is launched is left to the backend.
FIELDS = [field for field in Case._fields if field != "launch"]


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """Whether all cases passed, the cases, and the backends that could not be tried.

    Raises:
        UserError, BackendUnavailable: `LOWRANK_BACKEND` names none that can run, so that every step
            outside of here would fail.
    """
    with user_errors():
        requested_backend("auto")
    results = [_result(case) for case in _cases()]
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
        *case, error, bound, worst, repeats, passed = result.values()
        verdict = "ok" if passed else "WRONG" if repeats else "WRONG: two runs differ"
        rows.append((*case, f"{error:.1e}", f"{bound:.1e}", worst, verdict))
    parts = [table((*FIELDS, "moments", "error", "bound", "of", ""), rows), ""]
    parts += [f"{name}: not tried, {reason}" for name, reason in facts["unavailable"].items()]
    wrong = sum(not result["passed"] for result in facts["cases"])
    return "\n".join([*parts, f"{len(rows)} cases, {wrong} wrong"])


def _cases() -> Iterator[Case]:
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    names = [name for name, (available, _) in backends().items() if available]
    for name, device, *dtypes in itertools.product(names, devices, DTYPES, MOMENTS):
        dtype, moments = dtypes
        try:
            choose_kind(name, Kind(torch.device(device).type, dtype, dtype, moments=moments))
        except ValueError:
            continue  # not served
        sizes = ODD if device == "cpu" else ODD + PIPELINED
        for method, (shape, rank), side in itertools.product(METHODS, sizes, Side):
            yield Case(name, device, dtype, method, shape, rank, side, Launch(moments=moments))


def _result(case: Case) -> dict[str, Any]:
    outcome = judge(case)
    return {
        **{field: getattr(case, field) for field in FIELDS},
        "dtype": str(case.dtype).removeprefix("torch."),
        "side": case.side.name.lower(),
        "moments": str(case.launch.moments).removeprefix("torch."),
        **outcome._asdict(),
        "passed": outcome.passed,
    }
