"""What can be tuned, and the tables of what was measured, one JSON file a GPU.

    {"project": {"right 4096x4096 r1024 bfloat16": {"channels": 128, "rank": 256, ...}},
     "update": {"right 4096x4096 r1024 bfloat16": {"channels": 128, "depth": 256, ...}},
     "group": {"4096x4096 r1024 bfloat16": {"matrices": 2}}}

Configurations are keyed by side, channels x depth, rank and the dtypes of the product's operands,
"float32 x bfloat16" for a float32 G and a bfloat16 P; group sizes by rows x cols, rank and the
dtype of the gradient. Sizes are rounded up to powers of 2.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..contract import Side

TABLES = Path(__file__).parents[1] / "tuned"

# Offsets within a tile have 32 bits: see `obstacle`.
LARGEST_TILE = 256


class ProjectConfig(NamedTuple):
    """Tiles of channels, directions and depth, and how the kernel is compiled and launched."""

    channels: int
    rank: int
    depth: int
    split: int  # parts of the reduction
    cuts: int  # times that the epilogue halves its tile
    warps: int
    stages: int
    registers: int = 255


class UpdateConfig(NamedTuple):
    """Tiles of channels, depth and directions, and how the kernel is compiled."""

    channels: int
    depth: int
    rank: int
    cuts: int
    warps: int
    stages: int
    registers: int = 255


class GroupConfig(NamedTuple):
    """Matrices of a group."""

    matrices: int


class Problem(NamedTuple):
    """What a configuration is chosen for: a group of matrices, in channel coordinates."""

    side: Side
    channels: int
    depth: int
    rank: int
    matrices: int
    dtypes: tuple[torch.dtype, torch.dtype]  # of the product's operands
    wide: bool = True  # whether every matrix begins at a multiple of 16 bytes

    @property
    def itemsize(self) -> int:
        """Bytes of an operand on its way into the product."""
        return max(dtype.itemsize for dtype in self.dtypes)


_KINDS: dict[str, type[ProjectConfig] | type[UpdateConfig] | type[GroupConfig]] = {
    "project": ProjectConfig,
    "update": UpdateConfig,
    "group": GroupConfig,
}

Table = dict[str, dict[str, Any]]


def problem_key(problem: Problem) -> str:
    """Under which a table has the configuration for a problem."""
    sizes = _sizes((problem.channels, problem.depth), problem.rank)
    dtypes = " x ".join(_name(dtype) for dtype in dict.fromkeys(problem.dtypes))
    return f"{problem.side.name.lower()} {sizes} {dtypes}"


def group_key(shape: tuple[int, int], rank: int, dtype: torch.dtype) -> str:
    """Under which a table has the size of groups."""
    return f"{_sizes(shape, rank)} {_name(dtype)}"


def _sizes(shape: tuple[int, int], rank: int) -> str:
    rows, cols, directions = (1 << max(size - 1, 0).bit_length() for size in (*shape, rank))
    return f"{rows}x{cols} r{directions}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def path_of(gpu_name: str) -> Path:
    """The file with what was measured on a GPU, whether it exists or not."""
    return TABLES / (re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-") + ".json")


@functools.cache
def table_of(gpu_name: str) -> Table:
    """Configurations by kind and key; empty for a GPU that was never measured.

    Raises:
        ValueError: the file is not such a table.
    """
    path = path_of(gpu_name)
    if not path.is_file():
        return {kind: {} for kind in _KINDS}
    try:
        data = json.loads(path.read_text())
        if not set(data) <= set(_KINDS):
            raise ValueError(f"its keys are {sorted(data)}, not {sorted(_KINDS)}")
        return {
            kind: {key: _config(config, entry) for key, entry in data.get(kind, {}).items()}
            for kind, config in _KINDS.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a table of tuned configurations: {error}") from error


def _config(kind: type[Any], entry: dict[str, int]) -> Any:
    config = kind(**entry)
    for name, value in entry.items():
        if type(value) is not int or value < (name != "cuts"):
            raise ValueError(f"{name} is {value!r} in {entry}")
        is_tile = name in ("channels", "rank", "depth")
        if is_tile and (value & (value - 1) or not 16 <= value <= LARGEST_TILE):
            raise ValueError(f"{name} is {value}, not a power of 2 from 16 to {LARGEST_TILE}")
    return config
