"""Launches of a batch: by Triton's JIT the first time of their kind, then by the compiled kernel.

At every launch the JIT finds out what it has compiled for arguments like these: their dtypes,
whether an address or an integer is a multiple of 16, whether an integer is 1. That takes it 20 to
30 microseconds. Most arguments of a batch never change; a launch is bound to what it found for the
rest, and bound again where one of them is of another kind.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from .addresses import Addresses

Grid = tuple[int, int, int]


def by_jit(kernel: Any, grid: Grid, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Launches on the current stream; returns the compiled kernel, None where there is none."""
    if arguments[0].device.type == "meta":
        return None
    return kernel[grid](*arguments, **options)


def bound(compiled: Any, grid: Grid) -> Callable[..., object] | None:
    """What launches a compiled kernel on `stream=`, given its arguments, addresses as numbers."""
    return compiled[grid] if isinstance(compiled, CompiledKernel) else None


class Rest(NamedTuple):
    """What is equal in all launches of a kind."""

    grid: Grid
    arguments: tuple[Any, ...]  # those behind the ones that vary
    options: dict[str, Any]  # constants, and how Triton compiles


class _Bound(NamedTuple):
    run: Callable[..., object]
    rest: tuple[Any, ...]
    kept: list[Tensor]  # tables and counters that `rest` points to


class Launcher:
    """Launches a kernel for one batch, of which it keeps no tensor.

    A launch is of the kind of another if Triton would take the same binary: tensors begin at the
    same distance from a multiple of 16 bytes, scalars have the same types (for their values the
    kernels must not be specialized), and all else is equal.
    """

    def __init__(self, kernel: Any, device: torch.device) -> None:
        self._kernel = kernel
        self._index = device.index if device.type == "cuda" else None
        self._bound: dict[Hashable, _Bound] = {}

    def __call__(
        self,
        kind: Hashable,
        stream: int | None,
        tensors: tuple[Tensor, ...],
        scalars: tuple[Any, ...],
        rest: Callable[[], Rest],
    ) -> None:
        """Launches on the current stream; the kernel takes its arguments in this order.

        Args:
            kind: what `rest` depends on, besides alignment and the types of the scalars.
            stream: see `current_stream`.
            tensors: of the same dtypes at every launch.
            scalars: numbers or tensors.
            rest: asked for where the launch is not bound yet.
        """
        if self._index is not None and self._index != torch.cuda.current_device():
            # Launches go to the current device, which need not be the batch's.
            with torch.cuda.device(self._index):
                return self(kind, stream, tensors, scalars, rest)
        pointers = [tensor.data_ptr() for tensor in tensors]
        types = tuple(map(type, scalars))
        key = (kind, stream, types, *[pointer % 16 for pointer in pointers])
        ready = self._bound.get(key)
        if ready is not None:
            if Tensor in types:
                scalars = _numbers(scalars)
            ready.run(*pointers, *scalars, *ready.rest, stream=stream)
            return None
        grid, arguments, options = rest()
        compiled = by_jit(self._kernel, grid, (*tensors, *scalars, *arguments), options)
        run = None if stream is None else bound(compiled, grid)
        if run is not None:
            constants = (options[name] for name in self._kernel.arg_names if name in options)
            kept = [x.offsets if isinstance(x, Addresses) else x for x in arguments]
            kept = [x for x in kept if isinstance(x, Tensor)]
            self._bound[key] = _Bound(run, (*_numbers(arguments), *constants), kept)
        return None


def _numbers(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, with addresses in the place of tensors."""
    return tuple(
        x.data_ptr() if isinstance(x, Tensor) else _numbers(x) if isinstance(x, tuple) else x
        for x in arguments
    )
