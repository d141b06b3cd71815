"""What is printed: aligned columns and amounts of memory."""

import re
from collections.abc import Iterable, Sequence

GB = 10**9
UNITS = {"": GB, "GB": GB, "MB": 10**6, "GiB": 2**30, "MiB": 2**20, "G": 2**30, "M": 2**20}


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns that are aligned: numbers and amounts on the right, words on the left."""
    cells = [list(header), *(list(map(_words, row)) for row in rows)]
    columns = list(zip(*cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(cell[:1].isdigit() or cell[:1] == "-" for cell in c[1:]) for c in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in cells
    )


def amount(size: int) -> str:
    """Bytes in decimal units: 1 MB is 10^6 bytes, 1 GB 10^9."""
    for unit, name in ((GB, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} B"


def parse_bytes(text: str, name: str) -> int:
    """Of an amount as 24, 24GB or 24GiB, of an argument of that name.

    Raises:
        ValueError: it is none, or not above 0.
    """
    found = re.fullmatch(r"(\d*\.?\d+) ?([A-Za-z]*)", text)
    units = {name.lower(): size for name, size in UNITS.items()}
    if found is None or found[2].lower() not in units or float(found[1]) == 0:
        raise ValueError(
            f"{name} must be an amount above 0 as 24, which are GB, 24GB or 24GiB, got {text}"
        )
    return round(float(found[1]) * units[found[2].lower()])


def _words(cell: object) -> str:
    """A shape as 3 x 4, what there is none of as -."""
    if isinstance(cell, (list, tuple)):
        return " x ".join(map(str, cell))
    return "-" if cell is None else str(cell)
