# mypy: ignore-errors
"""What the kernels share, in Triton's language."""

import triton
import triton.language as tl


@triton.jit
def first_of(base, offsets, unit, matrix):
    """Pointer to the first element of one matrix of a batch: see `Addresses`."""
    return base + tl.load(offsets + matrix) * unit


@triton.jit
def locate(addresses, matrix):
    """As `first_of`."""
    return first_of(addresses.base, addresses.offsets, addresses.unit, matrix)


@triton.jit
def scalar(value, matrix, ON_DEVICE: tl.constexpr):
    """A number as float32: the argument itself, or this matrix's float64 on the device."""
    if ON_DEVICE:
        value = tl.load(value + matrix)
    return tl.cast(value, tl.float32)


@triton.jit
def arrives_last(counter_ptr, expected):
    """Whether the other programs that share a counter have all been here; then it is 0 again.

    The barrier and the release make this program's stores visible to the one that arrives last,
    which has to read them past its L1 cache (".cg").
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def piece(
    tile,
    INDEX: tl.constexpr,
    CUTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One of the 2^CUTS pieces of a tile, from left to right."""
    for cut in tl.static_range(CUTS):
        halves = tl.reshape(tile, (ROWS, 2, COLUMNS >> (cut + 1)))
        left, right = tl.split(tl.permute(halves, (0, 2, 1)))
        tile = left if (INDEX >> (CUTS - 1 - cut)) % 2 == 0 else right
    return tile
