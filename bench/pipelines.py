"""Do copies and products that run on their own keep out of each other's shared memory?

Triton cuts a loop into stages: copies into slots of shared memory, and the products that read them,
begin in one turn and are waited for in a later one. Where a copy into a slot begins while a product
reads it, results are wrong now and then, which no interpreter shows. `follow` takes a kernel as
TTGIR, Triton's last form that names its buffers, runs its loops on integers and keeps what is
pending. A hazard is

    something written where a pending product reads,
    something read or written where a copy is pending,
    an accumulator read while a product into it is pending (sm_100; on sm_90 ptxas takes care).

Threads that read and write at once are not looked at: the barriers between them come later. Of a
grid the first program alone is followed: `Course.missed` has what it did not come by.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

# Locations have parentheses within parentheses.
_LOCATION = re.compile(r" ?loc\((?:[^()]|\([^()]*\))*\)")
_VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")
_OPERATION = re.compile(r'(?:(%[^=]*?) = )?"?([a-z]\w*(?:\.\w+)*)"?(.*)')


@dataclass
class Course:
    """What was seen: hazards, each kind once, and how far copies and products overlap."""

    hazards: list[str] = field(default_factory=list)
    copies: int = 0  # that began
    overlapping: int = 0  # of those, while a product was pending
    missed: set[str] = field(default_factory=set)  # copies and products that were not reached


def follow(ttgir: str, **integers: int) -> Course:
    """Runs a kernel, program 0 of its grid, with these values of its integer arguments.

    Raises:
        ValueError: an operation on shared memory that is not known here, or under a condition or in
            a loop of which the integers do not tell enough.
    """
    machine, operations = _Machine(integers), _parsed(ttgir)
    machine.run(operations)
    machine.course.missed = {
        str(each) for each in _all(operations) if each.begins and each.line not in machine.reached
    }
    return machine.course


@dataclass
class _Operation:
    name: str
    results: list[str]
    text: str  # behind the name
    line: int
    regions: list[list[_Operation]] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.name} in line {self.line}"

    @property
    def begins(self) -> bool:
        """Whether something begins there that is waited for elsewhere."""
        return self.name.endswith(("async_copy_global_to_local", "warp_group_dot", "tc_gen5_mma"))

    @property
    def operands(self) -> list[str]:
        return _VALUE.findall(self.text)

    @property
    def is_of_memory(self) -> bool:
        """Whether it, or anything in it, deals with shared memory or is asynchronous."""
        inner = (each for region in self.regions for each in region)
        own = "memdesc" in self.text or "async" in self.name or self.name.startswith("ttng.")
        return own or any(each.is_of_memory for each in inner)


def _parsed(ttgir: str) -> list[_Operation]:
    """The operations of the module, an operation a line, with those of its regions."""
    top: list[_Operation] = []
    regions = [top]
    for number, raw in enumerate(ttgir.splitlines(), 1):
        line = _LOCATION.sub("", raw).strip()
        if line.startswith("}"):
            regions.pop()
            if not line.endswith("{"):
                continue
        elif found := _OPERATION.fullmatch(line):
            left, name, text = found.groups()
            regions[-1].append(_Operation(name, _results(left or ""), text, number))
        else:
            continue  # aliases, labels of blocks
        if line.endswith("{"):
            region: list[_Operation] = []
            regions[-1][-1].regions.append(region)
            regions.append(region)
    return top


def _all(operations: list[_Operation]) -> Iterator[_Operation]:
    """Those of their regions, too."""
    for operation in operations:
        yield operation
        for region in operation.regions:
            yield from _all(region)


def _results(left: str) -> list[str]:
    """`%a` or `%a, %b`, or `%a:3` for `%a#0` to `%a#2`."""
    found = []
    for each in filter(None, left.split(", ")):
        name, _, count = each.partition(":")
        found += [f"{name}#{index}" for index in range(int(count))] if count else [name]
    return found


class _View(NamedTuple):
    """A slot of a buffer, or all of it."""

    buffer: str
    slot: int | None = None

    def meets(self, other: _View) -> bool:
        same = self.slot == other.slot or None in (self.slot, other.slot)
        return self.buffer == other.buffer and same

    def __str__(self) -> str:
        return self.buffer if self.slot is None else f"{self.buffer}[{self.slot}]"


class _Product(NamedTuple):
    reads: list[_View]
    result: _View | None = None  # on sm_100
    barrier: _View | None = None  # that tells its end


_Value = int | _View | None  # None: not known


class _Machine:
    """Values and memory while a kernel runs."""

    def __init__(self, integers: dict[str, int]) -> None:
        self.course = Course()
        self.reached: set[int] = set()  # lines
        self._integers = integers
        self._values: dict[str, _Value] = {}
        self._copies: list[list[_View]] = [[]]  # pending, in groups, of which the last is open
        self._products: list[_Product] = []  # pending, as they began
        self._phases: dict[_View, int] = {}  # of barriers: how often each was completed

    def run(self, operations: list[_Operation]) -> list[_Value]:
        """Runs them; returns what they yield."""
        for operation in operations:
            if operation.name == "scf.yield":
                return self._known(operation.operands)
            results = self._step(operation)
            for name, value in zip(operation.results, results, strict=False):
                self._values[name] = value
        return []

    def _known(self, names: Iterable[str]) -> list[_Value]:
        return [self._values.get(name) for name in names]

    def _step(self, operation: _Operation) -> list[_Value]:
        """The results, those that are not known left out or None."""
        self.reached.add(operation.line)
        for name in operation.results:
            self._values[name] = None
        kind = operation.name.removeprefix("ttg.").removeprefix("ttng.").replace(".", "_")
        step: Callable[[_Operation], list[_Value]] | None = getattr(self, f"_{kind}", None)
        if step is not None:
            return step(operation)
        if operation.name in _INTEGERS:
            values = self._known(operation.operands)
            if all(isinstance(value, int) for value in values):
                return [_INTEGERS[operation.name](*values)]
            return []
        if operation.is_of_memory:
            raise ValueError(f"cannot follow {operation.name}{operation.text}")
        return []

    def _hazard(self, text: str) -> None:
        if text not in self.course.hazards:
            self.course.hazards.append(text)

    # Control.

    def _module(self, operation: _Operation) -> list[_Value]:
        return self.run(operation.regions[0])

    def _tt_func(self, operation: _Operation) -> list[_Value]:
        for name, value in self._integers.items():
            self._values[f"%{name}"] = value
        return self.run(operation.regions[0])

    def _scf_for(self, operation: _Operation) -> list[_Value]:
        turn, *bounds = operation.operands
        inner, values = bounds[3::2], self._known(bounds[4::2])
        begin, end, step = self._known(bounds[:3])
        if not (isinstance(begin, int) and isinstance(end, int) and isinstance(step, int)):
            return self._skipped(operation)
        for self._values[turn] in range(begin, end, step):
            self._values.update(zip(inner, values, strict=True))
            values = self.run(operation.regions[0])
        return values

    def _scf_if(self, operation: _Operation) -> list[_Value]:
        (condition,) = self._known(operation.operands[:1])
        if condition is None:
            return self._skipped(operation)
        branch = 0 if condition else 1
        return self.run(operation.regions[branch]) if branch < len(operation.regions) else []

    def _skipped(self, operation: _Operation) -> list[_Value]:
        if operation.is_of_memory:
            raise ValueError(f"cannot follow what hangs on {operation.name}{operation.text}")
        return []

    # Integers.

    def _arith_constant(self, operation: _Operation) -> list[_Value]:
        found = re.match(r" (true|false|-?\d+)\b(?! : f|\.)", operation.text)
        return [int(_TRUTH.get(found[1], found[1]))] if found else []

    def _arith_cmpi(self, operation: _Operation) -> list[_Value]:
        left, right = self._known(operation.operands)
        if not (isinstance(left, int) and isinstance(right, int)):
            return []
        predicate = operation.text.split(",")[0].strip()
        if predicate not in _COMPARISONS:
            raise ValueError(f"cannot compare by {predicate}: {operation}")
        return [int(_COMPARISONS[predicate](left, right))]

    def _arith_select(self, operation: _Operation) -> list[_Value]:
        condition, *choices = self._known(operation.operands)
        return [] if condition is None else [choices[0 if condition else 1]]

    def _tt_get_program_id(self, operation: _Operation) -> list[_Value]:
        return [0]

    # Buffers.

    def _view(self, name: str) -> _View:
        view = self._values.get(name)
        if not isinstance(view, _View):
            raise ValueError(f"cannot tell where {name} is")
        return view

    def _local_alloc(self, operation: _Operation) -> list[_Value]:
        view = _View(operation.results[0])
        if operation.operands:
            self._written(view, "written")
        return [view]

    _tmem_alloc = _local_alloc

    def _memdesc_index(self, operation: _Operation) -> list[_Value]:
        whole, index = operation.operands
        slot = self._values.get(index)
        return [_View(self._view(whole).buffer, slot if isinstance(slot, int) else None)]

    def _same_place(self, operation: _Operation) -> list[_Value]:
        return [self._view(operation.operands[0])]

    _memdesc_trans = _memdesc_reshape = _memdesc_reinterpret = _same_place
    _memdesc_subslice = _tmem_subslice = _same_place

    def _local_load(self, operation: _Operation) -> list[_Value]:
        self._read(self._view(operation.operands[0]))
        return []

    def _local_store(self, operation: _Operation) -> list[_Value]:
        self._written(self._view(operation.operands[1]), "written")
        return []

    def _local_dealloc(self, operation: _Operation) -> list[_Value]:
        self._written(self._view(operation.operands[0]), "given up")
        return []

    def _read(self, view: _View) -> None:
        if any(view.meets(other) for group in self._copies for other in group):
            self._hazard(f"{view} is read while a copy into it is pending")

    def _written(self, view: _View, how: str) -> None:
        if any(view.meets(other) for group in self._copies for other in group):
            self._hazard(f"{view} is {how} while a copy into it is pending")
        places = [place for product in self._products for place in (*product.reads, product.result)]
        if any(place and view.meets(place) for place in places):
            self._hazard(f"{view} is {how} while a product of it is pending")

    # Copies.

    def _async_copy_global_to_local(self, operation: _Operation) -> list[_Value]:
        view = self._view(operation.operands[1])
        self._written(view, "copied to")
        self._copies[-1].append(view)
        self.course.copies += 1
        self.course.overlapping += bool(self._products)
        return []

    def _async_commit_group(self, operation: _Operation) -> list[_Value]:
        self._copies.append([])
        return []

    def _async_wait(self, operation: _Operation) -> list[_Value]:
        # What is not committed is not waited for.
        committed = len(self._copies) - 1
        del self._copies[: max(committed - _attribute(operation, "num"), 0)]
        return []

    # Products of sm_90.

    def _warp_group_dot(self, operation: _Operation) -> list[_Value]:
        self._begin(operation)
        if "isAsync = true" not in operation.text:
            self._products.clear()
        return []

    def _warp_group_dot_wait(self, operation: _Operation) -> list[_Value]:
        ended = len(self._products) - _attribute(operation, "pendings")
        del self._products[: max(ended, 0)]
        return self._known(operation.operands)

    def _begin(self, operation: _Operation, *rest: _View | None) -> None:
        reads = [x for x in self._known(operation.operands[:2]) if isinstance(x, _View)]
        for view in reads:
            self._read(view)
        self._products.append(_Product(reads, *rest))

    # Products of sm_100.

    def _tc_gen5_mma(self, operation: _Operation) -> list[_Value]:
        unbracketed = re.sub(r"\[[^]]*\]", "", operation.text)
        _, _, result, _, wanted, *barriers = _VALUE.findall(unbracketed)
        if self._values.get(wanted) == 0:
            return []
        if "is_async" not in operation.text or len(barriers) != 1:
            raise ValueError(f"cannot tell when it ends: {operation.name}{operation.text}")
        self._begin(operation, self._view(result), self._view(barriers[0]))
        return []

    def _wait_barrier(self, operation: _Operation) -> list[_Value]:
        name, parity = _VALUE.findall(operation.text)[:2]
        barrier, phase = self._view(name), self._values.get(parity)
        if phase is None:
            raise ValueError(f"cannot tell what is waited for: {operation.text}")
        if barrier not in self._phases:
            raise ValueError(f"nothing has made the barrier of {operation}")
        if self._phases[barrier] % 2 != phase:
            return []
        ends = [i for i, product in enumerate(self._products) if product.barrier == barrier]
        if not ends:
            self._hazard(f"{barrier} is waited for, and nothing pending ends there")
            return []
        # Products end in the order in which they began.
        del self._products[: ends[0] + 1]
        self._phases[barrier] += 1
        return []

    def _init_barrier(self, operation: _Operation) -> list[_Value]:
        self._phases[self._view(operation.operands[0])] = 0
        return []

    def _nothing(self, operation: _Operation) -> list[_Value]:
        return []

    _inval_barrier = _fence_async_shared = _nothing

    def _tmem_load(self, operation: _Operation) -> list[_Value]:
        view = self._view(operation.operands[0])
        if any(p.result and view.meets(p.result) for p in self._products):
            self._hazard(f"{view} is read while a product into it is pending")
        return []

    def _tmem_store(self, operation: _Operation) -> list[_Value]:
        self._written(self._view(operation.operands[1]), "written")
        return []


def _of_unsigned(function: Callable[[int, int], bool]) -> Callable[[int, int], bool]:
    """Whatever the width: a number below 0 stands for one that is larger than all others."""
    return lambda left, right: function(left % 2**64, right % 2**64)


_TRUTH = {"true": 1, "false": 0}
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "slt": operator.lt,
    "sle": operator.le,
    "sgt": operator.gt,
    "sge": operator.ge,
    "ult": _of_unsigned(operator.lt),
    "ule": _of_unsigned(operator.le),
    "ugt": _of_unsigned(operator.gt),
    "uge": _of_unsigned(operator.ge),
}


def _quotient(left: int, right: int) -> int | None:
    """Towards 0."""
    if not right:
        return None
    return abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)


def _remainder(left: int, right: int) -> int | None:
    quotient = _quotient(left, right)
    return None if quotient is None else left - quotient * right


_INTEGERS: dict[str, Callable[..., int | None]] = {
    "arith.addi": operator.add,
    "arith.subi": operator.sub,
    "arith.muli": operator.mul,
    "arith.divsi": _quotient,
    "arith.remsi": _remainder,
    "arith.andi": operator.and_,
    "arith.ori": operator.or_,
    "arith.xori": operator.xor,
    "arith.shli": operator.lshift,
    "arith.shrsi": operator.rshift,
    "arith.minsi": min,
    "arith.maxsi": max,
    "arith.extsi": operator.pos,
    "arith.extui": operator.pos,
    "arith.trunci": operator.pos,
}


def _attribute(operation: _Operation, name: str) -> int:
    found = re.search(rf"\b{name} = (\d+)", operation.text)
    if found is None:
        raise ValueError(f"cannot tell {name} of {operation}")
    return int(found[1])
