"""Dry runs: the same code over meta tensors, which have a layout and no memory, to see what it
would allocate.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

# None outside of a dry run, and of a device whose memory nobody named.
_stood_for: ContextVar[str | None] = ContextVar("_stood_for", default=None)
_memory: ContextVar[int | None] = ContextVar("_memory", default=None)


@contextmanager
def meta_stands_for(device_type: str, memory_bytes: int | None = None) -> Iterator[None]:
    """Inside of it meta tensors are treated like those of this kind of device."""
    tokens = _stood_for.set(device_type), _memory.set(memory_bytes)
    try:
        yield
    finally:
        _stood_for.reset(tokens[0])
        _memory.reset(tokens[1])


def planned_memory() -> int | None:
    """Bytes of the device that meta tensors stand for, if they were named."""
    return _memory.get()


def device_type(tensor: Tensor) -> str:
    """The kind of device that the tensor lies on, or would: "cpu", "cuda" and so on."""
    return (_stood_for.get() if tensor.is_meta else None) or tensor.device.type


def device_name(tensor: Tensor) -> str:
    """As `device_type`, with its index if the tensor lies on one."""
    return device_type(tensor) if tensor.is_meta else str(tensor.device)


def on_host(values: Tensor) -> Tensor:
    """The values where Python can read them; those of a dry run are small, positive and true."""
    if values.is_meta and _stood_for.get() is not None:
        return torch.full(values.shape, 1e-6, device="cpu").to(values.dtype)
    return values.cpu()
