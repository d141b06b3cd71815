"""`offload_activations` in a rehearsal: what would go out and come back, without a disk."""

from __future__ import annotations

import math
import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from .offload import LEAST_SHARE

# What waits to be written, and what is read ahead, at most: the defaults of `offload_activations`.
IN_FLIGHT, AHEAD = 1 << 28, 1 << 28


class DryOffload(saved_tensors_hooks):
    """Holds what is saved of a model on the meta device as if the first part of it were elsewhere.

    By the rules of `offload_activations`: whole storages, once, whatever views of them are saved,
    and no parameters. One that is out holds no memory; backward makes it anew where it is needed,
    until the last that saved it has had it. Tensors go out at once, and come when they are asked
    for: what waits to be written and what is read ahead is not in it, nor that small ones stay.

    Args:
        model: whose parameters and buffers stay.
        budget: bytes of what is saved that go out, the first ones.

    Attributes:
        packed: bytes that were saved.
        out: bytes of them that went out.
    """

    def __init__(self, model: nn.Module, budget: float = math.inf) -> None:
        super().__init__(self._pack, _unpack)
        self._budget = budget
        self.packed = self.out = 0
        self._others = {_address(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._known: dict[tuple[int, int], weakref.ref[_Elsewhere]] = {}

    def _pack(self, tensor: Tensor) -> Tensor | _View:
        if not self._takes(tensor):
            return tensor.detach()
        key = _address(tensor), tensor._version
        elsewhere = self._known.get(key, lambda: None)()
        if elsewhere is None or elsewhere.is_gone():
            elsewhere = _Elsewhere(tensor.untyped_storage())
            self._known[key] = weakref.ref(elsewhere)
            self.packed += elsewhere.size
            if self.packed > self._budget:
                elsewhere.memory = tensor.untyped_storage()
            else:
                self.out += elsewhere.size
        elsewhere.uses += 1
        layout = tensor.dtype, int(tensor.storage_offset()), tensor.shape, tensor.stride()
        return _View(elsewhere, *layout)

    def _takes(self, tensor: Tensor) -> bool:
        if type(tensor) is not Tensor or tensor.layout is not torch.strided:
            return False
        base = tensor._base if tensor._is_view() else tensor
        assert base is not None
        if isinstance(base, nn.Parameter) or (base.is_leaf and base.requires_grad):
            return False
        size, storage = tensor.numel() * tensor.element_size(), tensor.untyped_storage()
        return _address(tensor) not in self._others and LEAST_SHARE * size >= storage.nbytes() > 0


class _Elsewhere:
    """A storage that is out.

    Attributes:
        size: bytes.
        uses: who saved it and has not asked for it yet.
        memory: it, or what backward has in its place.
    """

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._source = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self.size, self.uses = storage.nbytes(), 0
        self.memory: torch.UntypedStorage | None = None

    def is_gone(self) -> bool:
        """Whether another storage may have its address."""
        return bool(self._source.expired())  # type: ignore[no-untyped-call]


class _View(NamedTuple):
    """What autograd holds in the place of a tensor."""

    elsewhere: _Elsewhere
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]


def _unpack(found: Tensor | _View) -> Tensor:
    if isinstance(found, Tensor):
        return found
    elsewhere, dtype, *layout = found
    memory = elsewhere.memory
    if memory is None:
        memory = torch.empty(elsewhere.size, dtype=torch.uint8, device="meta").untyped_storage()
    elsewhere.uses -= 1
    elsewhere.memory = memory if elsewhere.uses > 0 else None
    tensor = torch.empty(0, dtype=dtype, device="meta")
    return tensor.set_(memory, *layout)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
