"""A new basis: time and captured energy of every range finder beside an exact SVD.

    python -m bench.refresh                        # this device: LLaMA 60M and 1B shapes; minutes
    python -m bench.refresh --gradients FILE       # also of saved gradients; see bench.gradients
    python -m bench.refresh --quick                # seconds: small shapes, figures of no use

Captured is |P^T G|^2 as a share of what the best basis of that rank captures; exact energies come
from a float64 SVD. Synthetic gradients have a hard spectrum: singular values i^-1/2 and 30 % of
noise. "share of a step" is a refresh every `--gap` steps against our Fira step of the same matrix.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from bench.cases import DTYPES, Case, make_inputs
from bench.cases import Candidate as Operations
from bench.models import PRESETS
from bench.options import parse, parser
from bench.record import head, result, write_lines
from bench.tables import SPREAD, new_table, progress, show, time_text
from bench.timing import Candidate as Timed
from bench.timing import copies_beyond_cache, interleaved
from lowrank_kernels.ops import load
from lowrank_kernels.subspace.range_finders import RANGE_FINDERS, Found, Request

SVD = "torch.linalg.svd"
FINDERS = {
    "randomized": ("randomized", 1),
    "randomized, 2 iterations": ("randomized", 2),
    "power": ("power", 1),
    "random": ("random", 1),
}
STEP = "Fira step"
MAX_SKEW = 1e-5
# Of what an SVD captures of a gradient that a training run has made.
LEAST_CAPTURED = {"randomized": 0.98, "randomized, 2 iterations": 0.99}
SYNTHETIC = "synthetic"


class Problem(NamedTuple):
    """A gradient whose basis is asked for, d x n."""

    name: str
    grad: Tensor
    rank: int


def synthetic(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    rng = torch.Generator(device).manual_seed(0)

    def orthonormal(size: int, directions: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, directions, generator=rng, device=device))[0]

    small = min(rows, cols)
    values = torch.arange(1, small + 1, device=device) ** -0.5
    matrix = orthonormal(rows, small) * values @ orthonormal(cols, small).T
    noise = torch.randn(rows, cols, generator=rng, device=device)
    level = 0.3 * torch.linalg.norm(matrix) / torch.linalg.norm(noise)
    return (matrix + level * noise).to(dtype)


def problems(options: argparse.Namespace, device: torch.device) -> Iterator[Problem]:
    shapes: dict[tuple[int, int], int] = {}
    for model in options.models:
        preset = PRESETS[model]
        hidden, ffn = preset.hidden, preset.ffn
        shapes |= dict.fromkeys([(hidden, hidden), (hidden, ffn)], preset.rank)
    if options.quick:
        shapes = {(64, 64): 16, (64, 96): 16}
    for dtype in options.dtypes:
        for (rows, cols), rank in shapes.items():
            grad = synthetic(rows, cols, DTYPES[dtype], device)
            yield Problem(f"{SYNTHETIC} {dtype}", grad, rank)
    if options.gradients:
        saved = torch.load(options.gradients, map_location=device, weights_only=True)
        for name, grad in saved["gradients"].items():
            wide = grad if grad.shape[0] <= grad.shape[1] else grad.T
            yield Problem(name, wide, saved["rank"])


def request(grad: Tensor, rank: int, previous: Tensor | None, iterations: int) -> Request:
    norms = torch.linalg.vector_norm(grad, dtype=torch.float64).unsqueeze(0)
    return Request(grad.unsqueeze(0), norms, rank, [previous], [0], iterations)


def captured(grad: Tensor, found: Found) -> float:
    return float((found.bases[0].double().T @ grad.double()).square().sum())


def orthogonality(found: Found) -> float:
    basis = found.bases[0]
    identity = torch.eye(basis.shape[1], device=basis.device)
    return float((basis.T @ basis - identity).abs().max())


def bench_problem(problem: Problem, backend: str, rounds: int, gap: int) -> list[dict]:
    """A row a range finder."""
    grad, rank, device = problem.grad, problem.rank, problem.grad.device
    best = float(torch.linalg.svdvals(grad.double())[:rank].square().sum())
    # No basis of an earlier step is to be had here: one of a random sketch stands for it.
    previous = RANGE_FINDERS["randomized"](request(grad, rank, None, 1)).bases[0]
    calls = {
        name: (RANGE_FINDERS[finder], request(grad, rank, previous, iterations))
        for name, (finder, iterations) in FINDERS.items()
    }
    quick: dict[str, Timed] = {name: lambda _, c=call: c[0](c[1]) for name, call in calls.items()}
    times = interleaved(quick | {STEP: step(problem, backend)}, device, rounds)
    # It takes a hundred times as long, so it gets rounds of its own, and fewer.
    wide = grad.float()
    exact: dict[str, Timed] = {SVD: lambda _: torch.linalg.svd(wide, full_matrices=False)}
    times |= interleaved(exact, device, max(2, rounds // 5))
    rows = []
    for name in (SVD, *FINDERS):
        row = {
            "gradient": problem.name,
            "rows": grad.shape[0],
            "cols": grad.shape[1],
            "rank": rank,
            "finder": name,
            "captured": 1.0,
            "orthogonality": None,
            **result(times[name]),
            "times_faster_than_svd": times[SVD].median / times[name].median,
            "share_of_step": times[name].median / gap / times[STEP].median,
        }
        if name != SVD:
            finder, asked = calls[name]
            found = finder(asked)
            row["captured"] = captured(grad, found) / best
            row["orthogonality"] = orthogonality(found)
        rows.append(row)
    return rows


def step(problem: Problem, backend: str) -> Timed:
    """Fira's step of one matrix of this shape, beside which a refresh is seldom."""
    rows, cols = problem.grad.shape
    dtype = {value: name for name, value in DTYPES.items()}[problem.grad.dtype]
    case = Case(rows, cols, problem.rank, dtype, "fira", 1)
    first = make_inputs(case, problem.grad.device, seed=0)
    copies = copies_beyond_cache(first.bytes, problem.grad.device) - 1
    sets = [first, *(first.to() for _ in range(copies))]
    operations = Operations(load(backend), case)
    return lambda turn: operations.step(sets[turn % len(sets)])


def table(record: dict, rows: list[dict]) -> Table:
    """A row a gradient and a range finder."""
    found = new_table(
        f"{record['environment']['device']}, {record['environment']['threads']} threads:"
        " a new basis",
        f"{SPREAD}; of a step: every {record['gap']} steps, beside a Fira step of the matrix by the"
        f" {record['backend']} backend",
        ("gradient", "matrix", "r", "range finder", "ms"),
        ("x SVD", "captured", "|P'P - I|", "of a step"),
    )
    for row in rows:
        found.add_row(
            row["gradient"],
            f"{row['rows']} x {row['cols']}",
            str(row["rank"]),
            row["finder"],
            time_text(row, 1),
            f"{row['times_faster_than_svd']:.1f}",
            f"{100 * row['captured']:.2f} %",
            "" if row["orthogonality"] is None else f"{row['orthogonality']:.0e}",
            f"{100 * row['share_of_step']:.1f} %",
            end_section=row["finder"] == list(FINDERS)[-1],
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measures, writes and prints; the exit status is 1 if a basis is bad."""
    line = parser("refresh", __doc__, models="60m,1b", dtypes="fp32,bf16", rounds=10)
    line.add_argument("--gradients", type=Path, help="what bench.gradients saved")
    line.add_argument("--gap", type=int, default=200, help="steps between refreshes")
    options = parse(line, arguments)
    todo = progress(list(problems(options, torch.device(options.device))))
    rows = [
        row
        for problem in todo
        for row in bench_problem(problem, options.backend, options.rounds, options.gap)
    ]
    facts = {"backend": options.backend, "gap": options.gap}
    record = head("refresh", options.device, options.arguments, **facts)
    if options.out:
        write_lines(options.out, record, "rows", rows)
    show(table(record, rows))
    if wrong := failures(rows):
        sys.exit("refresh: " + "; ".join(wrong))


def failures(rows: list[dict]) -> list[str]:
    """Bases that are skew, and real gradients of which too little was captured."""
    found = []
    for row in rows:
        what = f"{row['finder']} on {row['gradient']}"
        if (row["orthogonality"] or 0.0) > MAX_SKEW:
            found.append(f"{what} is not orthonormal to {MAX_SKEW}")
        least = LEAST_CAPTURED.get(row["finder"], 0.0)
        if not row["gradient"].startswith(SYNTHETIC) and row["captured"] < least:
            found.append(f"{what} captured {row['captured']:.4f} of what an SVD does")
    return found


if __name__ == "__main__":
    main()
