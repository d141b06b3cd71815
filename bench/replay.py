"""The calls of a step that compute, to be made again without the step around them.

    calls = recorded_passes(optimizer.step)          # native: products, and compiled passes
    calls = recorded_operations(optimizer.step)      # everything of torch that computes
    calls.run()                                      # the same calls, alone
    len(calls)

A step less its calls is what it costs to decide which calls to make, with views and with memory
that is asked for.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lowrank_kernels.ops import native

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "matmul", "__matmul__")


class Calls:
    """Functions with their arguments, in the order of the step."""

    def __init__(self) -> None:
        self._calls: list[functools.partial] = []
        self._kept: list[object] = []

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, function: Callable, args: tuple, kwargs: dict) -> None:
        self._calls.append(functools.partial(function, *args, **kwargs))

    def keep(self, result: object) -> None:
        """What a later call may know by its address only."""
        self._kept.append(result)

    @torch.no_grad()
    def run(self) -> None:
        for call in self._calls:
            call()


def recorded_passes(run: Callable[[], object]) -> Calls:
    """Matrix products, and all passes of the compiled module, each on the memory that it had."""
    calls = Calls()
    with _Products(calls), _passes(calls):
        run()
    return calls


def recorded_operations(run: Callable[[], object]) -> Calls:
    """Operations of torch but for views and empty memory; temporaries are few and stay in a cache,
    as where a step frees them at once.
    """
    calls = Calls()
    with _Operations(calls):
        run()
    return calls


class _Products(TorchFunctionMode):
    """Records at the level of Python, so that a call costs alone what it costs in the step."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function.__name__ in PRODUCTS:
            self._calls.add(function, args, kwargs)
        result = function(*args, **kwargs)
        self._calls.keep(result)
        return result


class _Operations(TorchFunctionMode):
    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._made: set[int] = set()
        self._stand_ins: dict[tuple, Tensor] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function.__name__ == "__get__":  # an attribute, as `grad`: nothing is made
            return function(*args, **kwargs)
        arguments = self._standing_in((args, kwargs))
        known = {_memory_of(tensor) for tensor in _tensors((args, kwargs))}
        result = function(*args, **kwargs)
        made = {_memory_of(tensor) for tensor in _tensors(result)} - known
        in_place = function.__name__.endswith("_") and not function.__name__.startswith("__")
        if "empty" not in function.__name__ and (made or in_place or "out" in kwargs):
            self._calls.add(function, *arguments)
        self._made |= made
        return result

    def _standing_in(self, arguments: tuple) -> tuple:
        """The arguments of a call, with others like them in the place of temporaries."""
        place = itertools.count()

        def replaced(value: object) -> object:
            if not isinstance(value, Tensor) or _memory_of(value) not in self._made:
                return value
            key = (next(place), value.shape, value.stride(), value.dtype)
            if key not in self._stand_ins:
                self._stand_ins[key] = torch.empty_strided(*key[1:3], dtype=key[3]).fill_(1)
            return self._stand_ins[key]

        return tree_map(replaced, arguments)


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def _passes(calls: Calls) -> Iterator[None]:
    """Functions of the compiled module, made to record their calls."""
    with ExitStack() as stack:
        for name, function in list(vars(native._native).items()):
            if not name.startswith("_") and not isinstance(function, type):
                wrapped = _recording(function, calls)
                stack.enter_context(mock.patch.object(native._native, name, wrapped))
        yield


def _recording(function: Callable, calls: Calls) -> Callable:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.add(function, args, kwargs)
        result = function(*args, **kwargs)
        calls.keep(result)
        return result

    return wrapper
