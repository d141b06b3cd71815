"""Forward and backward pass of factored linear layers beside nn.Linear, on a CPU.

    python -m bench.factored --out bench/results/factored-cpu.json    # some minutes
    python -m bench.factored --quick                                  # figures of no use

A layer of LLaMA's shapes, its weight as factors at a share of the smaller side, with and without
3 % of its entries beside. A pass is y = layer(x) and its backward, for x and all parameters; arms
go in turns. Beside the time stands the share of the dense products' operations.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from bench.options import about
from bench.record import head, result, write_lines
from bench.tables import SPREAD, new_table, show
from bench.timing import Candidate, interleaved
from lowrank_kernels import FactoredLinear

# Rows, columns and tokens.
SHAPES = ((512, 512, 1024), (1376, 512, 1024), (2048, 2048, 1024))
QUICK_SHAPES = ((64, 48, 32),)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SPARSE = 0.03
# Of the smaller side, which is divided by them.
SHARES = (4, 8)


def arms(rows: int, cols: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    made: dict[str, nn.Module] = {"dense": nn.Linear(cols, rows, bias=False, dtype=dtype)}
    for share in SHARES:
        for sparse in (0.0, SPARSE):
            name = f"r = 1/{share}" + (", sparse" if sparse else "")
            size = cols, rows, min(rows, cols) // share
            layer = FactoredLinear(*size, bias=False, sparse=sparse, dtype=dtype, seed=0)
            nn.init.normal_(layer.B)  # it is 0 beside a sparse part
            made[name] = layer
    return made


def passes(layer: nn.Module, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> Candidate:
    def run(turn: int) -> None:
        x, grad = inputs[turn % len(inputs)], outputs[turn % len(outputs)]
        x.grad = None
        layer.zero_grad()
        layer(x).backward(grad)

    return run


def measured(rows: int, cols: int, tokens: int, name: str, rounds: int) -> dict:
    dtype = DTYPES[name]
    inputs = [torch.randn(tokens, cols, dtype=dtype, requires_grad=True) for _ in range(2)]
    outputs = [torch.randn(tokens, rows, dtype=dtype) for _ in range(2)]
    layers = arms(rows, cols, dtype)
    todo = {name: passes(layer, inputs, outputs) for name, layer in layers.items()}
    samples = interleaved(todo, torch.device("cpu"), rounds)
    dense = samples["dense"].median
    found = {
        arm: result(each)
        | {"of_dense": each.median / dense, "operations": work(layers[arm]) / (rows * cols)}
        for arm, each in samples.items()
    }
    size = {"rows": rows, "cols": cols, "tokens": tokens, "dtype": name}
    return {**size, "results": found}


def work(layer: nn.Module) -> int:
    """Multiplications of a token, forward; backward has twice as many."""
    return sum(param.numel() for param in layer.parameters())


def main(arguments: list[str] | None = None) -> None:
    own = about("factored", __doc__)
    own.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    own.add_argument("--quick", action="store_true", help="seconds: figures of no use")
    own.add_argument("--out", type=Path, help="the JSON record; none by default")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = own.parse_args(arguments)
    torch.manual_seed(0)
    shapes, rounds = (QUICK_SHAPES, 2) if options.quick else (SHAPES, options.rounds)
    rows = []
    for size in shapes:
        for dtype in DTYPES:
            rows.append(measured(*size, dtype, rounds))
            title = f"{size[0]} x {size[1]}, {size[2]} tokens, {dtype}"
            table = new_table(title, SPREAD, ["layer"], ["ms", "of dense", "operations"])
            for arm, each in rows[-1]["results"].items():
                time = f"{each['ms']:.1f} ± {100 * each['spread']:.0f} %"
                table.add_row(arm, time, f"{each['of_dense']:.2f}", f"{each['operations']:.2f}")
            show(table)
            if options.out:
                write_lines(options.out, head("factored", "cpu", arguments), "rows", rows)


if __name__ == "__main__":
    main()
