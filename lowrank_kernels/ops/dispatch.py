"""Which backend runs the operations, and why: the one place where that is decided."""

import functools
import logging
import os
from types import ModuleType
from typing import NamedTuple

import torch

from . import native, reference

logger = logging.getLogger("lowrank_kernels")

BACKENDS = ("reference", "native", "triton")
REQUESTS = ("auto", *BACKENDS)
ENVIRONMENT_VARIABLE = "LOWRANK_BACKEND"

_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MODULES: dict[str, ModuleType] = {"reference": reference, "native": native}


class Choice(NamedTuple):
    """A backend by name and the reason for it."""

    backend: str
    reason: str


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run here; the text says why and the way out."""


def backends() -> dict[str, tuple[bool, str]]:
    """What this installation can run.

    Returns:
        For every backend name, whether it is available and the reason, for people to read.
    """
    return {
        "reference": (True, "plain torch, any device and dtype"),
        "native": _native_status(),
        "triton": (False, "this version has no Triton kernels yet"),
    }


def requested_backend(backend: str) -> str:
    """The backend asked for: `LOWRANK_BACKEND` if it is set, else the argument.

    Raises:
        ValueError: the name is unknown.
        BackendUnavailable: the backend is named and cannot run in this installation.
    """
    override = os.environ.get(ENVIRONMENT_VARIABLE)
    name, source = (override, ENVIRONMENT_VARIABLE) if override else (backend, "backend")
    if name not in REQUESTS:
        raise ValueError(f"{source}={name!r} is not one of {', '.join(REQUESTS)}")
    if name != "auto":
        available, reason = backends()[name]
        if not available:
            raise BackendUnavailable(
                f"{source}={name!r} cannot run here: {reason}; backend='auto' picks one that can"
            )
    return name


@functools.cache
def choose(request: str, device_type: str, param: torch.dtype, grad: torch.dtype) -> Choice:
    """The backend for one kind of matrix; each answer is logged once.

    Args:
        request: a name out of `requested_backend`.
        device_type: "cpu", "cuda", ...
        param: dtype of the weight.
        grad: dtype of its gradient.

    Raises:
        ValueError: a backend was asked for by name and does not serve these tensors.
    """
    if request == "auto":
        choice = _choose_automatically(device_type, param, grad)
    else:
        obstacle = _native_obstacle(device_type, param, grad) if request == "native" else None
        if obstacle:
            raise ValueError(f"backend={request!r}: {obstacle}; backend='auto' picks one that can")
        choice = Choice(request, "asked for by name")
    level = logging.WARNING if choice.backend == "reference" != request else logging.INFO
    kind = f"{device_type} {_short(param)} weights, {_short(grad)} gradients"
    logger.log(level, "%s: %s backend (%s)", kind, *choice)
    return choice


def load(backend: str) -> ModuleType:
    """The module that holds the three operations of a backend."""
    return _MODULES[backend]


def _choose_automatically(device_type: str, param: torch.dtype, grad: torch.dtype) -> Choice:
    obstacle = _native_obstacle(device_type, param, grad)
    if obstacle:
        return Choice("reference", obstacle)
    if device_type == "cuda":
        return Choice("reference", "the native CUDA half has not been measured on a GPU yet")
    return Choice("native", "compiled CPU passes")


def _native_status() -> tuple[bool, str]:
    if native.import_error is not None:
        return False, f"the compiled module does not load: {native.import_error}"
    facts = native.build_info()
    cuda = f"CUDA {facts['cuda']}" if facts["cuda"] else "no CUDA half: built without nvcc"
    return True, f"{facts['compiler']}, {facts['cpu_capability']}, {cuda}"


def _native_obstacle(device_type: str, param: torch.dtype, grad: torch.dtype) -> str | None:
    """Why the native backend does not serve these tensors, or None."""
    available, reason = _native_status()
    if not available:
        return reason
    if device_type not in ("cpu", "cuda"):
        return f"the native backend runs on cpu and cuda, not on {device_type}"
    if device_type == "cuda" and not native.build_info()["cuda"]:
        return "the native backend was built without its CUDA half"
    for dtype in (param, grad):
        if dtype not in _NATIVE_DTYPES:
            return f"the native backend has no {_short(dtype)}"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
