"""Which backend takes the least time for a matrix on a GPU, as far as that is known.

`times.json` has microseconds a matrix of a Fira step by each backend, without the host, a row a
case: `source` says whether they were measured on that GPU, or predicted from what was compiled, the
bytes and the FLOPs.
"""

import functools
import json
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from .contract import Side

FILE = Path(__file__).with_name("times.json")

# Where no time is known: fewest launches first.
ORDER = ("triton", "native", "foreach")


class Size(NamedTuple):
    """Of a weight and of its basis."""

    rows: int
    cols: int
    rank: int
    side: Side


class Times(NamedTuple):
    """A row of the table."""

    gpu: str
    dtype: torch.dtype
    size: Size
    source: str
    us: dict[str, float]


def fastest_first(size: Size | None, dtype: torch.dtype, gpu: str | None) -> tuple[list[str], str]:
    """The backends, best first, and why, by the nearest case that is known.

    Args:
        size: None for any, which tells what is usual.
        dtype: of the weights.
        gpu: its name.
    """
    # Half precision is one speed.
    alike = [row for row in table() if row.dtype.itemsize == dtype.itemsize]
    alike = [row for row in alike if row.gpu == gpu] or alike
    if not alike:
        return list(ORDER), "predicted by the number of launches"
    if size is None:
        return _usual(alike, gpu)
    nearest = min(alike, key=lambda row: (_distance(row.size, size), row.source != "measured"))
    us, of = nearest.us, nearest.size
    here = (nearest.gpu, nearest.dtype, of) == (gpu, dtype, size)
    source = nearest.source if here else "predicted"
    order = sorted(ORDER, key=lambda name: us.get(name, math.inf))
    times = ", ".join(f"{name} {us[name]:g} us" for name in order if name in us)
    case = f"{of.rows} x {of.cols}, rank {of.rank}, {nearest.gpu}"
    return order, f"{source}: {times} ({case})"


def _usual(rows: list[Times], gpu: str | None) -> tuple[list[str], str]:
    """For any size: the backends that are fastest most often, and how that is known."""
    fastest = Counter(min(row.us, key=row.us.__getitem__) for row in rows)
    measured = sum((row.gpu, row.source) == (gpu, "measured") for row in rows)
    first = ", ".join(f"{name} {count}" for name, count in fastest.most_common())
    known = f"{measured} measured here, {len(rows) - measured} predicted"
    order = sorted(ORDER, key=lambda name: -fastest[name])
    return order, f"by size; fastest in {len(rows)} cases: {first} ({known})"


@functools.cache
def table() -> list[Times]:
    """All rows."""
    return [
        Times(
            row["gpu"],
            getattr(torch, row["dtype"]),
            Size(row["rows"], row["cols"], row["rank"], Side[row["side"].upper()]),
            row["source"],
            row["us"],
        )
        for row in json.loads(FILE.read_text())["rows"]
    ]


def _distance(one: Size, other: Size) -> float:
    """In octaves of channels, depth and rank; the other side is as far as one octave."""
    pairs = zip(_lengths(one), _lengths(other), strict=True)
    return sum(abs(math.log2(a / b)) for a, b in pairs) + (one.side is not other.side)


def _lengths(size: Size) -> tuple[int, int, int]:
    """Channels, depth and rank, none of them 0."""
    rows, cols = max(1, size.rows), max(1, size.cols)
    channels, depth = (cols, rows) if size.side is Side.LEFT else (rows, cols)
    return channels, depth, max(1, size.rank)
