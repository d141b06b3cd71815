"""Figures of layers that hand R over, and of what a step holds in all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bench.figures.common import NOT_MEASURED, Records, by, figure, ms, source, span_text, table
from bench.models import PRESETS

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
        f"{span_text(speeds)} times as fast at r = h / {share}" for share, speeds in found.items()
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
def factored(records: Records) -> str:
    """Forward and backward of factored layers as shares of nn.Linear's time."""
    if "factored-cpu" not in records:
        return f"\n{NOT_MEASURED}\n"
    rows = records["factored-cpu"]["rows"]
    names = [name for name in rows[0]["results"] if name != "dense"]
    lines = []
    for row in rows:
        results = row["results"]
        cells = (
            f"{results[name]['of_dense']:.2f} ({results[name]['operations']:.2f})" for name in names
        )
        size = f"{row['rows']} x {row['cols']}, {row['dtype']}"
        lines.append((size, f"{row['tokens']:,}", ms(results["dense"]), *cells))
    headings = ("layer", "tokens", "`nn.Linear`, ms", *names)
    return table(headings, lines, source(records, "factored-cpu"))
