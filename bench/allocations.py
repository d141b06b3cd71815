"""Bytes of the tensors that a piece of code allocates, exact on every device that torch knows.

The resident set of a process is too coarse for this, and a CPU's allocator counts nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Counts the storages that are born while it is on: those still alive, and the most there were.

    What a kernel of torch's allocates inside and frees again is not seen.

    Attributes:
        peak_bytes: the most bytes that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def live_bytes(self) -> int:
        self._alive = {
            k: (ref, size) for k, (ref, size) in self._alive.items() if not ref.expired()
        }
        return sum(size for _, size in self._alive.values())

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        outputs = function(*args, **kwargs)
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(outputs):
            # Where it was given, it is a view or an output that was there before.
            if storage._cdata not in given and storage._cdata not in self._alive:
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return outputs


def _storages(values: Any) -> list[torch.UntypedStorage]:
    leaves = (
        leaf for leaf in tree_leaves(values) if type(leaf) in (torch.Tensor, torch.nn.Parameter)
    )
    return [leaf.untyped_storage() for leaf in leaves]
