"""What autograd saves, elsewhere between a forward and its backward (SSDTrain)."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

from ...text import parse_bytes
from .device import CudaLane, Device, HostMemory
from .disk import Disk
from .engine import Counts, Engine, Waiting
from .install import Installed
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


class _Here(threading.local):
    """Of a thread: the storages of the installed models that it is in."""

    others: frozenset[int] = frozenset()


class Places:
    """The engine of each device.

    Args:
        slots: on a disk; None without one.
        ram: bytes of the host's memory for each GPU.
        in_flight, ahead, keep: see `offload_activations`.
    """

    def __init__(
        self, slots: Slots | None, ram: int, in_flight: int, ahead: int, keep: float | None
    ) -> None:
        self.slots, self._ram = slots, ram
        self._in_flight, self._ahead, self._keep = in_flight, ahead, keep
        self.engines: dict[torch.device, Engine | None] = {}

    def of(self, device: torch.device) -> Engine | None:
        """None where tensors stay."""
        if device not in self.engines:
            # Of two threads that come at once, one counts.
            return self.engines.setdefault(device, self._made(device))
        return self.engines[device]

    def _made(self, device: torch.device) -> Engine | None:
        if device.type == "cpu":
            return self._disk(self._keep)
        if device.type != "cuda":
            return None
        limits = self._in_flight, self._ahead
        host, overflow = HostMemory(self._ram), self._disk(keep=0.0)
        return Device(CudaLane(device), host, overflow, *limits, self._keep)

    def _disk(self, keep: float | None) -> Disk | None:
        if self.slots is None:
            return None
        if self.slots.process != os.getpid():
            self.slots = Slots(self.slots.folder)
        return Disk(self.slots, self._in_flight, self._ahead, keep)


class OffloadActivations:
    """A context in which what is saved for backward goes away; it may be entered again."""

    def __init__(self, places: Places, least: int) -> None:
        self._places, self._least = places, least
        self._here = _Here()

    @property
    def counts(self) -> Counts:
        """Bytes and seconds since the start."""
        return sum((engine.counts for engine in self._engines()), Counts())

    @property
    def places_in_use(self) -> int:
        """Storages that are elsewhere now."""
        for engine in self._engines():
            engine.finish()
        slots = self._places.slots
        blocks = (each.host.in_use for each in self._engines() if isinstance(each, Device))
        return sum(blocks) + (0 if slots is None else slots.in_use)

    def _engines(self) -> list[Engine]:
        """Those that drop what waits in others come first."""
        found = [engine for engine in list(self._places.engines.values()) if engine is not None]
        disks = (each.disk for each in found if isinstance(each, Device))
        return found + [disk for disk in disks if disk is not None]

    def __enter__(self) -> OffloadActivations:
        for engine in self._engines():
            engine.begin_forward()
        self._hooks().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks().__exit__(*error)

    def _hooks(self) -> saved_tensors_hooks:
        # They keep nothing themselves: torch has a stack of them for each thread.
        return saved_tensors_hooks(self._pack, self._unpack)

    def install(self, model: nn.Module) -> RemovableHandle:
        """Enters the context in each forward of a model in training.

        Parameters and buffers of the model stay in memory. Deep copies do the same; a pickled model
        comes back without.

        Returns:
            Its `remove()` ends that.
        """
        return Installed(model, self._around)

    @contextmanager
    def _around(self, module: nn.Module) -> Iterator[None]:
        before = self._here.others
        tensors = (*module.parameters(), *module.buffers())
        self._here.others = before | {each.untyped_storage()._cdata for each in tensors}
        try:
            with self:
                yield
        finally:
            self._here.others = before

    def _pack(self, tensor: Tensor) -> Tensor | _View:
        engine = self._places.of(tensor.device) if self._takes(tensor) else None
        if engine is None:
            return tensor
        waiting = engine.pack(tensor)
        offset = int(tensor.storage_offset())
        return _View(waiting, tensor.dtype, offset, tensor.shape, tensor.stride())

    def _unpack(self, found: Tensor | _View) -> Tensor:
        if isinstance(found, Tensor):
            return found
        memory = found.waiting.engine.unpack(found.waiting)
        tensor = torch.empty(0, dtype=found.dtype, device=memory.device)
        return tensor.set_(memory, found.offset, found.shape, found.stride)

    def _takes(self, tensor: Tensor) -> bool:
        """Not small ones, nor what is held anyway, nor what is no plain memory."""
        size = tensor.numel() * tensor.element_size()
        if size < self._least or type(tensor) not in (Tensor, nn.Parameter):
            return False
        if tensor.is_nested or tensor.layout is not torch.strided:
            return False
        if tensor.device.type not in ("cpu", "cuda"):
            return False
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        if tensor.is_neg() or tensor.is_conj() or tensor.is_quantized:
            return False
        base = tensor._base if tensor._is_view() else tensor
        assert base is not None
        if isinstance(base, nn.Parameter) or (base.is_leaf and base.requires_grad):
            return False
        storage = tensor.untyped_storage()
        return storage._cdata not in self._here.others and LEAST_SHARE * size >= storage.nbytes()


def offload_activations(
    path: str | os.PathLike[str] | None = None,
    *,
    ram: int | str = "8GiB",
    keep: float | None = 0.0,
    least: int = 1 << 20,
    in_flight: int = 1 << 28,
    ahead: int = 1 << 28,
) -> OffloadActivations:
    """Moves what autograd saves to the host's memory and a disk, and back before it is needed.

        offload = offload_activations("/nvme/scratch")
        with offload:
            loss = model(**batch).loss
        loss.backward()

    What a GPU saves goes to the host's memory, and to the disk when that is full; what the host
    saves, to the disk. Gradients are the same in every bit, also through retain_graph, double
    backward, exceptions and checkpointing of both kinds, of which only the blocks' inputs are
    saved. Whole storages go away, once a forward, whatever views of them are saved; parameters and
    nested tensors are left out.
    The file has no name, nobody else can read it, and nothing of it is left, whatever ends the
    process. Of a full disk the rest stays in memory, with one warning. What is changed in place
    after it was saved is an error in backward, as without; what autograd cannot see is none: of
    changes through `.data` or numpy within a forward either state may come back, and what a
    backward of your own does to its saved tensors may be lost.

    Only one context of saved tensors' hooks counts, the innermost: leave out `save_on_cpu` and
    other packages' offloading. On a GPU, forward and backward are to run on one stream; where a
    CUDA graph is captured, all stays.

    Args:
        path: a folder on a disk; None for the host's memory alone, then only a GPU's tensors go.
        ram: bytes of the host's pinned memory for each GPU, as a number or "8GiB".
        keep: share of what a step saves that stays, the last part of it, which backward needs
            first; from the second step on. None measures in each step how much can leave while the
            forward runs, and keeps the rest: then nothing waits for it.
        least: bytes of a tensor below which it stays, 1 MiB by default.
        in_flight: bytes that may be on their way; the forward waits beyond that, on a GPU its
            stream and not the host.
        ahead: bytes that may be brought before backward asks for them.

    Raises:
        ValueError: the folder is none, or lies in memory, or there is none and no GPU either; a
            number of bytes is below 1, or `keep` is not between 0 and 1.
        OSError: no file can be made there.

    Source: SSDTrain (arXiv 2408.10013).
    """
    room = parse_bytes(ram, "ram") if isinstance(ram, str) else ram
    for name, value in (
        ("ram", room),
        ("least", least),
        ("in_flight", in_flight),
        ("ahead", ahead),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1 byte, got {value!r}")
    if keep is not None and not (isinstance(keep, (int, float)) and 0 <= keep <= 1):
        raise ValueError(f"keep must be between 0 and 1, or None, got {keep!r}")
    if path is None and not torch.cuda.is_available():
        raise ValueError("path is None, and there is no GPU: name a folder on a disk")
    slots = None if path is None else Slots(path)
    return OffloadActivations(Places(slots, room, in_flight, ahead, keep), least)
