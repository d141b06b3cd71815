"""The whole family at equal tuning: every method finds its rate and its scale with as many runs.

    python -m bench.family --optimizers adamw,adamw-split,muon,fira@16 --workers 2 --out family
    python -m bench.family --optimizers adamw-split,muon --tokens-per-batch 16384 --out family-16k
    python -m bench.family --optimizers muon,muon@b0.9 --model 9m-bytes --seconds 3000 --out 9m

Every method begins at its usual rate and scale, or at those of --lr and --scale, and takes steps of
--factor on one after the other: what lies beside the best so far is run until the best has been
tried on all sides, or --budget runs are made. Then, --refine times, the same with half such a step.
All that on the first of --seeds, of full length or of --tune-steps; at the best point the other
seeds are run. What comes next depends on the losses alone, and on no number of workers. A method
without a scale has a rate to find; where hidden matrices move at lr alpha, the scale is alpha.

The same command goes on where it was stopped, also with more optimizers, more seeds or a larger
budget; the other arguments have to be those of the start. They are those of bench.pretrain, of
whose --lr and --scale the first value is taken. Every run has a process of its own with one thread,
of which --workers are made at a time. With --seconds it stops by then; status 75 is that there is
more to do. The record holds every run, and the losers and what diverged with them.

A time is a processor's, of all that a step takes: others may use the machine, and it is what a run
takes of it with one thread. On a GPU it is the median step's. With --same-time-as NAME each method
is also run, at its best and with every seed, for as many steps as take the time of NAME's whole
run, by the times of the first seed's runs.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from bench.data import DataSummary, prepare
from bench.optimizers import named
from bench.options import about
from bench.pretrain import begun
from bench.record import head, write_lines
from bench.settings import Command, Job, Settings
from bench.settings import parse as parse_settings
from bench.summary import final_loss
from bench.tables import family_marks, family_texts, new_table, show, timed_text

UNFINISHED = 75
# Digits of a rate, so that a run's name tells it.
DIGITS = 3
# What does not decide a run but which runs there are.
FREE = ("lrs", "scales", "seeds")

# Steps on a logarithmic grid away from the start, of the rate and, if there is one, of the scale;
# in units of the finest step.
Place = tuple[int, ...]


@dataclass(frozen=True)
class Search:
    """How a method's rate and scale are found; `steps` of its runs, None for the full length."""

    factor: float
    refine: int
    budget: int
    steps: int | None = None

    @property
    def unit(self) -> int:
        """Of the finest steps, how many are a coarse one."""
        return 2**self.refine

    def next_round(self, tried: dict[Place, float]) -> list[Place]:
        """The places to be tried next, all of which have to be there before the round after."""
        if not tried:
            return []
        best = best_of(tried)
        for level in range(self.refine + 1):
            for axis in range(len(best)):
                missing = untried(tried, best, axis, self.unit >> level)
                if missing:
                    return missing[: max(0, self.budget - len(tried))]
        return []

    def bracketed(self, tried: dict[Place, float]) -> bool:
        """Whether the best was tried on all sides."""
        best = best_of(tried)
        return not any(untried(tried, best, axis, self.unit) for axis in range(len(best)))


def best_of(tried: dict[Place, float]) -> Place:
    """The least loss; of equals, as when all diverge, the lowest rate."""
    return min(tried, key=lambda place: (tried[place], place))


def beside(place: Place, axis: int, step: int) -> list[Place]:
    return [(*place[:axis], place[axis] + sign * step, *place[axis + 1 :]) for sign in (-1, 1)]


def untried(tried: dict[Place, float], best: Place, axis: int, step: int) -> list[Place]:
    """What lies beside the best where nothing was tried on that side, nor nearer to it."""

    def known(side: Place) -> bool:
        between = [zip(best, place, side, strict=True) for place in tried if place != best]
        return any(all(min(b, s) <= p <= max(b, s) for b, p, s in axes) for axes in between)

    return [side for side in beside(best, axis, step) if not known(side)]


class Trial(NamedTuple):
    """A run, of so many steps; None for those of the comparison."""

    job: Job
    steps: int | None = None


class Start(NamedTuple):
    """Where a method's search begins."""

    optimizer: str
    lr: float
    scale: float | None

    def job(self, place: Place, search: Search, seed: int) -> Job:
        def moved(value: float, steps: int) -> float:
            return float(f"{value * search.factor ** (steps / search.unit):.{DIGITS}g}")

        scale = None if self.scale is None else moved(self.scale, place[1])
        return Job(self.optimizer, moved(self.lr, place[0]), seed, scale)

    @property
    def origin(self) -> Place:
        return (0,) if self.scale is None else (0, 0)


def starts(settings: Settings) -> list[Start]:
    found = []
    for name, rates in settings.lrs.items():
        usual = settings.scale if named(name)[0].tunes else None
        found.append(Start(name, rates[0], settings.scales.get(name, [usual])[0]))
    return found


@dataclass
class Course:
    """What there is of a method's search, and what comes next.

    `missing` is what the round, or the seeds at the best, still need; without any it is finished.
    `timed` are runs of another method's time, a seed each, that still may be missing.
    """

    start: Start
    tried: dict[Place, float]
    missing: list[Trial]
    best: Job | None = None
    timed: list[Trial] = field(default_factory=list)

    def finals(self, seeds: list[int]) -> list[Trial]:
        """At the best, a seed each."""
        return [Trial(replace(self.best, seed=seed)) for seed in seeds] if self.best else []


def course(start: Start, search: Search, seeds: list[int], runs: dict[Trial, dict]) -> Course:
    """Replays the search over the runs that are there."""
    tried: dict[Place, float] = {}
    found = Course(start, tried, [])
    places = [start.origin, *beside(start.origin, 0, search.unit)][: search.budget]
    while places:
        trials = {
            place: Trial(start.job(place, search, seeds[0]), search.steps) for place in places
        }
        found.missing = [trial for trial in trials.values() if trial not in runs]
        if found.missing:
            return found
        tried.update((place, final_loss(runs[trial])) for place, trial in trials.items())
        places = search.next_round(tried)
    found.best = start.job(best_of(tried), search, seeds[0])
    found.missing = [trial for trial in found.finals(seeds) if trial not in runs]
    return found


def of_the_same_time(
    found: Course, other: Course, settings: Settings, runs: dict[Trial, dict]
) -> list[Trial]:
    """The runs of a method that take the time of another's; none before both have whole ones."""
    first = [each.finals(settings.seeds[:1]) for each in (found, other)]
    if found is other or not all(trials and trials[0] in runs for trials in first):
        return []
    own, theirs = (step_seconds(runs[trials[0]], settings.device) for trials in first)
    steps = max(1, round(settings.steps * theirs / own))
    return [trial._replace(steps=steps) for trial in found.finals(settings.seeds)]


def step_seconds(run: dict, device: str) -> float:
    if device == "cuda":
        return statistics.median(run["step_seconds"])
    return run["cpu_seconds"] / len(run["train_loss"])


@dataclass(frozen=True)
class Options:
    command: Command
    search: Search
    workers: int
    seconds: float
    against: str | None
    same_time_as: str | None
    words: list[str]


class Comparison:
    """The folder of a comparison: its runs, and the processes that make more of them."""

    def __init__(self, options: Options, data: DataSummary):
        self.options, self.data = options, data
        self.work = options.command.out / "work"
        self.runs: dict[Trial, dict] = {}

    def courses(self) -> list[Course]:
        settings, search = self.options.command.settings, self.options.search
        # What was read may tell what to read next.
        while True:
            found = [course(s, search, settings.seeds, self.runs) for s in starts(settings)]
            self._time(found)
            new = [self._read(trial) for each in found for trial in each.missing]
            if not any(new):
                return found

    def _time(self, found: list[Course]) -> None:
        other = next((e for e in found if e.start.optimizer == self.options.same_time_as), None)
        if other is None:
            return
        for each in found:
            each.timed = of_the_same_time(each, other, self.options.command.settings, self.runs)
            each.missing += [trial for trial in each.timed if trial not in self.runs]

    def _folder(self, trial: Trial) -> Path:
        # Where a search has runs of full length, those are both.
        kinds = {self.options.search.steps: "tuning", None: "runs"}
        return self.work / kinds.get(trial.steps, f"{trial.steps}-steps") / trial.job.name

    def _read(self, trial: Trial) -> bool:
        path = self._folder(trial) / "record.json"
        if not path.exists():
            return False
        self.runs[trial] = json.loads(path.read_text())
        return True

    def _begun(self, trial: Trial) -> BaseProcess:
        command = self.options.command
        if trial.steps is not None:
            command = replace(command, settings=of_length(command.settings, trial.steps))
        return begun(trial.job, command, self.data, self._folder(trial))

    def advance(self) -> bool:
        """Makes runs until there is none left, or the time is up; whether all are there.

        Raises:
            RuntimeError: a run failed.
        """
        deadline = time.monotonic() + self.options.seconds
        running: dict[Trial, BaseProcess] = {}
        try:
            while time.monotonic() < deadline:
                for trial in (trial for each in self.courses() for trial in each.missing):
                    if len(running) < self.options.workers and trial not in running:
                        running[trial] = self._begun(trial)
                if not running:
                    return True
                # What waits does not take infinity.
                left = min(3600.0, max(0.0, deadline - time.monotonic()))
                wait([process.sentinel for process in running.values()], timeout=left)
                for trial, process in list(running.items()):
                    if not process.is_alive():
                        del running[trial]
                        if process.exitcode:
                            name, status = trial.job.name, process.exitcode
                            raise RuntimeError(f"{name} ended with status {status}")
                        self._tell(trial)
            return not any(each.missing for each in self.courses())
        finally:
            for process in running.values():
                process.terminate()
                process.join()

    def _tell(self, trial: Trial) -> None:
        self._read(trial)
        length = "" if trial.steps is None else f", {trial.steps} steps"
        print(f"{trial.job.name}{length}: {final_loss(self.runs[trial]):.4f}", flush=True)

    def all_runs(self) -> Iterator[dict]:
        """Also of optimizers that this command does not name."""
        for path in sorted(self.work.glob("*/*/record.json")):
            yield json.loads(path.read_text())

    def rows(self) -> list[dict]:
        """A method each: what it came to with all seeds, and what was tried for it."""
        seeds = self.options.command.settings.seeds
        found = [each for each in self.courses() if each.best and self._finals(each)]
        losses = {each.start.optimizer: losses_of(self._finals(each)) for each in found}
        against = self.options.against
        if against not in losses:
            against = next(iter(losses), None)
        return [
            {
                **asdict(each.best),
                "seeds": [seed for seed in seeds if seed in losses[each.start.optimizer]],
                "losses": list(losses[each.start.optimizer].values()),
                **mean_and_difference(losses[each.start.optimizer], losses[against]),
                "against": against,
                "bracketed": self.options.search.bracketed(each.tried),
                "finished": not each.missing,
                "tried": [self._tried(each, place) for place in sorted(each.tried)],
                **self._costs(each),
                "timed": self._timed(each),
            }
            for each in found
        ]

    def _timed(self, each: Course) -> dict | None:
        """Of the runs of another method's time, those that are there."""
        runs = [self.runs[trial] for trial in each.timed if trial in self.runs]
        if not runs:
            return None
        found = mean_and_difference(losses_of(runs), {})
        return {
            "as": self.options.same_time_as,
            "steps": each.timed[0].steps,
            "losses": list(losses_of(runs).values()),
            "loss": found["loss"],
            "loss_error": found["loss_error"],
        }

    def _finals(self, each: Course) -> list[dict]:
        """The runs at the best that are there, a seed each."""
        trials = each.finals(self.options.command.settings.seeds)
        return [self.runs[trial] for trial in trials if trial in self.runs]

    def _tried(self, each: Course, place: Place) -> dict:
        seed = self.options.command.settings.seeds[0]
        job = each.start.job(place, self.options.search, seed)
        return {"lr": job.lr, "scale": job.scale, "loss": each.tried[place]}

    def _costs(self, each: Course) -> dict:
        runs, settings = self._finals(each), self.options.command.settings
        steps = [step for run in runs for step in run["step_seconds"]]
        seconds = statistics.mean(step_seconds(run, settings.device) for run in runs)
        tokens = settings.batch_size * settings.seq_len
        own = [step for run in runs for step in run["optimizer_seconds"]]
        return {
            "state_bytes": max(run["state_bytes"] for run in runs),
            "peak_bytes": max(run["peak_bytes"] for run in runs),
            "parameters": runs[0]["parameters"],
            "step_ms": 1e3 * seconds,
            "median_step_ms": 1e3 * statistics.median(steps),
            "optimizer_ms": 1e3 * statistics.median(own),
            "tokens_per_second": tokens / seconds,
            "run_seconds": seconds * settings.steps,
        }


def losses_of(runs: list[dict]) -> dict[int, float]:
    """By seed."""
    return {run["seed"]: final_loss(run) for run in runs}


def mean_and_difference(losses: dict[int, float], others: dict[int, float]) -> dict:
    """Mean and standard error, and those of the difference to another method, paired by seed."""
    pairs = [losses[seed] - others[seed] for seed in losses if seed in others]
    facts = {"loss": list(losses.values()), "difference": pairs}
    found = {}
    for name, values in facts.items():
        finite = bool(values) and all(map(math.isfinite, values))
        found[name] = statistics.mean(values) if finite else math.inf
        many = finite and len(values) > 1
        error = statistics.stdev(values) / math.sqrt(len(values)) if many else math.nan
        found[f"{name}_error"] = error
    return found


# What a record keeps of a run: no list with an entry a step.
KEPT = ("optimizer", "lr", "scale", "seed", "parameters", "weight_bytes", "state_bytes")
KEPT += ("peak_bytes", "weights_digest", "backends", "validation", "cpu_seconds")


def shortened(run: dict) -> dict:
    return {
        **{key: run[key] for key in KEPT},
        "steps": len(run["train_loss"]),
        "loss": final_loss(run),
        "last_train_loss": run["train_loss"][-1],
        "step_ms": 1e3 * statistics.median(run["step_seconds"]),
        "optimizer_ms": 1e3 * statistics.median(run["optimizer_seconds"]),
    }


def write(comparison: Comparison, path: Path) -> dict:
    """Writes the record and returns it, as it is read again."""
    options = comparison.options
    settings = options.command.settings
    facts = {
        "settings": asdict(settings),
        "data": asdict(comparison.data),
        "search": asdict(options.search) | {"workers": options.workers},
        "summary": comparison.rows(),
    }
    runs = [shortened(run) for run in comparison.all_runs()]
    write_lines(path, head("family", settings.device, options.words, **facts), "runs", runs)
    return json.loads(path.read_text())


def print_table(record: dict) -> None:
    rows = record["summary"]
    if not rows:
        return
    settings = record["settings"]
    tokens = settings["batch_size"] * settings["seq_len"]
    found = new_table(
        f"LLaMA {settings['model']}, {rows[0]['parameters'] / 1e6:.2f} M parameters,"
        f" {settings['steps']} steps of {tokens:,} tokens",
        f"± standard error; differences to {rows[0]['against']}, paired by seed; edge: not tried on"
        " all sides; same time: in as many steps as take the time of another's run",
        ("optimizer", "lr", "scale"),
        (
            "loss",
            "difference",
            "seeds",
            "state MB",
            "step ms",
            "tokens/s",
            "same time",
            "tried",
            "",
        ),
    )
    for row in sorted(rows, key=lambda row: math.inf if row["loss"] is None else row["loss"]):
        found.add_row(
            *family_texts(row), timed_text(row), str(len(row["tried"])), family_marks(row)
        )
    show(found)


def of_length(settings: Settings, steps: int) -> Settings:
    """The same comparison in another number of steps, with the same shares of them."""

    def share(count: int) -> int:
        return count * steps // settings.steps

    every = max(1, share(settings.eval_every))
    return replace(settings, steps=steps, warmup=share(settings.warmup), eval_every=every)


def prepared(options: Options, overwrite: bool) -> DataSummary:
    """Makes the folder ready, or checks that it is of the same comparison.

    Raises:
        ValueError: it is of another one, or the text is short.
    """
    settings, work = options.command.settings, options.command.out / "work"
    path = work / "family.json"
    if overwrite and path.exists():
        shutil.rmtree(work)
    window = settings.seq_len + 1
    data = prepare(settings.data, settings.tokenizer, settings.vocab_size, window, work / "data")
    mine = {"settings": asdict(settings), "digest": data.digest, "tune": options.search.steps}
    if path.exists():
        saved = json.loads(path.read_text())
        free = {name: mine["settings"][name] for name in FREE}
        differences = settings.differences(saved["settings"] | free)
        for name, text in (("digest", "the text's digest"), ("tune", "--tune-steps")):
            if saved[name] != mine[name]:
                differences.append(f"{text} was {saved[name]}, is {mine[name]}")
        if differences:
            raise ValueError(f"{work.parent} is of another comparison: {'; '.join(differences)}")
    # A process that is killed meanwhile leaves the file as it was.
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.write_text(json.dumps(mine))
    unfinished.replace(path)
    return data


def parse(arguments: list[str]) -> tuple[Options, bool]:
    """The options, and whether an earlier comparison is dropped."""
    line = about("family", __doc__)
    line.add_argument("--budget", type=int, default=9, help="runs a method; default: %(default)s")
    line.add_argument("--factor", type=float, default=2.0, help="default: %(default)s")
    line.add_argument("--refine", type=int, default=0, help="default: %(default)s")
    line.add_argument("--tune-steps", type=int, help="of the runs of the search; default: all")
    line.add_argument("--workers", type=int, default=1, help="default: %(default)s")
    line.add_argument("--seconds", type=float, default=math.inf, help="default: until all is done")
    line.add_argument("--against", help="whose loss is subtracted; default: the first optimizer's")
    line.add_argument("--same-time-as", metavar="NAME", help="whose time others get, too")
    line.add_argument("--overwrite", action="store_true", help="drop what is there")
    own, rest = line.parse_known_args(arguments)
    if own.budget < 1 or own.factor <= 1 or own.refine < 0 or own.workers < 1:
        line.error("--budget and --workers are 1 at least, --factor is more, --refine not negative")
    command = parse_settings(rest)
    if own.tune_steps is not None and not 0 < own.tune_steps < command.settings.steps:
        line.error(f"--tune-steps is less than the {command.settings.steps} steps of a run")
    search = Search(own.factor, own.refine, own.budget, own.tune_steps)
    if "--out" not in rest:
        command = replace(command, out=command.out.parent / f"family-{command.settings.model}")
    for option, name in (("against", own.against), ("same-time-as", own.same_time_as)):
        if name and name not in command.settings.lrs:
            line.error(f"--{option} {name} is not among {', '.join(command.settings.lrs)}")
    compared = own.against, own.same_time_as
    options = Options(command, search, own.workers, own.seconds, *compared, arguments)
    return options, own.overwrite


def main(arguments: list[str] | None = None) -> None:
    # Of the processes that are made, which read it when they begin.
    os.environ["OMP_NUM_THREADS"] = "1"
    options, overwrite = parse(sys.argv[1:] if arguments is None else arguments)
    out = options.command.out
    try:
        comparison = Comparison(options, prepared(options, overwrite))
    except ValueError as error:
        sys.exit(f"family: {error}")
    print(comparison.data.describe(), flush=True)
    failure, done = None, False
    try:
        done = comparison.advance()
    except KeyboardInterrupt:
        failure = "stopped; the same command goes on"
    except RuntimeError as error:
        failure = f"{error}; the same command goes on"
    import torch

    from bench.plots import draw_family

    torch.set_num_threads(1)
    record = write(comparison, out / "family.json")
    if record["summary"]:
        draw_family(record, out / "family.png")
    print_table(record)
    if failure:
        sys.exit(f"family: {failure}")
    if not done:
        print("the time is up; the same command goes on", file=sys.stderr)
        sys.exit(UNFINISHED)


if __name__ == "__main__":
    main()
