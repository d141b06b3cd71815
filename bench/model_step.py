"""`optimizer.step()` of whole models: time, launches, state and memory, ours and everybody's.

    python -m bench.model_step                                     # this device, LLaMA 60M; minutes
    python -m bench.model_step --models 60m,350m,1b,7b --dtypes bf16 --device cuda
    python -m bench.model_step --ranks 16,64,256,full --optimizers adamw,galore,fira
    python -m bench.model_step --quick                             # seconds, figures of no use

Parameters and gradients are those of the LLaMA layer sets, random, shared by all optimizers. Every
step is timed cold, after other memory has gone through the cache, and with gradients that have just
been written, as a backward pass leaves them. On a GPU these are its own times: Python has a lead,
and what it takes is told by `bench.first_contact`. Nobody refreshes a basis while the clock runs.
Ours are held against the reference backend first, on one block of the model; where the weights
differ by more than the precision of the run, nothing of it is timed. `-bf16` and `-8bit` are
formats of moments. Who is not installed, or does not fit in memory, is named.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from unittest import mock

import torch
from rich.table import Table

from bench.cases import DTYPES, STEP, Case
from bench.measure import tensor_bytes
from bench.models import PRESETS, Preset, build_model, cast_parameters
from bench.optimizers import FORMATS, METHODS, RIVALS, present
from bench.options import parse, parser, words
from bench.peers import Recipe
from bench.record import head, result, write_lines
from bench.step import random_svd
from bench.tables import SPREAD, missing_text, new_table, progress, rates_text, show, time_text
from bench.timing import (
    LEAD_OF_STEPS,
    Rates,
    Samples,
    best,
    cache_bytes,
    interleaved,
    measure_rates,
    rates_record,
)
from lowrank_kernels import param_groups
from lowrank_kernels.optim.allocations import Allocations

OURS = ("galore", "fira", "adarankgrad")
IN_FORMATS = tuple(f"{name}-{form}" for name in OURS for form in FORMATS)
FULL = "full"
VOCABULARY = 32_000
QUICK = {"models": ["9m"], "ranks": ["preset"], "vocabulary": 512}
Groups = list[dict]


@dataclass(frozen=True)
class Problem:
    """A model's layer set, the rank of its projections and the dtype of its weights."""

    model: str
    rank: int
    dtype: str
    vocabulary: int = VOCABULARY

    @property
    def preset(self) -> Preset:
        return PRESETS[self.model]

    def matrices(self) -> list[tuple[int, int]]:
        """Shapes of the projected matrices of a block."""
        hidden, ffn = self.preset.hidden, self.preset.ffn
        return [*[(hidden, hidden)] * 4, *[(ffn, hidden)] * 2, (hidden, ffn)]


def parameters(problem: Problem, device: torch.device, layers: int | None = None) -> Groups:
    """Groups of the layer set with weights and gradients as in training, a name a parameter."""
    preset = replace(problem.preset, layers=layers or problem.preset.layers)
    with torch.device("meta"):
        model = build_model(preset, problem.vocabulary, 256)
    cast_parameters(model, DTYPES[problem.dtype])
    model.to_empty(device=device)
    rng = torch.Generator(device).manual_seed(0)
    for param in model.parameters():
        param.data.normal_(0, 0.02, generator=rng)
        param.grad = torch.empty_like(param).normal_(0, 1e-3, generator=rng)
    # A rank that saves nothing is measured, too: it is where the curve over ranks ends.
    groups = param_groups(model, rank=1, update_proj_gap=2**40)
    return [{**g, "rank": problem.rank} if "rank" in g else g for g in groups]


def tensors(groups: Groups) -> list[torch.nn.Parameter]:
    return [param for group in groups for _, param in group["params"]]


def started(name: str, groups: Groups, backend: str) -> torch.optim.Optimizer:
    """An optimizer after its first step, the only one that computes bases, from no SVD."""
    found = METHODS[name].build(groups, 1e-4, Recipe(weight_decay=0.1, backend=backend))
    with mock.patch("torch.linalg.svd", random_svd):
        found.step()
    return found


def distance(name: str, problem: Problem, device: torch.device, backend: str) -> float:
    """How far three steps of one block end from those of the reference backend, of their way."""
    ends = []
    for each in (backend, "reference"):
        groups = parameters(replace(problem, vocabulary=64), device, layers=1)
        for param in tensors(groups):
            param.data.zero_()  # larger weights would be rounded by more than a step changes them
        optimizer = started(name, groups, each)
        for _ in range(2):
            optimizer.step()
        ends.append(torch.cat([p.detach().double().flatten() for p in tensors(groups)]))
    ours, reference = ends
    return float(torch.dist(ours, reference) / torch.linalg.norm(reference))


def allowed(name: str, dtype: str) -> float:
    """The distance at which a step is wrong.

    Where moments are rounded, as large a share of them as results are apart is rounded to another
    side, so that the weights are apart by its root.
    """
    limit = 16 * torch.finfo(DTYPES[dtype]).eps
    return math.sqrt(limit) if name in IN_FORMATS else limit


def floors(problem: Problem, rates: Rates) -> dict[str, float]:
    """Seconds that a step cannot beat by much: each operand once, or the products' FLOPs.

    AdamW's moments are counted in the dtype of the weights, as torch keeps them, ours in float32.
    """
    preset, size = problem.preset, DTYPES[problem.dtype].itemsize
    rest = 2 * problem.vocabulary * preset.hidden + (2 * preset.layers + 1) * preset.hidden
    projected = preset.layers * sum(rows * cols for rows, cols in problem.matrices())
    plain = rates.floor(rest * (3 * size + 16), 0.0)
    found = {"adamw": rates.floor((rest + projected) * 7 * size, 0.0)}
    for method in ("galore", "fira"):
        cases = [
            Case(*shape, min(problem.rank, *shape), problem.dtype, method, preset.layers)
            for shape in problem.matrices()
        ]
        found[method] = plain + sum(rates.floor(*case.traffic()[STEP]) for case in cases)
    return found


def launches(step: Callable[[], object], device: torch.device) -> int | None:
    """Kernels that a step launches; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == cuda for event in profile.events())


def workspace(name: str, step: Callable[[], object], device: torch.device) -> int | None:
    """Most bytes that a step holds at once beyond what it found; None where nobody can tell."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    if METHODS[name].compiled:
        return None
    with Allocations() as allocations:
        step()
    return allocations.peak_bytes


def bench_problem(
    problem: Problem, names: list[str], device: torch.device, options: argparse.Namespace
) -> dict:
    """A row of the record; ours have no times where they are wrong."""
    own = [name for name in names if name in OURS + IN_FORMATS]
    apart = {name: distance(name, problem, device, options.backend) for name in own}
    wrong = {n: value for n, value in apart.items() if not value <= allowed(n, problem.dtype)}
    groups = parameters(problem, device)
    params = tensors(groups)
    optimizers, missing = {}, {}
    for name in names:
        if name in wrong:
            continue
        try:
            optimizers[name] = started(name, groups, options.backend)
        except torch.OutOfMemoryError:
            missing[name] = "does not fit"
    rates = measure_rates(device, DTYPES[problem.dtype], options.quick)
    runs = {name: lambda _, o=optimizer: o.step() for name, optimizer in optimizers.items()}
    gradients = [param.grad for param in params]
    source = [torch.empty_like(grad).copy_(grad) for grad in gradients]
    other = torch.empty(3 * cache_bytes(device), dtype=torch.uint8, device=device)

    def timed(prepare: Callable[[int], object]) -> dict[str, Samples]:
        return interleaved(runs, device, options.rounds, prepare=prepare, lead=LEAD_OF_STEPS)

    cold = timed(lambda turn: other.fill_(turn))
    fresh = timed(lambda _: torch._foreach_copy_(gradients, source))
    rates = best(rates, measure_rates(device, DTYPES[problem.dtype], options.quick))
    floor = floors(problem, rates)
    costs = {
        name: {
            "state_bytes": tensor_bytes(dict(optimizer.state)) + rest_bytes(optimizer),
            "workspace_bytes": workspace(name, optimizer.step, device),
            "launches": launches(optimizer.step, device),
        }
        for name, optimizer in optimizers.items()
    }
    return {
        "model": problem.model,
        "parameters": sum(param.numel() for param in params),
        "vocabulary": problem.vocabulary,
        "rank": problem.rank,
        "dtype": problem.dtype,
        "distance": apart,
        "wrong": wrong,
        "missing": missing,
        "rates": rates_record({problem.dtype: rates}),
        "floor_ms": {name: 1e3 * seconds for name, seconds in floor.items()},
        "results": {n: result(s, floor.get(n)) | costs[n] for n, s in cold.items()},
        "fresh": {n: result(s, floor.get(n)) for n, s in fresh.items()},
    }


def rest_bytes(optimizer: torch.optim.Optimizer) -> int:
    """State of an optimizer inside another, as the hybrids have for what they do not project."""
    rest = getattr(optimizer, "rest", None)
    return tensor_bytes(dict(rest.state)) if rest else 0


def problems(options: argparse.Namespace) -> Iterator[Problem]:
    models = QUICK["models"] if options.quick else options.models
    vocabulary = QUICK["vocabulary"] if options.quick else VOCABULARY
    for model in models:
        for dtype in options.dtypes:
            preset = PRESETS[model]
            known = {"preset": preset.rank, FULL: preset.hidden}
            for word in options.ranks:
                yield Problem(model, known.get(word) or int(word), dtype, vocabulary)


def table(record: dict, rows: list[dict]) -> Table:
    """A row a model and optimizer."""
    rates = {dtype: rate for row in rows for dtype, rate in row["rates"].items()}
    found = new_table(
        f"{record['environment']['device']}, {record['environment']['threads']} threads:"
        f" {rates_text(rates)}; one step of a whole model, ours by the {record['backend']} backend",
        f"{SPREAD}; fresh: with gradients just written; {missing_text(record['missing'])}",
        ("model", "dtype", "r", "optimizer", "ms"),
        ("fresh", "of floor", "x adamw", "state MB", "workspace MB", "launches"),
    )
    for row in rows:
        cells = [row["model"], row["dtype"], str(row["rank"])]
        for name, value in row["wrong"].items():
            found.add_row(*cells, name, f"WRONG: {value:.1e} from the reference")
        for name, reason in row["missing"].items():
            found.add_row(*cells, name, reason)
        for name, own in row["results"].items():
            found.add_row(*cells, name, *_figures(row, name, own))
        found.add_section()
    return found


def _figures(row: dict, name: str, own: dict) -> list[str]:
    share, adamw = own.get("share_of_floor"), row["results"].get("adamw")
    return [
        time_text(own, 1),
        f"{row['fresh'][name]['ms']:.1f}",
        "" if share is None else f"{100 * share:.0f} %",
        "" if adamw is None else f"{own['ms'] / adamw['ms']:.2f}",
        f"{own['state_bytes'] / 1e6:.1f}",
        "" if own["workspace_bytes"] is None else f"{own['workspace_bytes'] / 1e6:.1f}",
        "" if own["launches"] is None else str(own["launches"]),
    ]


def main(arguments: list[str] | None = None) -> None:
    """Checks, measures, writes and prints; the exit status is 1 if one of ours is wrong."""
    usual = [name for name, method in METHODS.items() if name not in NOT_HERE]
    line = parser("model_step", __doc__, models="60m", dtypes="fp32,bf16", rounds=9)
    line.add_argument("--optimizers", type=words(METHODS), default=",".join(usual))
    help_of_ranks = f"integers, preset or {FULL}; default: preset"
    line.add_argument("--ranks", type=lambda text: text.split(","), default="preset",
                      help=help_of_ranks)  # fmt: skip
    options = parse(line, arguments)
    names, missing = present(options.optimizers, options.device)
    device, rows = torch.device(options.device), []
    for problem in progress(list(problems(options))):
        try:
            rows.append(bench_problem(problem, names, device, options))
        except torch.OutOfMemoryError:
            missing[f"{problem.model} {problem.dtype}"] = "the layer set does not fit"
        gc.collect()
    facts = {"backend": options.backend, "missing": missing}
    record = head("model_step", options.device, options.arguments, **facts)
    if options.out:
        write_lines(options.out, record, "rows", rows)
    show(table(record, rows))
    if any(row["wrong"] for row in rows):
        sys.exit("model_step: ours is not the reference's step, so no time")


# They differ from others in rates, in refreshes or in the model, or are there to be trained with.
NOT_HERE = tuple(
    name
    for name, method in METHODS.items()
    if name.startswith(("adamw-split", "galore-svd", "galore-together"))
    or name.endswith(("-moved", "-nearest", "-reversed"))
    or method.prepare
    or name in RIVALS
)


if __name__ == "__main__":
    main()
