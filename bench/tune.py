"""Measure the tiles of the Triton kernels, and the sizes of batches, on this GPU.

    python -m bench.tune --models 60m,1b --seconds 500     # again with the same command: goes on
    python -m bench.tune --models 7b --dtypes bf16

Everything runs on tensors of the tuner's own, never on a user's state: kernels that write in place
must not be tried out there. A configuration whose results err is reported and left out. The record
is written after every problem, so that an interrupted run loses one. Nothing reads it: heuristics
choose what the backend takes (`lowrank_kernels.ops.triton.config`), and a record tells how well.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from rich.console import Console

from bench.cases import (
    DTYPES,
    Candidate,
    Case,
    Inputs,
    Oracle,
    empty_inputs,
    input_sets,
    make_inputs,
)
from bench.models import PRESETS
from bench.options import about, words
from bench.record import Journal, head
from bench.timing import Samples, interleaved
from lowrank_kernels.ops import Matrices, Operations
from lowrank_kernels.ops.dispatch import load
from lowrank_kernels.ops.triton import config

Runs = dict[Any, Callable[[int], object]]
Timer = Callable[[Runs], dict[Any, Samples]]
RESULT = Path(__file__).parent / "results" / "tune.json"
AHEAD_SECONDS = 100.0
META = torch.device("meta")
TILES, BATCH = ("project", "update"), "batch"


class Tuner:
    """Times of right configurations, and of sizes of batches, the fastest first."""

    def __init__(self, device: torch.device, timer: Timer):
        self.device, self.timer, self.gpu = device, timer, config.gpu_of(device)

    def times(self, kind: str, case: Case, count: int) -> list[dict]:
        """For matrices like these, of which a model has `count`; empty if none is right."""
        times = self._batches(case, count) if kind == BATCH else self._tiles(kind, case)
        return sorted(times, key=lambda time: time["ms"])

    def candidates(self, kind: str, case: Case) -> list[config.Config]:
        return config.candidates(kind, problems_of(case)[kind], self.gpu)

    def every(self, kind: str, case: Case) -> list[tuple[Case, str, config.Config]]:
        """The candidates, as `compile_ahead` takes them; sizes of batches have none."""
        return [] if kind == BATCH else [(case, kind, c) for c in self.candidates(kind, case)]

    def _tiles(self, kind: str, case: Case) -> list[dict]:
        """All tiles at one number of stages, and the best ones at every number."""
        by_tiles: dict[config.Config, list[config.Config]] = {}
        for each in self.candidates(kind, case):
            by_tiles.setdefault(each._replace(stages=0), []).append(each)
        inputs = make_inputs(case, self.device, seed=0)
        times = self._measure(kind, case, inputs, [c[len(c) // 2] for c in by_tiles.values()])
        if times:
            best = min(times, key=lambda one: times[one].median)
            others = [c for c in by_tiles[best._replace(stages=0)] if c != best]
            times |= self._measure(kind, case, inputs, [best, *others])
        return [{"ms": 1e3 * s.median, **one._asdict()} for one, s in times.items()]

    def _measure(
        self, kind: str, case: Case, inputs: Inputs, configs: list[config.Config]
    ) -> dict[config.Config, Samples]:
        oracle, sets = Oracle(case, inputs), input_sets(inputs.to(), self.device)

        def run(module: SimpleNamespace) -> Callable[[int], object]:
            candidate = Candidate(module, case)
            handed = [candidate.step(x) for x in sets]

            def once(turn: int) -> None:
                x, results = sets[turn % len(sets)], handed[turn % len(sets)]
                if kind == "project":
                    candidate.project_moments(x)
                else:
                    candidate.back_project_update(x, *results)

            return once

        modules = {one: with_config(kind, one) for one in configs}
        wrong = {one: oracle.wrong(module) for one, module in modules.items()}
        for one, what in wrong.items():
            if what:
                text = f"WRONG, left out: {kind} {one} on {case}: {', '.join(what)}"
                print(text, file=sys.stderr)
        return self.timer({one: run(modules[one]) for one in configs if not wrong[one]})

    def _batches(self, case: Case, count: int) -> list[dict]:
        """The time of a whole step a matrix by the size of batches, around half the L2 cache."""
        usual = case.matrices
        sizes = {1, max(1, usual // 2), usual, min(count, 2 * usual), min(count, 4 * usual)}
        runs = {}
        for size in sorted(sizes):
            batch = replace(case, matrices=size)
            sets = input_sets(make_inputs(batch, self.device, seed=0), self.device)
            step = Candidate(load("triton"), batch).step
            runs[size] = lambda turn, step=step, sets=sets: step(sets[turn % len(sets)])
        times = self.timer(runs)
        return [{"ms": 1e3 * s.median / size, "matrices": size} for size, s in times.items()]


@functools.cache
def problems_of(case: Case) -> dict[str, config.Problem]:
    """What the backend chooses the configurations of its operations for, where rows lie well."""
    found = {}

    def noted(operation: str, problem: config.Problem, gpu: config.Gpu) -> config.Config:
        found[operation] = problem
        return config.config_of(operation, problem, gpu)

    backend = load("triton")
    with mock.patch.object(backend, "config_of", noted):
        # Of the two places that gradients may have, the aligned one comes last.
        backend.Operations(Matrices(case.side, case.residual, *empty_inputs(case, META)))
    return found


def with_config(kind: str, one: config.Config) -> SimpleNamespace:
    """The Triton backend, with an operation configured like this."""

    def operations(matrices: Matrices) -> Operations:
        with config.forced(**{kind: one}):
            return load("triton").Operations(matrices)

    return SimpleNamespace(Operations=operations)


def compile_ahead(
    todo: list[tuple[Case, str, config.Config]],
    device: torch.device,
    seconds: float = AHEAD_SECONDS,
) -> None:
    """Fills Triton's cache on disk in as many processes as there are cores, for so long at most.

    What fails there, or is left, is compiled where it is asked for, which then tells the error.
    """
    if not todo:
        return
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(max(1, min(len(todo), (os.cpu_count() or 2) - 1))) as pool:
        pool.starmap_async(_step_once, [(*one, device) for one in todo], chunksize=1).wait(seconds)


def _step_once(case: Case, kind: str, one: config.Config, device: torch.device) -> None:
    Candidate(with_config(kind, one), case).step(empty_inputs(case, device))


def fill(tuner: Tuner, journal: Journal, case: Case, count: int) -> Iterator[str]:
    """Measures what the record lacks for matrices like these, of which a model has `count`."""
    for kind in (*TILES, BATCH):
        if journal.find(kind=kind, case=vars(case)):
            continue
        times = tuner.times(kind, case, count)
        journal.put({"times": times}, kind=kind, case=vars(case))
        yield f"{kind} {case}: {times[0] if times else 'no configuration is right'}"


def problems(
    models: list[str], dtypes: list[str], device: torch.device
) -> Iterator[tuple[Case, int]]:
    """Batches as the backend takes them, and how many such matrices the model has."""
    for name in models:
        preset = PRESETS[name]
        hidden, ffn = preset.hidden, preset.ffn
        for dtype in dtypes:
            for shape, each in (((hidden, hidden), 4), ((ffn, hidden), 2), ((hidden, ffn), 1)):
                count = each * preset.layers
                matrix = torch.empty(shape, dtype=DTYPES[dtype], device=device)
                size = min(count, load("triton").batch_size(matrix, matrix, preset.rank))
                yield Case(*shape, preset.rank, dtype, "fira", size), count


def main(arguments: list[str] | None = None) -> None:
    """Tunes until everything is in the record or the time is up."""
    line = about("tune", __doc__)
    for name, known, usual in (
        ("models", PRESETS, "60m,1b,7b"),
        ("dtypes", DTYPES, "bf16,fp32"),
    ):
        text = f"of {', '.join(known)}; default: {usual}"
        line.add_argument(f"--{name}", type=words(known), default=usual, help=text)
    line.add_argument("--rounds", type=int, default=20, help="default: %(default)s")
    text = "begin nothing after; default: no limit"
    line.add_argument("--seconds", type=float, default=float("inf"), help=text)
    text = "the JSON record, gone on with; default: %(default)s"
    line.add_argument("--out", type=Path, default=RESULT, help=text)
    options = line.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune: there is no CUDA device, and no other has anything to tune", file=sys.stderr)
        sys.exit(2)
    device, started = torch.device("cuda"), time.monotonic()
    tuner = Tuner(device, lambda runs: interleaved(runs, device, options.rounds))
    journal = Journal(options.out, "tune")
    journal.begin(head("tune", "cuda", sys.argv[1:] if arguments is None else arguments))
    console = Console(stderr=True)
    found = list(problems(options.models, options.dtypes, device))
    compile_ahead(
        [
            one
            for case, _ in found
            for kind in (*TILES, BATCH)
            if not journal.find(kind=kind, case=vars(case))
            for one in tuner.every(kind, case)
        ],
        device,
    )
    for case, count in found:
        if time.monotonic() - started > options.seconds:
            console.print("the time is up; the same command goes on")
            break
        for text in fill(tuner, journal, case, count):
            console.print(f"{time.monotonic() - started:4.0f} s  {text}")
    print(f"{len(journal.rows)} problems in {options.out}")


if __name__ == "__main__":
    main()
