"""Tile sizes of the Triton kernels.

What decides them, from compiling ahead of time for sm_80, sm_90 and sm_100: the epilogue of the
projection holds four float32 tiles beside the accumulator and spills at 128 x 128.
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


SCALE_BLOCK = 1024
SCALE_WARPS = 8


def project_config(channels: int, depth: int, rank: int, processors: int) -> ProjectConfig:
    """Tiles of 64 channels, and enough parts of the reduction to occupy the processors.

    A part is at least 512 entries deep: below that its share of the workspace's traffic, 8 bytes an
    element of R and part, outweighs the product.
    """
    rank_tile = 128 if rank > 64 else max(16, 1 << (rank - 1).bit_length())
    tiles = -(-channels // 64) * -(-rank // rank_tile)
    split = max(1, min(processors // max(tiles, 1), depth // 512, 16))
    return ProjectConfig(64, rank_tile, 64, split, 8 if rank_tile == 128 else 4, 3)


def update_config(channels: int, depth: int, rank: int) -> UpdateConfig:
    """Tiles of 128 x 128 for large matrices, 64 x 64 where those would leave processors idle."""
    rank_tile = 64 if rank > 32 else max(16, 1 << (rank - 1).bit_length())
    if channels * depth >= 128 * 128 * 132:
        return UpdateConfig(128, 128, rank_tile, 8, 3)
    return UpdateConfig(64, 64, rank_tile, 4, 3)
