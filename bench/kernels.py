"""The three operations and the step they make: time, share of the floor, rivals side by side.

    python -m bench.kernels                      # this device, the shapes of LLaMA 60M and 1B
    python -m bench.kernels --device cuda --models 60m,1b,7b --dtypes bf16
    python -m bench.kernels --quick              # seconds: small shapes, figures of no use

Bytes are the fewest that an operation can move, each operand once; FLOPs those of its product. The
floor is the larger of bytes / measured copy rate and FLOPs / measured product rate. Inputs are
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
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import hybrid
from bench.cases import DTYPES, OPERATIONS, PLAIN, STEP, Candidate, Case, Inputs, check, make_inputs
from bench.models import PRESETS
from bench.record import environment, write_lines
from bench.timing import Rates, Samples, copies_beyond_cache, interleaved, measure_rates
from lowrank_kernels import backends
from lowrank_kernels.ops import load

QUICK_SHAPES = [((96, 64), 16), ((64, 96), 16)]


def measure(
    case: Case, modules: dict[str, ModuleType], device: torch.device, rounds: int
) -> dict[str, dict[str, Samples]]:
    """Samples by operation and candidate; the whole step also of torch's fused AdamW."""
    first = make_inputs(case, device, seed=0)
    sets = [first, *(first.to() for _ in range(copies_beyond_cache(first.bytes, device) - 1))]
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
            yield "torch fused AdamW", _adamw(sets)

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
                    name: {
                        "ms": 1e3 * samples.median,
                        "spread": samples.spread,
                        "share_of_floor": floor / samples.median,
                        "samples_ms": [round(1e3 * s, 5) for s in samples.seconds],
                    }
                    for name, samples in times.get(operation, {}).items()
                },
            }
        )
    return rows


def cases(options: argparse.Namespace, backend: str) -> list[Case]:
    """The projected shapes of the models, once each, in groups as the backend takes them."""
    shapes: dict[tuple[tuple[int, int], int], int] = {}
    for name in options.models.split(","):
        preset = PRESETS[name]
        hidden, ffn = preset.hidden, preset.ffn
        for shape, count in (((hidden, hidden), 4), ((ffn, hidden), 2), ((hidden, ffn), 1)):
            shapes[shape, preset.rank] = count * preset.layers
    if options.quick:
        shapes = dict.fromkeys(QUICK_SHAPES, 2)
    found = []
    for dtype in options.dtypes.split(","):
        for (shape, rank), count in shapes.items():
            matrix = torch.empty(shape, dtype=DTYPES[dtype], device=options.device)
            size = min(count, load(backend).group_size(matrix, matrix, rank))
            found += [Case(*shape, rank, dtype, m, size) for m in options.methods.split(",")]
    return found


def table(rows: list[dict], backend: str, head: dict) -> Table:
    """A row an operation: the backend's time and share of the floor, and what rivals take to it."""
    products = ", ".join(
        f"{name} {rate / 1e12:.2f}" for name, rate in head["flops_per_second"].items()
    )
    result = Table(
        title=f"{head['environment']['device']}, {head['threads']} threads: copies at"
        f" {head['bytes_per_second'] / 1e9:.0f} GB/s, products at {products} TFLOP/s",
        caption="medians of interleaved rounds, ± half the quartiles' distance; x: how many times"
        f" {backend} is faster; not here: {head['missing'] or 'nobody'}",
    )
    rivals = list(dict.fromkeys(n for row in rows for n in row["results"] if n != backend))
    for heading in ("matrices", "r", "dtype", "method", "operation", "floor ms", "ms", "of floor"):
        result.add_column(heading, no_wrap=True)
    for rival in rivals:
        result.add_column(f"x {rival}", justify="right")
    for row in rows:
        shape = f"{row['matrices']} of {row['rows']} x {row['cols']} {row['side']}"
        cells = [shape, str(row["rank"]), row["dtype"], row["method"], row["operation"]]
        result.add_row(*cells, f"{row['floor_ms']:.3f}", *_figures(row, backend, rivals))
    return result


def _figures(row: dict, backend: str, rivals: list[str]) -> list[str]:
    results, own = row["results"], row["results"].get(backend)
    if wrong := row["wrong"].get(backend):
        return [f"WRONG: {', '.join(wrong)}"]
    if own is None:
        return ["interpreted"]
    time = f"{own['ms']:.3f} ± {100 * own['spread']:.0f} %"
    ratios = [
        f"{results[name]['ms'] / own['ms']:.2f}" if name in results else "" for name in rivals
    ]
    return [time, f"{100 * own['share_of_floor']:.0f} %", *ratios]


def main(arguments: list[str] | None = None) -> None:
    """Checks, measures, writes and prints; the exit status is 1 if a candidate is wrong."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="python -m bench.kernels")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=here)
    parser.add_argument(
        "--backend", choices=tuple(backends()), help="default: triton, on cpu native"
    )
    parser.add_argument("--models", default="60m,1b", help=f"of {', '.join(PRESETS)}")
    parser.add_argument("--dtypes", default="bf16,fp32", help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--methods", default="fira,galore")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    parser.add_argument("--out", type=Path, help="the JSON record; none by default")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    backend = options.backend or ("triton" if options.device == "cuda" else "native")
    available, reason = backends()[backend]
    if not available:
        sys.exit(f"kernels: the {backend} backend cannot run here: {reason}")

    modules, missing = {backend: load(backend)}, {}
    if backend != "native":
        available, reason = backends()["native"]
        if available and (device.type == "cpu" or load("native").build_info()["cuda"]):
            modules["native"] = load("native")
        else:
            missing["native"] = reason
    modules[PLAIN] = hybrid
    rates = {
        name: measure_rates(device, DTYPES[name], options.quick)
        for name in options.dtypes.split(",")
    }
    todo = cases(options, backend)
    rows = [
        row
        for case in track(todo, "measuring", console=Console(stderr=True))
        for row in bench_case(
            case, modules, device, rates[case.dtype], 2 if options.quick else options.rounds
        )
    ]
    head = {
        "environment": environment(options.device),
        "command": " ".join(["python -m bench.kernels", *(arguments or sys.argv[1:])]),
        "threads": torch.get_num_threads(),
        "bytes_per_second": max(rate.bytes_per_second for rate in rates.values()),
        "flops_per_second": {name: rate.flops_per_second for name, rate in rates.items()},
        "missing": missing,
    }
    if options.out:
        write_lines(options.out, head, "rows", rows)
    Console(width=None if sys.stdout.isatty() else 170).print(table(rows, backend, head))
    if any(row["wrong"] for row in rows):
        names = sorted({name for row in rows for name in row["wrong"]})
        sys.exit(f"kernels: wrong results, so no time: {', '.join(names)}")


if __name__ == "__main__":
    main()
