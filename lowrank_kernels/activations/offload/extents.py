"""Which parts of a range are free."""

from __future__ import annotations

from bisect import bisect_left


class Extents:
    """Free parts of a range: neighbours become one, so that when everything is given back, all is
    one part again, whatever sizes were taken.
    """

    def __init__(self) -> None:
        # By place; no two touch.
        self._free: list[tuple[int, int]] = []

    def take(self, size: int) -> int | None:
        """The first place of so many; None if no part is as large."""
        for number, (place, free) in enumerate(self._free):
            if free >= size:
                self._free[number : number + 1] = [(place + size, free - size)] * (free > size)
                return place
        return None

    def give(self, place: int, size: int) -> None:
        """What was taken, or is new, may be taken."""
        number = bisect_left(self._free, (place, 0))
        first = last = number
        end = place + size
        if number and sum(self._free[number - 1]) == place:
            first, place = number - 1, self._free[number - 1][0]
        if number < len(self._free) and self._free[number][0] == end:
            last, end = number + 1, sum(self._free[number])
        self._free[first:last] = [(place, end - place)]

    def before(self, end: int) -> int:
        """How much is free right before a place that nothing free lies behind."""
        if self._free and sum(self._free[-1]) == end:
            return self._free[-1][1]
        return 0
