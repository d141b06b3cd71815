"""A file without a name, in which pieces of memory lie for a while.

name      none (O_TMPFILE), so that nothing is left of it, whatever ends the process
cache     none (O_DIRECT) where the file system has that: the memory is to be free
place     allocated before it is written, in chunks; a full disk is known before that
slots     whole blocks, used again by pieces of any size
"""

import contextlib
import errno
import mmap
import os
import tempfile
import threading
from pathlib import Path

import torch
from torch import Tensor

from .extents import Extents

BLOCK = 4096
CHUNK = 1 << 28
BOUNCE = 1 << 22
# Of these the memory would not be free.
IN_MEMORY = ("tmpfs", "ramfs")


class Slots:
    """Slots of a file in a folder. Threads may share it.

    Args:
        folder: on a disk, writable.

    Attributes:
        in_use: slots that are taken.
        process: whose they are; a fork shares the file, and would write over them.

    Raises:
        ValueError: the folder is none, or lies in memory.
        OSError: no file can be made there.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is no folder: make one on a disk for activations")
        if (kind := file_system(self.folder)) in IN_MEMORY:
            raise ValueError(f"{self.folder} is a {kind}, which is memory: take a folder on a disk")
        self._file = _unnamed(self.folder)
        self._free, self._allocated = Extents(), 0
        self._lock = threading.Lock()
        self._bounces = threading.local()
        self.in_use, self.process = 0, os.getpid()

    def take(self, size: int) -> int:
        """Where so many bytes may be written; OSError, as of a full disk, if they may not."""
        room = _rounded(size)
        with self._lock:
            place = self._free.take(room)
            if place is None:
                self._grow(room - self._free.before(self._allocated))
                place = self._free.take(room)
                assert place is not None
            self.in_use += 1
        return place

    def give(self, place: int, size: int) -> None:
        """A slot may be used again."""
        with self._lock:
            self._free.give(place, _rounded(size))
            self.in_use -= 1

    def write(self, place: int, memory: Tensor) -> None:
        """Bytes, a uint8 tensor of one dimension, into a slot."""
        bounce, view = self._bounce()
        for start in range(0, len(memory), BOUNCE):
            piece = memory[start : start + BOUNCE]
            bounce[: len(piece)].copy_(piece)
            room = _rounded(len(piece))
            self._complete(os.pwrite(self._file, view[:room], place + start), room)

    def read(self, place: int, memory: Tensor) -> None:
        """Bytes of a slot into a uint8 tensor of one dimension."""
        bounce, view = self._bounce()
        for start in range(0, len(memory), BOUNCE):
            piece = memory[start : start + BOUNCE]
            room = _rounded(len(piece))
            self._complete(os.preadv(self._file, [view[:room]], place + start), room)
            piece.copy_(bounce[: len(piece)])

    def close(self) -> None:
        """Gives the disk back."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):
            self.close()

    def _grow(self, needed: int) -> None:
        size = max(CHUNK, needed)
        try:
            os.posix_fallocate(self._file, self._allocated, size)
        except OSError:
            # A full disk, or a limit or quota of what may be taken.
            size = needed
            os.posix_fallocate(self._file, self._allocated, size)
        self._free.give(self._allocated, size)
        self._allocated += size

    def _bounce(self) -> tuple[Tensor, memoryview]:
        """Of this thread: memory whose address is a whole block's, as a tensor and as bytes."""
        if not hasattr(self._bounces, "memory"):
            memory = mmap.mmap(-1, BOUNCE)
            tensor = torch.frombuffer(memory, dtype=torch.uint8)
            self._bounces.memory = tensor, memoryview(memory)
        found: tuple[Tensor, memoryview] = self._bounces.memory
        return found

    def _complete(self, done: int, size: int) -> None:
        if done != size:
            raise OSError(errno.EIO, f"{done} of {size} bytes", str(self.folder))


def file_system(folder: Path) -> str:
    """What kind of file system a folder lies in; "" if it cannot be told."""
    device = os.stat(folder).st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            place, _, rest = line.partition(" - ")
            if place.split()[2] == name:
                return rest.split()[0]
    return ""


def _unnamed(folder: Path) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC
    for extra in (getattr(os, "O_DIRECT", 0), 0):
        with contextlib.suppress(OSError, AttributeError):
            return os.open(folder, os.O_TMPFILE | flags | extra, 0o600)
    try:
        file, name = tempfile.mkstemp(dir=folder)
    except OSError as error:
        text = f"{error.strerror}: no file for activations can be made here"
        raise OSError(error.errno, text, str(folder)) from error
    os.unlink(name)
    return file


def _rounded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
