"""Figures of what is saved for backward: counted on shapes, and computed from data sheets."""

from __future__ import annotations

from bench.figures.common import NOT_MEASURED, Records, figure, source, table
from bench.offload_speeds import DEVICES
from bench.wtacrs import cells

WITH = {
    "plain": "as transformers runs it",
    "recompute": "`recompute_activations`",
    "checkpointing": "checkpointing",
}


@figure
def offload_speeds(records: Records) -> str:
    """Of a model, a way and a card, what has to be written, and what a drive wears by that."""
    lines = []
    for row in records["offload-speeds"]["rows"]:
        speeds = [row["speeds"][card]["bytes_per_second"] for card in DEVICES]
        worn = row["speeds"]["h200"]["bytes_a_day"]
        lines.append(
            (
                *(row["model"], WITH[row["with"]], f"{100 * row['share']:g} %"),
                f"{row['saved_bytes'] / 1e9:.2f}",
                *(f"{speed / 1e9:.1f}" for speed in speeds),
                f"{worn / 1e12:,.0f}",
            )
        )
    tokens = records["offload-speeds"]["rows"][0]["tokens"]
    headings = ("LLaMA", "with", "goes out", f"saved of {tokens:,} tokens, GB")
    headings += (*(f"{card.upper()} GB/s" for card in DEVICES), "TB a day")
    about = f"**Computed, not measured.** {source(records, 'offload-speeds')}"
    return table(headings, lines, about)


@figure
def wtacrs(records: Records) -> str:
    """Peaks of T5, counted, beside those that are published."""
    rows = records["wtacrs"]["rows"]
    lines = []
    for row in rows:
        full = next(each for each in rows if each["model"] == row["model"])
        # With a bias and dropout torch has no fused kernel on a CPU.
        way = row["way"].replace("fused attention", "`sdpa` of a CPU")
        lines.append((row["model"], way, *cells(row, full)))
    headings = ("", "keep 0.3 where sampled", "saved MB a sequence", "peak GB", "times less")
    headings += ("published GB", "times less")
    return table(headings, lines, source(records, "wtacrs"))


@figure
def offload(records: Records) -> str:
    """A process with a disk beside one without: memory, time, and what anything waited for."""
    if "offload-cpu" not in records:
        return f"\n{NOT_MEASURED}\n"
    rows = records["offload-cpu"]["rows"]
    plain, lines = rows[0], []
    for row in rows:
        memory, seconds = (row[key] / plain[key] for key in ("peak_bytes", "seconds"))
        lines.append(
            (
                f"{row['arm']}, {row['layers']} layers, {row['tokens']:,} tokens",
                f"{row['peak_bytes'] / 1e6:.0f} ({100 * memory:.0f} %)",
                f"{row['seconds']:.2f} ({seconds:.2f} x)",
                *_disk_texts(row["disk"]),
            )
        )
    headings = ("", "resident MB", "s a step", "MB written a step", "s waited", "s stalled")
    return table(headings, lines, source(records, "offload-cpu"))


def _disk_texts(disk: dict | None) -> tuple[str, ...]:
    if disk is None:
        return ("", "", "")
    written, *seconds = (disk[key] / disk["steps"] for key in ("written", "waited", "stalled"))
    return (f"{written / 1e6:.0f}", *(f"{each:.3f}" for each in seconds))
