"""What a step asks of all its tensors, and the counters that it raises: one call for all of them.

torch's tensors can be read from C by DLPack's exchange API, in newer versions of torch and on the
devices that DLPack knows, in a tenth of the time that torch takes tensor by tensor.
"""

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

try:
    from .. import _native
except ImportError:
    _native = None  # type: ignore[assignment]

_LAYOUT = attrgetter("shape", "dtype", "device")


class OneByOne:
    """Answers for any tensors but sparse ones."""

    # Whether a mode, as for fake tensors, wants to see all operations.
    is_intercepted = staticmethod(torch._C._len_torch_dispatch_stack)

    def layouts(self, tensors: list[Tensor]) -> object:
        """Equal for tensors of equal shapes, strides, dtypes and devices."""
        return [*map(_LAYOUT, tensors), *map(Tensor.stride, tensors)]

    def places(self, tensors: list[Tensor]) -> object:
        """The same, and equal only if they are the same tensors at the same addresses."""
        own = [*map(id, tensors), *map(Tensor.data_ptr, tensors)]
        return [self.layouts(tensors), own]

    def counts(self, counters: list[Tensor]) -> list[int]:
        """The numbers in 0-d tensors, of which none has a pending negation."""
        return list(map(int, counters))

    def add_one(self, counters: list[Tensor]) -> None:
        """To each of some 0-d tensors."""
        torch._foreach_add_(counters, 1)


def _reader() -> Any:
    """What reads tensors from C, or else asks `OneByOne`."""
    others, api = OneByOne(), getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if _native is None or api is None:
        return others
    try:
        return _native.TensorReader(api, others)
    except (TypeError, ValueError):  # another version of DLPack
        return others


READER: OneByOne = _reader()
