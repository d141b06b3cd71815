"""Which configuration a launch has: forced, or by the heuristics here.

Compiled ahead of time by Triton 3.7.1 for sm_80, sm_90 and sm_100, none of what the heuristics
choose spills: bf16, fp16, float32, TF32 and mixed dtypes, both sides, batches at any distance, rows
of 5461 elements. No speed has been measured. Tiles of channels x directions x depth, and of
channels x depth x directions, with the registers of a thread, 255 being the end, at the worst
variant, where accesses are 16 bytes wide / where they are as narrow as an element:

    project  bf16  128 x 256 x 64  255 / 255    update  bf16  128 x 256 x 32  255 / 255
                   128 x 128 x 64  215 / 254                  128 x 128 x 32  174 / 248
                    64 x 128 x 64  164 / -                     64 x  64 x 32  128 / 222
                    64 x  64 x 64  200 / -            fp32  128 x 128 x 16  255 / 168
             fp32  128 x 128 x 32  255 / 254                   64 x  64 x 16  126 / 235
                    64 x  64 x 32  254 / -

`python -m bench.triton_compile`, record in bench/results/triton-compile.json.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import triton

from ..contract import Side

# Offsets within a tile have 32 bits: see `obstacle`.
LARGEST_TILE = 256

# Channels a program of operation 2, which waits for memory: short loops, many programs.
SCALE_BLOCK = 256
SCALE_WARPS = 4

# By operation and bytes of an operand: how much of the reduction goes through shared memory at a
# time, and tiles of channels x directions or of channels x depth, from large to small. A large tile
# reads less through the L2 cache, which bounds a product of 64 x 64 tiles.
_TILES = {
    ("project", 2): (64, ((128, 256), (128, 128), (64, 128), (64, 64))),
    ("project", 4): (32, ((128, 128), (64, 64))),
    ("update", 2): (32, ((128, 256), (128, 128), (64, 64))),
    ("update", 4): (16, ((128, 128), (64, 64))),
}

# Of operation 1 with two dtypes: three TF32 products, which take registers.
_MIXED_TILES = ((64, 128), (64, 64))

# A tile size is taken if its tiles occupy this share of the processors.
_OCCUPIED = 0.75


class Config(NamedTuple):
    """Tiles of channels, directions and depth, and how a kernel is compiled and launched."""

    channels: int
    rank: int
    depth: int
    cuts: int  # times that the epilogue halves its tile
    warps: int
    stages: int
    split: int = 1  # parts of operation 1's reduction
    registers: int = 255

    def options(self) -> dict[str, int]:
        """As the kernels and Triton call them."""
        return {
            "BC": self.channels,
            "BR": self.rank,
            "BD": self.depth,
            "CUTS": self.cuts,
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
    # Whether every matrix, in operation 3 every row too, begins at a multiple of 16 bytes.
    wide: bool = True

    @property
    def itemsize(self) -> int:
        """Bytes of an operand on its way into the product."""
        return max(dtype.itemsize for dtype in self.dtypes)


class Gpu(NamedTuple):
    """What a configuration depends on of the device."""

    name: str
    processors: int
    shared_bytes: int  # that one block can have
    l2_bytes: int


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU; for the interpreter one whose few processors make small matrices split.

    The meta device stands for the current GPU, or without one for the interpreter's.
    """
    if device.type == "meta" and torch.cuda.is_available():
        device = torch.device("cuda")
    if device.type != "cuda":
        return Gpu("interpreter", 64, 227 * 1024, 50 * 2**20)
    properties = torch.cuda.get_device_properties(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    limits = triton.runtime.driver.active.utils.get_device_properties(index)
    return Gpu(
        properties.name,
        properties.multi_processor_count,
        limits["max_shared_mem"],
        properties.L2_cache_size,
    )


def config_of(operation: str, problem: Problem, gpu: Gpu) -> Config:
    """The configuration of an operation: "project", which is the first, or "update", the third."""
    return _forced.get(operation) or _choice(operation, problem, gpu)


def sources() -> dict[str, str]:
    """Where the configurations come from, for people to read."""
    names = ("project", "update")
    return {name: "forced" if name in _forced else "heuristic tiles" for name in names}


_forced: dict[str, Config] = {}


@contextmanager
def forced(**configs: Config | None) -> Iterator[None]:
    """Batches prepared within it have these configurations; None leaves an operation as it is."""
    before = _forced.copy()
    _forced.update({name: config for name, config in configs.items() if config})
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def candidates(operation: str, problem: Problem, gpu: Gpu) -> list[Config]:
    """Configurations that are worth measuring; none of them spills."""
    return [
        config._replace(split=split, stages=stages)
        for config in _configs(operation, problem, gpu)
        for split in ((1, 2, 4, 8, 16) if operation == "project" else (1,))
        # The sum of 128 x 256 partial sums spills.
        if split == 1 or (split * config.depth < problem.depth and config.rank <= 128)
        for stages in (2, 3, 4)
        if stages * _stage_bytes(operation, config, problem.itemsize) <= gpu.shared_bytes
    ]


@functools.lru_cache(maxsize=4096)
def _choice(operation: str, problem: Problem, gpu: Gpu) -> Config:
    for config in _configs(operation, problem, gpu):
        tiles = problem.matrices * triton.cdiv(problem.channels, config.channels)
        if operation == "project":
            tiles *= triton.cdiv(problem.rank, config.rank)
        else:
            tiles *= triton.cdiv(problem.depth, config.depth)
        if tiles >= _OCCUPIED * gpu.processors:
            return config
    if operation == "update":
        return config
    # A part is at least 512 entries deep: below that its share of the workspace's traffic, 8 bytes
    # an element of R and part, outweighs the product.
    split = min(gpu.processors // max(tiles, 1), problem.depth // 512, 16)
    return config._replace(split=max(split, 1))


def _configs(operation: str, problem: Problem, gpu: Gpu) -> Iterator[Config]:
    """From large to small tiles, with as many stages as fit, 3 at most.

    Where accesses are as narrow as an element, each has an address of its own, which takes
    registers: no largest tiles, and half of the projection's depth.
    """
    size = problem.itemsize
    step, tiles = _TILES[operation, size]
    mixed = problem.dtypes[0] is not problem.dtypes[1]
    for channels, width in _MIXED_TILES if mixed else tiles:
        if operation == "project":
            narrow_fits = width <= 128
            width = rank = _tile(problem.rank, width)
            depth = step // (1 if problem.wide else 2)
            # Pieces of 16 columns.
            piece = 16
        else:
            narrow_fits = channels * width * size <= 128 * 128 * 2
            depth, rank = width, _tile(problem.rank, step)
            # Pieces of 64 bytes of W a row, of which the next one is loaded already.
            piece = 64 // size
        # A float32 product is a sum of FMAs, whose operands take registers of their own.
        warps = 8 if size == 4 or channels * width >= 64 * 128 else 4
        config = Config(channels, rank, depth, (width // piece).bit_length() - 1, warps, stages=1)
        stages = min(3, gpu.shared_bytes // _stage_bytes(operation, config, size))
        if stages and (problem.wide or narrow_fits):
            yield config._replace(stages=stages)


def _stage_bytes(operation: str, config: Config, size: int) -> int:
    """Of shared memory, at most: operation 3 holds N and R in float32, and P."""
    if operation == "project":
        return config.depth * (config.channels + config.rank) * size
    return config.rank * (config.channels * 2 * 4 + config.depth * size)


def _tile(size: int, largest: int) -> int:
    """The smallest power of two that holds the size, at least 16, which a product needs."""
    return min(largest, max(16, 1 << max(size - 1, 0).bit_length()))
