"""Fine-tuning with sampled activations: accuracy, bytes and time beside those of whole ones.

    python -m bench.finetune --out finetune                 # half an hour of one core
    python -m bench.finetune --out finetune --seconds 500   # status 75: there is more to do

A small encoder learns here to guess hidden bytes of torch's installed sources, once. Each arm
then fine-tunes it to tell which package two lines of code are from, by files that training has not
seen. All arms have as many rates to try, on the first of --seeds; at the best one the other seeds
are run. What counts is the share of wrong answers in validation. The same command goes on where it
was stopped: a run of fine-tuning takes half a minute, and begins anew.

    plain           nothing sampled
    pps-0.3         0.3 of the tokens of every linear layer's input, by their norms; and so on
    ...-norms       by the norms of their gradients in the last epoch, too
    wta-0.3-norms   as WTA-CRS was published
    lora            factors of rank 8 beside every linear layer of the blocks, trained alone

Bytes are what autograd saves of one batch, all and what linear layers are the first to save. Times
are of steps of all arms in turns, in one process with one thread.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench import encoder
from bench.arms import Comparison, check, compare, options_of, seeds_of
from bench.data import load_documents
from bench.family import Search, Start
from bench.labels import Labelled, Masked, Samples, labelled, torch_documents
from bench.measure import tensor_bytes, weights_digest
from bench.plots import draw_finetune
from bench.record import result
from bench.settings import Job
from bench.timing import interleaved
from bench.train import schedule
from lowrank_kernels import sample_linears, saved_bytes

WEIGHT_DECAY = 0.01
FACTOR = 3.0


@dataclass(frozen=True)
class Arm:
    """How an encoder is fine-tuned; a keep of 1 samples nothing."""

    lr: float
    keep: float = 1.0
    method: str = "pps"
    norms: bool = False
    lora: bool = False


# Where the search of the rate begins: as usual for so small a model, and a few times that for LoRA.
LR, LORA_LR = 1e-3, 5e-3
ARMS = {
    "plain": Arm(LR),
    "pps-0.3": Arm(LR, 0.3),
    "pps-0.1": Arm(LR, 0.1),
    "uniform-0.3": Arm(LR, 0.3, "uniform"),
    "wta-0.3-norms": Arm(LR, 0.3, "wta", norms=True),
    "pps-0.3-norms": Arm(LR, 0.3, norms=True),
    "lora": Arm(LORA_LR, lora=True),
    "lora-pps-0.3": Arm(LORA_LR, 0.3, lora=True),
}


@dataclass(frozen=True)
class Settings:
    """Everything that decides the figures, but the seeds and rates."""

    packages: int = 16
    train: int = 128
    validation: int = 64
    length: int = 64
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    batch: int = 16
    epochs: int = 3
    masked_steps: int = 2500
    data: str | None = None

    @property
    def steps(self) -> int:
        return self.epochs * (self.packages * self.train // self.batch)


class FineTuning:
    """A run: a classifier, what it is trained on, and how it moves on by a step."""

    def __init__(self, settings: Settings, job: Job, data: Labelled, pretrained: dict[str, Tensor]):
        self.settings, self.job, self.data = settings, job, data
        arm = ARMS[job.optimizer]
        torch.manual_seed(job.seed)
        self.model = encoder.classifier(config_of(settings), pretrained)
        if arm.lora:
            encoder.adapt(self.model)
        self.sampled = None
        self._has_norms = arm.norms
        if arm.keep < 1:
            # The factor behind another one has an input of 8 features a token.
            targets = r"\.down$" if arm.lora else None
            norms = len(data.train.labels) if arm.norms else None
            self.sampled = sample_linears(
                self.model, arm.keep, arm.method, targets=targets, norms=norms
            )
        trained = [param for param in self.model.parameters() if param.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=job.lr, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.model.train()

    def batch(self, step: int) -> dict[str, Tensor]:
        """Each epoch in an order of its own; tells what is sampled which samples these are."""
        size, samples = self.settings.batch, self.data.train
        epoch, place = divmod(step, len(samples.labels) // size)
        order = np.random.default_rng((self.job.seed, epoch)).permutation(len(samples.labels))
        index = torch.from_numpy(order[place * size : (place + 1) * size])
        batch = samples.batch(index)
        if self.sampled is not None:
            self.sampled.of_batch(batch["attention_mask"], index if self._has_norms else None)
        return batch

    def advance(self, step: int) -> float:
        """Takes one optimizer step, and returns its loss."""
        steps = self.settings.steps
        self.optimizer.param_groups[0]["lr"] = self.job.lr * schedule(step, steps, steps // 10)
        loss = self.model(**self.batch(step)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    @torch.no_grad()
    def wrong(self, samples: Samples) -> float:
        """The share of samples whose package is not told; nothing is sampled meanwhile."""
        self.model.eval()
        wrong = 0
        for index in torch.arange(len(samples.labels)).split(64):
            batch = samples.batch(index)
            labels = batch.pop("labels")
            wrong += int((self.model(**batch).logits.argmax(-1) != labels).sum())
        self.model.train()
        return wrong / len(samples.labels)

    def saved(self) -> dict[str, int]:
        """Bytes that autograd saves of a batch, and those of norms that are kept."""
        found = saved_bytes(self.model, **self.batch(0))
        norms = {} if self.sampled is None else self.sampled._norms_of
        return {
            "saved_bytes": found.total,
            "linear_bytes": found.by_kind()["linear"],
            "norm_bytes": tensor_bytes(norms),
            "trained": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
        }


def config_of(settings: Settings) -> object:
    own = settings
    return encoder.config(own.hidden, own.layers, own.heads, own.length, own.packages)


class Bench:
    """What the runs share: the samples, and the encoder once it is trained."""

    def __init__(self, settings: Settings, data: Labelled, work: Path):
        self.settings, self.data, self._work = settings, data, work
        self._pretrained: dict[str, Tensor] = {}

    def pretrain(self, until: float) -> None:
        own, text = self.settings, Masked(self.data.text, self.settings.length)
        self._pretrained = encoder.pretrained(
            config_of(own), text, own.masked_steps, own.batch, self._work / "encoder", until
        )

    def run(self, job: Job) -> FineTuning:
        return FineTuning(self.settings, job, self.data, self._pretrained)

    def train(self, job: Job, _folder: Path, until: float) -> dict:
        run, losses = self.run(job), []
        for step in range(self.settings.steps):
            check(until)
            losses.append(run.advance(step))
            if not math.isfinite(losses[-1]):
                break
        epoch = max(1, self.settings.steps // self.settings.epochs)
        means = [statistics.fmean(losses[at : at + epoch]) for at in range(0, len(losses), epoch)]
        return {
            "arm": job.optimizer,
            "lr": job.lr,
            "seed": job.seed,
            "steps": len(losses),
            # Of epochs.
            "train_loss": means,
            "validation": [[len(losses), run.wrong(self.data.validation)]],
            "weights_digest": weights_digest(run.model),
        }

    def measure(self, best: dict[str, Job], rounds: int) -> dict[str, dict]:
        """Times of all arms in turns, and then, where norms are known, their bytes."""
        runs = {arm: self.run(job) for arm, job in best.items()}
        steps: dict[str, Callable[[int], object]] = {arm: run.advance for arm, run in runs.items()}
        times = interleaved(steps, torch.device("cpu"), rounds)
        return {arm: {**run.saved(), **result(times[arm])} for arm, run in runs.items()}


def parse(words: list[str]) -> tuple[Settings, object]:
    line = options_of("finetune", __doc__, FACTOR)
    line.add_argument("--arms", default=",".join(ARMS), help="default: %(default)s")
    for each in fields(Settings):
        kind = str if each.name == "data" else int
        name = f"--{each.name.replace('_', '-')}"
        line.add_argument(name, type=kind, default=each.default, help="default: %(default)s")
    options = line.parse_args(words)
    unknown = set(options.arms.split(",")) - set(ARMS)
    if unknown:
        line.error(f"--arms {', '.join(sorted(unknown))}: the known ones are {', '.join(ARMS)}")
    return Settings(
        **{each.name: getattr(options, each.name) for each in fields(Settings)}
    ), options


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    words = sys.argv[1:] if arguments is None else arguments
    settings, options = parse(words)
    work = options.out / "work"
    search = Search(options.factor, 0, options.budget)
    arms = [Start(name, ARMS[name].lr, None) for name in options.arms.split(",")]
    try:
        own = settings
        documents = load_documents(own.data) if own.data else torch_documents()
        data = labelled(documents, own.packages, own.train, own.validation, own.length)
        bench = Bench(settings, data, work)
        comparison = Comparison(work, arms, search, seeds_of(options.seeds), bench.train)
        comparison.begin({"settings": asdict(settings), "digest": data.digest})
    except ValueError as error:
        sys.exit(f"finetune: {error}")
    facts = {
        "settings": asdict(settings),
        "data": {
            "source": own.data or f"torch {torch.__version__} as installed",
            "packages": data.packages,
            "digest": data.digest,
            "padding": float((data.train.tokens == encoder.PADDING).float().mean()),
        },
    }
    measure = partial(bench.measure, rounds=options.rounds)
    record = compare("finetune", words, options, comparison, facts, measure, before=bench.pretrain)
    draw_finetune(record, options.out / "finetune.png")


if __name__ == "__main__":
    main()
