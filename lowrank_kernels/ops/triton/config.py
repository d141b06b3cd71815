"""Which configuration a launch has: forced, or the one that `model` predicts to be the fastest.

Compiled ahead of time by Triton 3.7.1 for sm_80, sm_90 and sm_100, most of what may be chosen does
not spill; what does is in CONTRIBUTING.md. No speed has been measured.

`python -m bench.triton_compile`, record in bench/results/triton-compile.json.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import NamedTuple

import torch
import triton

from ..contract import CHANNELS_A_SCALE, Side
from .model import RATES, Build, Rates, project_work, resident, resident_work, seconds, update_work

# Of an H200 in float32, without tensor cores.
_FMA_FLOPS = 60e12

# Offsets within a tile have 32 bits: see `obstacle`.
LARGEST_TILE = 256

# Channels a program of operation 2, which waits for memory: short loops, many programs.
SCALE_BLOCK = 256
SCALE_SWEEP = 2048  # that the last of them multiplies at a time
SCALE_WARPS = 4

# Elements of a row of G that a program copies, and of a batch from which on a copy saves more than
# the time of its launch.
PAD_BLOCK = 2048
PAD_WARPS = 4
PAD_FROM = 2**20

# Elements of B that a program forms, along its contiguous axis and the other.
COMBINE_TILE = (128, 32)
COMBINE_WARPS = 4

# Directions of a group of channels whose moments a program steps where R is given. Of 64, accesses
# by elements take 215 registers beside codes, and single rows spill; of 32 at most 128.
MOMENTS_RANK = 32
MOMENTS_WARPS = 8

# Groups of codes of a parameter without a rank that a program has: each warp two.
ADAMW_GROUPS = 8
ADAMW_WARPS = 4


class _Tile(NamedTuple):
    """Of channels x directions, or of channels x depth, and how it is compiled."""

    channels: int
    width: int
    warps: int
    piece: int  # columns of the epilogue at a time
    # Of a thread at most: below 255 so that a processor holds more than one block, which hide each
    # other's epilogues.
    registers: int = 255
    # Whether it spills where an access is narrow, or a product's operand is in registers.
    even: bool = False
    resident: bool = False  # B stays in a block, of a rank up to `_RESIDENT_RANK`


# P, W and G of a larger rank have no room beside B.
_RESIDENT_RANK = 128

# By operation and bytes of an operand: how much of the reduction goes through shared memory at a
# time, and tiles. A large tile reads less through the L2 cache, which bounds a product of 64 x 64
# tiles. A float32 product is a sum of FMAs, whose operands take registers of their own.
_TILES = {
    ("project", 2): (
        64,
        (
            _Tile(128, 256, 8, 16),
            _Tile(128, 128, 8, 8, registers=128, even=True),
            _Tile(128, 128, 8, 16),
            _Tile(64, 128, 8, 16),
            _Tile(64, 64, 4, 16, registers=168, even=True),
            _Tile(64, 64, 4, 16),
        ),
    ),
    ("project", 4): (32, (_Tile(128, 128, 8, 8), _Tile(64, 64, 8, 16))),
    ("update", 2): (
        64,
        (
            _Tile(128, 256, 8, 32, even=True),
            _Tile(128, 128, 8, 32, registers=128, even=True),
            _Tile(128, 128, 8, 16),
            _Tile(64, 64, 4, 32),
            _Tile(128, 128, 8, 128, even=True, resident=True),
            _Tile(128, 64, 8, 64, registers=128, even=True, resident=True),
        ),
    ),
    ("update", 4): (16, (_Tile(128, 128, 8, 8), _Tile(64, 64, 8, 16))),
}

# Of operation 1 with two dtypes: three TF32 products, which take registers.
_MIXED_TILES = (_Tile(64, 128, 8, 16), _Tile(64, 64, 8, 16))


class Config(NamedTuple):
    """Tiles of channels, directions and depth, and how a kernel is compiled and launched."""

    channels: int
    rank: int
    depth: int
    cuts: int  # times that the epilogue halves its tile
    warps: int
    stages: int
    split: int = 1  # parts of operation 1's reduction, or of a resident kernel's depth
    registers: int = 255
    resident: bool = False  # which kernel operation 3 is

    def options(self) -> dict[str, int]:
        """As the kernels and Triton call them."""
        own = {"STAGES": self.stages} if self.resident else {"CUTS": self.cuts}
        return {
            "BC": self.channels,
            "BR": self.rank,
            "BD": self.depth,
            **own,
            "num_warps": self.warps,
            "num_stages": self.stages,
            "maxnreg": self.registers,
        }


class Problem(NamedTuple):
    """What a configuration is chosen for: a batch of matrices, in channel coordinates."""

    side: Side
    channels: int
    depth: int
    rank: int
    matrices: int
    dtypes: tuple[torch.dtype, torch.dtype]  # of the product's operands
    residual: bool = True
    wide: bool = True  # whether every matrix begins at a multiple of 16 bytes
    even: bool = True  # whether every row of a matrix does, as its first
    moments: torch.dtype = torch.float32  # as they are stored

    @property
    def itemsize(self) -> int:
        """Bytes of an operand on its way into the product."""
        return max(dtype.itemsize for dtype in self.dtypes)

    @property
    def coded(self) -> bool:
        """Whether moments are codes, with scales."""
        return self.moments is torch.int8

    @property
    def moment_bytes(self) -> float:
        """Of an element of M or of V, with its share of a scale."""
        return self.moments.itemsize + (4 / CHANNELS_A_SCALE if self.coded else 0)


class Gpu(NamedTuple):
    """What a configuration depends on of the device."""

    name: str
    processors: int
    shared_bytes: int  # that one block can have
    capability: int = 90


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU; for the interpreter one whose few processors make small matrices split.

    The meta device stands for the current GPU, or without one for the interpreter's.
    """
    if device.type == "meta" and torch.cuda.is_available():
        device = torch.device("cuda")
    if device.type != "cuda":
        return Gpu("interpreter", 64, 227 * 1024)
    properties = torch.cuda.get_device_properties(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    limits = triton.runtime.driver.active.utils.get_device_properties(index)
    return Gpu(
        properties.name,
        properties.multi_processor_count,
        limits["max_shared_mem"],
        10 * properties.major + properties.minor,
    )


def config_of(operation: str, problem: Problem, gpu: Gpu) -> Config:
    """The configuration of an operation: "project", which is the first, or "update", the third."""
    return _forced.get().get(operation) or _choice(operation, problem, gpu)


def sources() -> dict[str, str]:
    """Where the configurations come from, for people to read."""
    names = ("project", "update")
    return {name: "forced" if name in _forced.get() else "heuristic tiles" for name in names}


# Of a thread: what one of them tries, another must not get.
_forced: ContextVar[dict[str, Config]] = ContextVar("forced", default={})  # noqa: B039


@contextmanager
def forced(**configs: Config | None) -> Iterator[None]:
    """Batches prepared within it have these configurations; None leaves an operation as it is."""
    own = {name: config for name, config in configs.items() if config}
    before = _forced.set(_forced.get() | own)
    try:
        yield
    finally:
        _forced.reset(before)


def candidates(operation: str, problem: Problem, gpu: Gpu) -> list[Config]:
    """Configurations that are worth measuring."""
    return [
        config._replace(split=split, stages=stages)
        for config in _configs(operation, problem, gpu)
        for split in (1, 2, 4, 8, 16)
        if split == 1
        or (split * config.depth < problem.depth and _may_split(operation, problem, config))
        for stages in (2, 3, 4)
        if stages * _stage_bytes(operation, config, problem.itemsize) <= gpu.shared_bytes
    ]


@functools.lru_cache(maxsize=4096)
def _choice(operation: str, problem: Problem, gpu: Gpu) -> Config:
    """What the model takes for the fastest; of equals the first."""
    return min(
        (
            config._replace(split=split)
            for config in _configs(operation, problem, gpu)
            for split in _splits(operation, problem, config, gpu)
        ),
        key=lambda config: predicted_seconds(operation, problem, config, gpu),
    )


def predicted_seconds(operation: str, problem: Problem, config: Config, gpu: Gpu) -> float:
    """By `model`, with the registers that the configuration allows."""
    of_update = resident_work if config.resident else update_work
    work = (project_work if operation == "project" else of_update)(problem, config)
    return seconds(work, _build(operation, problem, config), _rates(problem.itemsize, gpu))


def _build(operation: str, problem: Problem, config: Config) -> Build:
    shared = config.stages * _stage_bytes(operation, config, problem.itemsize)
    pieces = 1 << config.cuts
    # Operation 3 has its next piece loaded. A resident B is waited for: N, R and the factors.
    rounds = pieces if operation == "project" else 2 if config.resident else max(1, pieces - 1)
    return Build(resident(config.registers, config.warps, shared), rounds)


@functools.cache
def _rates(itemsize: int, gpu: Gpu) -> Rates:
    """Of a GPU as an H200 of its number of processors; float32 products are FMAs."""
    share = gpu.processors / RATES.processors
    return replace(
        RATES,
        processors=gpu.processors,
        flops=share * (RATES.flops if itemsize == 2 else _FMA_FLOPS),
        memory=share * RATES.memory,
        l2=share * RATES.l2,
    )


def _splits(operation: str, problem: Problem, config: Config, gpu: Gpu) -> tuple[int, ...]:
    """Parts of operation 1's reduction: 1, and as many as give every place of a block one; parts of
    a resident kernel's depth that fill the places once, twice or four times.

    A part of a reduction is at least 512 entries deep: below that its share of the workspace's
    traffic, 8 bytes an element of R and part, outweighs the product.
    """
    tiles = problem.matrices * triton.cdiv(problem.channels, config.channels)
    places = gpu.processors * _build(operation, problem, config).resident
    if config.resident:
        most = triton.cdiv(problem.depth, config.depth)
        return tuple(max(1, min(times * places // max(tiles, 1), most)) for times in (1, 2, 4))
    if not _may_split(operation, problem, config):
        return (1,)
    tiles *= triton.cdiv(problem.rank, config.rank)
    return 1, max(1, min(places // max(tiles, 1), problem.depth // 512, 16))


def _may_split(operation: str, problem: Problem, config: Config) -> bool:
    """Where sums fill half of the registers, adding partial sums to them spills; beside codes, a
    quarter.
    """
    if operation == "update":
        return config.resident
    sums = config.channels * config.rank * (2 if problem.coded else 1)
    return sums < 16 * config.warps * config.registers


def _configs(operation: str, problem: Problem, gpu: Gpu) -> Iterator[Config]:
    """From large to small tiles, with as many stages as fit, 3 at most.

    Where accesses are as narrow as an element, each has an address of its own, which takes
    registers: no largest tiles, and half of the projection's depth.
    """
    size = problem.itemsize
    step, tiles = _TILES[operation, size]
    # Of wgmma and tcgen05 operands are in shared memory, of mma.sync in registers.
    wide, from_shared = problem.wide, gpu.capability >= 90
    if operation == "update" and size == 2 and not from_shared:
        step //= 2
    mixed = problem.dtypes[0] is not problem.dtypes[1]
    for tile in _MIXED_TILES if mixed else tiles:
        channels, width, registers = tile.channels, tile.width, tile.registers
        if operation == "project":
            # Beside codes the sums of a larger tile leave no register; on the left, where
            # neighbouring scales are far apart, half of the registers spill.
            halved = registers <= 128 and problem.side is Side.LEFT
            if problem.coded and (width > 128 or halved):
                continue
            narrow_fits = channels * width <= (64 if problem.coded else 128) * 128
            width = rank = _tile(problem.rank, width)
            depth = step // (1 if problem.wide else 2)
        else:
            narrow_fits = channels * width * size <= 128 * 128 * 2
            depth, rank = width, _tile(problem.rank, step)
        # On the left 128 registers spill: operation 3 takes pieces of half the width; operation 1,
        # whose accesses would be narrow then, takes no such tile.
        tight = problem.side is Side.LEFT and registers == 128
        if tight and operation == "project":
            continue
        piece = tile.piece // 2 if tight else tile.piece
        if tile.resident:
            # On the left Triton 3.7.1 does not copy W and G asynchronously on sm_90.
            if problem.rank > _RESIDENT_RANK or problem.side is Side.LEFT:
                continue
            rank = _tile(problem.rank, _RESIDENT_RANK)
        cuts = max(1, width // piece).bit_length() - 1
        common = channels, rank, depth, cuts, tile.warps
        config = Config(*common, stages=1, registers=registers, resident=tile.resident)
        # Registers decide how many blocks share a processor's memory, of which each loses 1 KiB.
        blocks = RATES.registers // (registers * 32 * tile.warps)
        shared = min(gpu.shared_bytes, RATES.shared_bytes // blocks - 1024)
        stages = min(3, shared // _stage_bytes(operation, config, size))
        if tile.even:
            fits = wide and problem.even and from_shared
        else:
            fits = narrow_fits or (wide and (problem.even or from_shared))
        if stages and fits:
            yield config._replace(stages=stages)


def _stage_bytes(operation: str, config: Config, size: int) -> int:
    """Of shared memory, at most: in float32 operation 3 holds N, R and P, else B and P."""
    if operation == "project":
        return config.depth * (config.channels + config.rank) * size
    if config.resident:
        # W and G too; B is in registers, or in as much of shared memory as P.
        return size * (config.rank + 2 * config.channels) * config.depth
    low = 2 * 4 if size == 4 else size
    return config.rank * (config.channels * low + config.depth * size)


def _tile(size: int, largest: int) -> int:
    """The smallest power of two that holds the size, at least 16, which a product needs."""
    return min(largest, max(16, 1 << max(size - 1, 0).bit_length()))
