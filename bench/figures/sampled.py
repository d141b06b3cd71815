"""Figures of training with sampled activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from bench.figures.common import NOT_MEASURED, Records, figure, ms, source, table
from bench.tables import family_marks, loss_text, mean_text, tried_text

BYTES = {"linear_bytes": "linears' MB", "saved_bytes": "saved MB"}


@figure
def finetune(records: Records) -> str:
    """Accuracy, bytes and time of every arm, and what was tried for it."""

    def texts(row: dict) -> tuple[str, ...]:
        right, error = _percent(row["loss"]), _scaled(row["loss_error"])
        difference = _scaled(row["difference"], -100)
        return (
            mean_text(right, error, ".1f", ".1f"),
            mean_text(difference, _scaled(row["difference_error"]), "+.1f", ".1f"),
        )

    def tried(row: dict) -> str:
        rates = [
            f"{each['lr']:g}: {mean_text(_percent(each['loss']), None, '.1f')}"
            for each in row["tried"]
        ]
        return "; ".join([*rates, *filter(None, [family_marks(row)])])

    headings = ("right, %", "tried on one seed: rate: right, %")
    sizes = BYTES | {"norm_bytes": "norms MB"}
    return _arms(records, "finetune", headings, texts, tried, sizes)


@figure
def sampled_nano(records: Records) -> str:
    """The loss of sampled pre-training beside that of a smaller batch."""

    def texts(row: dict) -> tuple[str, ...]:
        return loss_text(row), mean_text(row["difference"], row["difference_error"], "+.4f")

    headings = ("loss", "tried on one seed: rate: loss")
    return _arms(records, "sampled-nano", headings, texts, tried_text, BYTES)


def _arms(
    records: Records,
    name: str,
    headings: tuple[str, str],
    texts: Callable[[dict], Iterable[str]],
    tried: Callable[[dict], str],
    sizes: dict[str, str],
) -> str:
    """An arm a row: what it comes to, what it saves, how long its steps are."""
    if name not in records:
        return f"\n{NOT_MEASURED}\n"
    rows = records[name]["summary"]
    lines = [
        (
            row["arm"],
            f"{row['lr']:g}",
            *texts(row),
            *(f"{row[kind] / 1e6:.2f}" for kind in sizes),
            ms(row),
            tried(row),
        )
        for row in rows
    ]
    measured, last = headings
    top = ("arm", "lr", measured, f"to {rows[0]['arm']}", *sizes.values(), "step, ms", last)
    return table(top, lines, source(records, name))


def _percent(wrong: float | None) -> float | None:
    """Of right answers."""
    return None if wrong is None else 100 * (1 - wrong)


def _scaled(value: float | None, by: float = 100.0) -> float | None:
    return None if value is None else by * value
