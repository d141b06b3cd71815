"""Arms of a comparison at equal tuning, one run after the other in this process.

Each arm finds its rate with as many runs of the first seed as every other, as in `bench.family`,
and then has a run of each other seed there. A run leaves a file: a command that was stopped or
killed goes on behind the last one, also with more seeds or a larger budget.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.family import (
    UNFINISHED,
    Course,
    Search,
    Start,
    Trial,
    course,
    losses_of,
    mean_and_difference,
)
from bench.options import about
from bench.record import head, write_lines
from bench.settings import Job
from bench.summary import final_loss
from bench.tables import family_marks, loss_text, new_table, show


class TimeUp(Exception):
    """The deadline came before the end of a run."""


def check(until: float) -> None:
    """Raises TimeUp from this time on, by time.monotonic()."""
    if time.monotonic() >= until:
        raise TimeUp


def write_json(path: Path, value: object) -> None:
    """A file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.write_text(json.dumps(value))
    os.replace(unfinished, path)


@dataclass
class Comparison:
    """A folder of runs, and what is still to be done there.

    `train` makes the run of a job, whose optimizer is the name of an arm, in a folder that is its
    own, and returns the record of it; it raises TimeUp at the deadline.
    """

    work: Path
    starts: list[Start]
    search: Search
    seeds: list[int]
    train: Callable[[Job, Path, float], dict]
    runs: dict[Trial, dict] = field(default_factory=dict)

    def begin(self, facts: dict) -> None:
        """Makes the folder ready, or checks that it is of the same comparison.

        Raises:
            ValueError: it is of another one.
        """
        path = self.work / "comparison.json"
        # As they are read again.
        mine = json.loads(json.dumps(facts))
        saved = json.loads(path.read_text()) if path.exists() else mine
        names = [name for name in mine | saved if mine.get(name) != saved.get(name)]
        if names:
            raise ValueError(
                f"{self.work.parent} is of another comparison: "
                + "; ".join(f"{n} was {saved.get(n)}, is {mine.get(n)}" for n in names)
            )
        write_json(path, mine)

    def courses(self) -> list[Course]:
        # What was read may tell what to read next.
        while True:
            found = [course(start, self.search, self.seeds, self.runs) for start in self.starts]
            new = [self._read(trial) for each in found for trial in each.missing]
            if not any(new):
                return found

    def _folder(self, trial: Trial) -> Path:
        return self.work / "runs" / trial.job.name

    def _read(self, trial: Trial) -> bool:
        path = self._folder(trial) / "record.json"
        if not path.exists():
            return False
        self.runs[trial] = json.loads(path.read_text())
        return True

    def advance(self, until: float) -> None:
        """Makes all runs that are missing.

        Raises:
            TimeUp: the deadline came first.
        """
        while missing := [trial for each in self.courses() for trial in each.missing]:
            check(until)
            folder = self._folder(missing[0])
            write_json(folder / "record.json", self.train(missing[0].job, folder, until))
            self._read(missing[0])
            print(f"{missing[0].job.name}: {final_loss(self.runs[missing[0]]):.4f}", flush=True)

    def costs(self, measure: Callable[[dict[str, Job]], dict[str, dict]]) -> dict[str, dict]:
        """What the steps of all arms take, side by side, at what was found for each."""
        path = self.work / "costs.json"
        best = {each.start.optimizer: each.best for each in self.courses() if each.best}
        if not path.exists() or json.loads(path.read_text()).keys() != best.keys():
            write_json(path, measure(best))
        return json.loads(path.read_text())

    def rows(self, costs: dict[str, dict]) -> list[dict]:
        """An arm each; differences are to the first, paired by seed."""
        found = [each for each in self.courses() if each.best and self._finals(each)]
        losses = {each.start.optimizer: losses_of(self._finals(each)) for each in found}
        first = losses.get(self.starts[0].optimizer, {})
        return [
            {
                "arm": each.start.optimizer,
                "lr": each.best.lr,
                "seeds": list(losses[each.start.optimizer]),
                "losses": list(losses[each.start.optimizer].values()),
                **mean_and_difference(losses[each.start.optimizer], first),
                "bracketed": self.search.bracketed(each.tried),
                "finished": not each.missing,
                "tried": [
                    {
                        "lr": each.start.job(place, self.search, self.seeds[0]).lr,
                        "scale": None,
                        "loss": each.tried[place],
                    }
                    for place in sorted(each.tried)
                ],
                **costs.get(each.start.optimizer, {}),
            }
            for each in found
        ]

    def _finals(self, each: Course) -> list[dict]:
        trials = each.finals(self.seeds)
        return [self.runs[trial] for trial in trials if trial in self.runs]

    def records(self) -> list[dict]:
        """Of all runs, also of other seeds than this command's."""
        paths = sorted(self.work.glob("runs/*/record.json"))
        return [json.loads(path.read_text()) for path in paths]


def options_of(bench: str, text: str | None, factor: float) -> ArgumentParser:
    """A parser with the options that comparisons of arms share."""
    line = about(bench, text)
    line.add_argument("--out", type=Path, required=True, help="a folder")
    line.add_argument("--seeds", default="0,1,2", help="default: %(default)s")
    line.add_argument("--budget", type=int, default=3, help="rates an arm; default: %(default)s")
    line.add_argument("--factor", type=float, default=factor, help="default: %(default)s")
    line.add_argument("--rounds", type=int, default=15, help="of times; default: %(default)s")
    line.add_argument("--seconds", type=float, default=math.inf, help="default: until all is done")
    return line


def compare(
    bench: str,
    words: list[str],
    options: Namespace,
    comparison: Comparison,
    facts: dict,
    measure: Callable[[dict[str, Job]], dict[str, dict]],
    before: Callable[[float], None] = check,
) -> dict:
    """Does what is left to do, and writes the record, which it returns.

    Args:
        bench: its name.
        words: of the command line.
        options: of `options_of`.
        comparison: which has begun.
        facts: for the record's head.
        measure: from the best job of each arm to what steps of it take.
        before: what comes before the runs, with the deadline.
    """
    until, done, costs = time.monotonic() + options.seconds, False, {}
    try:
        before(until)
        comparison.advance(until)
        costs = comparison.costs(measure)
        done = True
    except TimeUp:
        print("the time is up; the same command goes on", file=sys.stderr)
    except KeyboardInterrupt:
        sys.exit(f"{bench}: stopped; the same command goes on")
    facts = facts | {"search": asdict(comparison.search), "summary": comparison.rows(costs)}
    path = options.out / f"{bench}.json"
    write_lines(path, head(bench, "cpu", words, **facts), "runs", comparison.records())
    record = json.loads(path.read_text())
    print_table(record)
    if not done:
        sys.exit(UNFINISHED)
    return record


def print_table(record: dict) -> None:
    found = new_table(
        record["command"],
        "loss: of the last validation, in fine-tuning the share of wrong answers, ± standard error"
        " over seeds; edge: not tried on all sides",
        ("arm",),
        ("lr", "loss", "seeds", "saved MB", "linears' MB", "step ms", "tried", ""),
    )
    for row in record["summary"]:
        costs = [""] * 3
        if "saved_bytes" in row:
            sizes = (row["saved_bytes"], row["linear_bytes"])
            costs = [*(f"{size / 1e6:.2f}" for size in sizes), f"{row['ms']:.1f}"]
        found.add_row(
            *(row["arm"], f"{row['lr']:g}", loss_text(row), str(len(row["seeds"]))),
            *(*costs, str(len(row["tried"])), family_marks(row)),
        )
    show(found)


def seeds_of(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]
