"""Plain text for a terminal: aligned columns and amounts of memory."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

GB = 10**9


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns that are aligned: numbers and amounts on the right, words on the left."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [
        all(cell[:1].isdigit() or cell[:1] == "-" for cell in column[1:])
        for column in zip(*cells, strict=True)
    ]
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


def print_json(facts: Any) -> None:
    """JSON for programs; what it does not know is printed as text."""
    print(json.dumps(facts, indent=2, default=str))
