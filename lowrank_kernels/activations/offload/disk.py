"""Storages of the host that wait on a disk.

A thread writes what is saved and lets it go; where too much is to be written still, the forward
waits, so that memory is bounded. Another thread reads ahead. Threads end when they have nothing to
do. What they cannot write stays in memory; what they cannot read is an error where it is needed.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable

import torch

from ...ops.notices import notice_once
from .engine import Engine, Left, Waiting, bytes_of
from .slots import Slots


class Disk(Engine):
    """See the module; places are those of `Slots`.

    Args:
        slots: where they wait.
        in_flight: bytes that may wait to be written.
        ahead, keep: see `Engine`.
    """

    def __init__(self, slots: Slots, in_flight: int, ahead: int, keep: float | None) -> None:
        super().__init__(ahead, keep)
        self.slots, self._in_flight = slots, in_flight
        self._to_write: deque[tuple[weakref.ref[Waiting], int]] = deque()
        self._to_read: deque[weakref.ref[Waiting]] = deque()
        self._queued = 0
        self._writes = self._reads = False
        # Of a step: when it began, the seconds of its forward, what was written in which seconds.
        self._start = self._forward = self._writing = 0.0
        self._written = 0

    def finish(self) -> None:
        with self._changed:
            while self._writes or self._reads:
                self._changed.wait()
            self._tidy()

    def _step_began(self) -> None:
        self._start, self._written, self._writing = time.monotonic(), 0, 0.0

    def _forward_ended(self) -> None:
        self._forward = time.monotonic() - self._start

    def _could_send(self) -> float:
        return self._written / self._writing * self._forward if self._writing else math.inf

    def _send(self, waiting: Waiting) -> None:
        self._wait_for_room(waiting.size)
        self._writes = self._writes or _is_started(self._write_all)
        if not self._writes:
            self._stays(waiting, "no thread can be started")
            return
        self._queued += waiting.size
        self._to_write.append((weakref.ref(waiting), waiting.size))

    def _stays(self, waiting: Waiting, why: str) -> None:
        notice_once(logging.WARNING, f"activations stay in memory: {why}")
        self.counts.kept += waiting.size

    def _wait_for_room(self, size: int) -> None:
        start = time.monotonic()
        while self._queued and self._queued + size > self._in_flight:
            self._changed.wait(0.05)
            self._tidy()
        self.counts.waited += time.monotonic() - start

    def _stop_sending(self) -> None:
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
        try:
            if waiting.event is not None:
                waiting.event.synchronize()
            start = time.monotonic()
            slot = self.slots.take(waiting.size)
            found = bytes_of(memory)
            if len(found) != waiting.size:
                raise ValueError(f"a storage of {waiting.size} bytes has {len(found)} now")
            self.slots.write(slot, found)
        except Exception as error:  # whatever it is, the forward waits for this thread
            if slot is not None:
                self.slots.give(slot, waiting.size)
            reason = getattr(error, "strerror", None) or error
            with self._changed:
                self._stays(waiting, f"{self.slots.folder} takes no more ({reason})")
            return
        with self._changed:
            self.counts.written += waiting.size
            self._written += waiting.size
            self._writing += time.monotonic() - start
            waiting.place = slot
            # What has changed is an error, also when the change came while it was written.
            if not self._is_backward:
                self._let_go(waiting)

    def _bring_ahead(self, waiting: Waiting) -> bool:
        self._reads = self._reads or _is_started(self._read_all)
        if self._reads:
            waiting.is_loading = True
            self._to_read.append(weakref.ref(waiting))
        return self._reads

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

    def _bring(self, waiting: Waiting) -> torch.UntypedStorage:
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
        return memory

    def _read_storage(self, waiting: Waiting) -> torch.UntypedStorage:
        memory: torch.UntypedStorage = torch.UntypedStorage(waiting.size)  # type: ignore[no-untyped-call]
        try:
            self.slots.read(waiting.place, bytes_of(memory))
        except OSError as error:
            text = f"{waiting.size} bytes of activations cannot be read: {error.strerror or error}"
            raise OSError(error.errno, text, str(self.slots.folder)) from error
        self.counts.read += waiting.size
        return memory

    def _free(self, left: Left) -> None:
        if left.place is not None:
            self.slots.give(left.place, left.size)


def _is_started(work: Callable[[], None]) -> bool:
    """False where the process may have no more threads, or ends."""
    try:
        threading.Thread(target=work, daemon=True).start()
    except (RuntimeError, MemoryError):
        return False
    return True
