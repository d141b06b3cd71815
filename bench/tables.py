"""The tables that the benches print."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import track
from rich.table import Table

SPREAD = "medians of interleaved rounds, ± half the quartiles' distance"


def new_table(title: str, caption: str, names: Sequence[str], figures: Sequence[str]) -> Table:
    """A table of columns with names, to the left, and with figures, to the right."""
    table = Table(title=title, caption=caption)
    for heading in names:
        table.add_column(heading, no_wrap=True)
    for heading in figures:
        table.add_column(heading, justify="right", no_wrap="\n" not in heading)
    return table


def show(table: Table, width: int = 150) -> None:
    """Prints it; piped output has no width of its own, and 80 columns would cut figures off."""
    Console(width=None if sys.stdout.isatty() else width).print(table)


def time_text(result: dict, digits: int = 2) -> str:
    return f"{result['ms']:.{digits}f} ± {100 * result['spread']:.0f} %"


def share_text(share: float) -> str:
    """In percent, rounded up: less is better, and nobody's share looks smaller than it is."""
    return f"{math.ceil(1000 * share) / 10:.1f} %"


def less_text(share: float) -> str:
    """What is saved, in percent, rounded down."""
    return f"{math.floor(1000 * share) / 10:.1f} %"


def difference_texts(row: dict) -> tuple[str, ...]:
    """Seeds, mean, standard error and bound of a row of `bench.formats`, in thousandths."""

    def text(value: float | None, form: str = ".1f") -> str:
        return "" if _unknown(value) else f"{1e3 * value:{form}}"

    missing = sum(map(_unknown, row["differences"]))
    mean = f"diverged: {missing}" if missing else text(row["mean"], "+.1f")
    return str(len(row["seeds"])), mean, text(row["error"]), text(row["bound"])


def family_texts(row: dict) -> tuple[str, ...]:
    """What a table shows of a row of the summary of `bench.family`."""
    return (
        row["optimizer"],
        f"{row['lr']:g}",
        "" if row["scale"] is None else f"{row['scale']:g}",
        loss_text(row),
        mean_text(row["difference"], row["difference_error"], "+.4f"),
        str(len(row["seeds"])),
        f"{row['state_bytes'] / 1e6:.2f}",
        f"{row['step_ms']:.1f}",
        f"{row['tokens_per_second']:,.0f}",
    )


def timed_text(row: dict) -> str:
    """The loss in the time of another method's run."""
    timed = row["timed"]
    if timed is None:
        return ""
    return f"{mean_text(timed['loss'], timed['loss_error'], '.4f')}, {timed['steps']} steps"


def loss_text(row: dict) -> str:
    return mean_text(row["loss"], row["loss_error"], ".4f")


def family_marks(row: dict) -> str:
    words = {"edge": not row["bracketed"], "unfinished": not row["finished"]}
    return ", ".join(word for word, holds in words.items() if holds)


def mean_text(mean: float | None, error: float | None, form: str, error_form: str = ".4f") -> str:
    if mean is None:
        return "diverged"
    return f"{mean:{form}}" + ("" if error is None else f" ± {error:{error_form}}")


def tried_text(row: dict) -> str:
    """What was tried of a method, and at the best's side what was not."""

    def text(each: dict) -> str:
        scale = "" if each["scale"] is None else f", {each['scale']:g}"
        loss = "diverged" if each["loss"] is None else f"{each['loss']:.3f}"
        return f"{each['lr']:g}{scale}: {loss}"

    words = [text(each) for each in row["tried"]]
    return "; ".join([*words, *filter(None, [family_marks(row)])])


def _unknown(value: float | None) -> bool:
    """A record has null for what is not finite."""
    return value is None or not math.isfinite(value)


def rates_text(rates: dict[str, dict[str, float]]) -> str:
    """What the device was measured to do."""
    copies = max(rate["bytes_per_second"] for rate in rates.values())
    products = (f"{name} {rate['flops_per_second'] / 1e12:.2f}" for name, rate in rates.items())
    return f"{copies / 1e9:.0f} GB/s, products at {', '.join(products)} TFLOP/s"


def missing_text(missing: dict[str, str]) -> str:
    """Who is not in a table, and why."""
    absent = "; ".join(f"{name} ({reason})" for name, reason in missing.items())
    return f"not here: {absent or 'nobody'}"


def progress(todo: Sequence, what: str = "measuring"):
    """Iterates with a bar on stderr, so that a table on stdout can be kept."""
    return track(todo, what, console=Console(stderr=True))
