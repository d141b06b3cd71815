"""Storages of a GPU that wait in the host's memory, and beyond that on a disk.

Copies run on a stream of their own, and no host waits for them. What is being copied is held until
more than `in_flight` bytes are: then the stream that computes waits for the oldest copy, and its
memory is free in that stream's order. What comes back is allocated there as well, copied ahead
on the other stream, and waited for where it is used.

Of the host's memory, blocks are taken for good and used again by all copies of one stream, one
after another, so that nobody has to know when a copy is done.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol
from weakref import ref

import torch
from torch import Tensor

from ...ops.notices import notice_once
from .disk import Disk
from .engine import Engine, Left, Waiting, bytes_of
from .extents import Extents

# Blocks are cut from pieces of so many bytes: allocators of pinned memory round up to powers of 2.
PIECE = 1 << 28
ALIGNED = 512


class Copying(NamedTuple):
    """A copy under way.

    Attributes:
        begun, done: events.
    """

    begun: Any
    done: Any


class Lane(Protocol):
    """Copies between a device and the host, in an order of their own."""

    def out(self, memory: torch.UntypedStorage, block: Tensor) -> Copying:
        """Of the device into a block of the host, after what computes now."""

    def back(self, block: Tensor) -> tuple[torch.UntypedStorage, Copying]:
        """Of a block into new memory of the device."""

    def wait(self, done: Any) -> None:
        """What computes from now on waits for a copy."""

    def mark(self) -> Any:
        """An event in what computes now."""

    def finish(self) -> None:
        """The host waits for all copies."""


class CudaLane:
    """The `Lane` of a CUDA device, on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def out(self, memory: torch.UntypedStorage, block: Tensor) -> Copying:
        return self._copy(bytes_of(memory), block)

    def back(self, block: Tensor) -> tuple[torch.UntypedStorage, Copying]:
        # Of the stream that computes: nobody has to be told who uses it.
        found = torch.empty(len(block), dtype=torch.uint8, device=self._device)
        return found.untyped_storage(), self._copy(block, found)

    def wait(self, done: Any) -> None:
        torch.cuda.current_stream(self._device).wait_event(done)

    def mark(self) -> Any:
        return _mark(torch.cuda.current_stream(self._device))

    def finish(self) -> None:
        self._stream.synchronize()

    def _copy(self, source: Tensor, target: Tensor) -> Copying:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            begun = _mark(self._stream)
            target.copy_(source, non_blocking=True)
            return Copying(begun, _mark(self._stream))


def _mark(stream: torch.cuda.Stream) -> Any:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def pinned(size: int) -> Tensor:
    """Memory of the host that a GPU reads and writes by itself."""
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)


class HostMemory:
    """Blocks of the host's memory.

    Args:
        most: bytes to take at most.
        allocate: gives memory, uint8, of a number of bytes.

    Attributes:
        in_use: blocks that are taken.
    """

    def __init__(self, most: int, allocate: Callable[[int], Tensor] = pinned) -> None:
        self._left, self.allocate = most, allocate
        # By where they lie, as a block knows it.
        self._pieces: dict[int, tuple[Tensor, Extents]] = {}
        self.in_use = 0

    def take(self, size: int) -> Tensor | None:
        """A block, uint8; None if there is no room."""
        room = _rounded(size)
        for memory, free in self._pieces.values():
            if (place := free.take(room)) is not None:
                self.in_use += 1
                return memory[place : place + size]
        return self.take(size) if self._grow(room) else None

    def give(self, block: Tensor) -> None:
        """It may be used again."""
        _, free = self._pieces[block.untyped_storage().data_ptr()]
        free.give(int(block.storage_offset()), _rounded(len(block)))
        self.in_use -= 1

    def _grow(self, room: int) -> bool:
        # Of eight equal blocks and more, a ninth is the most that is left over.
        size = min(max(PIECE, _power(8 * room)), _power(self._left + 1) // 2)
        if size < room:
            return False
        try:
            memory, free = self.allocate(size), Extents()
        except RuntimeError:  # the host has no more that can be pinned
            self._left = 0
            return False
        self._left -= size
        free.give(0, size)
        self._pieces[memory.untyped_storage().data_ptr()] = memory, free
        return True


def _power(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _rounded(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


class Device(Engine):
    """See the module; places are blocks of `HostMemory`, or what waits on the disk.

    Args:
        lane: how to copy.
        host: where to.
        disk: beyond that; None for what stays on the device then.
        in_flight: bytes that are held while they are copied.
        ahead, keep: see `Engine`.
    """

    def __init__(
        self,
        lane: Lane,
        host: HostMemory,
        disk: Disk | None,
        in_flight: int,
        ahead: int,
        keep: float | None,
    ) -> None:
        super().__init__(ahead, keep)
        self._lane, self.host, self.disk, self._in_flight = lane, host, disk, in_flight
        self._leaving: deque[tuple[ref[Waiting], int]] = deque()
        self._held = 0
        # Of a step: when its forward began and ended, and what was copied, where that is measured.
        self._span: list[Any] = []
        self._copies: list[tuple[Copying, int]] = []

    def finish(self) -> None:
        with self._changed:
            self._lane.finish()
            self._tidy()

    def _step_began(self) -> None:
        self._span, self._copies = [self._lane.mark()], []

    def _forward_ended(self) -> None:
        self._span.append(self._lane.mark())

    def _could_send(self) -> float | None:
        # Where the device is not that far yet, the host does not wait for it.
        if not self._copies or len(self._span) < 2:
            return None
        copies, sizes = zip(*self._copies, strict=True)
        if not (self._span[1].query() and copies[-1].done.query()):
            return None
        busy = sum(copy.begun.elapsed_time(copy.done) for copy in copies)
        forward = self._span[0].elapsed_time(self._span[1])
        return float(sum(sizes) / busy * forward) if busy else None

    def _send(self, waiting: Waiting) -> None:
        assert waiting.memory is not None
        block = self.host.take(waiting.size)
        if block is None and self.disk is None:
            notice_once(logging.WARNING, "activations stay on the GPU: ram is full, and path None")
            self.counts.kept += waiting.size
            return
        is_overflow = block is None
        if block is None:
            block = self.host.allocate(waiting.size)
        copying = self._lane.out(waiting.memory, block)
        if self._keep is None:
            self._copies.append((copying, waiting.size))
        self.counts.copied += waiting.size
        waiting.place = self._to_disk(block, copying) if is_overflow else block
        waiting.event = copying.done
        self._leaving.append((ref(waiting), waiting.size))
        self._held += waiting.size
        while self._held > self._in_flight:
            self._let_oldest_go()

    def _to_disk(self, block: Tensor, copying: Copying) -> Waiting:
        assert self.disk is not None
        found = self.disk.pack(block, copying.done)
        # It is counted here.
        self.disk.counts.packed -= len(block)
        return found

    def _let_oldest_go(self) -> None:
        reference, size = self._leaving.popleft()
        self._held -= size
        waiting = reference()
        if waiting is not None:
            self._lane.wait(waiting.event)
            self._let_go(waiting)

    def _stop_sending(self) -> None:
        self._leaving.clear()
        self._held = 0

    def _bring_ahead(self, waiting: Waiting) -> bool:
        # The host would wait for the disk.
        if isinstance(waiting.place, Waiting):
            return False
        waiting.memory, waiting.event = self._back(waiting.place)
        return True

    def _bring(self, waiting: Waiting) -> torch.UntypedStorage:
        if waiting.memory is None:
            self.counts.missed += 1
            waiting.memory, waiting.event = self._back(self._block_of(waiting))
        if waiting.event is not None:
            self._lane.wait(waiting.event)
            waiting.event = None
        return waiting.memory

    def _block_of(self, waiting: Waiting) -> Tensor:
        if not isinstance(waiting.place, Waiting):
            block: Tensor = waiting.place
            return block
        assert self.disk is not None
        return bytes_of(self.disk.unpack(waiting.place))

    def _back(self, block: Tensor) -> tuple[torch.UntypedStorage, Any]:
        memory, copying = self._lane.back(block)
        self.counts.returned += len(block)
        return memory, copying.done

    def _free(self, left: Left) -> None:
        # Its memory may be read or written still.
        if left.event is not None:
            self._lane.wait(left.event)
        if isinstance(left.place, Tensor):
            self.host.give(left.place)
