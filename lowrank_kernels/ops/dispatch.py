"""Which backend runs the operations, and why: the one place where that is decided."""

import functools
import importlib
import importlib.util
import itertools
import logging
import os
import threading
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import native
from .notices import notice_once
from .times import Size, fastest_first

logger = logging.getLogger("lowrank_kernels")

BACKENDS = ("reference", "foreach", "native", "triton")
REQUESTS = ("auto", *BACKENDS)
ENVIRONMENT_VARIABLE = "LOWRANK_BACKEND"

# Kernels take named tuples, which older versions cannot pass.
OLDEST_TRITON = (3, 3)

# Two threads that ask at once wait for one check.
_choosing = threading.RLock()

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    return {name: status() for name, status in _STATUS.items()}


class CapturedStream(RuntimeError):
    """Kernels cannot be checked while a stream is captured: nothing could be read."""


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
        available, reason = _STATUS[name]()
        if not available:
            raise BackendUnavailable(
                f"{source}={name!r} cannot run here: {reason}; backend='auto' picks one that can"
            )
    return name


class Kind(NamedTuple):
    """What the choice of a backend depends on; hashable, so that each is chosen and logged once.

    Attributes:
        device: "cpu", "cuda:1" and so on; without an index the current one is meant.
        param: the dtype of the weight.
        grad: the dtype of its gradient.
        capturable: step-dependent scalars are tensors on the device.
        strides: why the kernels cannot address the weight or its gradient, None if they can.
        size: of the weight and its basis; None where it does not matter.
        moments: the dtype that holds M: wide, bfloat16, or int8 for codes.
        projected: operation 1 is given R, of which `grad` is the dtype.
    """

    device: str
    param: torch.dtype
    grad: torch.dtype
    capturable: bool = False
    strides: str | None = None
    size: Size | None = None
    moments: torch.dtype = torch.float32
    projected: bool = False

    @property
    def device_type(self) -> str:
        """The device without its index."""
        return self.device.partition(":")[0]


def choose(
    request: str,
    param: Tensor,
    grad: Tensor | None = None,
    *,
    capturable: bool = False,
    size: Size | None = None,
    moments: torch.dtype = torch.float32,
    projected: bool = False,
) -> Choice:
    """The backend for a matrix; the answer for each kind of matrix is logged once.

    Before "auto" takes kernels on a GPU for a kind for the first time in a process, they are tried.

    Args:
        request: a name out of `requested_backend`.
        param: the weight.
        grad: its gradient; without one, a gradient like the weight is meant.
        capturable: step-dependent scalars are tensors on the device.
        size: of the weight and its basis; None leaves the choice to the dtypes.
        moments: the dtype that holds M.
        projected: the gradient is R.

    Raises:
        ValueError: a backend was asked for by name and does not serve these tensors.
    """
    grad = param if grad is None else grad
    ask_triton = request == "triton" or (request == "auto" and param.is_cuda)
    strides = None
    if ask_triton and _triton_status()[0]:
        strides = load("triton").obstacle(param, grad)
    dtypes = param.dtype, grad.dtype
    kind = Kind(str(param.device), *dtypes, capturable, strides, size, moments, projected)
    return choose_kind(request, kind)


def choose_kind(request: str, kind: Kind) -> Choice:
    """As `choose`, for a kind of matrix."""
    if request != "auto" or kind.device_type != "cuda":
        kind = kind._replace(size=None)
    try:
        with _choosing:
            return _chosen(request, kind)
    except CapturedStream:
        choice = Choice("foreach", "kernels cannot be checked while a stream is captured")
        # The graph keeps it, whatever is chosen later.
        notice_once(logging.WARNING, _in_words(kind, choice))
        return choice


def is_stepped_by_triton(kind: Kind) -> bool:
    """Whether parameters without a rank are: on a GPU where "auto" takes Triton's kernels."""
    if kind.device_type != "cuda" or requested_backend("auto") not in ("auto", "triton"):
        return False
    kind = Kind(kind.device, kind.param, kind.grad)
    return choose_kind("auto", kind).backend == "triton"


@functools.cache
def _chosen(request: str, kind: Kind) -> Choice:
    """Remembered, and logged the first time; what raises is not."""
    if request == "auto":
        choice = _choose_automatically(kind)
    elif obstacle := _OBSTACLES[request](kind):
        raise ValueError(f"backend={request!r}: {obstacle}; backend='auto' picks one that can")
    else:
        choice = Choice(request, "asked for by name")
    # On a CPU the others are slower than the compiled passes, and nobody asked for them.
    slow = choice.backend == "reference" or (choice.backend, kind.device_type) == ("foreach", "cpu")
    level = logging.WARNING if slow and request == "auto" else logging.INFO
    logger.log(level, _in_words(kind, choice))
    return choice


def _in_words(kind: Kind, choice: Choice) -> str:
    grads = "projected gradients" if kind.projected else "gradients"
    name = f"{kind.device} {_short(kind.param)} weights, {_short(kind.grad)} {grads}"
    if kind.size is not None:
        name += f", {kind.size.rows} x {kind.size.cols}, rank {kind.size.rank}"
    return f"{name}: {choice.backend} backend ({choice.reason})"


def triton_is_ready() -> bool:
    """Whether it serves what is computed on a GPU beside steps."""
    return requested_backend("auto") in ("auto", "triton") and _triton_status()[0]


@functools.cache
def load(backend: str) -> ModuleType:
    """The module of a backend, or one in it; triton is imported here."""
    return importlib.import_module(f".{backend}", __package__)


def _choose_automatically(kind: Kind) -> Choice:
    if torch.float64 in (kind.param, kind.grad):
        return Choice("reference", "float64 is left to the specification")
    if kind.device_type == "cuda":
        return _choose_on_cuda(kind)
    if obstacle := _native_obstacle(kind):
        return Choice("foreach", obstacle)
    return Choice("native", "compiled CPU passes")


def _choose_on_cuda(kind: Kind) -> Choice:
    """The fastest backend that serves the matrices and computes what it should."""
    gpu = _gpu_of(kind.device)
    if gpu is None:
        return _predict_on_cuda(kind)
    device, gpu_name = gpu
    order, reason = fastest_first(kind.size, kind.param, gpu_name)
    reasons = [reason]
    for name in itertools.takewhile(lambda name: name != "foreach", order):
        obstacle = _OBSTACLES[name](kind) or _fault(name, device, kind)
        if obstacle is None:
            return Choice(name, "; ".join(reasons))
        reasons.append(obstacle)
    return Choice("foreach", "; ".join(reasons[1:] or reasons))


def _predict_on_cuda(kind: Kind) -> Choice:
    """For a plan on a machine without a GPU: the first that could serve there, if it is right."""
    order, reason = fastest_first(kind.size, kind.param, None)
    obstacles = {
        "triton": _triton_fault() or kind.strides or _dtype_obstacle("triton", kind),
        "native": native.import_error or _scalars_obstacle(kind) or _dtype_obstacle("native", kind),
    }
    name = next(name for name in order if not obstacles.get(name))
    return Choice(name, f"there is no CUDA device here to check kernels on; {reason}")


def _fault(backend: str, device: torch.device, kind: Kind) -> str | None:
    """Why kernels are not to be trusted, None if they are; they are tried here."""
    selfcheck = importlib.import_module(".selfcheck", __package__)
    fault: str | None = selfcheck.fault_of(backend, device, kind)
    return fault


def _gpu_of(device: str) -> tuple[torch.device, str] | None:
    """The device with its index, and its name; None if there is no GPU."""
    if not torch.cuda.is_available():
        return None
    index = torch.device(device).index
    index = torch.cuda.current_device() if index is None else index
    return torch.device("cuda", index), torch.cuda.get_device_name(index)


def _native_status() -> tuple[bool, str]:
    if native.import_error is not None:
        return False, f"the compiled module does not load: {native.import_error}"
    facts = native.build_info()
    cuda = f"CUDA {facts['cuda']}" if facts["cuda"] else "no CUDA half: built without nvcc"
    return True, f"{facts['compiler']}, {facts['cpu_capability']}, {cuda}"


def _triton_fault() -> str | None:
    """Why the installed triton does not serve."""
    if not _triton_is_installed():
        return "triton is not installed: pip install triton"
    version = _triton_version()
    if version < OLDEST_TRITON:
        found, needed = (".".join(map(str, v)) for v in (version, OLDEST_TRITON))
        return f"triton {found} is too old: {needed} is needed, which comes with torch 2.7"
    return None


def _triton_status() -> tuple[bool, str]:
    if fault := _triton_fault():
        return False, fault
    if _interpreted():
        return True, "Triton's interpreter (TRITON_INTERPRET=1), for tests"
    if not torch.cuda.is_available():
        return False, "there is no CUDA device, and TRITON_INTERPRET=1 is not set"
    return True, "fused kernels"


def _native_obstacle(kind: Kind) -> str | None:
    available, reason = _native_status()
    if not available:
        return reason
    if kind.device_type not in ("cpu", "cuda"):
        return f"the native backend runs on cpu and cuda, not on {kind.device_type}"
    if kind.device_type == "cuda" and not native.build_info()["cuda"]:
        return "the native backend was built without its CUDA half"
    return _scalars_obstacle(kind) or _dtype_obstacle("native", kind)


def _scalars_obstacle(kind: Kind) -> str | None:
    if kind.capturable:
        return "the native backend takes its scalars from the host, so it is not capturable"
    return None


def _triton_obstacle(kind: Kind) -> str | None:
    available, reason = _triton_status()
    if not available:
        return reason
    if kind.device_type != ("cpu" if _interpreted() else "cuda"):
        return f"the triton backend runs on cuda, or interpreted on cpu, not on {kind.device_type}"
    # The interpreter multiplies the bit patterns of bf16 and truncates where a GPU rounds.
    dtypes = (torch.float32,) if _interpreted() else _KERNEL_DTYPES
    return kind.strides or _dtype_obstacle("triton", kind, dtypes)


def _dtype_obstacle(
    backend: str, kind: Kind, dtypes: tuple[torch.dtype, ...] = _KERNEL_DTYPES
) -> str | None:
    for dtype in (kind.param, kind.grad, kind.moments):
        # Codes are integers, and every backend decodes them.
        if dtype.is_floating_point and dtype not in dtypes:
            return f"the {backend} backend has no {_short(dtype)} here"
    return None


# Whether a backend can run in this installation, and the reason.
_STATUS: dict[str, Callable[[], tuple[bool, str]]] = {
    "reference": lambda: (True, "plain torch, any device and dtype"),
    "foreach": lambda: (True, "torch's batched operations, any device"),
    "native": _native_status,
    "triton": _triton_status,
}

# Why a backend does not serve a kind of matrices, or None.
_OBSTACLES: dict[str, Callable[[Kind], str | None]] = {
    "reference": lambda _: None,
    "foreach": lambda _: None,
    "native": _native_obstacle,
    "triton": _triton_obstacle,
}


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _triton_version() -> tuple[int, ...]:
    version: str = importlib.import_module("triton").__version__
    return tuple(int(part) for part in version.split(".")[:2])


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
