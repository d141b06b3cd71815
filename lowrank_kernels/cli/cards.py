"""Memory of cards."""

# GiB that torch can have of it, CUDA's own part included, as its messages tell when it runs out,
# rounded down: less than data sheets have, whose GB are of either kind, and less than nvidia-smi
# shows. Of an MI250 it is one of the two devices.
CARDS = {
    "rtx-3060": 11.7,
    "rtx-3090": 23.6,
    "rtx-4080": 15.6,
    "rtx-4090": 23.5,
    "rtx-5090": 31.3,
    "l4": 22.0,
    "a10": 21.9,
    "a40": 44.3,
    "a6000": 47.4,
    "l40s": 44.3,
    "a100-40": 39.3,
    "a100-80": 79.1,
    "h100": 79.0,
    "h200": 139.8,
    "b200": 178.3,
    "mi250": 63.9,
    "mi300x": 191.6,
}


def card_bytes(name: str) -> int:
    return round(CARDS[name] * 2**30)
