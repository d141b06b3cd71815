"""How fast a disk, or the memory of the host, has to be for offloading, and what a drive wears.

Of the bytes A that a forward pass saves a share goes out while it runs, so that nothing waits if

    bytes a second = share A / T,    T = 2 operations a weight and token / the card's rate

T counts matrix products alone, at a share of what the card does at best (`REACHED`): attention's
own, norms and the host make it longer. Coming back may be slower: the backward pass takes 2 T, and
with checkpointing 3 T. So a drive that takes all of it wears by share A in 3 T or 4 T; the
optimizer's time is left out. Both are thus the most there can be.
"""

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..activations.dry_offload import AHEAD, IN_FLIGHT
from ..text import amount
from .cards import CARDS, Card
from .text import UserError

SHARE = 0.5
# Of dense bfloat16 in forward and backward: LLaMA 3 reports 38 to 43 % (arXiv 2407.21783).
REACHED = 0.4
DAY = 24 * 60 * 60
# Bytes a second that copies reach over 16 lanes of a generation, 4 / 5 of what the standard has.
PCIE = {4: 25e9, 5: 50e9}


class Speed(NamedTuple):
    """What a disk must do.

    Attributes:
        bytes_per_second: written while the forward pass runs.
        bytes_a_day: written by training without a pause.
    """

    bytes_per_second: float
    bytes_a_day: float


def speed_of(out: int, products: int, card: str, checkpointing: bool = False) -> Speed:
    """So that nothing waits.

    Args:
        out: bytes of a forward pass that go out.
        products: operations of its matrix products, above 0.
        card: of `CARDS`.
        checkpointing: the backward pass computes the forward pass again.
    """
    forward = products / (REACHED * 1e12 * CARDS[card].tflops)
    step = (4 if checkpointing else 3) * forward
    return Speed(out / forward, DAY * out / step)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The share that goes out."""
    text = f"offload_activations: this share of what is saved goes out; {SHARE} if none is named"
    parser.add_argument(
        "--offload", nargs="?", type=float, const=SHARE, default=0.0, metavar="SHARE", help=text
    )


def check(args: argparse.Namespace) -> None:
    """Raises UserError for a share that is none, or if there is nothing to go out."""
    if not 0 <= args.offload <= 1:
        raise UserError(f"--offload must be a share, between 0 and 1, got {args.offload:g}")
    if args.offload and not args.tokens:
        raise UserError("--offload needs --tokens above 0: without activations nothing goes out")


def facts_of(out: int, products: int, args: argparse.Namespace) -> dict[str, Any]:
    """Of one optimizer: bytes of a micro-batch, and speeds where the card's rate is known."""
    speed = None
    if knows_rate(args) and products:
        speed = speed_of(out, products, args.card, args.checkpointing)
    return {
        "offload_bytes": out,
        "offload_bytes_per_second": speed and round(speed.bytes_per_second),
        "offload_bytes_a_day": speed and round(speed.bytes_a_day),
    }


def cells_of(needs: dict[str, Any]) -> list[str]:
    """Of one optimizer, in the table: what goes out, and how fast."""
    speed = needs["offload_bytes_per_second"]
    return [amount(needs["offload_bytes"]), "-" if speed is None else f"{speed / 1e9:.1f}"]


def knows_rate(args: argparse.Namespace) -> bool:
    """Whether the time of a forward pass can be told: cards' rates are of bfloat16."""
    return args.card is not None and args.dtype == "bf16" and args.device == "cuda"


def notes(facts: dict[str, Any]) -> Iterator[str]:
    """What stands below the table.

    Args:
        facts: of the plan.
    """
    yield (
        f"offload: the first {100 * facts['offload']:g} % of what a forward pass saves go out and"
        " come back before the backward pass needs them; the peak has up to"
        f" {amount(IN_FLIGHT + AHEAD)} that are on their way."
    )
    worn = max(each["offload_bytes_a_day"] or 0 for each in facts["optimizers"].values())
    if not worn:
        yield "How fast the disk must be: name a --card, whose rate in bf16 is known."
        return
    card = CARDS[facts["offload_card"]]
    yield (
        f"Nothing waits if so many GB/s are written, computed at {100 * REACHED:g} % of"
        f" {card.tflops:g} TFLOP/s. {_judged(facts, card)}"
        " A good NVMe drive does 5 to 7; written day and night it takes"
        f" {worn / 1e12:,.0f} TB a day, of some hundreds to thousands that it is rated for."
    )


def _judged(facts: dict[str, Any], card: Card) -> str:
    """Whether a card's lanes carry what its optimizers' runs send."""
    lanes = PCIE[card.pcie]
    speeds = [each["offload_bytes_per_second"] or 0 for each in facts["optimizers"].values()]
    verdict = "a step waits for them" if max(speeds) > lanes else "they follow"
    return f"PCIe {card.pcie}.0 does about {lanes / 1e9:g} GB/s: {verdict}."
