"""Pre-training with sampled activations, beside a batch that is smaller by as much.

    python -m bench.sampled --out sampled                 # nano, AdamW; a quarter of an hour
    python -m bench.sampled --out sampled --seconds 500   # status 75: there is more to do

    all            the whole batch
    pps-0.3        0.3 of the tokens of every linear layer's input, by their norms
    uniform-0.3    the same, all tokens as likely
    batch-0.3      0.3 times the sequences, and as many steps

All by `adamw-split`, with as many rates to try; other arguments are those of bench.pretrain. The
same command goes on where it was stopped. Bytes are what autograd saves of one batch, all and what
linear layers are the first to save; times are of steps of all arms in turns, in one process with
one thread.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.arms import Comparison, check, compare, options_of, seeds_of
from bench.data import DataSummary, prepare
from bench.family import Search, Start, shortened
from bench.record import result
from bench.settings import Job, Settings
from bench.settings import parse as parse_settings
from bench.timing import interleaved
from bench.train import Run, train
from lowrank_kernels import sample_linears, saved_bytes

OPTIMIZER = "adamw-split"
FACTOR = 2.0
# Of 10 sequences 0.3 are 3.
RECIPE = ["--steps", "300", "--batch-size", "10", "--micro-batch", "10", "--eval-every", "150"]


@dataclass(frozen=True)
class Arm:
    """What of each batch is left: a share of its sequences, and of its tokens for weights."""

    batch: float = 1.0
    keep: float = 1.0
    method: str = "pps"


ARMS = {
    "all": Arm(),
    "pps-0.3": Arm(keep=0.3),
    "uniform-0.3": Arm(keep=0.3, method="uniform"),
    "batch-0.3": Arm(batch=0.3),
}


class Sampled(Run):
    """A run of an arm, which ends at the deadline."""

    def __init__(
        self, settings: Settings, job: Job, data: Path, vocabulary: int, arm: Arm, until: float
    ):
        super().__init__(settings, job, data, vocabulary)
        self._until = until
        if arm.keep < 1:
            sample_linears(self.model, arm.keep, arm.method)

    def advance(self) -> None:
        check(self._until)
        super().advance()

    def saved(self) -> dict[str, int]:
        """Bytes that autograd saves of a batch."""
        batch = self.batches.train(0, self.settings.batch_size)

        def loss(output: object) -> torch.Tensor:
            return F.cross_entropy(output.logits.flatten(0, 1), batch[:, 1:].flatten())

        found = saved_bytes(self.model, input_ids=batch[:, :-1], loss=loss)
        return {"saved_bytes": found.total, "linear_bytes": found.by_kind()["linear"]}


def of_arm(settings: Settings, arm: Arm) -> Settings:
    """With the arm's share of the batch.

    Raises:
        ValueError: that is no number of sequences, or of micro-batches.
    """
    size = round(arm.batch * settings.batch_size, 6)
    if size != int(size) or settings.micro_batch != settings.batch_size:
        raise ValueError(
            f"--batch-size {settings.batch_size} times {arm.batch:g} is to be whole, and"
            f" --micro-batch, {settings.micro_batch}, the same as --batch-size"
        )
    return replace(settings, batch_size=int(size), micro_batch=int(size))


class Bench:
    """What the runs share."""

    def __init__(self, settings: Settings, data: DataSummary, place: Path):
        self.settings, self.data, self.place = settings, data, place

    def train(self, job: Job, folder: Path, until: float) -> dict:
        arm, own = ARMS[job.optimizer], replace(job, optimizer=OPTIMIZER)
        make = partial(Sampled, arm=arm, until=until)
        settings, vocabulary = of_arm(self.settings, arm), self.data.vocab_size
        record = train(settings, own, self.place, vocabulary, folder / "run", make)
        # What tells whether it ended, of a list with an entry a step.
        short = {"train_loss": record["train_loss"][-1:]}
        return {"arm": job.optimizer, **shortened(record), **short}

    def measure(self, best: dict[str, Job], rounds: int) -> dict[str, dict]:
        runs = {
            arm: Sampled(
                of_arm(self.settings, ARMS[arm]),
                replace(job, optimizer=OPTIMIZER),
                self.place,
                self.data.vocab_size,
                ARMS[arm],
                float("inf"),
            )
            for arm, job in best.items()
        }
        steps: dict[str, Callable[[int], object]] = {
            arm: lambda _, run=run: run.advance() for arm, run in runs.items()
        }
        times = interleaved(steps, torch.device("cpu"), rounds)
        return {arm: {**run.saved(), **result(times[arm])} for arm, run in runs.items()}


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    words = sys.argv[1:] if arguments is None else arguments
    options, rest = options_of("sampled", __doc__, FACTOR).parse_known_args(words)
    work = options.out / "work"
    recipe = ["--optimizers", OPTIMIZER, "--device", "cpu", *RECIPE, *rest]
    settings = parse_settings(["--out", str(options.out), *recipe]).settings
    settings = replace(settings, seeds=seeds_of(options.seeds))
    (lr, *_) = settings.lrs[OPTIMIZER]
    try:
        for arm in ARMS.values():
            of_arm(settings, arm)
        window = settings.seq_len + 1
        data = prepare(
            settings.data, settings.tokenizer, settings.vocab_size, window, work / "data"
        )
        bench = Bench(settings, data, work / "data")
        arms = [Start(name, lr, None) for name in ARMS]
        search = Search(options.factor, 0, options.budget)
        comparison = Comparison(work, arms, search, settings.seeds, bench.train)
        mine = asdict(settings) | {"seeds": []}
        comparison.begin({"settings": mine, "digest": data.digest})
    except ValueError as error:
        sys.exit(f"sampled: {error}")
    facts = {"settings": asdict(settings), "data": asdict(data)}
    compare(
        "sampled", words, options, comparison, facts, partial(bench.measure, rounds=options.rounds)
    )


if __name__ == "__main__":
    main()
