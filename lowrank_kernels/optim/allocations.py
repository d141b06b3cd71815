"""What a piece of code allocates through torch: bytes alive and at the peak.

    with Allocations() as allocations:
        optimizer.step()
    print(allocations.peak_bytes, allocations.live_bytes)

A storage counts from the operation that makes it until it is freed, on any device. What an
operation keeps for itself while it runs (workspaces of products, say) is not seen.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracks the storages that are born inside it, on a kind of device or on all."""

    def __init__(self, device: str | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        before = {_address(tensor) for tensor in _tensors((args, kwargs))}
        result = operation(*args, **kwargs)
        for tensor in _tensors(result):
            here = self.device in (None, tensor.device.type)
            if here and _address(tensor) not in before:
                self._count(tensor.untyped_storage())
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def freed(_: object) -> None:
            del self._known[key]
            self.live_bytes -= size

        self._known[key] = weakref.ref(storage, freed)
        self.live_bytes += size


def _tensors(tree: Any) -> list[Tensor]:
    """Those with memory of their own: a wrapper's is that of what it wraps."""
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [x for x in leaves if type(x).__torch_dispatch__ is Tensor.__torch_dispatch__]


def _address(tensor: Tensor) -> int:
    """Of the storage object, which outlives views of it."""
    return tensor.untyped_storage()._cdata
