"""What is printed: aligned columns and amounts of memory."""

from collections.abc import Iterable, Sequence

GB = 10**9


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


def _words(cell: object) -> str:
    """A shape as 3 x 4, what there is none of as -."""
    if isinstance(cell, (list, tuple)):
        return " x ".join(map(str, cell))
    return "-" if cell is None else str(cell)
