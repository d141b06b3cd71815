"""What a run costs: time in a step and in its optimizer, state bytes, peak memory."""

from __future__ import annotations

import hashlib
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch


class StepClock:
    """Times a step and the optimizer inside it; on a GPU with events, which make nothing wait."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks = []

    def mark(self) -> None:
        """Called at the step's start, before and after the optimizer, and at the end."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def read(self) -> tuple[float, float]:
        """Returns the seconds of the step and of its optimizer, and starts anew."""
        start, before, after, end = self._marks
        self._marks = []
        if self._cuda:
            end.synchronize()
            return start.elapsed_time(end) / 1e3, before.elapsed_time(after) / 1e3
        return end - start, after - before


class PeakMemory:
    """Peak bytes above what the process held when this was made.

    On a GPU the allocator's peak. On a CPU the growth of the resident set, which also counts what
    libraries and their threads keep: honest, but coarse at small models, and it needs a process of
    its own.
    """

    def __init__(self, device: torch.device):
        self._device = device
        if device.type == "cuda":
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats(device)
        self._before = self._peak()

    def read(self) -> int:
        return self._peak() - self._before

    def _peak(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        status = Path("/proc/self/status")
        if status.exists():
            # Not ru_maxrss: Linux hands the parent's peak down to a child.
            line = next(line for line in status.read_text().splitlines() if "VmHWM" in line)
            return int(line.split()[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def tensor_bytes(value: object) -> int:
    """Sums the bytes of all tensors in a nest of dicts, lists, tuples and objects, as states are.

    The official packages keep a basis in an object. A tensor that several states hold counts once,
    such as the codes of bitsandbytes.
    """
    return sum({id(tensor): _bytes(tensor) for tensor in _tensors(value)}.values())


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        # A quantized tensor shows the dtype that it stands for, not the one that it holds.
        parts = getattr(value, "__tensor_flatten__", None)
        if parts is None:
            yield value
        else:
            for name in parts()[0]:
                yield from _tensors(getattr(value, name))
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)
    else:
        yield from _tensors(getattr(value, "__dict__", ()))


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def weights_digest(model: torch.nn.Module) -> str:
    """Hashes every weight, so that two records show whether two runs ended bit for bit equal."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
