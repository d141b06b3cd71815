"""`optimizer.step()` of one matrix beside the official packages, fused AdamW and bare products.

    python -m bench.step                # this device, every case; minutes
    python -m bench.step --quick        # seconds: small shapes, figures of no use

All take the same gradients, more of them in turn than a cache holds, and nobody refreshes a basis
while the clock runs; "fresh" are the times with a gradient that has just been written, as a
backward pass leaves it. `products` are the two matrix products that a low-rank step cannot do
without, R = P^T G and P B, and nothing else; `torch` is the step as a careful user writes it
without a package. Ours is held against the official optimizer first, or against the reference
backend where that is not installed: where its weights differ by more than the precision of the run,
the case is reported and not timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from statistics import geometric_mean
from unittest import mock

import torch
from rich.table import Table
from torch import Tensor

from bench import hybrid
from bench.cases import DTYPES, OPERATIONS, PLAIN, STEP, Case, Inputs, input_sets, make_inputs
from bench.cases import Candidate as Operations
from bench.optimizers import METHODS as OPTIMIZERS
from bench.optimizers import present
from bench.options import parse, parser, words
from bench.peers import Recipe
from bench.record import head, result, write_lines
from bench.tables import SPREAD, missing_text, new_table, progress, rates_text, show, time_text
from bench.timing import (
    Candidate,
    Rates,
    Samples,
    interleaved,
    measure_rates,
    rates_record,
)
from lowrank_kernels import FiraAdamW, GaLoreAdamW
from lowrank_kernels.ops import Side

OURS, OFFICIAL, ADAMW, PRODUCTS = "ours", "official", "fused AdamW", "products"
REFERENCE = "reference"
# The official package of each method.
PACKAGES = {"fira": "fira-official", "galore": "galore-torch"}
RIVALS = (OFFICIAL, ADAMW, PLAIN, PRODUCTS)
# The squares on both sides, the rest beside their transposes.
SHAPES = [
    *((2048, 2048, rank, proj_type) for rank in (512, 128) for proj_type in ("std", "reverse_std")),
    *((2048, 5461, 512, "std"), (5461, 2048, 512, "std")),
    *((512, 1376, 128, "std"), (1376, 512, 128, "std")),
]
QUICK_SHAPES = [(96, 64, 16, "std"), (64, 64, 16, "reverse_std")]
CHECKED_STEPS = 3


class Trained:
    """A weight and its optimizer, after the first step, the only one that computes a basis."""

    def __init__(self, name: str, case: Case, start: Tensor, grad: Tensor, backend: str):
        self.weight = torch.nn.Parameter(start.clone())
        self.optimizer = build(name, case, self.weight, backend)
        # Its time is nobody's figure here, and an SVD of 2048 x 5461 takes half a minute.
        with mock.patch("torch.linalg.svd", random_svd):
            self.step(grad)

    def step(self, grad: Tensor) -> None:
        self.weight.grad = grad
        self.optimizer.step()


def build(name: str, case: Case, weight: Tensor, backend: str) -> torch.optim.Optimizer:
    group = {
        "params": [weight],
        "rank": case.rank,
        "update_proj_gap": 2**62,
        "scale": 0.25,
        "proj_type": case.proj_type,
    }
    if name in (OURS, REFERENCE):
        backend = REFERENCE if name == REFERENCE else backend
        ours = FiraAdamW if case.method == "fira" else GaLoreAdamW
        return ours([group], lr=1e-3, weight_decay=0.1, backend=backend, subspace="svd")
    chosen = OPTIMIZERS["adamw" if name == ADAMW else PACKAGES[case.method]]
    return chosen.build([group], 1e-3, Recipe(weight_decay=0.1))


def random_svd(matrix: Tensor, full_matrices: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """In place of torch.linalg.svd: random orthonormal vectors, the same for the same shape."""
    rng = torch.Generator(matrix.device).manual_seed(0)
    small = min(matrix.shape)
    like = {"generator": rng, "device": matrix.device, "dtype": matrix.dtype}
    left, right = (torch.linalg.qr(torch.randn(n, small, **like))[0] for n in matrix.shape)
    return left, torch.ones(small).to(matrix), right.mT


def is_official_here(case: Case, device: torch.device) -> bool:
    return OPTIMIZERS[PACKAGES[case.method]].obstacle(device.type) is None


def distance(case: Case, backend: str, device: torch.device) -> float:
    """How far ours ends from the official weights, or the reference's, as a share of their way.

    From zero: larger weights would be rounded by more than a step changes them.
    """
    grads = [make_inputs(case, device, seed).grads[0] for seed in range(CHECKED_STEPS)]
    ends = []
    for name in (OURS, OFFICIAL if is_official_here(case, device) else REFERENCE):
        trained = Trained(name, case, torch.zeros_like(grads[0]), grads[0], backend)
        for grad in grads[1:]:
            trained.step(grad)
        ends.append(trained.weight.detach().double())
    ours, right = ends
    return float(torch.dist(ours, right) / torch.linalg.norm(right))


def products(case: Case, sets: list[Inputs]) -> dict[str, Candidate]:
    """The products of operations 1 and 3 and of a step, of the first matrix of each set.

    In the dtype of the run, into memory that is there already.
    """
    basis, left = sets[0].bases[0], case.side is Side.LEFT
    low = basis.T @ sets[0].grads[0] if left else sets[0].grads[0] @ basis
    outputs = [torch.empty_like(x.grads[0]) for x in sets]

    def project(turn: int) -> None:
        grad = sets[turn % len(sets)].grads[0]
        torch.mm(*((basis.T, grad) if left else (grad, basis)), out=low)

    def back_project(turn: int) -> None:
        output = outputs[turn % len(sets)]
        torch.mm(*((basis, low) if left else (low, basis.T)), out=output)

    def both(turn: int) -> None:
        project(turn)
        back_project(turn)

    first, _, third = OPERATIONS
    return {first: project, third: back_project, STEP: both}


def candidates(
    case: Case, sets: list[Inputs], backend: str, device: torch.device
) -> dict[str, Candidate]:
    def optimizer(name: str) -> Candidate:
        every = [Trained(name, case, x.params[0], x.grads[0], backend) for x in sets]
        return lambda turn: every[turn % len(sets)].step(sets[turn % len(sets)].grads[0])

    official = (OFFICIAL,) if is_official_here(case, device) else ()
    found = {name: optimizer(name) for name in (OURS, *official, ADAMW)}
    operations = Operations(hybrid, case)
    found[PLAIN] = lambda turn: operations.step(sets[turn % len(sets)])
    found[PRODUCTS] = products(case, sets)[STEP]
    return found


def bench_case(case: Case, device: torch.device, backend: str, rates: Rates, rounds: int) -> dict:
    """A row of the record: no times where ours is wrong."""
    # The official moments, products and weights are rounded to the dtype at every pass.
    apart = distance(case, backend, device)
    wrong = not apart <= 16 * torch.finfo(DTYPES[case.dtype]).eps
    cold, fresh = ({}, {}) if wrong else measure(case, device, backend, rounds)
    floor = rates.floor(*case.traffic()[STEP])
    return {
        **asdict(case),
        "side": case.side.name.lower(),
        "against": OFFICIAL if is_official_here(case, device) else REFERENCE,
        "distance": apart,
        "wrong": wrong,
        "floor_ms": 1e3 * floor,
        "times_faster": {
            name: cold[name].median / cold[OURS].median for name in RIVALS if name in cold
        },
        "results": results(cold, floor),
        "fresh": results(fresh, floor),
    }


def results(times: dict[str, Samples], floor: float) -> dict[str, dict]:
    """AdamW is another algorithm, with another floor."""
    return {n: result(s, None if n == ADAMW else floor) for n, s in times.items()}


def measure(
    case: Case, device: torch.device, backend: str, rounds: int
) -> tuple[dict[str, Samples], dict[str, Samples]]:
    """Cold, and with a gradient that has just been written."""
    sets = input_sets(make_inputs(case, device, seed=0), device)
    runs, source = candidates(case, sets, backend, device), sets[0].grads[0].clone()

    def write(turn: int) -> None:
        sets[turn % len(sets)].grads[0].copy_(source)

    cold = interleaved(runs, device, rounds)
    return cold, interleaved(runs, device, max(2, rounds // 2), prepare=write)


def means(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Geometric means of the ratios over the cases of each method."""
    result = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        right = [row for row in rows if row["method"] == method and not row["wrong"]]
        if right:
            result[method] = {
                name: geometric_mean([row["times_faster"][name] for row in right])
                for name in right[0]["times_faster"]
            }
    return result


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for method in options.methods:
        for dtype in options.dtypes:
            for rows, cols, rank, proj_type in QUICK_SHAPES if options.quick else SHAPES:
                yield Case(rows, cols, rank, dtype, method, 1, proj_type)


def table(record: dict, rows: list[dict]) -> Table:
    """A row a case: our time, and how many times as long the others take."""
    found = new_table(
        f"{record['environment']['device']}, {record['environment']['threads']} threads:"
        f" {rates_text(record['rates'])}; one step of one matrix, {record['backend']} backend",
        f"{SPREAD}; fresh: with the gradient just written; x: how many times ours is faster;"
        f" {missing_text(record['missing'])}",
        ("method", "dtype", "matrix", "side", "r", "ms"),
        ("fresh", "of floor", *(f"x {rival}" for rival in RIVALS)),
    )
    for row in rows:
        shape = f"{row['rows']} x {row['cols']}"
        cells = [row["method"], row["dtype"], shape, row["side"], str(row["rank"])]
        if row["wrong"]:
            found.add_row(*cells, f"WRONG: {row['distance']:.1e} from {row['against']}")
            continue
        own, fresh = row["results"][OURS], row["fresh"][OURS]
        cells += [time_text(own), f"{fresh['ms']:.2f}", f"{100 * own['share_of_floor']:.0f} %"]
        found.add_row(*cells, *_ratios(row["times_faster"]))
    for method, ratios in record["geometric_means"].items():
        found.add_row(method, "", "geometric mean", *5 * [""], *_ratios(ratios))
    return found


def _ratios(ratios: dict[str, float]) -> list[str]:
    return [f"{ratios[name]:.2f}" if name in ratios else "" for name in RIVALS]


def main(arguments: list[str] | None = None) -> None:
    """Checks, measures, writes and prints; the exit status is 1 if a case is wrong."""
    line = parser("step", __doc__, models="1b", dtypes="fp32,bf16", rounds=15)
    line.add_argument("--methods", type=words(PACKAGES), default="fira,galore")
    options = parse(line, arguments)
    device = torch.device(options.device)
    rates = {name: measure_rates(device, DTYPES[name], options.quick) for name in options.dtypes}
    rows = [
        bench_case(case, device, options.backend, rates[case.dtype], options.rounds)
        for case in progress(list(cases(options)))
    ]
    _, missing = present([PACKAGES[method] for method in options.methods], options.device)
    facts = {"backend": options.backend, "rates": rates_record(rates), "missing": missing}
    record = head("step", options.device, options.arguments, **facts, geometric_means=means(rows))
    if options.out:
        write_lines(options.out, record, "rows", rows)
    show(table(record, rows))
    if any(row["wrong"] for row in rows):
        sys.exit("step: ours is not the official step, or the reference's: no time")


if __name__ == "__main__":
    main()
