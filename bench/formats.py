"""Whether fewer bits cost loss: arms of one optimizer, paired by seed.

    python -m bench.pretrain --optimizers galore,galore-8bit,galore-moved --seeds 0,1,2,3 --out nano
    python -m bench.formats nano/pretrain.json --out bench/results/formats.json
    python -m bench.formats nano/work/runs/*/record.json

Reads what `bench.pretrain` leaves, the record of a comparison or of single runs. Arms that share a
seed and a rate start from the same weights and see the same batches, so what counts is the
difference of their last validation losses, an arm's less that of the optimizer that it is named
after: X-8bit, X-bf16, X-8bit-basis (its bases in int8, too), X-8bit-nearest, X-reversed and X-moved
against X. X-moved changes no format, only the rate by a millionth, and so shows how far apart two
runs end for no reason. X-8bit-basis-reversed stands against X-8bit-basis: what the larger side
costs. galore is also what layers that hand R over are judged by: galore-projected, with first bases
from the activations, galore-projected-random, galore-projected-gradient, and
galore-projected-shared, where layers of one input share a basis.

A loss of |mean| + 2 standard errors cannot be excluded, whatever the mean says. A run that
diverged leaves its arm without a mean.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.optimizers import ARMS
from bench.options import about
from bench.record import head, write_lines
from bench.summary import final_loss
from bench.tables import difference_texts, new_table, show

# What is read of a run.
RECORDED = {"optimizer", "lr", "seed", "parameters", "train_loss", "validation"}


@dataclass(frozen=True)
class Run:
    """What pairs a run, and what it came to."""

    optimizer: str
    lr: float
    seed: int
    steps: int
    parameters: int
    loss: float
    scale: float | None = None


@dataclass(frozen=True)
class Arm:
    """An arm against its optimizer: differences of the loss by seed, in nats.

    With one seed there is no standard error, and without one no bound.
    """

    arm: str
    against: str
    lr: float
    seeds: list[int]
    losses: list[float]
    differences: list[float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.differences)

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        if len(self.differences) < 2 or not math.isfinite(self.mean):
            return math.nan
        return statistics.stdev(self.differences) / math.sqrt(len(self.differences))

    @property
    def bound(self) -> float:
        return abs(self.mean) + 2 * self.error

    def row(self) -> dict:
        return {**asdict(self), "mean": self.mean, "error": self.error, "bound": self.bound}


def base_of(name: str) -> str | None:
    """The optimizer that an arm is named after; None of what is no arm."""
    for arm in sorted(ARMS, key=len, reverse=True):
        if name.endswith(f"-{arm}"):
            return name.removesuffix(f"-{arm}") + ARMS[arm]
    return None


def read(paths: Iterable[Path]) -> tuple[list[dict], list[dict]]:
    """Runs, and the heads of the comparisons among what was read.

    Raises:
        ValueError: a file cannot be read, or is no record of `bench.pretrain`.
    """
    runs, heads = [], []
    for path in paths:
        try:
            found = json.loads(path.read_text())
            own = found.get("runs", [found])
            if "runs" in found:
                heads.append({key: found[key] for key in ("command", "date", "environment")})
            if any(RECORDED - run.keys() for run in own):
                raise KeyError
            runs += own
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        except (KeyError, AttributeError, TypeError):
            raise ValueError(f"{path} is no record of bench.pretrain, nor of a run of it") from None
    return runs, heads


def paired(records: list[dict]) -> list[Arm]:
    """Every arm and rate that has seeds in common with its optimizer, in the records' order.

    Raises:
        ValueError: there are two different runs of one seed, or a pair is of different length or of
            different models.
    """
    runs: dict[tuple[str, float, float | None, int], Run] = {}
    for record in records:
        run = _run(record)
        known = runs.setdefault((run.optimizer, run.lr, run.scale, run.seed), run)
        if known != run:
            raise ValueError(f"two runs of {run.optimizer}, lr {run.lr:g}, seed {run.seed}")
    arms = []
    for name, lr, scale in dict.fromkeys(key[:3] for key in runs):
        base = base_of(name)
        seeds = [seed for *point, seed in runs if point == [name, lr, scale]]
        seeds = [seed for seed in sorted(seeds) if (base, lr, scale, seed) in runs]
        if base is None or not seeds:
            continue
        pairs = [(runs[name, lr, scale, seed], runs[base, lr, scale, seed]) for seed in seeds]
        for own, other in pairs:
            if (own.steps, own.parameters) != (other.steps, other.parameters):
                raise ValueError(f"{name} and {base}, seed {own.seed}: {own.steps} and"
                                 f" {other.steps} steps of {own.parameters} and"
                                 f" {other.parameters} parameters")  # fmt: skip
        losses = [own.loss for own, _ in pairs]
        differences = [_difference(own.loss, other.loss) for own, other in pairs]
        arms.append(Arm(name, base, lr, seeds, losses, differences))
    return arms


def _run(record: dict) -> Run:
    own = (record[key] for key in ("optimizer", "lr", "seed"))
    # A record of a comparison has null for what is not finite.
    last = [record["train_loss"][-1], record["validation"][-1][1] if record["validation"] else None]
    loss = math.inf if None in last else final_loss(record)
    steps = len(record["train_loss"])
    facts = {"parameters": record["parameters"], "scale": record.get("scale")}
    return Run(*own, steps=steps, loss=loss, **facts)


def _difference(own: float, other: float) -> float:
    return own - other if math.isfinite(own) and math.isfinite(other) else math.nan


def main(arguments: list[str] | None = None) -> None:
    line = about("formats", __doc__)
    line.add_argument("records", type=Path, nargs="+", help="of bench.pretrain")
    line.add_argument("--out", type=Path, help="the JSON record; none by default")
    options = line.parse_args(arguments)
    try:
        runs, heads = read(options.records)
        rows = [arm.row() for arm in paired(runs)]
    except ValueError as error:
        sys.exit(f"formats: {error}")
    if not rows:
        sys.exit(f"formats: no pairs: an arm is named X-{', X-'.join(ARMS)}, and X has to be there")
    if options.out:
        # Where the records lay says nothing about the figures.
        write_lines(options.out, head("formats", "cpu", [], comparisons=heads), "rows", rows)
    found = new_table(
        "last validation loss, an arm's less that of its optimizer, paired by seed",
        "in thousandths of a nat",
        ("arm", "lr"),
        ("seeds", "mean", "standard error", "|mean| + 2 s.e.", "by seed"),
    )
    for row in rows:
        by_seed = " ".join("-" if math.isnan(d) else f"{1e3 * d:+.1f}" for d in row["differences"])
        found.add_row(row["arm"], f"{row['lr']:g}", *difference_texts(row), by_seed)
    show(found)


if __name__ == "__main__":
    main()
