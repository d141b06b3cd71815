"""What weights, gradients and state take, counted on shapes; and the published savings recounted.

    python -m bench.memory --models 60m,350m,1b,7b

Needs no device: `plan()` makes the optimizers' state of models on the meta device, in every format,
which tests hold against real state and against formulas, to the byte. Rivals are counted as their
packages keep them.

The accounting sets what GaLore's authors count beside what their code and this package keep. They
print two savings of one and the same 8-bit GaLore: 65.5 % against 8-bit Adam, and 82.5 % against
Adam in bfloat16. Both come out with a byte for each number of the basis and no scales; that the
first is against 8-bit Adam stands in their section 5.5, and not in the abstract.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.table import Table

from bench.cases import DTYPES
from bench.models import PRESETS, build_model, cast_parameters
from bench.options import parse, parser
from bench.peers import factored_bytes
from bench.record import head, write_lines
from bench.tables import less_text, new_table, progress, share_text, show
from lowrank_kernels import AdaRankGradAdamW, FiraAdamW, GaLoreAdamW, param_groups
from lowrank_kernels.ops.orthogonal import STEPS

VOCABULARY = 32_000
OURS = {"galore": GaLoreAdamW, "fira": FiraAdamW, "adarankgrad": AdaRankGradAdamW}
# Of moments and of bases: each step takes less.
FORMATS = (
    ("float32", "weight"),
    ("bfloat16", "weight"),
    ("int8", "weight"),
    ("int8", "int8"),
    ("int8", "int4"),
)
# Counted beside a model's own rank: low ones are used at 7B, too.
MORE_RANKS = {"7b": (64,)}
PUBLISHED = {"of 8-bit Adam": 0.655, "of bfloat16 Adam": 0.825}
# Of 8-bit AdamW, as bitsandbytes and torchao keep it: elements that share a float32 scale, and the
# elements below which a parameter's moments are float32.
BLOCK, SMALLEST = 256, 4096


def on_meta(model: str, dtype: str, layers: int | None = None) -> torch.nn.Module:
    """A model without weights, of so many layers or of all."""
    preset = PRESETS[model]
    with torch.device("meta"):
        found = build_model(replace(preset, layers=layers or preset.layers), VOCABULARY, 256)
    cast_parameters(found, DTYPES[dtype])
    return found


def eight_bit_bytes(elements: int) -> int:
    """Two moments in codes of a byte; maps of codes, which all parameters share, are left out."""
    if elements < SMALLEST:
        return 8 * elements
    return 2 * (elements + 4 * math.ceil(elements / BLOCK))


def rivals(params: Sequence[torch.Tensor], size: int) -> dict[str, int]:
    """State of optimizers without a rank, for weights of so many bytes an element."""
    count, steps = sum(param.numel() for param in params), 4 * len(params)
    found = {"adamw": 2 * count * size + steps}
    if size < 4:
        # With copies of the weights in float32, too, and without.
        found |= {"adamw-master": 12 * count + steps, "adamw-fp32": 8 * count + steps}
    found["adamw-8bit"] = sum(eight_bit_bytes(param.numel()) for param in params)
    found["adamw-factored-8bit"] = sum(factored_bytes(param.shape) for param in params)
    return found


def ours(module: torch.nn.Module, name: str, rank: int, state: str, basis: str) -> int:
    """State of one of our optimizers in these formats."""
    optimizer = OURS[name](param_groups(module, rank), state=state, basis=basis)
    return sum(row["state_bytes"] for row in optimizer.plan())


def plans(model: str, dtype: str, rank: int) -> list[dict]:
    """A row an optimizer and format; the rivals come with the model's own rank.

    Each stands beside AdamW as torch keeps it, in the weights' dtype, and beside 8-bit AdamW.
    """
    module = on_meta(model, dtype)
    params = list(module.parameters())
    count, size = sum(param.numel() for param in params), DTYPES[dtype].itemsize
    common = {"model": model, "dtype": dtype, "parameters": count}
    common |= {"weight_bytes": count * size, "gradient_bytes": count * size}
    known = rivals(params, size)
    states = {}
    if rank == PRESETS[model].rank:
        states |= {(name, None, None, None): state for name, state in known.items()}
    for name in OURS:
        for state, basis in FORMATS:
            states[name, rank, state, basis] = ours(module, name, rank, state, basis)
    return [
        {"optimizer": name, **common, "rank": of_rank, "state": state, "basis": basis,
         "state_bytes": found, "of_adamw": found / known["adamw"],
         "of_adamw_8bit": found / known["adamw-8bit"]}
        for (name, of_rank, state, basis), found in states.items()
    ]  # fmt: skip


def accounting(model: str) -> list[dict]:
    """GaLore's state in every format, and as the authors' code and their figures have it."""
    module, rank = on_meta(model, "bf16"), PRESETS[model].rank
    rows = GaLoreAdamW(param_groups(module, rank)).plan()
    projected = [row["shape"] for row in rows if row["projected"]]
    rest = [math.prod(row["shape"]) for row in rows if not row["projected"]]
    basis = sum(rank * min(shape) for shape in projected)
    low = [rank * max(shape) for shape in projected]
    official = 2 * basis + sum(map(eight_bit_bytes, low + rest))
    printed = " and ".join(f"{100 * share:.1f} % less" for share in PUBLISHED.values())
    counts = {
        "the authors' 8-bit code: bfloat16 basis, moments in 8 bits with scales": official,
        f"a byte each for basis and moments, no scales; published: {printed}": basis
        + 2 * sum(low + rest),
    }
    for state, held in FORMATS:
        counts[f"this package, `state={state!r}`, `basis={held!r}`".replace("'", '"')] = ours(
            module, "galore", rank, state, held
        )
    known = rivals(list(module.parameters()), 2)
    return [
        {"model": model, "text": text, "state_bytes": state,
         "less_than_8bit": 1 - state / known["adamw-8bit"],
         "less_than_bf16": 1 - state / known["adamw"]}
        for text, state in counts.items()
    ]  # fmt: skip


def orthogonalization(model: str) -> dict:
    """What Newton-Schulz iterations of all matrices multiply, beside a forward and backward pass.

    Per iteration of an m x n matrix, m <= n: its Gram matrix, the square of that, and the product
    with the matrix. Per token: 6 for each weight that multiplies; attention's own are left out.
    """
    module = on_meta(model, "bf16")
    rows = [row["shape"] for row in GaLoreAdamW(param_groups(module, 8)).plan() if row["projected"]]
    sides = [(min(shape), max(shape)) for shape in rows]
    flops = STEPS * sum(2 * m * m * n + 2 * m**3 + 2 * m * m * n for m, n in sides)
    linears = (each for each in module.modules() if isinstance(each, torch.nn.Linear))
    per_token = 6 * sum(each.weight.numel() for each in linears)
    tenth = math.ceil(10 * flops / per_token)
    return {"model": model, "flops": flops, "flops_per_token": per_token, "tokens_of_tenth": tenth}


def table(rows: list[dict]) -> Table:
    found = new_table(
        "weights, gradients and optimizer state, counted on shapes",
        "GB are 10^9 bytes; of AdamW's: of torch's AdamW with state in the dtype of the weights;"
        " of 8-bit: of 8-bit AdamW with scales",
        ("LLaMA", "dtype", "r", "optimizer", "state", "basis"),
        ("weights GB", "state GB", "of AdamW's", "of 8-bit"),
    )
    for row in rows:
        found.add_row(
            *(row["model"], row["dtype"], str(row["rank"] or ""), row["optimizer"]),
            *(row["state"] or "", row["basis"] or ""),
            *(f"{row[key] / 1e9:.3f}" for key in ("weight_bytes", "state_bytes")),
            *(share_text(row[key]) for key in ("of_adamw", "of_adamw_8bit")),
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    own = parser("memory", __doc__, models="60m,350m,1b,7b", dtypes="bf16", rounds=1)
    options = parse(own, arguments)
    cases = [
        (model, dtype, rank)
        for model in options.models
        for dtype in options.dtypes
        for rank in (PRESETS[model].rank, *MORE_RANKS.get(model, ()))
    ]
    rows = [row for case in progress(cases, "counting") for row in plans(*case)]
    accounts = accounting("7b")
    products = [orthogonalization(model) for model in options.models]
    facts = {"accounting": accounts, "published": PUBLISHED, "orthogonalization": products}
    record = head("memory", "cpu", options.arguments, **facts)
    if options.out:
        write_lines(options.out, record, "rows", rows)
    show(table(rows), 130)
    second = new_table(
        "GaLore at 7B, r 1024", "", ("what is counted",), ("GB", "less than\n8-bit AdamW", "bf16")
    )
    for row in accounts:
        cells = (less_text(row[key]) for key in ("less_than_8bit", "less_than_bf16"))
        second.add_row(row["text"], f"{row['state_bytes'] / 1e9:.3f}", *cells)
    show(second, 130)
    third = new_table(
        'residual="orthogonal": Newton-Schulz beside forward and backward, by products',
        "",
        ("LLaMA",),
        ("TFLOP a step", "MFLOP a token", "a tenth at tokens"),
    )
    for row in products:
        sizes = (f"{row['flops'] / 1e12:.2f}", f"{row['flops_per_token'] / 1e6:,.0f}")
        third.add_row(row["model"], *sizes, f"{row['tokens_of_tenth']:,}")
    show(third, 130)


if __name__ == "__main__":
    main()
