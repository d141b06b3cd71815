"""What cards have."""

from typing import NamedTuple


class Card(NamedTuple):
    """What a card has, one of two devices of an MI250.

    Attributes:
        gib: memory that torch can have, CUDA's own part included, as its messages tell when it runs
            out, rounded down: less than data sheets have, whose GB are of either kind, and less
            than nvidia-smi shows.
        tflops: 10^12 operations a second of dense bfloat16 products, summed in float32, at best.
        pcie: generation of its 16 lanes.
    """

    gib: float
    tflops: float
    pcie: int


# Rates are those of data sheets, halved where these count zeros (sparsity), and for GeForce cards
# those of NVIDIA's papers on Ampere, Ada and Blackwell, twice the rate of float32 outside of tensor
# cores. An MI250's is half of the card's.
CARDS = {
    "rtx-3060": Card(11.7, 25.5, 4),
    "rtx-3090": Card(23.6, 71.2, 4),
    "rtx-4080": Card(15.6, 97.5, 4),
    "rtx-4090": Card(23.5, 165.2, 4),
    "rtx-5090": Card(31.3, 209.5, 5),
    "l4": Card(22.0, 121.0, 4),
    "a10": Card(21.9, 125.0, 4),
    "a40": Card(44.3, 149.7, 4),
    "a6000": Card(47.4, 154.8, 4),
    "l40s": Card(44.3, 362.0, 4),
    "a100-40": Card(39.3, 312.0, 4),
    "a100-80": Card(79.1, 312.0, 4),
    "h100": Card(79.0, 989.0, 5),
    "h200": Card(139.8, 989.0, 5),
    "b200": Card(178.3, 2250.0, 5),
    "mi250": Card(63.9, 181.0, 4),
    "mi300x": Card(191.6, 1307.4, 5),
}


def card_bytes(name: str) -> int:
    return round(CARDS[name].gib * 2**30)
