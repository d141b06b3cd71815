"""What autograd saves, on a disk between a forward and its backward (SSDTrain)."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

from .engine import Counts, Engine, Waiting
from .slots import Slots

__all__ = ["Counts", "OffloadActivations", "offload_activations"]

# Of a storage, which part a saved tensor has to be, that the whole is taken.
LEAST_SHARE = 8


class _View(NamedTuple):
    """What autograd holds in the place of a tensor."""

    waiting: Waiting
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]


class OffloadActivations:
    """A context in which what is saved for backward goes to a disk; it may be entered again.

    Attributes:
        counts: bytes and seconds since the start, see `Counts`.
    """

    def __init__(self, engine: Engine, least: int) -> None:
        self._engine, self._least = engine, least
        self._others: set[int] = set()
        self._stack = ExitStack()

    @property
    def counts(self) -> Counts:
        return self._engine.counts

    @property
    def slots_in_use(self) -> int:
        """Storages that are on the disk now."""
        self._engine.finish()
        return self._engine.slots.in_use

    def __enter__(self) -> OffloadActivations:
        self._stack.enter_context(saved_tensors_hooks(self._pack, self._unpack))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def install(self, model: nn.Module) -> RemovableHandle:
        """Enters the context in each forward of a model in training.

        Parameters and buffers of the model stay in memory.

        Returns:
            Its `remove()` takes the hooks away again.
        """

        def enter(module: nn.Module, args: Any) -> None:
            self._others = {
                tensor.untyped_storage()._cdata
                for tensor in (*module.parameters(), *module.buffers())
            }
            if module.training and torch.is_grad_enabled():
                self.__enter__()

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._stack.close()

        before = model.register_forward_pre_hook(enter)
        after = model.register_forward_hook(leave, always_call=True)
        return _Both(before, after)

    def _pack(self, tensor: Tensor) -> Tensor | _View:
        if not self._takes(tensor):
            return tensor
        waiting = self._engine.pack(tensor)
        offset = int(tensor.storage_offset())
        return _View(waiting, tensor.dtype, offset, tensor.shape, tensor.stride())

    def _unpack(self, found: Tensor | _View) -> Tensor:
        if isinstance(found, Tensor):
            return found
        memory = self._engine.unpack(found.waiting)
        tensor = torch.empty(0, dtype=found.dtype, device="cpu")
        return tensor.set_(memory, found.offset, found.shape, found.stride)

    def _takes(self, tensor: Tensor) -> bool:
        """Not small ones, nor what is held anyway, nor what is no plain memory."""
        size = tensor.numel() * tensor.element_size()
        if size < self._least or type(tensor) not in (Tensor, nn.Parameter):
            return False
        if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            return False
        if tensor.is_neg() or tensor.is_conj() or tensor.is_quantized:
            return False
        base = tensor._base if tensor._is_view() else tensor
        assert base is not None
        if isinstance(base, nn.Parameter) or (base.is_leaf and base.requires_grad):
            return False
        storage = tensor.untyped_storage()
        return storage._cdata not in self._others and LEAST_SHARE * size >= storage.nbytes()


class _Both(RemovableHandle):
    """Two hooks as one."""

    def __init__(self, *handles: RemovableHandle) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def offload_activations(
    path: str | os.PathLike[str],
    *,
    keep: float | None = 0.0,
    least: int = 1 << 20,
    in_flight: int = 1 << 28,
    ahead: int = 1 << 28,
) -> OffloadActivations:
    """Moves what autograd saves of CPU tensors to a disk, and back before backward needs it.

        offload = offload_activations("/nvme/scratch")
        with offload:
            loss = model(**batch).loss
        loss.backward()

    Gradients are the same in every bit, also through retain_graph, double backward, exceptions and
    checkpointing of both kinds, of which only the blocks' inputs are saved. Whole storages are
    written, once, whatever views of them are saved; parameters are left out. The file has no name,
    nobody else can read it, and nothing of it is left, whatever ends the process. Of a full disk
    the rest stays in memory, with one warning. What is changed in place after it was saved is an
    error in backward, as without.

    Only one context of saved tensors' hooks counts, the innermost: leave out `save_on_cpu` and
    other packages' offloading.

    Args:
        path: a folder on a disk.
        keep: share of what a step saves that stays in memory, the last part of it, which backward
            needs first; from the second step on. None measures in each step how much the disk can
            write while the forward runs, and keeps the rest: then nothing waits for it.
        least: bytes of a tensor below which it stays in memory.
        in_flight: bytes that may wait to be written; the forward waits beyond that.
        ahead: bytes that may be read before backward asks for them.

    Raises:
        ValueError: the folder is none, or lies in memory, a number of bytes is below 1, or `keep`
            is not between 0 and 1.
        OSError: no file can be made there.

    Source: SSDTrain (arXiv 2408.10013).
    """
    for name, value in (("least", least), ("in_flight", in_flight), ("ahead", ahead)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1 byte, got {value!r}")
    if keep is not None and not 0 <= keep <= 1:
        raise ValueError(f"keep must be between 0 and 1, or None, got {keep!r}")
    return OffloadActivations(Engine(Slots(path), in_flight, ahead, keep), least)
