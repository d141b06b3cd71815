"""The LLaMA shapes of the GaLore paper, by the size that each has with a vocabulary of 32000."""

from dataclasses import dataclass

VOCABULARY = 32_000


@dataclass(frozen=True)
class Shape:
    """A LLaMA, and the rank and the interval between two bases that are published for it."""

    hidden: int
    ffn: int
    heads: int
    layers: int
    rank: int
    update_proj_gap: int


# The rank of 1b is the paper's; nothing is published for 3b, whose values lie between its
# neighbours'. nano is the 9m shape under the name of the recipe for two CPU cores.
SHAPES = {
    "nano": Shape(128, 352, 4, 4, 32, 200),
    "9m": Shape(128, 352, 4, 4, 32, 200),
    "20m": Shape(256, 688, 4, 4, 64, 200),
    "35m": Shape(384, 1024, 8, 6, 96, 200),
    "60m": Shape(512, 1376, 8, 8, 128, 200),
    "130m": Shape(768, 2048, 12, 12, 256, 200),
    "350m": Shape(1024, 2736, 16, 24, 256, 200),
    "1b": Shape(2048, 5461, 32, 24, 512, 200),
    "3b": Shape(2560, 6848, 32, 32, 640, 200),
    "7b": Shape(4096, 11008, 32, 32, 1024, 500),
}
