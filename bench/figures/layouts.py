"""Figures of many GPUs: computed from formulas and data sheets, not measured."""

from __future__ import annotations

from bench.figures.common import Records, by, figure, source, table
from bench.gpus import shown_from

GPUS = (8, 64, 512, 4096)
OPTIMIZERS = ("adamw", "galore", "fira", "orthogonal")
SHARES = (0.01, 0.05)


def _source(records: Records) -> str:
    return f"**Computed, not measured.** {source(records, 'gpus')}"


@figure
def gpus_steps(records: Records) -> str:
    """Of Fira what a step is made of, and whole steps of all."""
    lines = []
    for row in by(records["gpus"]["rows"], optimizer="fira"):
        if row["gpus"] not in GPUS:
            continue
        place = {key: row[key] for key in ("model", "shard", "gpus")}
        others = [by(records["gpus"]["rows"], optimizer=o, **place)[0] for o in OPTIMIZERS]
        parts = ("passes", "update", "own", "refresh")
        lines.append(
            (
                *(row["model"], row["shard"], f"{row['gpus']:,}", f"{row['tokens']:,}"),
                f"{row['held_bytes'] / 1e9:.2f}",
                *(_ms(row[part]) for part in parts),
                *(_ms(other["step"]) for other in others),
            )
        )
    headings = ("LLaMA", "shards", "GPUs", "tokens on each", "held GB", "passes ms", "update")
    headings += ("limiter", "bases", *(f"**{name}** ms" for name in OPTIMIZERS))
    return table(headings, lines, _source(records))


@figure
def gpus_refreshes(records: Records) -> str:
    """From how many GPUs on Fira's bases take a share of its step, and what a step then waits."""
    rows = by(records["gpus"]["rows"], optimizer="fira")
    lines = []
    for model, shard in dict.fromkeys((row["model"], row["shard"]) for row in rows):
        own = by(rows, model=model, shard=shard)
        counts = [shown_from(own, share) for share in SHARES]
        due = [row["refresh_when_due"] for row in own if row["gpus"] in (min(GPUS), max(GPUS))]
        lines.append(
            (
                *(model, shard),
                *("nowhere" if count is None else f"{count:,}" for count in counts),
                " to ".join(map(_ms, due)),
            )
        )
    headings = ("LLaMA", "shards", *(f"{100 * share:g} % first on GPUs" for share in SHARES))
    return table((*headings, "ms in the step of the largest"), lines, _source(records))


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}"
