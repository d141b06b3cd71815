"""What lets one launch serve a batch: where its matrices lie."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# A captured graph needs these at each replay, so they have to live as long as any graph.
_kept_for_graphs: list[Tensor] = []

MOST_TABLES = 4096


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


def keep_for_graphs(tensor: Tensor) -> None:
    """Of a captured launch, what is not the graph's own and what it does not keep alive."""
    _kept_for_graphs.append(tensor)


def device_table(values: tuple[int, ...], device: torch.device) -> Tensor:
    """The values as int64 on the device, without waiting for it; uploaded once in a stream.

    A graph takes the table of an eager step, whatever its stream: whoever replays the graph has
    waited for that step, which changed the weights. So nothing is copied at a replay.
    """
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int64, device=device)
    stream = current_stream(device)
    uploaded_in, table = _tables.get((values, device), (None, None))
    if table is None or stream not in (uploaded_in, None):
        source = torch.tensor(values, dtype=torch.int64, device="cpu", pin_memory=True)
        table = source.to(device, non_blocking=True)
        if stream is None:
            # The graph's pool owns it and gives its memory to others: for nobody else.
            keep_for_graphs(source)
            return table
        _tables.pop((values, device), None)
        _tables[values, device] = stream, table
        if len(_tables) > MOST_TABLES:
            del _tables[next(iter(_tables))]
    if stream is None:
        keep_for_graphs(table)
    return table


_tables: dict[tuple[tuple[int, ...], torch.device], tuple[int, Tensor]] = {}
