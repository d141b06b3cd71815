"""`optimizer.step()` of one matrix beside the official packages, fused AdamW and bare products.

    python -m bench.step                # this device, every case; minutes
    python -m bench.step --quick        # seconds: small shapes, figures of no use

All take the same gradients, more of them in turn than a cache holds, and nobody refreshes a basis
while the clock runs. `products` are the two matrix products that a low-rank step cannot do without,
R = P^T G and P B, and nothing else; `torch` is the step as a careful user writes it without a
package. Ours is held against the official optimizer first: where its weights differ by more than
the precision of the run, the case is reported and not timed.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import geometric_mean
from unittest import mock

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from bench import hybrid
from bench.cases import DTYPES, PLAIN, Case, Inputs, make_inputs
from bench.cases import Candidate as Operations
from bench.record import environment, write_lines
from bench.timing import Candidate, Samples, copies_beyond_cache, interleaved
from lowrank_kernels import FiraAdamW, GaLoreAdamW
from lowrank_kernels.ops import Side

OURS, OFFICIAL, ADAMW, PRODUCTS = "ours", "official", "fused AdamW", "products"
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
    options = {"lr": 1e-3, "weight_decay": 0.1}
    if name == ADAMW:
        return torch.optim.AdamW([weight], fused=True, **options)
    group = {
        "params": [weight],
        "rank": case.rank,
        "update_proj_gap": 2**62,
        "alpha" if case.method == "fira" else "scale": 0.25,
        "proj_type": case.proj_type,
    }
    if name == OURS:
        ours = FiraAdamW if case.method == "fira" else GaLoreAdamW
        return ours([group], eps=1e-6, backend=backend, subspace="svd", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a GPU that bitsandbytes does not find
        from fira import FiraAdamW as OfficialFira
        from galore_torch import GaLoreAdamW as OfficialGaLore
    official = OfficialFira if case.method == "fira" else OfficialGaLore
    return official([group], eps=1e-6, no_deprecation_warning=True, **options)


def random_svd(matrix: Tensor, full_matrices: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """In place of torch.linalg.svd: random orthonormal vectors, the same for the same shape."""
    rng = torch.Generator(matrix.device).manual_seed(0)
    small = min(matrix.shape)
    like = {"generator": rng, "device": matrix.device, "dtype": matrix.dtype}
    left, right = (torch.linalg.qr(torch.randn(n, small, **like))[0] for n in matrix.shape)
    return left, torch.ones(small).to(matrix), right.mT


def distance(case: Case, backend: str, device: torch.device) -> float:
    """How far ours ends from the official weights, as a share of their way.

    From zero: larger weights would be rounded by more than a step changes them.
    """
    grads = [make_inputs(case, device, seed).grads[0] for seed in range(CHECKED_STEPS)]
    ends = []
    for name in (OURS, OFFICIAL):
        trained = Trained(name, case, torch.zeros_like(grads[0]), grads[0], backend)
        for grad in grads[1:]:
            trained.step(grad)
        ends.append(trained.weight.detach().double())
    ours, official = ends
    return float(torch.dist(ours, official) / torch.linalg.norm(official))


def products(case: Case, sets: list[Inputs]) -> Candidate:
    """The two products of a step, in the dtype of the run, into memory that is there already."""
    basis, left = sets[0].bases[0], case.side is Side.LEFT
    low = basis.T @ sets[0].grads[0] if left else sets[0].grads[0] @ basis
    outputs = [torch.empty_like(x.grads[0]) for x in sets]

    def run(turn: int) -> None:
        grad, output = sets[turn % len(sets)].grads[0], outputs[turn % len(sets)]
        torch.mm(*((basis.T, grad) if left else (grad, basis)), out=low)
        torch.mm(*((basis, low) if left else (low, basis.T)), out=output)

    return run


def candidates(case: Case, device: torch.device, backend: str) -> dict[str, Candidate]:
    first = make_inputs(case, device, seed=0)
    sets = [first, *(first.to() for _ in range(copies_beyond_cache(first.bytes, device) - 1))]

    def optimizer(name: str) -> Candidate:
        every = [Trained(name, case, x.params[0], x.grads[0], backend) for x in sets]
        return lambda turn: every[turn % len(sets)].step(sets[turn % len(sets)].grads[0])

    found = {name: optimizer(name) for name in (OURS, OFFICIAL, ADAMW)}
    operations = Operations(hybrid, case)
    found[PLAIN] = lambda turn: operations.step(sets[turn % len(sets)])
    found[PRODUCTS] = products(case, sets)
    return found


def bench_case(case: Case, device: torch.device, backend: str, rounds: int) -> dict:
    """A row of the record: no times where ours is wrong."""
    # The official moments, products and weights are rounded to the dtype at every pass.
    apart = distance(case, backend, device)
    wrong = not apart <= 16 * torch.finfo(DTYPES[case.dtype]).eps
    times: dict[str, Samples] = {}
    if not wrong:
        times = interleaved(candidates(case, device, backend), device, rounds)
    own = times[OURS].median if times else None
    return {
        **asdict(case),
        "side": case.side.name.lower(),
        "distance": apart,
        "wrong": wrong,
        "times_faster": {name: times[name].median / own for name in RIVALS if own},
        "results": {
            name: {
                "ms": 1e3 * samples.median,
                "spread": samples.spread,
                "samples_ms": [round(1e3 * s, 5) for s in samples.seconds],
            }
            for name, samples in times.items()
        },
    }


def means(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Geometric means of the ratios over the cases of each method."""
    result = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        right = [row for row in rows if row["method"] == method and not row["wrong"]]
        if right:
            result[method] = {
                name: geometric_mean([row["times_faster"][name] for row in right])
                for name in RIVALS
            }
    return result


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for method in options.methods.split(","):
        for dtype in options.dtypes.split(","):
            for rows, cols, rank, proj_type in QUICK_SHAPES if options.quick else SHAPES:
                yield Case(rows, cols, rank, dtype, method, 1, proj_type)


def table(rows: list[dict], head: dict) -> Table:
    """A row a case: our time, and how many times as long the others take."""
    result = Table(
        title=f"{head['environment']['device']}, {head['threads']} threads: one step of one matrix,"
        f" {head['backend']} backend",
        caption="ms: median of interleaved rounds, ± half the quartiles' distance; x: how many"
        " times ours is faster",
    )
    for heading in ("method", "dtype", "matrix", "side", "r", "ms"):
        result.add_column(heading, no_wrap=True)
    for rival in RIVALS:
        result.add_column(f"x {rival}", justify="right")
    for row in rows:
        shape = f"{row['rows']} x {row['cols']}"
        cells = [row["method"], row["dtype"], shape, row["side"], str(row["rank"])]
        if row["wrong"]:
            result.add_row(*cells, f"WRONG: {row['distance']:.1e} from official")
            continue
        own = row["results"][OURS]
        time = f"{own['ms']:.2f} ± {100 * own['spread']:.0f} %"
        result.add_row(*cells, time, *(f"{row['times_faster'][name]:.2f}" for name in RIVALS))
    for method, ratios in head["geometric_means"].items():
        mean = (f"{ratios[name]:.2f}" for name in RIVALS)
        result.add_row(method, "", "geometric mean", "", "", "", *mean)
    return result


def main(arguments: list[str] | None = None) -> None:
    """Checks, measures, writes and prints; the exit status is 1 if a case is wrong."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="python -m bench.step")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=here)
    parser.add_argument("--backend", help="default: triton, on cpu native")
    parser.add_argument("--dtypes", default="fp32,bf16", help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--methods", default="fira,galore")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    parser.add_argument("--out", type=Path, help="the JSON record; none by default")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    backend = options.backend or ("triton" if options.device == "cuda" else "native")
    rounds = 2 if options.quick else options.rounds
    todo = track(list(cases(options)), "measuring", console=Console(stderr=True))
    rows = [bench_case(case, device, backend, rounds) for case in todo]
    head = {
        "environment": environment(options.device),
        "command": " ".join(["python -m bench.step", *(arguments or sys.argv[1:])]),
        "threads": torch.get_num_threads(),
        "backend": backend,
        "geometric_means": means(rows),
    }
    if options.out:
        write_lines(options.out, head, "rows", rows)
    Console(width=None if sys.stdout.isatty() else 130).print(table(rows, head))
    if any(row["wrong"] for row in rows):
        sys.exit("step: ours is not the official step, so no time")


if __name__ == "__main__":
    main()
