"""The three operations and the step they make: time, share of the floor, rivals side by side.

    python -m bench.kernels                      # this device, the shapes of LLaMA 60M and 1B
    python -m bench.kernels --device cuda --models 60m,1b,7b --dtypes bf16
    python -m bench.kernels --quick              # seconds: small shapes, figures of no use

Bytes are the fewest that an operation can move, each operand once; FLOPs those of its product. The
floor is the larger of bytes / measured memory rate and FLOPs / measured product rate. Inputs are
cold: sets of them are used in turn, more than a cache holds. Every candidate's results are held
against float64 first; one that errs more than twice as much as plain torch is reported and not
timed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from types import ModuleType

import torch
from rich.table import Table

from bench import hybrid
from bench.cases import (
    DTYPES,
    METHODS,
    OPERATIONS,
    PLAIN,
    STEP,
    Candidate,
    Case,
    Inputs,
    check,
    input_sets,
    make_inputs,
)
from bench.models import PRESETS
from bench.options import parse, parser, words
from bench.record import head, result, write_lines
from bench.tables import SPREAD, missing_text, new_table, progress, rates_text, show, time_text
from bench.timing import (
    Rates,
    Samples,
    interleaved,
    measure_rates,
    rates_record,
)
from lowrank_kernels import backends
from lowrank_kernels.ops import load

# Another algorithm, with another floor.
ADAMW = "torch fused AdamW"
QUICK_SHAPES = [((96, 64), 16), ((64, 96), 16)]


def measure(
    case: Case, modules: dict[str, ModuleType], device: torch.device, rounds: int
) -> dict[str, dict[str, Samples]]:
    """Samples by operation and candidate; the whole step also of torch's fused AdamW."""
    sets = input_sets(make_inputs(case, device, seed=0), device)
    candidates = {name: Candidate(module, case) for name, module in modules.items()}
    handed = {name: [c.step(x) for x in sets] for name, c in candidates.items()}

    def runs(operation: str) -> Iterator[tuple[str, Callable[[int], object]]]:
        for name, candidate in candidates.items():
            run = getattr(candidate, operation)
            if operation == "channel_scale":
                yield (
                    name,
                    lambda i, r=run, h=handed[name]: r(sets[i % len(sets)], h[i % len(h)][0]),
                )
            elif operation == "back_project_update":
                yield name, lambda i, r=run, h=handed[name]: r(sets[i % len(sets)], *h[i % len(h)])
            else:
                yield name, lambda i, r=run: r(sets[i % len(sets)])
        if operation == STEP:
            yield ADAMW, _adamw(sets)

    operations = [op for op in (*OPERATIONS, STEP) if case.residual or op != "channel_scale"]
    return {op: interleaved(dict(runs(op)), device, rounds) for op in operations}


def _adamw(sets: list[Inputs]) -> Callable[[int], object]:
    """Full-rank AdamW of the same matrices, moments in the weights' dtype as torch has them."""
    optimizers = []
    for x in sets:
        params = [torch.nn.Parameter(param.clone()) for param in x.params]
        for param, grad in zip(params, x.grads, strict=True):
            param.grad = grad
        optimizers.append(torch.optim.AdamW(params, lr=1e-4, fused=True))
    return lambda i: optimizers[i % len(optimizers)].step()


def bench_case(
    case: Case, modules: dict[str, ModuleType], device: torch.device, rates: Rates, rounds: int
) -> list[dict]:
    """A row an operation; a candidate that errs has its wrong outputs there and no time."""
    wrong = check(case, modules, make_inputs(case, device, seed=1))
    right = {name: module for name, module in modules.items() if not wrong[name]}
    silent = os.environ.get("TRITON_INTERPRET") == "1"
    times = {} if silent else measure(case, right, device, rounds)
    rows = []
    for operation, (moved, flops) in case.traffic().items():
        if operation == "channel_scale" and not case.residual:
            continue
        floor = rates.floor(moved, flops)
        rows.append(
            {
                **asdict(case),
                "side": case.side.name.lower(),
                "operation": operation,
                "bytes": moved,
                "flops": flops,
                "floor_ms": 1e3 * floor,
                "wrong": {name: outputs for name, outputs in wrong.items() if outputs},
                "results": {
                    name: result(samples, None if name == ADAMW else floor)
                    for name, samples in times.get(operation, {}).items()
                },
            }
        )
    return rows


def cases(options: argparse.Namespace) -> list[Case]:
    """The projected shapes of the models, once each, in batches as the backend takes them."""
    shapes: dict[tuple[tuple[int, int], int], int] = {}
    for name in options.models:
        preset = PRESETS[name]
        hidden, ffn = preset.hidden, preset.ffn
        for shape, count in (((hidden, hidden), 4), ((ffn, hidden), 2), ((hidden, ffn), 1)):
            shapes[shape, preset.rank] = count * preset.layers
    if options.quick:
        shapes = dict.fromkeys(QUICK_SHAPES, 2)
    found = []
    for dtype in options.dtypes:
        for (shape, rank), count in shapes.items():
            matrix = torch.empty(shape, dtype=DTYPES[dtype], device=options.device)
            size = min(count, load(options.backend).batch_size(matrix, matrix, rank))
            found += [Case(*shape, rank, dtype, method, size) for method in options.methods]
    return found


def table(record: dict, rows: list[dict]) -> Table:
    """A row an operation: the backend's time and share of the floor, and what rivals take to it."""
    backend = record["backend"]
    rivals = list(dict.fromkeys(n for row in rows for n in row["results"] if n != backend))
    found = new_table(
        f"{record['environment']['device']}, {record['environment']['threads']} threads:"
        f" {rates_text(record['rates'])}",
        f"{SPREAD}; x: how many times {backend} is faster; {missing_text(record['missing'])}",
        ("matrices", "r", "dtype", "method", "operation", "floor ms", "ms", "of floor"),
        [f"x {rival}" for rival in rivals],
    )
    for row in rows:
        shape = f"{row['matrices']} of {row['rows']} x {row['cols']} {row['side']}"
        cells = [shape, str(row["rank"]), row["dtype"], row["method"], row["operation"]]
        found.add_row(*cells, f"{row['floor_ms']:.3f}", *_figures(row, backend, rivals))
    return found


def _figures(row: dict, backend: str, rivals: list[str]) -> list[str]:
    results, own = row["results"], row["results"].get(backend)
    if wrong := row["wrong"].get(backend):
        return [f"WRONG: {', '.join(wrong)}"]
    if own is None:
        return ["interpreted"]
    ratios = [
        f"{results[name]['ms'] / own['ms']:.2f}" if name in results else "" for name in rivals
    ]
    return [time_text(own, 3), f"{100 * own['share_of_floor']:.0f} %", *ratios]


def candidates(backend: str, device: str) -> tuple[dict[str, ModuleType], dict[str, str]]:
    """Ours first, then the rivals that are here, and why the others are not."""
    modules, missing = {backend: load(backend)}, {}
    if backend != "native":
        available, reason = backends()["native"]
        if available and (device == "cpu" or load("native").build_info()["cuda"]):
            modules["native"] = load("native")
        else:
            missing["native"] = reason
    modules["foreach"] = load("foreach")
    return {**modules, PLAIN: hybrid}, missing


def main(arguments: list[str] | None = None) -> None:
    """Checks, measures, writes and prints; the exit status is 1 if a candidate is wrong."""
    line = parser("kernels", __doc__, models="60m,1b", dtypes="bf16,fp32", rounds=15)
    line.add_argument("--methods", type=words(METHODS), default="fira,galore")
    options = parse(line, arguments)
    device = torch.device(options.device)
    modules, missing = candidates(options.backend, options.device)
    rates = {name: measure_rates(device, DTYPES[name], options.quick) for name in options.dtypes}
    rows = [
        row
        for case in progress(cases(options))
        for row in bench_case(case, modules, device, rates[case.dtype], options.rounds)
    ]
    facts = {"backend": options.backend, "rates": rates_record(rates), "missing": missing}
    record = head("kernels", options.device, options.arguments, **facts)
    if options.out:
        write_lines(options.out, record, "rows", rows)
    show(table(record, rows), 170)
    if any(row["wrong"] for row in rows):
        names = sorted({name for row in rows for name in row["wrong"]})
        sys.exit(f"kernels: wrong results, so no time: {', '.join(names)}")


if __name__ == "__main__":
    main()
