"""What lets one launch serve a batch: where its matrices lie, and counters of arrived programs."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# A captured graph copies from these at each replay, so they have to live as long as any graph.
_sources_of_graphs: list[Tensor] = []


class Addresses(NamedTuple):
    """Tensors that are alike, as a kernel takes them: the first, and how far off each of them lies.

    The distances are in units of 16 elements where those divide them all, else of 1 element. Triton
    compiles an argument that 16 divides as such, so that accesses stay 16 bytes wide.
    """

    base: Tensor
    offsets: Tensor  # int64, one a matrix
    unit: int

    @property
    def wide(self) -> bool:
        """Whether every matrix begins at a multiple of 16 bytes, as far as Triton can see."""
        return self.unit == 16 and self.base.data_ptr() % 16 == 0


def addresses_of(tensors: Sequence[Tensor]) -> Addresses:
    """Those of tensors of one dtype on one device."""
    base = tensors[0]
    start, size = base.data_ptr(), base.element_size()
    distances = [(tensor.data_ptr() - start) // size for tensor in tensors]
    unit = 1 if any(distance % 16 for distance in distances) else 16
    return Addresses(base, device_table(tuple(d // unit for d in distances), base.device), unit)


def current_stream(device: torch.device) -> int | None:
    """The stream of a launch; None while a graph is captured, whose memory outlives no call."""
    if device.type != "cuda":
        return 0
    if torch.cuda.is_current_stream_capturing():
        return None
    stream: int = torch._C._cuda_getCurrentRawStream(device.index)
    return stream


def device_table(values: tuple[int, ...], device: torch.device) -> Tensor:
    """The values as int64 on the device, without waiting for it; uploaded once in a stream."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int64, device=device)
    stream = current_stream(device)
    if stream is None:
        # The graph's pool owns this table and gives its memory to others: not for the cache.
        source = torch.tensor(values, dtype=torch.int64, device="cpu", pin_memory=True)
        _sources_of_graphs.append(source)
        return source.to(device, non_blocking=True)
    return _uploaded(values, device, stream)


@functools.lru_cache(maxsize=4096)
def _uploaded(values: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """The stream is a key because another one would not wait for the copy."""
    source = torch.tensor(values, dtype=torch.int64, device="cpu", pin_memory=True)
    return source.to(device, non_blocking=True)


def arrival_counters(count: int, device: torch.device) -> Tensor:
    """Counters at 0, which the kernels put back to 0; launches of one stream share them."""
    stream = current_stream(device)
    if stream is None or device.type == "meta":
        # In a graph the zeros are set at each replay, whatever another stream does meanwhile.
        return torch.zeros(count, dtype=torch.int32, device=device)
    counters = _counters.get((device, stream))
    if counters is None or counters.numel() < count:
        counters = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
        _counters[device, stream] = counters
    return counters


_counters: dict[tuple[torch.device, int], Tensor] = {}
