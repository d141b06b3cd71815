"""Tile sizes of the Triton kernels.

Compiled ahead of time for sm_80, sm_90 and sm_100 (`python -m bench.triton_compile`), these spill
nothing in bf16. In float32 6 of 140 variants spill 2 to 13 instructions at 80 registers, where
ptxas prefers a third block a processor: capped at 128 registers instead, they spill none. No other
property of these sizes has been measured. What lost, in registers of a thread (255 is the end) and
instructions that spill, at the worst of three targets and both sides:

    project 64 x 128, 8 warps       255, 41; at rows of 5461 elements 128, 730
    project 128 x 64, 8 warps       255, 52; at rows of 5461 255, 196
    project 64 x 64, 4 warps        255, 26; at rows of 5461 168, 347
    project 32 x 128, 8 warps       191, 0; at rows of 5461 255, 20; no wgmma and no tcgen05
    project 64 x 64, 8 warps        191, 0; at rows of 5461 255, 0: taken
    update 128 x 128 x 64, 8 warps  255, 6; at rows of 5461 255, 236; sm_80 lacks shared memory
    update 64 x 256 x 32, 8 warps   194, 0; at rows of 5461 255, 218
    update 64 x 128 x 32, 8 warps   182, 0; in float32 128, 2
    update 128 x 64 x 32, 3 stages  174, 0; in float32 128, 7
    update 128 x 64 x 32, 2 stages  178, 0: taken
    update 64 x 64 x 32, 4 warps    72, 4; in float32 with 37 columns 255, 121
    scale, 4 channels a thread      40, 3

The projection's epilogue holds four float32 tiles and their 64-bit addresses beside the
accumulator. Rows of 5461 elements start at odd distances from 16 bytes, so there each element of
those tiles has an address and a mask of its own.
"""

from typing import NamedTuple


class ProjectConfig(NamedTuple):
    """Tiles of channels, directions and depth; parts of the reduction; warps and stages."""

    channels: int
    rank: int
    depth: int
    split: int
    warps: int
    stages: int


class UpdateConfig(NamedTuple):
    """Tiles of channels, depth and directions; warps and stages."""

    channels: int
    depth: int
    rank: int
    warps: int
    stages: int


# One program reads 3 tiles C floats, 2 MB at 11008 channels and rank 1024: many loads in flight.
SCALE_BLOCK = 4096
SCALE_WARPS = 16


def project_config(channels: int, depth: int, rank: int, processors: int) -> ProjectConfig:
    """Tiles of 64 x 64 at most, and enough parts of the reduction to occupy the processors.

    A part is at least 512 entries deep: below that its share of the workspace's traffic, 8 bytes an
    element of R and part, outweighs the product.
    """
    rank_tile = _tile(rank, 64)
    tiles = -(-channels // 64) * -(-rank // rank_tile)
    split = max(1, min(processors // max(tiles, 1), depth // 512, 16))
    return ProjectConfig(64, rank_tile, 64, split, 8 if rank_tile == 64 else 4, 3)


def update_config(channels: int, depth: int, rank: int) -> UpdateConfig:
    """Tiles of 128 x 64 for large matrices, 64 x 64 where those would leave processors idle."""
    rank_tile = _tile(rank, 32)
    if channels * depth >= 128 * 64 * 132:
        return UpdateConfig(128, 64, rank_tile, 8, 2)
    return UpdateConfig(64, 64, rank_tile, 8, 3)


def _tile(size: int, largest: int) -> int:
    """The smallest power of two that holds the size, at least 16, which a product needs."""
    return min(largest, max(16, 1 << (size - 1).bit_length()))
