"""How fast must a disk be for offloaded activations? COMPUTED, NOT MEASURED.

    python -m bench.offload_speeds --out bench/results/offload-speeds.json      # some minutes
    python -m bench.offload_speeds --models 1b

Bytes are counted by `lowrank_kernels.activations.plan`, of LLaMA as transformers computes it in
bfloat16 with flash attention, one sequence of 2,048 tokens; seconds follow from the rates of cards'
data sheets by `lowrank_kernels.cli.offload`, which says what is assumed. Bytes and products grow
alike with tokens, so that speeds hardly depend on them.

SSDTrain (arXiv 2408.10013) holds 47 % less: so much goes out here, too; of checkpointed blocks,
whose inputs alone are saved, everything.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.table import Table

from bench.options import about, words
from bench.record import head, write_lines
from bench.tables import new_table, progress, show
from lowrank_kernels.activations.plan import Training, plan_training
from lowrank_kernels.cli.models import PLANNED, llama
from lowrank_kernels.cli.offload import REACHED, speed_of

TITLE = "computed, not measured"
MODELS = ("1b", "7b", "13b", "70b")
DEVICES = ("b200", "h200", "a100-80", "l40s", "rtx-5090", "rtx-4090")
TOKENS, SSDTRAIN = 2048, 0.47
# What is done beside it, and the share that goes out.
WAYS = (("plain", SSDTRAIN), ("recompute", SSDTRAIN), ("checkpointing", 1.0))


def rows_of(model: str) -> list[dict]:
    """A row a way."""
    module, rows = llama(model).bfloat16(), []
    for how, share in WAYS:
        options = {} if how == "plain" else {how: True}
        plan = plan_training(module, None, TOKENS, Training("cuda", offload=share, **options))
        found = plan.activations
        assert found is not None
        speeds = {
            card: speed_of(found.out, found.products, card, how == "checkpointing")._asdict()
            for card in DEVICES
        }
        rows.append(
            {"model": model, "with": how, "share": share, "tokens": TOKENS,
             "saved_bytes": found.saved + found.out, "out_bytes": found.out,
             "products": found.products, "speeds": speeds}
        )  # fmt: skip
    return rows


def table(rows: list[dict]) -> Table:
    found = new_table(
        f"what a disk has to write, {TITLE}",
        "GB are 10^9 bytes; so that the forward pass of 2,048 tokens waits for nothing",
        ("LLaMA", "with", "share"),
        ("saved GB", *(f"{card} GB/s" for card in DEVICES)),
    )
    for row in rows:
        speeds = (row["speeds"][card]["bytes_per_second"] for card in DEVICES)
        found.add_row(
            *(row["model"], row["with"], f"{row['share']:g}", f"{row['saved_bytes'] / 1e9:.2f}"),
            *(f"{speed / 1e9:.1f}" for speed in speeds),
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    line = about("offload_speeds", __doc__)
    names = f"of {', '.join(PLANNED)}; default: {','.join(MODELS)}"
    line.add_argument("--models", type=words(PLANNED), default=",".join(MODELS), help=names)
    line.add_argument("--out", type=Path, help="the JSON record; none by default")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = line.parse_args(arguments)
    rows = [row for model in progress(options.models, "counting") for row in rows_of(model)]
    if options.out:
        facts = {"title": TITLE, "reached": REACHED}
        write_lines(options.out, head("offload_speeds", "cpu", arguments, **facts), "rows", rows)
    show(table(rows), 150)


if __name__ == "__main__":
    main()
