"""The pictures of a comparison: loss curves beside the optimizers' memory; subspaces over time."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.data import DataSummary
from bench.plots import COLOURS, colour, tidy
from bench.settings import Settings
from bench.summary import Summary, summarize


class Comparison(NamedTuple):
    """What is drawn: the runs, how they were made, and on what device."""

    records: list[dict]
    settings: Settings
    data: DataSummary
    device: str


def draw(comparison: Comparison, path: Path) -> None:
    """Draws every optimizer at its best rate, averaged over the seeds."""
    records, settings, data, device = comparison
    best = [summary for summary in summarize(records, settings, data) if summary.best]
    colours = {row.optimizer: colour(row.optimizer, i) for i, row in enumerate(best)}
    # Not pyplot, which would look for a display.
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(2.3, 1))
    _draw_curves(curves, best, records, settings, colours)
    _draw_bars(bars, best, records[0]["weight_bytes"], colours)
    size = f"{records[0]['parameters'] / 1e6:.2f} M parameters, {settings.dtype}"
    figure.suptitle(
        f"LLaMA {settings.model} ({size}), rank {settings.rank}, on {data.source}; {device}",
        fontweight="bold",
    )
    figure.savefig(path, dpi=150)


def draw_subspaces(comparison: Comparison, path: Path) -> None:
    """Draws rank and captured energy of every projected matrix over time, a row an optimizer.

    There is no file if nobody projected anything.
    """
    records, settings, _, device = comparison
    runs = {r["optimizer"]: r for r in reversed(records) if r["subspaces"]}
    if not runs:
        return
    figure = Figure(figsize=(11, 1.2 + 2.8 * len(runs)), layout="constrained")
    rows = figure.subplots(len(runs), 2, sharex=True, squeeze=False)
    for axes, (name, run) in zip(rows, reversed(runs.items()), strict=True):
        steps = [step for step, _ in run["subspaces"]]
        kinds: dict[str, str] = {}
        for matrix in run["subspaces"][0][1]:
            kind = matrix.removesuffix(".weight").rsplit(".", 1)[-1]
            label = None if kind in kinds else kind
            shade = kinds.setdefault(kind, COLOURS[len(kinds) % len(COLOURS)])
            for axis, part in zip(axes, (0, 1), strict=True):
                values = [matrices[matrix][part] for _, matrices in run["subspaces"]]
                axis.plot(steps, values, color=shade, lw=1, alpha=0.8, label=label)
        axes[0].set(ylabel="rank", ylim=(0, settings.rank * 1.05))
        axes[1].set(ylabel="captured energy", ylim=(0, 1))
        axes[0].set_title(f"{name}, lr {run['lr']:g}", fontsize="medium", loc="left")
        for axis in axes:
            tidy(axis)
    for axis in rows[-1]:
        axis.set_xlabel("optimizer step")
    rows[0][1].legend(fontsize="small", frameon=False, ncols=4)
    figure.suptitle(
        f"LLaMA {settings.model}: each line a matrix, when its basis was last computed; {device}",
        fontweight="bold",
    )
    figure.savefig(path, dpi=130)


def _draw_curves(
    axes: Axes, best: list[Summary], records: list[dict], settings: Settings, colours: dict
) -> None:
    seen, start = [], settings.steps // 5
    for row in best:
        runs = [r for r in records if row.has(r)]
        train = smooth(_mean_over_seeds([r["train_loss"] for r in runs]))
        axes.plot(range(1, len(train) + 1), train, color=colours[row.optimizer], alpha=0.35, lw=1)
        losses = _mean_over_seeds([[loss for _, loss in r["validation"]] for r in runs])
        steps = [step for step, _ in runs[0]["validation"]][: len(losses)]
        label = f"{row.optimizer}, lr {row.rates}: {row.loss:.3f}"
        axes.plot(steps, losses, "o-", color=colours[row.optimizer], ms=4.5, lw=1.6, label=label)
        late = [loss for step, loss in zip(steps, losses, strict=True) if step >= start]
        seen += train[start:] + late
    # The fall from a uniform guess takes most of the height and shows no difference.
    finite = [loss for loss in seen if math.isfinite(loss)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    axes.set_ylim(low - (0.05 * (high - low) or 0.1), high)
    axes.set_xlim(0, settings.steps * 1.01)
    unit = "byte" if settings.tokenizer == "bytes" else "token"
    axes.set(xlabel="optimizer step", ylabel=f"loss (nats per {unit})")
    axes.set_title("validation loss (dots) and smoothed training loss (faint)", fontsize="medium")
    axes.legend(title="validation loss at the end", frameon=False)
    tidy(axes)


def _draw_bars(axes: Axes, best: list[Summary], weight_bytes: int, colours: dict) -> None:
    names = [row.optimizer for row in best]
    sizes = [row.state_bytes / 1e6 for row in best]
    bars = axes.bar(names, sizes, color=[colours[name] for name in names], width=0.65)
    axes.bar_label(bars, [f"{size:.2f}" for size in sizes], padding=2)
    axes.axhline(weight_bytes / 1e6, color="0.35", ls="--", lw=1)
    axes.annotate(
        "the weights themselves",
        (1, weight_bytes / 1e6),
        xycoords=axes.get_yaxis_transform(),
        xytext=(-2, 3),
        textcoords="offset points",
        ha="right",
        color="0.35",
    )
    axes.margins(y=0.1)
    axes.set_title("optimizer state", fontsize="medium")
    axes.set_ylabel("MB")
    axes.tick_params(axis="x", length=0, rotation=20)
    tidy(axes)


def _mean_over_seeds(curves: list[list[float]]) -> list[float]:
    # The curve of a diverged run is shorter; the mean ends with it.
    return [statistics.mean(values) for values in zip(*curves, strict=False)]


def smooth(values: list[float]) -> list[float]:
    """Averages exponentially over a fortieth of the curve, without the bias of a zero start."""
    keep = 1 - 1 / max(1.0, len(values) / 40)
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight)
    return smoothed


def draw_steps(comparison: Comparison, path: Path) -> None:
    """Draws how long each `optimizer.step()` took, in order, so that a stall shows."""
    records, settings, _, device = comparison
    runs = {record["optimizer"]: record for record in reversed(records)}
    figure = Figure(figsize=(11, 1.2 + 1.9 * len(runs)), layout="constrained")
    rows = figure.subplots(len(runs), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for index, (axes, (name, run)) in enumerate(zip(rows, reversed(runs.items()), strict=True)):
        times = [1e3 * seconds for seconds in run["optimizer_seconds"]]
        axes.semilogy(range(1, len(times) + 1), times, ".", ms=2.5, color=colour(name, index))
        middle, worst = statistics.median(times), max(times[1:] or times)
        axes.axhline(middle, color="0.4", lw=0.8)
        late = f"slowest after the first: {worst / middle:.1f} times that"
        text = f"{name}: median {middle:.2f} ms; {late}"
        axes.set_title(text, fontsize="medium", loc="left")
        axes.set_ylabel("ms")
        tidy(axes)
    rows[-1].set_xlabel("optimizer step")
    size = f"rank {settings.rank}, a basis every {settings.update_proj_gap} steps; {device}"
    figure.suptitle(f"Every optimizer.step(), LLaMA {settings.model}, {size}", fontweight="bold")
    figure.savefig(path, dpi=130)


PICTURES = {"pretrain": draw, "steps": draw_steps, "subspaces": draw_subspaces}
