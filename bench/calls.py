"""How many functions of a package a piece of code goes through, in how many files. No clock.

    way = followed(optimizer.step)
    print(way.calls, way.functions, way.files, way.changes)

What Python's own profiler sees is counted: calls of functions written in Python, in the order in
which they are made. A generator counts when it is entered, not each time that it goes on.
Comprehensions are functions in Python 3.10 and 3.11, and are not from 3.12 on, so that they, and
lambdas and generator expressions beside them, are left out unless they are asked for.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

import lowrank_kernels

PACKAGE = Path(lowrank_kernels.__file__).parent


class Way(NamedTuple):
    """What lies between the call of a function and its return."""

    functions: int  # different ones
    files: int
    changes: int  # calls into another file than the call before
    calls: int

    def within(self, budget: Way) -> bool:
        return all(mine <= most for mine, most in zip(self, budget, strict=True))


def followed(run: Callable[[], object], *, package: Path = PACKAGE, nameless: bool = False) -> Way:
    """The way of a call through a package.

    Args:
        run: what is followed, once.
        package: the folder whose functions count.
        nameless: counts comprehensions, generator expressions and lambdas, too.
    """
    entered = [code for code in _entered(run) if code.co_filename.startswith(f"{package}/")]
    if not nameless:
        entered = [code for code in entered if not code.co_name.startswith("<")]
    files = [code.co_filename for code in entered]
    changes = sum(before != after for before, after in itertools.pairwise(files))
    return Way(len(set(entered)), len(set(files)), changes, len(entered))


def _entered(run: Callable[[], object]) -> list[CodeType]:
    """The code of every Python function that was called, in order."""
    # Frames are kept, so that none is taken for one before it that lay in the same memory.
    seen: dict[FrameType, None] = {}

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            seen.setdefault(frame)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(before)
    return [frame.f_code for frame in seen]
