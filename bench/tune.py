"""Measure the tiles of the Triton kernels, and the sizes of batches, on this GPU.

    python -m bench.tune --models 60m,1b --seconds 500     # again with the same command: goes on
    python -m bench.tune --models 7b --dtypes bf16

Everything runs on tensors of the tuner's own, never on a user's state: kernels that write in place
must not be tried out there. A configuration whose results err is reported and left out. The record
is written after every problem, so that an interrupted run loses one. Nothing reads it: heuristics
choose what the backend takes (`lowrank_kernels.ops.triton.config`), and a record tells how well.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.cases import DTYPES, Candidate, Case, Inputs, check, make_inputs
from bench.models import PRESETS
from bench.record import head, write_lines
from bench.timing import Samples, copies_beyond_cache, interleaved
from lowrank_kernels.ops.contract import rank_axis
from lowrank_kernels.ops.dispatch import load

Runs = dict[Any, Callable[[int], object]]
Timer = Callable[[Runs], dict[Any, Samples]]
RESULT = Path(__file__).parent / "results" / "tune.json"


class Tuner:
    """Fills a record, a problem at a time; what it holds already stays."""

    def __init__(self, device: torch.device, path: Path, head: dict, timer: Timer):
        from lowrank_kernels.ops.triton import config

        self.config, self.device, self.timer = config, device, timer
        self.path, self.head, self.gpu = path, head, config.gpu_of(device)
        self.rows: list[dict] = json.loads(path.read_text())["rows"] if path.exists() else []

    def tune(self, case: Case, count: int) -> Iterator[str]:
        """Measures what the record lacks for matrices like these, of which a model has `count`."""
        for kind in ("project", "update", "batch"):
            if any(row["kind"] == kind and row["case"] == vars(case) for row in self.rows):
                continue
            times = self._batches(case, count) if kind == "batch" else self._tiles(kind, case)
            times.sort(key=lambda time: time["ms"])
            self.rows.append({"kind": kind, "case": vars(case), "times": times})
            write_lines(self.path, self.head, "rows", self.rows)
            yield f"{kind} {case}: {times[0]}"

    def problem(self, case: Case) -> Any:
        shape, axis = (case.rows, case.cols), rank_axis(case.side)
        sizes = (shape[1 - axis], shape[axis], case.rank, case.matrices)
        return self.config.Problem(case.side, *sizes, (DTYPES[case.dtype],) * 2)

    def _tiles(self, kind: str, case: Case) -> list[dict]:
        """All tiles at one number of stages, and the best ones at every number."""
        candidates = self.config.candidates(kind, self.problem(case), self.gpu)
        by_tiles: dict[Any, list] = {}
        for config in candidates:
            by_tiles.setdefault(config._replace(stages=0), []).append(config)
        inputs = make_inputs(case, self.device, seed=0)
        times = self._measure(kind, case, inputs, [c[len(c) // 2] for c in by_tiles.values()])
        best = min(times, key=lambda config: times[config].median)
        others = [c for c in by_tiles[best._replace(stages=0)] if c != best]
        times |= self._measure(kind, case, inputs, [best, *others])
        return [{"ms": 1e3 * s.median, **config._asdict()} for config, s in times.items()]

    def _measure(self, kind: str, case: Case, inputs: Inputs, configs: list) -> dict[Any, Samples]:
        sets = [inputs.to() for _ in range(copies_beyond_cache(inputs.bytes, self.device))]

        def run(config: Any) -> Callable[[int], object]:
            candidate = Candidate(load("triton"), case)
            with self.config.forced(**{kind: config}):
                handed = [candidate.step(x) for x in sets]

            def once(turn: int) -> None:
                x, results = sets[turn % len(sets)], handed[turn % len(sets)]
                if kind == "project":
                    candidate.project_moments(x)
                else:
                    candidate.back_project_update(x, *results)

            return once

        return self.timer({c: run(c) for c in configs if self._is_right(kind, case, inputs, c)})

    def _is_right(self, kind: str, case: Case, inputs: Inputs, config: Any) -> bool:
        with self.config.forced(**{kind: config}):
            wrong = check(case, {"triton": load("triton")}, inputs)["triton"]
        if wrong:
            print(
                f"WRONG, left out: {kind} {config} on {case}: {', '.join(wrong)}", file=sys.stderr
            )
        return not wrong

    def _batches(self, case: Case, count: int) -> list[dict]:
        """The time of a whole step a matrix by the size of batches, around half the L2 cache."""
        usual = case.matrices
        sizes = {1, max(1, usual // 2), usual, min(count, 2 * usual), min(count, 4 * usual)}
        runs = {}
        for size in sorted(sizes):
            batch = replace(case, matrices=size)
            inputs = make_inputs(batch, self.device, seed=0)
            sets = [inputs.to() for _ in range(copies_beyond_cache(inputs.bytes, self.device))]
            step = Candidate(load("triton"), batch).step
            runs[size] = lambda turn, step=step, sets=sets: step(sets[turn % len(sets)])
        times = self.timer(runs)
        return [{"ms": 1e3 * s.median / size, "matrices": size} for size, s in times.items()]


def problems(models: list[str], dtypes: list[str]) -> Iterator[tuple[Case, int]]:
    """Batches as the backend takes them, and how many such matrices the model has."""
    for name in models:
        preset = PRESETS[name]
        hidden, ffn = preset.hidden, preset.ffn
        for dtype in dtypes:
            for shape, each in (((hidden, hidden), 4), ((ffn, hidden), 2), ((hidden, ffn), 1)):
                count = each * preset.layers
                matrix = torch.empty(shape, dtype=DTYPES[dtype], device="cuda")
                size = min(count, load("triton").batch_size(matrix, matrix, preset.rank))
                yield Case(*shape, preset.rank, dtype, "fira", size), count


def main(arguments: list[str] | None = None) -> None:
    """Tunes until everything is in the record or the time is up."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune")
    parser.add_argument("--models", default="60m,1b,7b", help=f"of {', '.join(PRESETS)}")
    parser.add_argument("--dtypes", default="bf16,fp32", help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after")
    parser.add_argument("--out", type=Path, default=RESULT, help="the JSON record")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune: there is no CUDA device, and no other has anything to tune", file=sys.stderr)
        sys.exit(2)
    device, started = torch.device("cuda"), time.monotonic()
    facts = head("tune", "cuda", arguments or sys.argv[1:])
    tuner = Tuner(
        device, options.out, facts, lambda runs: interleaved(runs, device, options.rounds)
    )
    console = Console(stderr=True)
    for case, count in problems(options.models.split(","), options.dtypes.split(",")):
        if time.monotonic() - started > options.seconds:
            console.print("the time is up; the same command goes on")
            break
        for line in tuner.tune(case, count):
            console.print(f"{time.monotonic() - started:4.0f} s  {line}")
    print(f"{len(tuner.rows)} problems in {options.out}")


if __name__ == "__main__":
    main()
