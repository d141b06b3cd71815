"""Triton's kernels compiled, looked up and called as on a GPU, up to the launch, without a GPU.

    with no_launch() as launches:
        optimizer.step()         # of backend="triton", on tensors of the CPU: computes nothing
    print(launches.count)

Kernels are compiled for sm_90 by Triton's own JIT at their first call. The C function that puts a
launch into a stream returns at once, and so do the few functions of the driver that a launch asks;
all that Triton does in Python before it is done. What the package does on a GPU only is left out:
the device that it makes current, the stream that it asks for, and tables of addresses that go to
the device, which are made anew here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

from lowrank_kernels.ops import dispatch

CAPABILITY, SHARED_BYTES, THREADS = 90, 227 * 1024, 1024


class Launches:
    """In the place of the C function; counts what would have been launched."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *_: object) -> None:
        self.count += 1


def obstacle() -> str | None:
    """Why it cannot be done here, or None."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 replaces what is measured"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    return None


@contextmanager
def no_launch() -> Iterator[Launches]:
    """Within it the triton backend takes matrices of the CPU and leaves them as they are."""
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    launches = Launches()
    with ExitStack() as stack:
        for name in ("PyKernelArg", "ARG_CONSTEXPR", "ARG_KERNEL", "ARG_TUPLE"):
            if hasattr(nvidia, name):
                stack.enter_context(mock.patch.object(nvidia, name, SimpleNamespace))
        stack.enter_context(mock.patch.object(driver, "_active", _driver(nvidia, launches)))
        for table, answer in ((dispatch._STATUS, _available), (dispatch._OBSTACLES, _none)):
            stack.enter_context(mock.patch.dict(table, triton=answer))
        yield launches


def _driver(nvidia: object, launches: Launches) -> SimpleNamespace:
    from triton.backends.compiler import GPUTarget

    # Until 3.6 Triton compiled a launcher a kernel, against the driver's library.
    launcher = nvidia.CudaLauncher if hasattr(nvidia, "PyKernelArg") else lambda *_: launches
    return SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", CAPABILITY, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        launcher_cls=launcher,
        utils=SimpleNamespace(
            launch=launches,
            build_signature_metadata=lambda _: b"",
            get_device_properties=lambda _: {"max_shared_mem": SHARED_BYTES},
            # module, function, registers, spills, threads of a block
            load_binary=lambda *_: (1, 1, 64, 0, THREADS),
        ),
    )


def _available() -> tuple[bool, str]:
    return True, "compiled, never launched"


def _none(_: object) -> None:
    return None
