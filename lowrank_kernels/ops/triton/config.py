"""Which configuration a launch has: forced, out of a tuned table, or by the heuristics here.

Compiled ahead of time by Triton 3.7.1 for sm_80, sm_90 and sm_100, none of what the heuristics
choose spills: bf16, fp16, float32, TF32 and mixed dtypes, both sides, groups at any distance, rows
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

from .tuned import Problem, ProjectConfig, UpdateConfig, group_key, problem_key, table_of

# Channels a program of operation 2, which waits for memory: short loops, many programs.
SCALE_BLOCK = 256
SCALE_WARPS = 4

# Tiles of channels x directions and of channels x depth, from large to small, by the bytes of an
# operand, and how much of the reduction goes through shared memory at once. A large tile reads less
# through the L2 cache, which bounds a product of 64 x 64 tiles.
_PROJECT_TILES = {2: ((128, 256), (128, 128), (64, 128), (64, 64)), 4: ((128, 128), (64, 64))}
_PROJECT_DEPTH = {2: 64, 4: 32}
_UPDATE_TILES = {2: ((128, 256), (128, 128), (64, 64)), 4: ((128, 128), (64, 64))}
_UPDATE_RANK = {2: 32, 4: 16}

# Operands of two dtypes are multiplied by three TF32 products, which take registers.
_MIXED_TILES = ((64, 128), (64, 64))

# A tile size is taken if its tiles occupy this share of the processors.
_OCCUPIED = 0.75


class Gpu(NamedTuple):
    """What a configuration depends on of the device."""

    name: str
    processors: int
    shared_bytes: int  # that one block can have
    l2_bytes: int


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU; for the interpreter one whose few processors make small matrices split."""
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


def project_config(problem: Problem, gpu: Gpu) -> ProjectConfig:
    """The configuration of operation 1."""
    return _forced_project or _project_choice(problem, gpu)[0]


def update_config(problem: Problem, gpu: Gpu) -> UpdateConfig:
    """The configuration of operation 3."""
    return _forced_update or _update_choice(problem, gpu)[0]


def group_matrices(shape: tuple[int, int], rank: int, dtype: torch.dtype, gpu: Gpu) -> int:
    """Matrices a group: as many as have their gradients in half of the L2 cache, at least 1."""
    tuned = table_of(gpu.name)["group"].get(group_key(shape, rank, dtype))
    if tuned is not None:
        return int(tuned.matrices)
    bytes_of_one = shape[0] * shape[1] * dtype.itemsize
    return max(1, gpu.l2_bytes // 2 // max(1, bytes_of_one))


def project_source(problem: Problem, gpu: Gpu) -> str:
    """Where the configuration of operation 1 comes from, for people to read."""
    return "forced" if _forced_project else _project_choice(problem, gpu)[1]


def update_source(problem: Problem, gpu: Gpu) -> str:
    """Where the configuration of operation 3 comes from, for people to read."""
    return "forced" if _forced_update else _update_choice(problem, gpu)[1]


_forced_project: ProjectConfig | None = None
_forced_update: UpdateConfig | None = None


@contextmanager
def forced(
    *, project: ProjectConfig | None = None, update: UpdateConfig | None = None
) -> Iterator[None]:
    """Within it every launch has these configurations; None leaves an operation as it is."""
    global _forced_project, _forced_update
    before = _forced_project, _forced_update
    _forced_project, _forced_update = project or before[0], update or before[1]
    try:
        yield
    finally:
        _forced_project, _forced_update = before


def project_candidates(problem: Problem, gpu: Gpu) -> list[ProjectConfig]:
    """Configurations of operation 1 that are worth measuring; none of them spills."""
    size = problem.itemsize
    return [
        config._replace(split=split, stages=stages)
        for config in _project_configs(problem, gpu)
        for split in (1, 2, 4, 8, 16)
        # The sum of 128 x 256 partial sums spills.
        if split == 1 or (split * config.depth < problem.depth and config.rank <= 128)
        for stages in (2, 3, 4)
        if stages * _project_stage(config, size) <= gpu.shared_bytes
    ]


def update_candidates(problem: Problem, gpu: Gpu) -> list[UpdateConfig]:
    """Configurations of operation 3 that are worth measuring; none of them spills."""
    size = problem.itemsize
    return [
        config._replace(stages=stages)
        for config in _update_configs(problem, gpu)
        for stages in (2, 3, 4)
        if stages * _update_stage(config, size) <= gpu.shared_bytes
    ]


@functools.lru_cache(maxsize=4096)
def _project_choice(problem: Problem, gpu: Gpu) -> tuple[ProjectConfig, str]:
    tuned = table_of(gpu.name)["project"].get(problem_key(problem))
    if tuned is not None:
        return tuned, f"tuned for {gpu.name}"
    for config in _project_configs(problem, gpu):
        tiles = _tiles(problem, config.channels, problem.rank, config.rank)
        if tiles >= _OCCUPIED * gpu.processors:
            break
    else:
        # A part is at least 512 entries deep: below that its share of the workspace's traffic, 8
        # bytes an element of R and part, outweighs the product.
        split = min(gpu.processors // max(tiles, 1), problem.depth // 512, 16)
        config = config._replace(split=max(split, 1))
    return config, "heuristic tiles"


@functools.lru_cache(maxsize=4096)
def _update_choice(problem: Problem, gpu: Gpu) -> tuple[UpdateConfig, str]:
    tuned = table_of(gpu.name)["update"].get(problem_key(problem))
    if tuned is not None:
        return tuned, f"tuned for {gpu.name}"
    for config in _update_configs(problem, gpu):
        tiles = _tiles(problem, config.channels, problem.depth, config.depth)
        if tiles >= _OCCUPIED * gpu.processors:
            break
    return config, "heuristic tiles"


def _tiles(problem: Problem, tile_c: int, columns: int, tile: int) -> int:
    return problem.matrices * triton.cdiv(problem.channels, tile_c) * triton.cdiv(columns, tile)


def _project_configs(problem: Problem, gpu: Gpu) -> Iterator[ProjectConfig]:
    """From large to small tiles, with as many stages as fit, 3 at most.

    Where accesses are as narrow as an element, each has an address of its own, which takes
    registers: no largest tiles and half of the depth.
    """
    size = problem.itemsize
    mixed = problem.dtypes[0] is not problem.dtypes[1]
    for channels, largest in _MIXED_TILES if mixed else _PROJECT_TILES[size]:
        rank = _tile(problem.rank, largest)
        warps = _warps(channels * rank, size)
        # Pieces of 16 columns.
        cuts = _log2(rank // 16)
        depth = _PROJECT_DEPTH[size] // (1 if problem.wide else 2)
        config = ProjectConfig(channels, rank, depth, 1, cuts, warps, 1)
        stages = min(3, gpu.shared_bytes // _project_stage(config, size))
        if stages and (problem.wide or largest <= 128):
            yield config._replace(stages=stages)


def _update_configs(problem: Problem, gpu: Gpu) -> Iterator[UpdateConfig]:
    """As for the projection."""
    size = problem.itemsize
    for channels, depth in _UPDATE_TILES[size]:
        rank = _tile(problem.rank, _UPDATE_RANK[size])
        warps = _warps(channels * depth, size)
        # Pieces of 64 bytes of W a row, half of that for the largest tile.
        cuts = _log2(depth // (16 if depth == 256 else 64 // size))
        config = UpdateConfig(channels, depth, rank, cuts, warps, 1)
        stages = min(3, gpu.shared_bytes // _update_stage(config, size))
        if stages and (problem.wide or channels * depth * size <= 128 * 128 * 2):
            yield config._replace(stages=stages)


def _warps(elements: int, size: int) -> int:
    """A float32 product is a sum of FMAs, whose operands take registers of their own."""
    return 8 if size == 4 or elements >= 64 * 128 else 4


def _project_stage(config: ProjectConfig, size: int) -> int:
    """Bytes of shared memory a stage, at most."""
    return config.depth * (config.channels + config.rank) * size


def _update_stage(config: UpdateConfig, size: int) -> int:
    """Bytes of shared memory a stage, at most: N and R in float32, and P."""
    return config.rank * (config.channels * 2 * 4 + config.depth * size)


def _tile(size: int, largest: int) -> int:
    """The smallest power of two that holds the size, at least 16, which a product needs."""
    return min(largest, max(16, 1 << max(size - 1, 0).bit_length()))


def _log2(power: int) -> int:
    return power.bit_length() - 1
