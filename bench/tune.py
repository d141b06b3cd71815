"""Measure the tiles of the Triton kernels on this GPU and write the table that they are taken from.

    python -m bench.tune --models 60m,1b --seconds 500     # again with the same command: goes on
    python -m bench.tune --models 7b --dtypes bf16

Everything runs on tensors of the tuner's own, never on a user's state: kernels that write in place
must not be tried out there. A configuration whose results err is reported and left out. The table
goes where the package looks for it, `lowrank_kernels/ops/tuned/<GPU>.json`, after every problem, so
that an interrupted run loses one problem; `--record` keeps the times.
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
from lowrank_kernels.ops import load
from lowrank_kernels.ops.contract import rank_axis

Runs = dict[Any, Callable[[int], object]]
Timer = Callable[[Runs], dict[Any, Samples]]
OPERATION_OF = {"project": "project_moments", "update": "back_project_update"}


class Tuner:
    """Fills a table, a problem at a time; what it holds already stays."""

    def __init__(self, device: torch.device, path: Path, timer: Timer):
        from lowrank_kernels.ops.triton import config, tuned

        self.config, self.tuned = config, tuned
        self.device, self.path, self.timer = device, path, timer
        self.gpu = config.gpu_of(device)
        self.table: dict[str, dict[str, dict[str, int]]] = {
            "project": {},
            "update": {},
            "group": {},
        }
        if path.exists():
            self.table.update(json.loads(path.read_text()))
        self.rows: list[dict] = []

    def tune(self, case: Case, count: int) -> Iterator[str]:
        """Measures what the table lacks for matrices like these, of which a model has `count`."""
        for kind in OPERATION_OF:
            key = self.tuned.problem_key(self._problem(case))
            if key not in self.table[kind]:
                yield f"{kind} {key}: {self._store(kind, key, self._fastest(kind, case))}"
        key = self.tuned.group_key((case.rows, case.cols), case.rank, DTYPES[case.dtype])
        if key not in self.table["group"]:
            yield f"group {key}: {self._store('group', key, self._best_group(case, count))}"

    def _problem(self, case: Case) -> Any:
        shape, axis = (case.rows, case.cols), rank_axis(case.side)
        sizes = (shape[1 - axis], shape[axis], case.rank, case.matrices)
        return self.tuned.Problem(case.side, *sizes, (DTYPES[case.dtype],) * 2)

    def _store(self, kind: str, key: str, config: Any) -> Any:
        self.table[kind][key] = config._asdict()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.table, indent=1) + "\n")
        self.tuned.table_of.cache_clear()
        return config

    def _fastest(self, kind: str, case: Case) -> Any:
        """The best tiles at one number of stages, then the best number of stages for them."""
        candidates = getattr(self.config, f"{kind}_candidates")(self._problem(case), self.gpu)
        by_tiles: dict[Any, list] = {}
        for config in candidates:
            by_tiles.setdefault(config._replace(stages=0), []).append(config)
        inputs = make_inputs(case, self.device, seed=0)
        times = self._measure(kind, case, inputs, [c[len(c) // 2] for c in by_tiles.values()])
        best = min(times, key=lambda config: times[config].median)
        others = [c for c in by_tiles[best._replace(stages=0)] if c != best]
        times |= self._measure(kind, case, inputs, [best, *others])
        return min(times, key=lambda config: times[config].median)

    def _measure(self, kind: str, case: Case, inputs: Inputs, configs: list) -> dict[Any, Samples]:
        candidate = Candidate(load("triton"), case)
        sets = [inputs.to() for _ in range(copies_beyond_cache(inputs.bytes, self.device))]
        handed = [candidate.step(x) for x in sets]

        def run(config: Any) -> Callable[[int], object]:
            def once(turn: int) -> None:
                x, results = sets[turn % len(sets)], handed[turn % len(sets)]
                with self.config.forced(**{kind: config}):
                    if kind == "project":
                        candidate.project_moments(x)
                    else:
                        candidate.back_project_update(x, *results)

            return once

        times = self.timer({c: run(c) for c in configs if self._is_right(kind, case, inputs, c)})
        self.rows += [
            {"kind": kind, "case": vars(case), "config": config._asdict(), "ms": 1e3 * s.median}
            for config, s in times.items()
        ]
        return times

    def _is_right(self, kind: str, case: Case, inputs: Inputs, config: Any) -> bool:
        with self.config.forced(**{kind: config}):
            wrong = check(case, {"triton": load("triton")}, inputs)["triton"]
        if wrong:
            print(
                f"WRONG, left out: {kind} {config} on {case}: {', '.join(wrong)}", file=sys.stderr
            )
        return not wrong

    def _best_group(self, case: Case, count: int) -> Any:
        """Matrices a group by the time of a whole step a matrix, around half the L2 cache."""
        usual = case.matrices
        sizes = {1, max(1, usual // 2), usual, min(count, 2 * usual), min(count, 4 * usual)}
        runs = {}
        for size in sorted(sizes):
            group = replace(case, matrices=size)
            inputs = make_inputs(group, self.device, seed=0)
            sets = [inputs.to() for _ in range(copies_beyond_cache(inputs.bytes, self.device))]
            step = Candidate(load("triton"), group).step
            runs[size] = lambda turn, step=step, sets=sets: step(sets[turn % len(sets)])
        times = self.timer(runs)
        self.rows += [
            {"kind": "group", "case": vars(case), "matrices": size, "ms": 1e3 * s.median}
            for size, s in times.items()
        ]
        best = min(times, key=lambda size: times[size].median / size)
        return self.tuned.GroupConfig(best)


def problems(models: list[str], dtypes: list[str]) -> Iterator[tuple[Case, int]]:
    """Groups as the backend takes them, and how many such matrices the model has."""
    for name in models:
        preset = PRESETS[name]
        hidden, ffn = preset.hidden, preset.ffn
        for dtype in dtypes:
            for shape, each in (((hidden, hidden), 4), ((ffn, hidden), 2), ((hidden, ffn), 1)):
                count = each * preset.layers
                matrix = torch.empty(shape, dtype=DTYPES[dtype], device="cuda")
                size = min(count, load("triton").group_size(matrix, matrix, preset.rank))
                yield Case(*shape, preset.rank, dtype, "fira", size), count


def main(arguments: list[str] | None = None) -> None:
    """Tunes until everything is in the table or the time is up."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune")
    parser.add_argument("--models", default="60m,1b,7b", help=f"of {', '.join(PRESETS)}")
    parser.add_argument("--dtypes", default="bf16,fp32", help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after")
    parser.add_argument("--out", type=Path, help="the table, by default where the package looks")
    parser.add_argument("--record", type=Path, help="a JSON record of every time")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune: there is no CUDA device, and no other has anything to tune", file=sys.stderr)
        sys.exit(2)
    from lowrank_kernels.ops.triton import config, tuned

    device, started = torch.device("cuda"), time.monotonic()
    path = options.out or tuned.path_of(config.gpu_of(device).name)
    tuner = Tuner(device, path, lambda runs: interleaved(runs, device, options.rounds))
    console = Console(stderr=True)
    for case, count in problems(options.models.split(","), options.dtypes.split(",")):
        if time.monotonic() - started > options.seconds:
            console.print("the time is up; the same command goes on")
            break
        for line in tuner.tune(case, count):
            console.print(f"{time.monotonic() - started:4.0f} s  {line}")
    if options.record:
        write_lines(
            options.record, head("tune", "cuda", arguments or sys.argv[1:]), "rows", tuner.rows
        )
    print(f"{sum(map(len, tuner.table.values()))} configurations in {path}")


if __name__ == "__main__":
    main()
