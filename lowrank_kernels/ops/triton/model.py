"""How long a kernel takes, predicted from its tiles: what the heuristics compare.

Arithmetic with the rates of `Rates`, most of which are assumptions about an H200; other GPUs are
taken for H200s of their number of processors. It orders configurations. A measurement corrects the
constants, here; `python -m bench.predict` shows what they say of compiled kernels.

A kernel is a grid of blocks, of which a processor holds as many as its registers and its shared
memory allow. They run in waves. A block has a loop of products, then an epilogue:

    loop      the slowest of: FLOPs at the processor's rate; bytes through L2 at its share of L2's
              rate; bytes from and to memory at its share of memory's rate; bytes in flight a round
              trip
    epilogue  the slower of: bytes at its share of memory's rate; rounds of loads that wait for one
              another, a round trip each
    wave      loop + epilogue where a block is alone on its processor; else the longer of the two
              and what it does not hide of the shorter

and no kernel takes less than its bytes or its FLOPs do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .config import Config, Problem


@dataclass(frozen=True)
class Rates:
    """An H200 as it is assumed to be; seconds, bytes a second, FLOPs a second."""

    processors: int = 132
    registers: int = 65536  # of a processor, as all below up to `blocks`
    shared_bytes: int = 228 * 1024
    threads: int = 2048
    blocks: int = 32
    flops: float = 790e12  # of a large product of torch's, bf16
    memory: float = 4.3e12  # of a copy
    streaming: float = 0.92  # share of it that a kernel reaches
    l2: float = 7.3e12  # what all processors read; 620 TFLOP/s of 128 x 256 tiles take as much
    l2_of_one: float = 110e9  # what one processor can read
    round_trip: float = 0.75e-6  # of a load from memory
    l2_round_trip: float = 0.35e-6  # of a load that L2 holds
    product: float = 0.85  # share of `flops` of an asynchronous product from shared memory
    product_from_registers: float = 0.62  # which waits for what forms its operand
    step_by_registers: float = 1.6e-6  # of a loop whose loads are narrow and not asynchronous
    fill: float = 1.5e-6  # of a pipeline, once a wave
    launch: float = 2e-6  # from the end of a kernel to the work of the next one
    hidden: float = 0.65  # share of the shorter of loop and epilogue that another block hides


RATES = Rates()


class Work(NamedTuple):
    """What a kernel does; FLOPs and bytes of one block unless it says otherwise."""

    blocks: int  # of the grid
    flops: float
    loop_bytes: float  # that the loop reads through L2
    stream_bytes: float  # of them from memory, and what the loop writes there
    epilogue_bytes: float
    total_bytes: float  # of the grid, from and to memory
    steps: int  # of the loop
    step_bytes: float  # that a step reads
    stages: int
    trips: int = 0  # to L2 and back, one after another, of the grid's last block

    @property
    def flops_a_byte(self) -> float:
        """Of the product, by bytes that processors read through L2."""
        return self.flops / self.loop_bytes if self.loop_bytes else 0.0

    @property
    def bytes_in_flight(self) -> float:
        """Of a block's loop."""
        return max(1, self.stages - 1) * self.step_bytes


class Build(NamedTuple):
    """How a kernel is compiled.

    Attributes:
        resident: blocks that a processor holds.
        rounds: groups of loads behind the last product, each behind a store.
        asynchronous: whether both operands of the product ride the copy pipeline.
        from_registers: whether an operand of the product comes from registers.
    """

    resident: int
    rounds: int
    asynchronous: bool = True
    from_registers: bool = False


def resident(registers: int, warps: int, shared: int, rates: Rates = RATES) -> int:
    """Blocks that a processor holds, at least 1. Registers are given out by 8 to a thread."""
    threads = 32 * warps
    by_registers = rates.registers // (threads * -(-max(registers, 1) // 8) * 8)
    # The system has 1 KiB of each block's shared memory.
    by_shared = rates.shared_bytes // (shared + 1024)
    return max(1, min(by_registers, by_shared, rates.threads // threads, rates.blocks))


def seconds(work: Work, build: Build, rates: Rates = RATES) -> float:
    """Of one launch."""
    if not work.blocks:
        return 0.0
    at_once = build.resident * rates.processors
    whole, rest = divmod(work.blocks, at_once)
    total = rates.launch + work.trips * rates.l2_round_trip
    total += whole * _wave(work, build, rates, at_once)
    if rest:
        total += _wave(work, build, rates, rest)
    flops = work.blocks * work.flops / rates.flops
    return max(total, work.total_bytes / (rates.memory * rates.streaming), flops)


def _wave(work: Work, build: Build, rates: Rates, active: int) -> float:
    processors = min(active, rates.processors)
    together = -(-active // processors)
    share = rates.product_from_registers if build.from_registers else rates.product
    # Of one processor.
    flops = share * rates.flops / rates.processors
    memory = rates.memory * rates.streaming / processors
    l2 = min(rates.l2 / processors, rates.l2_of_one)
    waiting = 0.0
    if work.steps:
        a_step = work.step_bytes / work.bytes_in_flight * rates.round_trip
        waiting = work.steps * (a_step if build.asynchronous else rates.step_by_registers)
    loop = max(
        together * work.flops / flops,
        together * work.loop_bytes / l2,
        together * work.stream_bytes / memory,
        waiting,
    )
    epilogue = max(together * work.epilogue_bytes / memory, build.rounds * rates.round_trip)
    if together == 1:
        return rates.fill + loop + epilogue
    return rates.fill + max(loop, epilogue) + (1 - rates.hidden) * min(loop, epilogue)


def project_work(problem: Problem, config: Config) -> Work:
    """Of operation 1."""
    size, split = problem.itemsize, config.split
    tiles_c, tiles_k = -(-problem.channels // config.channels), -(-problem.rank // config.rank)
    blocks = problem.matrices * tiles_c * tiles_k * split
    depth, sides = problem.depth / split, config.channels + config.rank
    # M and V are read and written, N is written, and R for Fira.
    low = 4 * problem.moment_bytes + (8 if problem.residual else 4)
    area = config.channels * config.rank
    partial = 8 * area if split > 1 else 0
    matrix = size * problem.depth * (problem.channels + problem.rank)
    moved = problem.matrices * (matrix + low * problem.channels * problem.rank)
    return Work(
        blocks=blocks,
        flops=2.0 * area * depth,
        loop_bytes=size * sides * depth,
        # Rank tiles are neighbours: one of them reads G from memory.
        stream_bytes=size * config.channels * depth / max(1, tiles_k),
        epilogue_bytes=low * area / split + partial,
        total_bytes=moved + blocks * partial,
        steps=-(-problem.depth // (config.depth * split)),
        step_bytes=size * config.depth * sides,
        stages=config.stages,
    )


def combine_work(problem: Problem, channels: int, directions: int) -> Work:
    """Of B, where it is formed by itself."""
    blocks = -(-problem.channels // channels) * -(-problem.rank // directions) * problem.matrices
    moved = (8 + problem.itemsize) * problem.channels * problem.rank * problem.matrices
    return Work(blocks, 0, 0, 0, moved / max(1, blocks), moved, 0, 0, 1)


def update_work(problem: Problem, config: Config) -> Work:
    """Of operation 3."""
    size = problem.itemsize
    low = size if size < 4 else 8 if problem.residual else 4
    tiles_c, tiles_d = -(-problem.channels // config.channels), -(-problem.depth // config.depth)
    # W is read and written, G is read for Fira.
    full, area = size * (3 if problem.residual else 2), config.channels * config.depth
    of_low = low * config.channels * problem.rank
    return Work(
        blocks=problem.matrices * tiles_c * tiles_d,
        flops=2.0 * area * problem.rank,
        loop_bytes=of_low + size * config.depth * problem.rank,
        stream_bytes=of_low / max(1, tiles_d),
        epilogue_bytes=full * area,
        total_bytes=_moved(problem, full, low),
        steps=-(-problem.rank // config.rank),
        step_bytes=config.rank * (low * config.channels + size * config.depth),
        stages=config.stages,
    )


def resident_work(problem: Problem, config: Config) -> Work:
    """Of operation 3 with B in a block's registers: its loop reads P, W and G."""
    size, split = problem.itemsize, config.split
    tiles_c, tiles_d = -(-problem.channels // config.channels), -(-problem.depth // config.depth)
    steps = -(-tiles_d // split)
    full, area = size * (3 if problem.residual else 2), config.channels * config.depth
    low = 8 if problem.residual else size
    basis = size * config.depth * problem.rank
    read = (full - size) * area
    return Work(
        blocks=problem.matrices * tiles_c * split,
        flops=2.0 * area * problem.rank * steps,
        loop_bytes=(basis + read) * steps,
        stream_bytes=full * area * steps,
        # In front of the loop, not behind it: nothing of it overlaps with the loop either.
        epilogue_bytes=low * config.channels * problem.rank,
        total_bytes=_moved(problem, full, low),
        steps=steps,
        step_bytes=basis + read,
        stages=config.stages,
    )


def _moved(problem: Problem, full: int, low: int) -> float:
    """Bytes of operation 3 from and to memory."""
    basis = problem.itemsize * problem.depth * problem.rank
    low_and_full = problem.channels * (full * problem.depth + low * problem.rank)
    return float(problem.matrices * (basis + low_and_full))
