"""How many tokens at a time a model can be trained with on a card, without checkpointing.

    python -m bench.fits --out bench/results/fits.json       # LLaMA 7B in 24 GB; some minutes
    python -m bench.fits --models 1b --memory 8GiB,8GB

Needs no device: `lowrank_kernels.activations.plan` counts a step of the model as transformers
computes it, bfloat16, attention by flash kernels, one sequence; see `plan_training` for what is
counted. Weights, gradients, state, temporaries, activations and loss lie on the card, and 0.8 GB
are left to CUDA, an estimate. Nothing is offloaded and no block is computed again. AdamW has its
gradients at once; GaLore and Fira, their state in int8, are planned so, too, and with what
`lowrank_kernels.activations` has for them: gradients projected (GaLore) and released, and inputs of
linears computed again.

24GB are 24 x 10^9 bytes, 24GiB 24 x 2^30. A card of "24 GB" gives torch 23.5 GiB, 25.2 GB.
"""

from __future__ import annotations

from rich.table import Table

from bench.memory import on_meta
from bench.models import PRESETS
from bench.options import parse, parser
from bench.record import head, write_lines
from bench.tables import new_table, progress, show
from lowrank_kernels import FiraAdamW, GaLoreAdamW, LowRankAdamW, param_groups
from lowrank_kernels.activations.plan import Planner, Training
from lowrank_kernels.text import parse_bytes

# Of a model's own rank.
SHARES = (1, 2, 4)
BASES = ("weight", "int8")
# What a method is trained with, in turn.
METHODS: dict[str, tuple[type[LowRankAdamW], tuple[tuple[str, ...], ...]]] = {
    "galore": (GaLoreAdamW, ((), ("project", "release"), ("project", "release", "recompute"))),
    "fira": (FiraAdamW, ((), ("release",), ("release", "recompute"))),
}
TOKENS = 2048


def rows_of(model: str, memories: list[str]) -> list[dict]:
    """A row a method, what it is trained with, rank and basis; AdamW first."""
    module = on_meta(model, "bf16")
    sizes = {text: parse_bytes(text, "--memory") for text in memories}
    plain = Planner(module, Training("cuda", min(sizes.values())))
    rows = [{"model": model, "optimizer": "adamw", "with": [], **_row(plain, None, sizes)}]
    cases = [(name, how) for name, (_, ways) in METHODS.items() for how in ways]
    for name, how in progress(cases, model):
        training = Training("cuda", min(sizes.values()), **dict.fromkeys(how, True))
        planner = Planner(module, training) if how else plain
        for share in SHARES:
            for basis in BASES:
                formats = {"rank": PRESETS[model].rank // share, "state": "int8", "basis": basis}
                groups = param_groups(module, formats["rank"])
                optimizer = METHODS[name][0](groups, state="int8", basis=basis)
                found = _row(planner, optimizer, sizes)
                rows.append({"model": model, "optimizer": name, "with": how, **formats, **found})
    return rows


def _row(planner: Planner, optimizer: LowRankAdamW | None, sizes: dict[str, int]) -> dict:
    plan = planner.plan(optimizer, TOKENS)
    assert plan.activations is not None
    return {
        "tokens": TOKENS,
        "weight_bytes": plan.weights,
        "state_bytes": plan.state,
        "gradient_bytes": plan.gradients,
        "activation_bytes": plan.activations.saved,
        "allowance_bytes": plan.allowance,
        "total_bytes": plan.total,
        "peak_in": plan.at,
        "most_tokens": {text: planner.most_tokens(optimizer, size) for text, size in sizes.items()},
    }


def table(rows: list[dict]) -> Table:
    memories = list(rows[0]["most_tokens"])
    found = new_table(
        f"bytes of a step with {TOKENS} tokens, and how many tokens fit",
        "GB are 10^9 bytes; state in int8; activations: when the backward pass begins",
        ("LLaMA", "optimizer", "with", "r", "basis"),
        ("weights GB", "state GB", "activations GB", "peak GB", *(f"in {m}" for m in memories)),
    )
    for row in rows:
        sizes = (row[f"{key}_bytes"] for key in ("weight", "state", "activation", "total"))
        found.add_row(
            *(row["model"], row["optimizer"], ", ".join(row["with"])),
            *(str(row.get("rank", "")), row.get("basis", "")),
            *(f"{size / 1e9:.2f}" for size in sizes),
            *(f"{row['most_tokens'][memory]:,}" for memory in memories),
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    own = parser("fits", __doc__, models="7b", dtypes="bf16", rounds=1)
    own.add_argument("--memory", default="24GB,24GiB", help="default: %(default)s")
    options = parse(own, arguments)
    memories = options.memory.split(",")
    rows = [row for model in options.models for row in rows_of(model, memories)]
    if options.out:
        write_lines(options.out, head("fits", "cpu", options.arguments), "rows", rows)
    show(table(rows), 150)


if __name__ == "__main__":
    main()
