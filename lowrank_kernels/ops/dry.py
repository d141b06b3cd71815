"""Dry runs: the same code over meta tensors, which have a layout and no memory, to see what it
would allocate.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

# None outside of a dry run.
_stood_for: ContextVar[str | None] = ContextVar("_stood_for", default=None)


@contextmanager
def meta_stands_for(device_type: str) -> Iterator[None]:
    """Inside of it meta tensors are treated like those of this kind of device."""
    token = _stood_for.set(device_type)
    try:
        yield
    finally:
        _stood_for.reset(token)


def device_type(tensor: Tensor) -> str:
    """The kind of device that the tensor lies on, or would: "cpu", "cuda" and so on."""
    return (_stood_for.get() if tensor.is_meta else None) or tensor.device.type


def on_host(values: Tensor) -> Tensor:
    """The values where Python can read them; those of a dry run are small, positive and true."""
    if values.is_meta and _stood_for.get() is not None:
        return torch.full(values.shape, 1e-6, device="cpu").to(values.dtype)
    return values.cpu()
