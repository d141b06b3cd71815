"""Figures of what optimizers train to: losses, and how many steps and seconds they take."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

from bench.figures.common import NOT_MEASURED, Records, by, figure, source, table
from bench.tables import (
    difference_texts,
    family_marks,
    family_texts,
    loss_text,
    share_text,
    timed_text,
    tried_text,
)


@figure
def demo(records: Records) -> str:
    rows = [
        (
            row["optimizer"],
            f"{row['lr']:g}",
            f"{row['loss']:.4f}",
            f"{math.exp(row['loss']):.3f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['optimizer_ms']:.2f}",
            f"{row['state_bytes'] / 1e6:.2f}",
        )
        for row in records["pretrain-nano/pretrain"]["summary"]
    ]
    headings = ("optimizer", "lr", "validation loss", "perplexity", "tokens/s")
    headings += ("`step()`, median ms", "state MB")
    return table(headings, rows, source(records, "pretrain-nano/pretrain"))


@figure
def subspaces(records: Records) -> str:
    record, rows = records["subspaces-nano/pretrain"], []
    names = {
        "galore-svd": "GaLore, exact SVD, all layers at once (the official way)",
        "galore-together": "GaLore, randomized, all layers at once",
        "galore": "GaLore, randomized, layers in turn (the default)",
        "adarankgrad": "AdaRankGrad, `rank=32`, 1 % of the energy outside",
    }
    losses = {row["optimizer"]: row for row in record["summary"]}
    official = losses["galore-svd"]["loss"]
    for name, text in names.items():
        row = losses[name]
        ranks = [
            rank
            for run in by(record["runs"], optimizer=name)
            for _, matrices in run["subspaces"]
            for rank, _ in matrices.values()
        ]
        rows.append(
            (
                text,
                f"{row['loss']:.4f} ± {row['deviation']:.4f}",
                f"{100 * (row['loss'] / official - 1):+.2f} %",
                f"{statistics.mean(ranks):.1f}",
                f"{row['state_bytes'] / 1e6:.2f}",
            )
        )
    headings = ("", "loss, mean of 3 seeds", "to the first", "mean rank", "state MB at the end")
    return table(headings, rows, source(records, "subspaces-nano/pretrain"))


@figure
def rank_course(records: Records) -> str:
    """Mean rank of all matrices at the first and at the last point."""
    runs = by(records["subspaces-nano/pretrain"]["runs"], optimizer="adarankgrad")
    ends = [
        statistics.mean(rank for run in runs for rank, _ in run["subspaces"][at][1].values())
        for at in (0, -1)
    ]
    return f"{ends[0]:.0f} to {ends[1]:.0f}"


@figure
def noise(records: Records) -> str:
    """What `stats` tells beside many batches: the noise scale, and its two parts as ratios."""
    rows = []
    for row in records["noise-nano"]["rows"]:
        told, direct = row["told"], row["batches"]
        rows.append(
            (
                row["step"],
                f"{row['matrices']} ({row['count']})",
                f"{row['told_scale']:.1f}",
                f"{row['batches_scale']:.1f} ± {row['batches_scale_error']:.1f}",
                f"{told['noise'] / direct['noise']:.2f}",
                f"{told['signal'] / direct['signal']:.2f}",
            )
        )
    headings = ("after step", "matrices", "noise scale, told", "noise scale of the batches")
    headings += ("noise, told / of the batches", "signal, told / of the batches")
    return table(headings, rows, source(records, "noise-nano"))


@figure
def stagger(records: Records) -> str:
    """The slowest step after the first, and the steps of the optimizer alone."""
    names = {
        "adamw": "AdamW",
        "galore": "layers in turn (the default)",
        "galore-together": "randomized, all at once",
        "galore-svd": "exact SVD, all at once",
    }
    runs = {run["optimizer"]: run for run in records["stagger-nano/pretrain"]["runs"]}
    rows = []
    for name, text in names.items():
        whole, own = runs[name]["step_seconds"], runs[name]["optimizer_seconds"]
        middle, usual = statistics.median(whole), statistics.median(own)
        rows.append(
            (
                text,
                f"{1e3 * middle:.0f}",
                f"{max(whole[1:]) / middle:.2f}x",
                f"{whole[0] / middle:.2f}x",
                f"{1e3 * usual:.1f}",
                f"{1e3 * max(own[1:]):.0f}",
            )
        )
    headings = ("", "training step, median ms", "slowest after the first", "the first")
    headings += ("`step()`, median ms", "slowest after the first, ms")
    return table(headings, rows, source(records, "stagger-nano/pretrain"))


@figure
def format_losses(records: Records) -> str:
    """What fewer bits cost in loss, paired by seed."""
    return _losses(records, "formats")


@figure
def projected_losses(records: Records) -> str:
    """What first and shared bases of layers that hand R over cost in loss."""
    return _losses(records, "projected-losses")


def _losses(records: Records, name: str) -> str:
    if name not in records:
        return f"\n{NOT_MEASURED}\n"
    record = records[name]
    lines = [(row["arm"], f"{row['lr']:g}", *difference_texts(row)) for row in record["rows"]]
    runs = "".join(f"; `{each['command']}`" for each in record["comparisons"])
    headings = ("arm", "lr", "seeds", "mean", "standard error", "mean + 2 standard errors, sizes")
    return table(headings, lines, source(records, name) + runs)


@figure
def family(records: Records) -> str:
    """Every method at the rate and scale that were found for it, and what was tried."""
    return _family(records, "family-nano", "tried on one seed: rate, scale: loss", tried_text)


@figure
def family_time(records: Records) -> str:
    """The same number of steps, and as many as take the time of one method's run."""
    rows = records["family-nano-time"]["summary"] if "family-nano-time" in records else []
    as_whose = next((row["timed"]["as"] for row in rows if row["timed"]), "")
    return _family(records, "family-nano-time", f"in the time of {as_whose}", timed_text)


@figure
def family_parts(records: Records) -> str:
    """The orthogonal residual without some of its parts."""
    return _family(records, "family-nano-parts", "", family_marks)


@figure
def family_decay(records: Records) -> str:
    """With weight decay."""
    return _family(records, "family-nano-decay", "", family_marks)


def _family(records: Records, name: str, heading: str, last: Callable[[dict], str]) -> str:
    """A comparison, the least loss first; `last` makes the last column."""
    if name not in records:
        return f"\n{NOT_MEASURED}\n"
    worst = {None: math.inf}
    rows = sorted(records[name]["summary"], key=lambda row: worst.get(row["loss"], row["loss"]))
    headings = ("optimizer", "lr", "scale", "loss", f"to {rows[0]['against']}", "seeds", "state MB")
    headings += ("step, ms", "tokens/s", heading)
    return table(headings, [(*family_texts(row), last(row)) for row in rows], source(records, name))


SHORT = ("orthogonal@16", "orthogonal@4", "muon", "adamw-split", "fira@16")


@figure
def family_losses(records: Records) -> str:
    """Of some methods, with what their state takes of AdamW's in float32."""
    rows = {row["optimizer"]: row for row in records["family-nano"]["summary"]}
    whole = rows["adamw"]["state_bytes"]
    return ", ".join(
        f"`{name}` {loss_text(rows[name])} ({share_text(rows[name]['state_bytes'] / whole)})"
        for name in SHORT
    )


LARGER = ("family-nano", "family-nano-4k", "family-nano-16k", "family-9m", "family-20m")


@figure
def family_sizes(records: Records) -> str:
    """The same at larger batches and models, of methods that any of these has."""
    found = {name: records[name] for name in LARGER if name in records}
    if not found.keys() - {"family-nano"}:
        return f"\n{NOT_MEASURED}\n"
    rows = {
        name: {row["optimizer"]: row for row in record["summary"]} for name, record in found.items()
    }
    compared = {method for name in rows.keys() - {"family-nano"} for method in rows[name]}
    methods = [method for each in rows.values() for method in each if method in compared]
    lines = [
        (
            method,
            *(_loss_and_marks(each[method]) if method in each else "" for each in rows.values()),
        )
        for method in dict.fromkeys(methods)
    ]
    headings = ["optimizer"]
    for record in found.values():
        settings = record["settings"]
        tokens = settings["batch_size"] * settings["seq_len"]
        headings.append(f"{settings['model']}, {settings['steps']} x {tokens:,} tokens")
    return table(headings, lines, "; ".join(source(records, name) for name in found))


def _loss_and_marks(row: dict) -> str:
    at = f"{row['lr']:g}" + ("" if row["scale"] is None else f", {row['scale']:g}")
    return ", ".join(filter(None, [f"{loss_text(row)} ({at})", family_marks(row)]))
