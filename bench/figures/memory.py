"""Figures of state, counted on shapes, and of what Newton-Schulz iterations multiply."""

from __future__ import annotations

from bench.figures.common import Records, by, figure, source, table
from bench.tables import (
    less_text,
    share_text,
)


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
