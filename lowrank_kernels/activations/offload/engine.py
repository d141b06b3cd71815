"""Storages that wait somewhere else between a forward and its backward.

    pack      a storage that is saved is sent away, once a forward, whatever views of it are saved
    unpack    the backward goes through the storages the other way round: the next ones are brought
              ahead. What has not left when it begins stays
    free      a place is free when autograd has dropped what was saved: nobody has to call anything

An `Engine` knows what is saved and in which order. Its subclasses know where it goes: `Disk`, or
from a GPU to `HostMemory`.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass
class Counts:
    """What has been done since the start.

    Attributes:
        packed, kept: bytes that were saved, and that of these stayed where they were.
        copied, returned: bytes that went from a GPU to the host's memory, and back.
        written, read: bytes that went to the disk, and came from it.
        missed: storages that were not there when backward asked for them.
        waited, stalled: seconds that the host has waited for the disk, in the forward and in the
            backward.
    """

    packed: int = 0
    kept: int = 0
    copied: int = 0
    returned: int = 0
    written: int = 0
    read: int = 0
    missed: int = 0
    waited: float = 0.0
    stalled: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        sums = (
            one + two for one, two in zip(vars(self).values(), vars(other).values(), strict=True)
        )
        return Counts(*sums)


class Waiting:
    """A storage that is saved.

    Attributes:
        engine, order: whose, and how many were saved before it.
        key: of what it was made, as far as storages and counts of changes tell.
        memory: itself; None while it is elsewhere alone.
        place: where else it is, as its engine says; None if nowhere.
        event: what memory has to wait for before it is used or given up, on a GPU.
        uses: how often backward has still to ask for it, the first time.
        is_loading: it is being brought, by a thread.
        is_ahead: it was brought before it was needed.
        error: why it could not be.
    """

    def __init__(self, engine: Engine, tensor: Tensor, order: int) -> None:
        self.engine, self.order = engine, order
        self.memory: torch.UntypedStorage | None = tensor.untyped_storage()
        self.alive: Any = StorageWeakRef(self.memory)  # type: ignore[no-untyped-call]
        self.size, self.version = self.memory.nbytes(), tensor._version
        self.key = self.memory._cdata, self.version
        # Shares the count of changes, and later no memory.
        self._counter = tensor.detach()
        self.place: Any = None
        self.event: Any = None
        self.uses = 0
        self.is_loading = self.is_ahead = False
        self.error: Exception | None = None

    def check(self) -> None:
        """RuntimeError if it was changed in place, or cut, since it was saved."""
        if self._counter._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an"
                f" inplace operation: a storage of {self.size} bytes, saved at version"
                f" {self.version}, is at version {self._counter._version}"
            )
        if self.memory is not None and (size := self.memory.nbytes()) < self.size:
            if self.place is None:
                raise RuntimeError(
                    f"a storage of {self.size} bytes was resized to {size} since it was saved"
                )
            self.memory = None

    def let_go(self) -> None:
        """Only its other place has it now."""
        self.memory = self.event = None
        self._counter.data = self._counter.new_empty(0)

    def __del__(self) -> None:
        # Memory is needed by nobody but a copy under way.
        memory = None if self.event is None else self.memory
        left = Left(self.order, self.key, self.place, self.size, self.is_ahead, memory, self.event)
        self.engine.forget(left)


class Left(NamedTuple):
    """What a `Waiting` had when nobody needed it any more."""

    order: int
    key: tuple[int, int]
    place: Any
    size: int
    is_ahead: bool
    memory: torch.UntypedStorage | None
    event: Any


class Engine:
    """See the module.

    Args:
        ahead: bytes that may be brought before they are needed.
        keep: share of what a step saves, its last part, that stays; None for what could not have
            left during the forward before.

    Attributes:
        counts: what was done.
        budget: bytes that this step may send away.
    """

    def __init__(self, ahead: int, keep: float | None) -> None:
        self._ahead, self._keep = ahead, keep
        self.counts = Counts()
        self.budget = math.inf
        self._saved = 0
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._known: dict[tuple[int, int], weakref.ref[Waiting]] = {}
        # By order, which counts on: all there are, and which of them are to be brought ahead.
        self._living: dict[int, weakref.ref[Waiting]] = {}
        self._away: list[int] = []
        self._next = 0
        self._forgotten: deque[Left] = deque()
        self._brought_ahead = 0
        self._is_backward = False

    def finish(self) -> None:
        """Waits until nothing is on its way."""
        raise NotImplementedError

    def _send(self, waiting: Waiting) -> None:
        """Begins to send it away; it is held until that is done."""
        raise NotImplementedError

    def _stop_sending(self) -> None:
        """What has not left yet stays, and is not let go."""
        raise NotImplementedError

    def _bring_ahead(self, waiting: Waiting) -> bool:
        """Begins to bring it; False if that is not to be."""
        raise NotImplementedError

    def _bring(self, waiting: Waiting) -> torch.UntypedStorage:
        """Its memory, which may be used at once."""
        raise NotImplementedError

    def _free(self, left: Left) -> None:
        """Nobody needs it any more."""
        raise NotImplementedError

    def _step_began(self) -> None:
        """Something of a new step is saved."""
        raise NotImplementedError

    def _forward_ended(self) -> None:
        """Something is asked for."""
        raise NotImplementedError

    def _could_send(self) -> float | None:
        """Bytes that could have left during the forward; None if that is not known."""
        raise NotImplementedError

    def pack(self, tensor: Tensor, event: Any = None) -> Waiting:
        """Takes the storage of a tensor, or finds that it has it.

        Args:
            tensor: with the storage.
            event: after which it is filled.
        """
        self._check_process()
        key = tensor.untyped_storage()._cdata, tensor._version
        with self._changed:
            self._tidy()
            known = self._known.get(key, lambda: None)()
            if known is not None and not known.alive.expired():
                known.uses += 1
                return known
            if self._is_backward or not self._living:
                self._begin()
            waiting = Waiting(self, tensor, self._next)
            waiting.uses, waiting.event = 1, event
            self._known[key] = self._living[self._next] = weakref.ref(waiting)
            self._next += 1
            if not self._saved:
                self._step_began()
            self.counts.packed += waiting.size
            self._saved += waiting.size
            if self._saved > self.budget:
                self.counts.kept += waiting.size
            else:
                self._send(waiting)
        return waiting

    def unpack(self, waiting: Waiting) -> torch.UntypedStorage:
        """The storage, which is brought if it has to be.

        Raises:
            RuntimeError: it was changed in place, or cut, since it was saved.
            OSError: it cannot be read.
        """
        self._check_process()
        with self._changed:
            self._tidy()
            if not self._is_backward:
                self._is_backward = True
                self._forward_ended()
            self._stop_sending()
            waiting.check()
            if waiting.is_ahead:
                waiting.is_ahead = False
                self._brought_ahead -= waiting.size
            self._prefetch(waiting.order)
            memory = self._bring(waiting)
            waiting.uses -= 1
            if waiting.place is not None:
                waiting.memory = memory if waiting.uses > 0 else None
        return memory

    def forget(self, left: Left) -> None:
        """Of a storage that nobody has any more; takes no lock, as finalizers run anywhere."""
        self._forgotten.append(left)

    def begin_forward(self) -> None:
        """What is saved from now on may have changed in ways that no count of changes tells."""
        self._check_process()
        with self._changed:
            self._known.clear()

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError("offloaded activations do not survive a fork: spawn processes")

    def _begin(self) -> None:
        """A forward after a backward, or after others of which nothing is left."""
        if self._is_backward:
            if self._keep is not None:
                self.budget = (1 - self._keep) * self._saved if self._keep else math.inf
            elif (measured := self._could_send()) is not None:
                self.budget = measured
        self._is_backward, self._saved = False, 0
        self._known.clear()

    def _tidy(self) -> None:
        while self._forgotten:
            left = self._forgotten.popleft()
            self._free(left)
            if left.is_ahead:
                self._brought_ahead -= left.size
            self._living.pop(left.order, None)
            place = bisect_left(self._away, left.order)
            if self._away[place : place + 1] == [left.order]:
                del self._away[place]
            # Another one may have its key.
            if self._known.get(left.key, lambda: self)() is None:
                del self._known[left.key]

    def _let_go(self, waiting: Waiting) -> None:
        waiting.let_go()
        insort(self._away, waiting.order)

    def _prefetch(self, order: int) -> None:
        """Orders what comes next, backwards; each is looked at once."""
        place = bisect_left(self._away, order)
        while place > 0:
            place -= 1
            waiting = self._living[self._away[place]]()
            if waiting is not None and waiting.memory is None and waiting.uses > 0:
                if self._brought_ahead + waiting.size > self._ahead:
                    return
                if self._bring_ahead(waiting):
                    waiting.is_ahead = True
                    self._brought_ahead += waiting.size
            del self._away[place]


def bytes_of(memory: torch.UntypedStorage) -> Tensor:
    """All of a storage, uint8, of one dimension."""
    found = torch.empty(0, dtype=torch.uint8, device=memory.device)
    found.set_(memory, 0, (memory.nbytes(),))  # type: ignore[call-overload]
    return found
