"""What a terminal shows: aligned columns, amounts of memory, JSON, and mistakes in one line."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

GB = 10**9


class UserError(Exception):
    """What the user has to change, in one line; it ends a command with exit status 2."""


@contextmanager
def user_errors() -> Iterator[None]:
    """A ValueError of the library as a `UserError`."""
    try:
        yield
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from None


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


def as_json(facts: Any) -> str:
    """JSON for programs; what it does not know is printed as text."""
    return json.dumps(facts, indent=2, default=str)


def _words(cell: object) -> str:
    """A shape as 3 x 4, what there is none of as -."""
    if isinstance(cell, (list, tuple)):
        return " x ".join(map(str, cell))
    return "-" if cell is None else str(cell)
