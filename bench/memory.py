"""What weights, gradients and state take, counted on shapes; and the published savings recounted.

    python -m bench.memory --models 60m,1b,7b

Needs no device: `plan()` makes the optimizers' state of models on the meta device, which a test
holds against real state, to the byte. The accounting goes from what this package keeps to what
GaLore's authors counted, a difference at a time. They print 65.5 % less state than AdamW's, and
82.5 % with 8-bit moments, both against AdamW in bfloat16.
"""

from __future__ import annotations

import torch
from rich.table import Table

from bench.cases import DTYPES
from bench.models import PRESETS, build_model, cast_parameters
from bench.options import parse, parser
from bench.record import head, write_lines
from bench.tables import new_table, progress, show
from lowrank_kernels import AdaRankGradAdamW, FiraAdamW, GaLoreAdamW, param_groups

VOCABULARY = 32_000
OURS = {"galore": GaLoreAdamW, "fira": FiraAdamW, "adarankgrad": AdaRankGradAdamW}
PUBLISHED = {"bf16": 0.655, "8-bit": 0.825}
# A float32 scale for every block of so many, as in 8-bit Adam.
BLOCK = 256


def on_meta(model: str, dtype: str) -> torch.nn.Module:
    with torch.device("meta"):
        found = build_model(PRESETS[model], VOCABULARY, 256)
    cast_parameters(found, DTYPES[dtype])
    return found


def plans(model: str, dtype: str) -> list[dict]:
    """A row an optimizer; AdamW as torch keeps it, in the dtype of the weights and in float32."""
    module, rank = on_meta(model, dtype), PRESETS[model].rank
    params = list(module.parameters())
    count, tensors = sum(param.numel() for param in params), len(params)
    size = DTYPES[dtype].itemsize
    common = {"model": model, "dtype": dtype, "parameters": count}
    common |= {"weight_bytes": count * size, "gradient_bytes": count * size}
    states = {"adamw": (None, 2 * count * size + 4 * tensors)}
    if size < 4:
        # Copies of the weights and two moments, in float32.
        states["adamw-master"] = (None, 12 * count + 4 * tensors)
    for name, optimizer in OURS.items():
        rows = optimizer(param_groups(module, rank)).plan()
        states[name] = (rank, sum(row["state_bytes"] for row in rows))
    full = states["adamw"][1]
    return [
        {"optimizer": name, **common, "rank": rank, "state_bytes": state, "of_adamw": state / full}
        for name, (rank, state) in states.items()
    ]


def accounting(model: str) -> list[dict]:
    """GaLore's state from ours to the published count, each line with one thing changed."""
    rank = PRESETS[model].rank
    rows = GaLoreAdamW(param_groups(on_meta(model, "bf16"), rank)).plan()
    basis = sum(rank * min(row["shape"]) for row in rows if row["projected"])
    moments = sum(2 * rank * max(row["shape"]) for row in rows if row["projected"])
    projected = sum(torch.Size(row["shape"]).numel() for row in rows if row["projected"])
    total = sum(torch.Size(row["shape"]).numel() for row in rows)
    rest, scales = 2 * (total - projected), 4 / BLOCK
    published = {name: f"published: {100 * share:.1f} %" for name, share in PUBLISHED.items()}
    counts = [
        ("this package: bfloat16 basis, float32 moments, float32 moments of the rest",
         sum(row["state_bytes"] for row in rows), 4 * total),
        ("bfloat16 moments everywhere, as in the published runs; " + published["bf16"],
         2 * (basis + moments + rest), 4 * total),
        ("the same of the projected matrices alone",
         2 * (basis + moments), 4 * projected),
        ("8-bit moments in blocks with a float32 scale, bfloat16 basis",
         2 * basis + (1 + scales) * (moments + rest), 4 * total),
        ("8 bits for the basis, too, and no scales; " + published["8-bit"],
         basis + moments + rest, 4 * total),
        ("8-bit moments, no scales, and no basis",
         moments + rest, 4 * total),
    ]  # fmt: skip
    return [
        {"model": model, "text": text, "state_bytes": round(state), "adamw_bytes": full,
         "reduction": 1 - state / full}
        for text, state, full in counts
    ]  # fmt: skip


def table(rows: list[dict]) -> Table:
    found = new_table(
        "weights, gradients and optimizer state, counted on shapes",
        "GB are 10^9 bytes; of AdamW's: of torch's AdamW with state in the dtype of the weights",
        ("LLaMA", "dtype", "r", "optimizer"),
        ("weights GB", "gradients GB", "state GB", "of AdamW's"),
    )
    for row in rows:
        sizes = (row["weight_bytes"], row["gradient_bytes"], row["state_bytes"])
        found.add_row(
            *(row["model"], row["dtype"], str(row["rank"] or ""), row["optimizer"]),
            *(f"{size / 1e9:.3f}" for size in sizes),
            f"{100 * row['of_adamw']:.1f} %",
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    options = parse(
        parser("memory", __doc__, models="60m,1b,7b", dtypes="bf16", rounds=1), arguments
    )
    cases = [(model, dtype) for model in options.models for dtype in options.dtypes]
    rows = [row for case in progress(cases, "counting") for row in plans(*case)]
    accounts = accounting("7b")
    record = head("memory", "cpu", options.arguments, accounting=accounts, published=PUBLISHED)
    if options.out:
        write_lines(options.out, record, "rows", rows)
    show(table(rows), 120)
    second = new_table("GaLore at 7B, r 1024", "", ("what is counted",), ("GB", "less"))
    for row in accounts:
        size = f"{row['state_bytes'] / 1e9:.2f}"
        second.add_row(row["text"], size, f"{100 * row['reduction']:.1f} %")
    show(second, 120)


if __name__ == "__main__":
    main()
