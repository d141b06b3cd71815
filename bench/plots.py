"""Pictures of what the benches measured: roofline, step against rank and size, memory."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

# Okabe and Ito's, which stay apart for colour-blind readers.
COLOURS = ("#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#000000")
OPTIMIZER_COLOURS = {
    "adamw": "#000000",
    "adamw-master": "#999999",
    "adamw-split": "#999999",
    "galore": "#0072B2",
    "fira": "#D55E00",
    "adarankgrad": "#009E73",
    "hybrid-galore": "#56B4E9",
    "hybrid-fira": "#E69F00",
}
OPERATIONS = {
    "project_moments": "project + moments",
    "back_project_update": "back-project + update",
}
# Fira and AdaRankGrad take what GaLore takes, and a few bytes more.
MEMORY_BARS = ("adamw", "adamw-8bit", "adamw-factored-8bit", "galore")
MARKS = "os"
MARKERS = {"project_moments": "o", "back_project_update": "s", "step": "D"}


def colour(name: str, index: int) -> str:
    """Of an optimizer, the same in every picture; of an unknown one, by its place."""
    return OPTIMIZER_COLOURS.get(name, COLOURS[index % len(COLOURS)])


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)


def device_line(record: dict) -> str:
    environment = record["environment"]
    place = f"{environment['device']}, {environment['threads']} threads"
    return f"{place}, torch {environment['versions']['torch']}, {record['date']}"


def draw_roofline(record: dict, path: Path) -> None:
    """What each operation computes a second, below what the device was measured to do."""
    dtypes = list(record["rates"])
    figure = Figure(figsize=(2.6 + 5.2 * len(dtypes), 5), layout="constrained")
    panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    for axes, dtype in zip(panels, dtypes, strict=True):
        rates = record["rates"][dtype]
        _draw_roof(axes, rates)
        for row in (r for r in record["rows"] if r["dtype"] == dtype and r["flops"]):
            _draw_operation(axes, row, record["backend"])
        axes.set(title=dtype, xlabel="FLOPs a byte of the fewest bytes that it can move")
        tidy(axes)
    panels[0].set_ylabel("TFLOP/s")
    marks = _operation_legend(panels[0], record["backend"])
    figure.legend(handles=marks, loc="outside right center", frameon=False)
    figure.suptitle(f"Operations below the roof: {device_line(record)}", fontweight="bold")
    figure.savefig(path, dpi=130)


def _draw_roof(axes: Axes, rates: dict[str, float]) -> None:
    bandwidth, peak = rates["bytes_per_second"], rates["flops_per_second"]
    intensity = np.geomspace(1, 500, 200)
    axes.loglog(intensity, np.minimum(bandwidth * intensity, peak) / 1e12, color="0.2", lw=1.5)
    near = {"textcoords": "offset points"}
    label = f"product of large matrices: {peak / 1e12:.2f} TFLOP/s"
    axes.annotate(label, (500, peak / 1e12), xytext=(0, 5), ha="right", **near)
    label = f"memory:\n{bandwidth / 1e9:.0f} GB/s"
    axes.annotate(label, (1.5, 1.5 * bandwidth / 1e12), xytext=(8, -16), **near)


def _draw_operation(axes: Axes, row: dict, backend: str) -> None:
    for name, own in row["results"].items():
        if name not in (backend, "torch"):
            continue
        axes.plot(
            row["flops"] / row["bytes"],
            row["flops"] / own["ms"] / 1e9,
            MARKERS[row["operation"]],
            color=OPTIMIZER_COLOURS[row["method"]],
            mfc="none" if name == "torch" else None,
            ms=7,
            alpha=0.85,
        )


def _operation_legend(axes: Axes, backend: str) -> list:
    def mark(marker: str, label: str, **style: object) -> object:
        return axes.plot([], [], marker, ms=7, label=label, **style)[0]

    shapes = [
        mark(MARKERS[k], text, color="0.4")
        for k, text in {**OPERATIONS, "step": "whole step"}.items()
    ]
    colours = [mark("o", name, color=OPTIMIZER_COLOURS[name]) for name in ("galore", "fira")]
    hollow = mark("o", "the same with torch's operations", color="0.4", mfc="none")
    return [*shapes, *colours, mark("o", f"filled: {backend} backend", color="0.4"), hollow]


def draw_ranks(record: dict, path: Path) -> None:
    """Step time against rank, with AdamW's, which has none, as a line."""
    rows = record["rows"]
    kinds = list(dict.fromkeys((row["model"], row["dtype"]) for row in rows))
    figure = Figure(figsize=(5.6 * len(kinds), 4.6), layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axes, (model, dtype) in zip(panels, kinds, strict=True):
        chosen = [row for row in rows if (row["model"], row["dtype"]) == (model, dtype)]
        ranks = [row["rank"] for row in chosen]
        for name in chosen[0]["results"]:
            times = [row["results"][name]["ms"] for row in chosen]
            style = "--" if name == "adamw" else "o-"
            axes.plot(ranks, times, style, color=OPTIMIZER_COLOURS.get(name), label=name, ms=5)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.set(title=f"LLaMA {model}, {dtype}", xlabel="rank r", ylabel="optimizer.step(), ms")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        tidy(axes)
    figure.suptitle(f"A step against its rank: {device_line(record)}", fontweight="bold")
    figure.savefig(path, dpi=130)


def draw_sizes(record: dict, path: Path) -> None:
    """Step time against parameters; where lines are parallel to the grey ones, time is size."""
    rows = record["rows"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure = Figure(figsize=(5.6 * len(dtypes), 4.6), layout="constrained")
    panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    for axes, dtype in zip(panels, dtypes, strict=True):
        chosen = [row for row in rows if row["dtype"] == dtype]
        sizes = [row["parameters"] / 1e6 for row in chosen]
        for name in chosen[0]["results"]:
            times = [
                row["results"][name]["ms"] if name in row["results"] else np.nan for row in chosen
            ]
            axes.loglog(sizes, times, "o-", color=OPTIMIZER_COLOURS.get(name), label=name, ms=5)
        labels = [f"{row['model']}\nr {row['rank']}" for row in chosen]
        axes.set_xticks(sizes, labels)
        axes.minorticks_off()
        axes.set(title=dtype, xlabel="LLaMA layer set, millions of parameters to scale")
        axes.legend(frameon=False)
        tidy(axes)
    panels[0].set_ylabel("optimizer.step(), ms")
    figure.suptitle(f"A step against the model's size: {device_line(record)}", fontweight="bold")
    figure.savefig(path, dpi=130)


def draw_memory(record: dict, path: Path) -> None:
    """Bytes of weights, gradients and state, GaLore's in every format, at the model's own rank."""
    rows = [row for row in record["rows"] if row["optimizer"] in MEMORY_BARS]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(4.6 * len(models), 6.2), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    parts = {"weight_bytes": "weights", "gradient_bytes": "gradients", "state_bytes": "state"}
    shades = ("0.55", "0.8", "#0072B2")
    for axes, model in zip(panels, models, strict=True):
        own = [row for row in rows if row["model"] == model]
        rank = next(row["rank"] for row in own if row["rank"])
        chosen = [row for row in own if row["rank"] in (None, rank)]
        names = [_memory_label(row) for row in chosen]
        bottom = np.zeros(len(chosen))
        for (key, label), shade in zip(parts.items(), shades, strict=True):
            sizes = np.array([row[key] / 1e9 for row in chosen])
            bars = axes.bar(names, sizes, bottom=bottom, color=shade, label=label, width=0.68)
            if key == "state_bytes":
                axes.bar_label(bars, [f"{size:.2f}" for size in sizes], padding=2)
            bottom += sizes
        axes.set_title(f"LLaMA {model}, r {rank}, {chosen[0]['dtype']} weights")
        axes.set_ylabel("GB (1e9 bytes); the label is the state's")
        axes.margins(y=0.1)
        axes.tick_params(axis="x", length=0, rotation=90)
        tidy(axes)
    panels[0].legend(frameon=False)
    figure.suptitle("What training holds besides activations, counted on shapes", fontweight="bold")
    figure.savefig(path, dpi=130)


def _memory_label(row: dict) -> str:
    """An optimizer with the formats of its moments and of its bases, the default's left out."""
    named = (("state", "float32"), ("basis", "weight"))
    formats = [f"{key} {row[key]}" for key, usual in named if row[key] not in (None, usual)]
    return ", ".join([row["optimizer"], *formats])


def draw_fits(record: dict, path: Path) -> None:
    """What a step of a large model holds, by kind, with and without what makes it less."""
    rows = [row for row in record["rows"] if row.get("basis") in (None, "int8")]
    own = max(row.get("rank", 0) for row in rows)
    rows = [row for row in rows if row.get("rank") in (None, own)]
    kinds = {"weight": "weights", "state": "state", "gradient": "gradients"}
    kinds["activation"] = f"activations, {rows[0]['tokens']:,} tokens"
    names = [", ".join([row["optimizer"], *row["with"]]) for row in rows]
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    axes, left = figure.subplots(), np.zeros(len(rows))
    for (kind, label), shade in zip(kinds.items(), ("0.55", *COLOURS[:3]), strict=True):
        sizes = np.array([row[f"{kind}_bytes"] / 1e9 for row in rows])
        axes.barh(names, sizes, left=left, color=shade, label=label, height=0.66)
        left += sizes
    peaks = [row["total_bytes"] / 1e9 for row in rows]
    axes.plot(peaks, names, "D", color="black", label="held at once, at the most")
    for place, value in enumerate(peaks):
        beside = {"textcoords": "offset points", "va": "center"}
        axes.annotate(f"{value:.1f}", (value, place), (7, 0), **beside)
    axes.axvline(24, color="black", linestyle=":", linewidth=1)
    axes.annotate("24 GB", (24, 1), (4, -2), ("data", "axes fraction"), "offset points", va="top")
    axes.invert_yaxis()
    axes.set_xlabel("GB (1e9 bytes)")
    axes.margins(x=0.06)
    tidy(axes)
    axes.grid(axis="y", visible=False)
    axes.legend(frameon=False)
    model = f"LLaMA {rows[0]['model']}, bfloat16, r {own}, state in int8"
    figure.suptitle(f"What a step holds, planned: {model}", fontweight="bold")
    figure.savefig(path, dpi=130)


def draw_gpus(record: dict, path: Path) -> None:
    """A step against the number of GPUs at a fixed batch, and what new bases take of it."""
    rows = record["rows"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(6 * len(models), 5), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    styles = {"fsdp2": "-", "hsdp": "--"}
    for axes, model in zip(panels, models, strict=True):
        for (shard, style), name in itertools.product(styles.items(), ("adamw", "fira")):
            wanted = {"model": model, "shard": shard, "optimizer": name}
            own = [row for row in rows if wanted.items() <= row.items()]
            counts = [row["gpus"] for row in own]
            label = f"{name}, {shard}"
            times = [row["step"] for row in own]
            axes.loglog(counts, times, style, color=OPTIMIZER_COLOURS[name], label=label)
            if name == "fira":
                bases = [row["refresh"] for row in own]
                label = f"of it new bases, {shard}"
                axes.loglog(counts, bases, style, color=COLOURS[4], label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [f"{count:,}" for count in counts], rotation=45)
        axes.set(title=f"LLaMA {model}", xlabel="GPUs", ylabel="seconds a step")
        axes.legend(frameon=False)
        tidy(axes)
    batch = f"{record['run']['tokens']:,} tokens a step"
    figure.suptitle(f"Computed, not measured: {batch}, H100, bfloat16", fontweight="bold")
    figure.savefig(path, dpi=130)


def draw_family(record: dict, path: Path) -> None:
    """The loss of every method against the bytes of its state and against what a run takes."""
    rows = sorted(
        (row for row in record["summary"] if row["loss"] is not None), key=lambda row: row["loss"]
    )
    settings = record["settings"]
    names = [row["optimizer"] for row in record["summary"]]
    figure = Figure(figsize=(15, 3.5 + 0.22 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    on_gpu = settings["device"] == "cuda"
    seconds = "seconds of a run" if on_gpu else "processor seconds of a run, one thread"
    sides = (("state_bytes", 1e-6, "MB of state"), ("run_seconds", 1.0, seconds))
    for axes, (key, unit, text) in zip(panels, sides, strict=True):
        for row in rows:
            shade = colour(row["optimizer"], names.index(row["optimizer"]))
            place, error = (unit * row[key], row["loss"]), row["loss_error"] or 0.0
            axes.errorbar(*place, error, fmt="o", color=shade, ms=6, capsize=3)
        axes.set_xlabel(text)
        axes.margins(x=0.08, y=0.06)
        tidy(axes)
        _label_beside(axes, [(unit * row[key], row["loss"], row["optimizer"]) for row in rows])
    panels[0].set_xscale("log")
    panels[0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].xaxis.set_major_formatter("{x:g}")
    panels[0].xaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel("validation loss, mean and standard error over seeds")
    tokens = settings["batch_size"] * settings["seq_len"]
    run = f"{settings['steps']} steps of {tokens:,} tokens, {len(settings['seeds'])} seeds"
    most = f"at most {record['search']['budget']} runs to find each one's rate and scale"
    figure.suptitle(f"LLaMA {settings['model']}, {run}; {most}", fontweight="bold")
    figure.savefig(path, dpi=130)


def _label_beside(axes: Axes, points: list[tuple[float, float, str]]) -> None:
    """Names in a column beside the panel, in the order of height: points lie too close for them."""
    count = len(points)
    for place, (x, y, name) in enumerate(sorted(points, key=lambda point: point[1])):
        axes.annotate(
            name,
            (x, y),
            xytext=(1.03, (place + 0.5) / count),
            textcoords="axes fraction",
            va="center",
            fontsize="small",
            arrowprops={
                "arrowstyle": "-",
                "color": "0.7",
                "lw": 0.6,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )


def draw_finetune(record: dict, path: Path) -> None:
    """Accuracy of every arm against what it saves for backward, linear layers' and all."""
    rows = [row for row in record["summary"] if row["loss"] is not None and "saved_bytes" in row]
    figure = Figure(figsize=(15, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    sides = {"linear_bytes": "by linear layers", "saved_bytes": "in all"}
    for axes, (key, text) in zip(panels, sides.items(), strict=True):
        points = [(row[key] / 1e6, 100 * (1 - row["loss"]), row["arm"]) for row in rows]
        for index, (row, (x, y, _)) in enumerate(zip(rows, points, strict=True)):
            error = 100 * (row["loss_error"] or 0.0)
            shade = COLOURS[index % len(COLOURS)]
            axes.errorbar(x, y, error, fmt=MARKS[index // len(COLOURS)], color=shade, capsize=3)
        axes.set_xlabel(f"MB saved for backward {text}, a batch")
        axes.set_xlim(left=0)
        axes.margins(x=0.08, y=0.06)
        tidy(axes)
        _label_beside(axes, points)
    panels[0].set_ylabel("right answers in validation, %, mean and standard error over seeds")
    settings = record["settings"]
    labels = f"{settings['packages']} packages, {settings['epochs']} epochs"
    figure.suptitle(f"Fine-tuning with sampled activations: {labels}", fontweight="bold")
    figure.savefig(path, dpi=130)


# By the bench whose record of a device each draws.
PICTURES = {"kernels": draw_roofline, "ranks": draw_ranks, "sizes": draw_sizes}
# By the bench whose record, of no device, each draws.
COUNTED = {"memory": draw_memory, "fits": draw_fits, "gpus": draw_gpus}
COUNTED["finetune"] = draw_finetune
