"""Storages that wait on a disk between a forward and its backward.

    pack      a storage that is saved is handed to a thread, which writes it and lets it go. It is
              written once, whatever views of it are saved, and never if it is needed before
    wait      where too much is to be written still, the forward waits: memory is bounded
    unpack    the backward goes through the storages the other way round. Its first one stops what
              is not written yet; another thread reads ahead
    free      a slot is free when autograd has dropped what was saved: there is nothing to be called

Threads end when they have nothing to do. What they cannot write stays in memory; what they cannot
read is an error where it is needed.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ...ops.notices import notice_once
from .slots import Slots


@dataclass
class Counts:
    """What has been done since the start.

    Attributes:
        packed, written, read, kept: bytes that were saved, that went to the disk and came from it,
            and that stayed in memory.
        missed: storages that were not there when backward asked for them.
        waited, stalled: seconds that the forward has waited for the disk, and the backward.
    """

    packed: int = 0
    written: int = 0
    read: int = 0
    kept: int = 0
    missed: int = 0
    waited: float = 0.0
    stalled: float = 0.0


@dataclass
class _Step:
    """Of a forward and its backward.

    Attributes:
        start: when something was saved first.
        forward: seconds until something was asked for.
        saved, written: bytes.
        writing: seconds that the disk took for these.
    """

    start: float
    forward: float = 0.0
    saved: int = 0
    written: int = 0
    writing: float = 0.0

    def budget(self, keep: float | None) -> float:
        """Bytes of the next one that are to be written; see `Engine` for `keep`."""
        if keep is not None:
            return (1 - keep) * self.saved
        if not self.writing:
            return math.inf
        return self.written / self.writing * self.forward


class Waiting:
    """A storage that is saved.

    Attributes:
        memory: itself; None while it is on the disk alone.
        slot: where it is on the disk; None if it is not.
        uses: how often backward has still to ask for it, the first time.
        is_ahead: it was read before it was needed.
    """

    def __init__(self, engine: Engine, tensor: Tensor, order: int) -> None:
        self._engine, self.order = engine, order
        self.memory: torch.UntypedStorage | None = tensor.untyped_storage()
        self.alive: Any = StorageWeakRef(self.memory)  # type: ignore[no-untyped-call]
        self.size, self.version = self.memory.nbytes(), tensor._version
        # Shares the count of changes, and later no memory.
        self._counter = tensor.detach()
        self.slot: int | None = None
        self.uses = 0
        self.is_loading = self.is_ahead = False
        self.error: Exception | None = None

    def check(self) -> None:
        """RuntimeError if it was changed in place since it was saved."""
        if self._counter._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an"
                f" inplace operation: a storage of {self.size} bytes, saved at version"
                f" {self.version}, is at version {self._counter._version}"
            )

    def let_go(self) -> None:
        """Only the disk has it now."""
        self.memory = None
        self._counter.data = self._counter.new_empty(0)

    def __del__(self) -> None:
        self._engine.forget(self.slot, self.size, self.is_ahead)


class Engine:
    """See the module.

    Args:
        slots: where they wait.
        in_flight: bytes that may wait to be written.
        ahead: bytes that may be read before they are needed.
        keep: share of what a step saves, its last part, that stays in memory; None for what the
            disk could not have written during the forward before.
    """

    def __init__(self, slots: Slots, in_flight: int, ahead: int, keep: float | None) -> None:
        self.slots, self._in_flight, self._ahead, self._keep = slots, in_flight, ahead, keep
        self.counts = Counts()
        self.budget = math.inf
        self._step = _Step(0.0)
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._known: dict[tuple[int, int], weakref.ref[Waiting]] = {}
        self._order: list[weakref.ref[Waiting]] = []
        self._to_write: deque[tuple[weakref.ref[Waiting], int]] = deque()
        self._to_read: deque[weakref.ref[Waiting]] = deque()
        self._forgotten: deque[tuple[int | None, int, bool]] = deque()
        self._queued = self._read_ahead = 0
        self._writes = self._reads = self._is_backward = False

    def pack(self, tensor: Tensor) -> Waiting:
        """Takes the storage of a tensor, or finds that it has it."""
        self._check_process()
        storage = tensor.untyped_storage()
        key = storage._cdata, tensor._version
        with self._changed:
            self._tidy()
            known = self._known.get(key, lambda: None)()
            if known is not None and not known.alive.expired():
                known.uses += 1
                return known
            if self._is_backward:
                self._begin()
            waiting = Waiting(self, tensor, len(self._order))
            waiting.uses = 1
            reference = weakref.ref(waiting)
            self._known[key] = reference
            self._order.append(reference)
            if not self._step.saved:
                self._step.start = time.monotonic()
            self.counts.packed += waiting.size
            self._step.saved += waiting.size
            if self._step.saved > self.budget:
                self.counts.kept += waiting.size
                return waiting
            self._wait_for_room(waiting.size)
            self._queued += waiting.size
            self._to_write.append((reference, waiting.size))
            if not self._writes:
                self._writes = True
                threading.Thread(target=self._write_all, daemon=True).start()
        return waiting

    def unpack(self, waiting: Waiting) -> torch.UntypedStorage:
        """The storage, which is read if it has to be.

        Raises:
            RuntimeError: it was changed in place since it was saved.
            OSError: it cannot be read.
        """
        self._check_process()
        with self._changed:
            self._tidy()
            if not self._is_backward:
                self._is_backward = True
                self._step.forward = time.monotonic() - self._step.start
            self._stop_writing()
            waiting.check()
            self._prefetch(waiting.order)
            start = time.monotonic()
            while waiting.is_loading:
                self._changed.wait()
            if waiting.error is not None:
                raise waiting.error
            memory = waiting.memory
            if memory is None:
                self.counts.missed += 1
                memory = self._read_storage(waiting)
            self.counts.stalled += time.monotonic() - start
            waiting.uses -= 1
            if waiting.slot is not None:
                self._used(waiting)
                waiting.memory = memory if waiting.uses > 0 else None
        return memory

    def forget(self, slot: int | None, size: int, was_ahead: bool) -> None:
        """Of a storage that nobody has any more; takes no lock, as finalizers run anywhere."""
        self._forgotten.append((slot, size, was_ahead))

    def finish(self) -> None:
        """Waits until threads have nothing to do."""
        with self._changed:
            while self._writes or self._reads:
                self._changed.wait()
            self._tidy()

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError("offloaded activations do not survive a fork: spawn processes")

    def _begin(self) -> None:
        """A forward after a backward."""
        self.budget = self._step.budget(self._keep)
        self._is_backward, self._step = False, _Step(time.monotonic())
        self._order = [each for each in self._order if each() is not None]
        for place, reference in enumerate(self._order):
            if (waiting := reference()) is not None:
                waiting.order = place
        self._known = {key: each for key, each in self._known.items() if each() is not None}

    def _tidy(self) -> None:
        while self._forgotten:
            slot, size, was_ahead = self._forgotten.popleft()
            if slot is not None:
                self.slots.give(slot, size)
            if was_ahead:
                self._read_ahead -= size

    def _wait_for_room(self, size: int) -> None:
        start = time.monotonic()
        while self._queued and self._queued + size > self._in_flight:
            self._changed.wait(0.05)
            self._tidy()
        self.counts.waited += time.monotonic() - start

    def _stop_writing(self) -> None:
        """What backward needs next is never written."""
        for reference, size in self._to_write:
            self._queued -= size
            if reference() is not None:
                self.counts.kept += size
        self._to_write.clear()

    def _write_all(self) -> None:
        while True:
            with self._changed:
                if not self._to_write:
                    self._writes = False
                    self._changed.notify_all()
                    return
                reference, size = self._to_write.popleft()
                waiting = reference()
            if waiting is not None:
                self._write(waiting)
            # Its finalizer may want the lock.
            del waiting
            with self._changed:
                self._queued -= size
                self._changed.notify_all()

    def _write(self, waiting: Waiting) -> None:
        memory, slot = waiting.memory, None
        if memory is None:
            return
        start = time.monotonic()
        try:
            slot = self.slots.take(waiting.size)
            self.slots.write(slot, _bytes_of(memory))
        except Exception as error:  # whatever it is, the forward waits for this thread
            notice_once(
                logging.WARNING,
                f"activations stay in memory: {self.slots.folder} takes no more"
                f" ({getattr(error, 'strerror', None) or error})",
            )
            if slot is not None:
                self.slots.give(slot, waiting.size)
            with self._changed:
                self.counts.kept += waiting.size
            return
        with self._changed:
            self.counts.written += waiting.size
            self._step.written += waiting.size
            self._step.writing += time.monotonic() - start
            waiting.slot = slot
            # What has changed is an error, also when the change came while it was written.
            if not self._is_backward:
                waiting.let_go()

    def _prefetch(self, order: int) -> None:
        """Orders what comes next, backwards."""
        for reference in reversed(self._order[:order]):
            waiting = reference()
            if waiting is None or waiting.memory is not None or waiting.is_loading:
                continue
            if waiting.slot is None or waiting.uses <= 0 or waiting.error is not None:
                continue
            if self._read_ahead + waiting.size > self._ahead:
                return
            waiting.is_loading = waiting.is_ahead = True
            self._read_ahead += waiting.size
            self._to_read.append(reference)
            if not self._reads:
                self._reads = True
                threading.Thread(target=self._read_all, daemon=True).start()

    def _read_all(self) -> None:
        while True:
            with self._changed:
                if not self._to_read:
                    self._reads = False
                    self._changed.notify_all()
                    return
                waiting = self._to_read.popleft()()
            if waiting is not None:
                self._read(waiting)
            del waiting

    def _read(self, waiting: Waiting) -> None:
        memory, error = None, None
        try:
            memory = self._read_storage(waiting)
        except Exception as failure:  # whatever it is, the backward waits for this thread
            error = failure
        with self._changed:
            waiting.is_loading, waiting.memory, waiting.error = False, memory, error
            self._changed.notify_all()

    def _read_storage(self, waiting: Waiting) -> torch.UntypedStorage:
        assert waiting.slot is not None
        memory: torch.UntypedStorage = torch.UntypedStorage(waiting.size)  # type: ignore[no-untyped-call]
        try:
            self.slots.read(waiting.slot, _bytes_of(memory))
        except OSError as error:
            text = f"{waiting.size} bytes of activations cannot be read: {error.strerror or error}"
            raise OSError(error.errno, text, str(self.slots.folder)) from error
        self.counts.read += waiting.size
        return memory

    def _used(self, waiting: Waiting) -> None:
        if waiting.is_ahead:
            waiting.is_ahead = False
            self._read_ahead -= waiting.size


def _bytes_of(memory: torch.UntypedStorage) -> Tensor:
    found = torch.empty(0, dtype=torch.uint8)
    found.set_(memory, 0, (memory.nbytes(),))  # type: ignore[call-overload]
    return found
