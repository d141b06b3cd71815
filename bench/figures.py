"""The figures and tables that the documents show, each from a record in `bench/results`.

A function takes the records and returns Markdown; its name is what stands around it there:
`<!-- figure: NAME -->...<!-- end -->`.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from bench.models import PRESETS
from bench.tables import (
    difference_texts,
    family_texts,
    less_text,
    loss_text,
    share_text,
    tried_text,
)

RESULTS = Path(__file__).parent / "results"
NOT_MEASURED = "**not measured**"


class Records:
    """The records of a folder by their path without the ending, read when first asked for."""

    def __init__(self, folder: Path = RESULTS):
        self.folder = folder
        self._read: dict[str, dict] = {}

    def __getitem__(self, name: str) -> dict:
        if name not in self._read:
            self._read[name] = json.loads((self.folder / f"{name}.json").read_text())
        return self._read[name]

    def __contains__(self, name: str) -> bool:
        return (self.folder / f"{name}.json").exists()


Figure = Callable[[Records], str]
FIGURES: dict[str, Figure] = {}


def figure(function: Figure) -> Figure:
    FIGURES[function.__name__] = function
    return function


def table(headings: Iterable[str], rows: Iterable[Iterable[object]], record: str = "") -> str:
    """A Markdown table; the line below says where it is from."""
    headings = list(headings)
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(["", *lines, *(["", record] if record else []), ""])


def source(records: Records, name: str) -> str:
    """Device, date, command and the record itself."""
    record = records[name]
    place, commit = record["environment"], (record["environment"]["commit"] or "")[:7]
    command, torch = record["command"], place["versions"]["torch"]
    threads = f"{place['threads']} thread{'s' * (place['threads'] > 1)}"
    return (
        f"{place['device']}, {threads}, torch {torch},"
        f" {record['date']}, commit {commit}, `{command}`:"
        f" [{name}.json](bench/results/{name}.json)"
    )


def by(rows: list[dict], **wanted: object) -> list[dict]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def times(value: float) -> str:
    return f"{value:.2f}x"


def ms(result: dict) -> str:
    return f"{result['ms']:.1f} ± {100 * result['spread']:.0f} %"


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
def step_matrices(records: Records) -> str:
    """Ours and the rivals, a row a shape: the ratios over dtypes and sides, least to most."""
    record, lines = records["step-cpu"], []
    for method, official in (("fira", "fira 1.0.2"), ("galore", "galore-torch 1.0")):
        mine = by(record["rows"], method=method)
        shapes = dict.fromkeys((*sorted((r["rows"], r["cols"])), r["rank"]) for r in mine)
        for small, large, rank in shapes:
            some = [r for r in mine if sorted((r["rows"], r["cols"])) == [small, large]]
            some = [r for r in some if r["rank"] == rank]
            cells = [
                _range(r["times_faster"][name] for r in some) for name in ("official", "torch")
            ]
            products = _range(1 / r["times_faster"]["products"] for r in some)
            adamw = _range(1 / r["times_faster"]["fused AdamW"] for r in some)
            shape = f"{small} x {large}, r {rank}"
            lines.append((method, official, shape, *cells, products, adamw))
        mean = record["geometric_means"][method]
        cells = [f"**{mean[name]:.2f}**" for name in ("official", "torch")]
        inverse = [f"**{1 / mean[name]:.2f}**" for name in ("products", "fused AdamW")]
        lines.append((method, official, "geometric mean", *cells, *inverse))
    headings = (
        "",
        "official package",
        "matrix",
        "times as fast as it",
        "as torch's own operations",
    )
    headings += ("our time in bare products", "in fused AdamW's steps")
    return table(headings, lines, source(records, "step-cpu"))


def _range(values: Iterable[float]) -> str:
    found = list(values)
    return f"{min(found):.2f} to {max(found):.2f}"


@figure
def model_steps(records: Records) -> str:
    """Every optimizer on a whole model."""
    record, lines = records["model_step-cpu"], []
    dtypes = list(dict.fromkeys(row["dtype"] for row in record["rows"]))
    rows = {row["dtype"]: row for row in record["rows"]}
    known = dict.fromkeys(name for row in rows.values() for name in row["results"])
    for optimizer in known:
        cells = []
        for dtype in dtypes:
            own = rows[dtype]["results"].get(optimizer)
            if own is None:
                cells += ["", "", ""]
                continue
            room = own["workspace_bytes"]
            cells += [
                ms(own),
                f"{own['state_bytes'] / 1e6:.0f}",
                "" if room is None else f"{room / 1e6:.1f}",
            ]
        lines.append((optimizer, *cells))
    lines += [
        (f"{name}: {reason}", *[""] * 3 * len(dtypes)) for name, reason in record["missing"].items()
    ]
    headings = [h for d in dtypes for h in (f"{d}: ms", "state MB", "workspace MB")]
    return table(("optimizer", *headings), lines, source(records, "model_step-cpu"))


@figure
def kernels(records: Records) -> str:
    """Shares of the floor, least to most over shapes, ours and torch's operations."""
    record, lines = records["kernels-cpu"], []
    own = record["backend"]
    for method in ("galore", "fira"):
        for operation in ("project_moments", "channel_scale", "back_project_update", "step"):
            cells = []
            for dtype in record["rates"]:
                some = by(record["rows"], method=method, operation=operation, dtype=dtype)
                for name in (own, "torch"):
                    shares = [100 * row["results"][name]["share_of_floor"] for row in some]
                    cells.append(f"{min(shares):.0f} to {max(shares):.0f} %" if shares else "")
            if any(cells):
                lines.append((method, f"`{operation}`", *cells))
    headings = [f"{d}: {n}" for d in record["rates"] for n in (own, "torch's operations")]
    return table(("", "operation", *headings), lines, source(records, "kernels-cpu"))


@figure
def refresh(records: Records) -> str:
    """Range finders beside an SVD, synthetic gradients."""
    record, lines = records["refresh-cpu"], []
    made = [row for row in record["rows"] if row["gradient"].startswith("synthetic")]
    for key in dict.fromkeys((r["rows"], r["cols"], r["rank"], r["gradient"]) for r in made):
        some = {
            r["finder"]: r for r in made if (r["rows"], r["cols"], r["rank"], r["gradient"]) == key
        }
        exact, own = some["torch.linalg.svd"], some["randomized"]
        lines.append(
            (
                f"{key[0]} x {key[1]}, r {key[2]}, {key[3].split()[-1]}",
                f"{exact['ms']:.0f}",
                f"{own['ms']:.1f}",
                f"{own['times_faster_than_svd']:.1f}x",
                f"{100 * own['captured']:.1f} %",
                f"{100 * own['share_of_step']:.1f} %",
            )
        )
    headings = ("gradient", "`torch.linalg.svd`, ms", "randomized, ms", "times as fast")
    headings += ("of its energy", "of a Fira step, every 200")
    return table(headings, lines, source(records, "refresh-cpu"))


@figure
def captured(records: Records) -> str:
    """Least share of an SVD's energy over saved gradients, with one and two iterations."""
    rows = records["refresh-cpu"]["rows"]
    real = [row for row in rows if not row["gradient"].startswith("synthetic")]
    least = [
        min(row["captured"] for row in by(real, finder=finder))
        for finder in ("randomized", "randomized, 2 iterations")
    ]
    return f"{100 * least[0]:.2f} % ({100 * least[1]:.2f} % with two power iterations)"


@figure
def memory(records: Records) -> str:
    """Ours with the default's formats."""
    rows, lines = records["memory"]["rows"], []
    for model in MEMORY_MODELS:
        default = [r for r in by(rows, model=model) if r["state"] in (None, "float32")]
        rank = next(row["rank"] for row in default if row["rank"])
        for row in default:
            if row["rank"] not in (None, rank):
                continue
            sizes = (row[f"{key}_bytes"] for key in ("weight", "gradient", "state"))
            lines.append(
                (
                    *(model, row["optimizer"], row["rank"] or ""),
                    *(f"{size / 1e9:.3f}" for size in sizes),
                    share_text(row["of_adamw"]),
                )
            )
    headings = ("LLaMA", "optimizer", "r", "weights GB", "gradients GB", "state GB")
    return table((*headings, "of AdamW's state, bf16"), lines, source(records, "memory"))


@figure
def orthogonal_cost(records: Records) -> str:
    """By products, the same for all that Newton-Schulz iterations run over."""
    lines = [
        (
            row["model"],
            f"{row['flops'] / 1e12:.2f}",
            f"{row['flops_per_token'] / 1e9:.2f}",
            f"{row['tokens_of_tenth']:,}",
        )
        for row in records["memory"]["orthogonalization"]
    ]
    headings = ("LLaMA", "TFLOP a step", "GFLOP a token", "tokens a batch where it is a tenth")
    return table(headings, lines, source(records, "memory"))


@figure
def formats(records: Records) -> str:
    """State of GaLore in every format at the models' own ranks, and of rivals without a rank."""
    ranks = dict(reversed(_counted(records)))
    return _formats(records, [(model, ranks[model]) for model in MEMORY_MODELS])


@figure
def all_formats(records: Records) -> str:
    return _formats(records, _counted(records))


def _counted(records: Records) -> list[tuple[str, int]]:
    """Models and ranks, a model's own rank first."""
    rows = by(records["memory"]["rows"], optimizer="galore")
    return list(dict.fromkeys((row["model"], row["rank"]) for row in rows))


def _formats(records: Records, ranks: list[tuple[str, int]]) -> str:
    rows, lines = records["memory"]["rows"], []
    own = by(rows, optimizer="galore")
    for state, basis in dict.fromkeys((row["state"], row["basis"]) for row in own):
        found = [by(own, model=m, rank=r, state=state, basis=basis)[0] for m, r in ranks]
        lines.append((f'`state="{state}"`, `basis="{basis}"`', *map(_state_text, found)))
    for name, text in RIVALS.items():
        found = [by(rows, optimizer=name, model=model)[0] for model, _ in ranks]
        lines.append((text, *map(_state_text, found)))
    headings = (f"{model}, r {rank}" for model, rank in ranks)
    return table(("state GB, of bf16 AdamW's", *headings), lines, source(records, "memory"))


def _state_text(row: dict) -> str:
    return f"{row['state_bytes'] / 1e9:.3f}, {share_text(row['of_adamw'])}"


MEMORY_MODELS = ("60m", "1b", "7b")
RIVALS = {
    "adamw": "AdamW, moments in bfloat16",
    "adamw-fp32": "AdamW, moments in float32",
    "adamw-8bit": "8-bit AdamW (bitsandbytes, torchao)",
    "adamw-factored-8bit": "AdamW with M in 8 bits and V factored",
}


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
    if "family-nano" not in records:
        return f"\n{NOT_MEASURED}\n"
    record = records["family-nano"]
    worst = {None: math.inf}
    rows = sorted(record["summary"], key=lambda row: worst.get(row["loss"], row["loss"]))
    lines = [(*family_texts(row), tried_text(row)) for row in rows]
    headings = ("optimizer", "lr", "scale", "loss", f"to {rows[0]['against']}", "seeds", "state MB")
    headings += ("step, ms", "tokens/s", "same time", "tried on one seed: rate, scale: loss")
    return table(headings, lines, source(records, "family-nano"))


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
        (method, *(loss_text(each[method]) if method in each else "" for each in rows.values()))
        for method in dict.fromkeys(methods)
    ]
    headings = ["optimizer"]
    for record in found.values():
        settings = record["settings"]
        tokens = settings["batch_size"] * settings["seq_len"]
        headings.append(f"{settings['model']}, {settings['steps']} x {tokens:,} tokens")
    return table(headings, lines, "; ".join(source(records, name) for name in found))


PROJECTED = "activations-cpu"


@figure
def projected_speed(records: Records) -> str:
    """How many times as fast as AdamW, least to most, at each share of the hidden size."""
    if PROJECTED not in records:
        return NOT_MEASURED
    found: dict[int, list[float]] = {}
    for row in by(records[PROJECTED]["rows"], part="blocks"):
        share = PRESETS[row["shape"]].hidden // row["rank"]
        arm = row["results"]["galore-projected"]
        found.setdefault(share, []).append(arm["times_as_fast"])
    texts = (
        f"{_range(speeds)} times as fast at r = h / {share}" for share, speeds in found.items()
    )
    return " and ".join(texts)


@figure
def projected_blocks(records: Records) -> str:
    """What R in place of gradients buys blocks of a model."""
    return _projected(records, "blocks", TIMES)


@figure
def projected_models(records: Records) -> str:
    texts = {"tokens/s": _tokens_text} | TIMES
    return _projected(records, "models", texts, name="activations-models-cpu")


@figure
def projected_bytes(records: Records) -> str:
    """Of everything that was measured; the length of sequences is no matter of bytes."""
    kinds = {"saved for backward": "saved", "gradients": "gradient", "state": "state"}
    texts = {f"{text}, MB": partial(_megabytes, kind) for text, kind in kinds.items()}
    return _projected(records, None, texts, ("length", "sequences"))


def _projected(
    records: Records,
    part: str | None,
    texts: dict[str, Callable[[dict], str]],
    alike: tuple[str, ...] = (),
    name: str = PROJECTED,
) -> str:
    """A row for every case of a part, of those that are alike but for some facts one, and arm."""
    if name not in records:
        return f"\n{NOT_MEASURED}\n"
    lines, seen = [], []
    for row in records[name]["rows"]:
        case = {key: row[key] for key in row if key in CASE and key not in alike}
        if part not in (None, row["part"]) or case in seen:
            continue
        seen.append(case)
        shape = row["shape"] if row["part"] == "models" else f"{row['layers']} of {row['shape']}"
        size = f"{row['sequences'] * row['length']}" if alike else (
            f"{row['sequences']} x {row['length']}")  # fmt: skip
        about = f"{shape}, {size} tokens, r {row['rank']}, {row['dtype']}"
        for arm, own in row["results"].items():
            lines.append((about, arm, *(text(own) for text in texts.values())))
    return table(("LLaMA", "", *texts), lines, source(records, name))


def _tokens_text(own: dict) -> str:
    return f"{own['tokens_per_second']:,.0f}"


def _megabytes(kind: str, own: dict) -> str:
    return f"{own[f'{kind}_bytes'] / 1e6:.1f}"


CASE = ("part", "shape", "layers", "vocabulary", "sequences", "length", "rank", "dtype")
TIMES = {
    "usual step, ms": ms,
    "forward and backward": lambda own: f"{own['passes']['ms']:.1f}",
    "`step()`": lambda own: f"{own['step']['ms']:.1f}",
    "mean with new bases": lambda own: f"{own['mean_ms']:.1f}",
    "times as fast as AdamW": lambda own: f"**{own['times_as_fast']:.2f}**",
    "by products alone": lambda own: f"{own['predicted']:.2f}",
}


@figure
def fits(records: Records) -> str:
    """AdamW, GaLore and Fira at the model's own rank, and at lower ones with all there is."""
    rows = records["fits"]["rows"]
    own = max(row.get("rank", 0) for row in rows)
    chosen = [row for row in rows if row.get("basis") in (None, "int8")]
    last = {row["optimizer"]: row["with"] for row in chosen}
    return _fits(
        records,
        [
            row
            for row in chosen
            if row.get("rank") in (None, own) or row["with"] == last[row["optimizer"]]
        ],
    )


@figure
def all_fits(records: Records) -> str:
    return _fits(records, records["fits"]["rows"])


def _fits(records: Records, rows: list[dict]) -> str:
    memories = list(rows[0]["most_tokens"])
    kinds = ("weight", "state", "gradient", "activation", "total")
    lines = [
        (
            _trained_text(row),
            row.get("rank", ""),
            row.get("basis", ""),
            *(f"{row[f'{kind}_bytes'] / 1e9:.2f}" for kind in kinds),
            *(f"**{row['most_tokens'][text]:,}**" for text in memories),
        )
        for row in rows
    ]
    headings = (f"LLaMA {rows[0]['model']}", "r", "basis", "weights GB", "state", "gradients")
    headings += (f"activations of {rows[0]['tokens']:,} tokens", "peak")
    headings += tuple(f"tokens that fit in {text}" for text in memories)
    return table(headings, lines, source(records, "fits"))


def _trained_text(row: dict) -> str:
    text = " + ".join(f"`{name}`" for name in row["with"])
    return f"{row['optimizer']}, {text}" if text else row["optimizer"]


@figure
def peak(records: Records) -> str:
    lines = [
        (
            row["arm"],
            *(f"{row[f'{kind}_bytes'] / 1e6:.1f}" for kind in ("planned", "measured")),
            f"{100 * (row['ratio'] - 1):+.1f} %",
        )
        for row in records["peak-cpu"]["rows"]
    ]
    return table(("", "planned MB", "resident MB", ""), lines, source(records, "peak-cpu"))


@figure
def accounting(records: Records) -> str:
    lines = [
        (
            row["text"],
            f"{row['state_bytes'] / 1e9:.3f}",
            less_text(row["less_than_8bit"]),
            less_text(row["less_than_bf16"]),
        )
        for row in records["memory"]["accounting"]
    ]
    headings = ("state GB", "less than 8-bit AdamW's", "less than bf16 AdamW's")
    return table(("GaLore at 7B, r 1024", *headings), lines)


@figure
def published_8bit(records: Records) -> str:
    return f"{100 * records['memory']['published']['of 8-bit Adam']:.1f} %"


@figure
def published_bf16(records: Records) -> str:
    return f"{100 * records['memory']['published']['of bfloat16 Adam']:.1f} %"


def _account(records: Records, basis: str, key: str) -> str:
    """Of this package's, with moments in codes."""
    (row,) = (
        r for r in records["memory"]["accounting"] if f'"int8"`, `basis="{basis}"' in r["text"]
    )
    return less_text(row[key])


@figure
def saved_to_8bit(records: Records) -> str:
    saved = (_account(records, basis, "less_than_8bit") for basis in ("int8", "int4"))
    return " and ".join(saved)


@figure
def saved_to_bf16(records: Records) -> str:
    saved = (_account(records, basis, "less_than_bf16") for basis in ("int8", "int4"))
    return " and ".join(saved)


@figure
def cuda_compile(records: Records) -> str:
    rows = records["cuda-compile"]["rows"]
    registers = [row["registers"] for row in rows]
    spilling = sum(row["spill_stores"] + row["spill_loads"] > 0 for row in rows)
    found = f"{len(rows)} kernels, {min(registers)} to {max(registers)} registers"
    return f"{found}, {spilling} of them spill"


@figure
def gpu_goals(records: Records) -> str:
    """What has to be shown on a GPU, and what was."""
    lines = [(text, goal, _measured(records, value)) for text, goal, value in GPU_GOALS]
    return table(("on an NVIDIA H200, bf16 weights and gradients", "goal", "measured"), lines)


def _measured(records: Records, value: Callable[[Records], str]) -> str:
    try:
        return value(records)
    except (FileNotFoundError, KeyError):
        return NOT_MEASURED


def _gpu_row(records: Records, model: str) -> dict:
    """Of a model's step at its own rank by triton: its own record's, else that of first contact.

    Raises:
        FileNotFoundError, KeyError: it was not measured.
    """
    if (name := f"model_step-{model}-cuda") in records:
        return records[name]["rows"][0]
    rank = PRESETS[model].rank
    for row in records["first_contact-cuda"]["rows"]:
        facts = [row.get(key) for key in ("part", "model", "rank", "dtype", "backend")]
        if facts == ["models", model, rank, "bf16", "triton"]:
            return row
    raise KeyError(model)


def _of_floor(records: Records) -> str:
    shares = [
        _gpu_row(records, model)["results"]["fira"]["share_of_floor"] for model in ("1b", "7b")
    ]
    return ", ".join(times(1 / share) for share in shares)


def _against(ours: str, rival: str, models: tuple[str, ...]) -> Callable[[Records], str]:
    def ratio(records: Records) -> str:
        rows = [_gpu_row(records, model)["results"] for model in models]
        return ", ".join(times(row[rival]["ms"] / row[ours]["ms"]) for row in rows)

    return ratio


def _refresh_share(records: Records) -> str:
    rows = by(records["refresh-cuda"]["rows"], finder="randomized")
    return f"{100 * max(row['share_of_step'] for row in rows):.1f} %"


def _slowest(records: Records) -> str:
    """The slowest step after the first, in medians, of layers that take turns."""
    runs = by(records["pretrain-60m-cuda/pretrain"]["runs"], optimizer="galore")
    return times(
        max(max(r["step_seconds"][1:]) / statistics.median(r["step_seconds"]) for r in runs)
    )


def _at_low_rank(records: Records) -> str:
    (row,) = by(records["ranks-cuda"]["rows"], model="1b", rank=128)
    return times(row["results"]["adamw-master"]["ms"] / row["results"]["fira"]["ms"])


def _tokens(records: Records) -> str:
    ratios = []
    for model in ("60m", "350m"):
        rows = records[f"pretrain-{model}-cuda/pretrain"]["summary"]
        rate = {row["optimizer"]: row["tokens_per_second"] for row in rows}
        ratios.append(rate["fira"] / rate["adamw"])
    return ", ".join(map(times, ratios))


def _launches(records: Records) -> str:
    return str(_gpu_row(records, "60m")["results"]["fira"]["launches"])


LARGE = ("1b", "7b")
GPU_GOALS = [
    ("Fira's step over its floor, 1B and 7B", "at most 1.4x", _of_floor),
    ("Fira, times as fast as the hybrid", "1.3x", _against("fira", "hybrid-fira", LARGE)),
    ("GaLore, times as fast as the hybrid", "1.1x", _against("galore", "hybrid-galore", LARGE)),
    (
        "Fira at 1B, times as fast as fused AdamW, float32 moments",
        "1x at r = m/4",
        _against("fira", "adamw-master", ("1b",)),
    ),
    ("the same at r = m/16", "1.5x", _at_low_rank),
    ("Fira at 60M, times as fast as fused AdamW", "1x", _against("fira", "adamw", ("60m",))),
    ("launches of a Fira step at 60M", "10: 3 or 4 a batch of equal matrices", _launches),
    ("randomized refresh, of a step at T = 200", "at most 2 %", _refresh_share),
    ("slowest step after the first, in medians, 60M", "under 2x", _slowest),
    ("tokens/s against fused AdamW, 60M and 350M", "at least 0.99x", _tokens),
]
