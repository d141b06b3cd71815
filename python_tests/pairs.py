"""Few rows of a table of cases in place of all of them."""

import itertools
from collections.abc import Iterable
from typing import Any


def pairwise(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Rows of one value an axis in which any two values of different axes meet.

    Code that is wrong for one value, or for two together, fails in some row. Of 576 rows of six
    axes some 20 are left, the same ones each time.
    """
    values = [list(axis) for axis in axes]
    product = list(itertools.product(*(range(len(axis)) for axis in values)))

    def pairs(row: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(row), 2))

    missing = set().union(*map(pairs, product))
    rows = []
    while missing:
        best = max(product, key=lambda row: len(pairs(row) & missing))
        missing -= pairs(best)
        rows.append(tuple(axis[index] for axis, index in zip(values, best, strict=True)))
    return rows
