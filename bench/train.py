"""One pre-training run: a model, an optimizer, a seed. It can be stopped and continued."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from bench.batches import Batches
from bench.measure import PeakMemory, StepClock, tensor_bytes, weights_digest
from bench.models import MODELS, attend_by_products, build_model, cast_parameters
from bench.optimizers import named
from bench.settings import Job, Settings
from lowrank_kernels import param_groups

# How often a run notes the ranks of its matrices.
SUBSPACE_POINTS = 50

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class History:
    """What a run has measured so far; plain values only, so that checkpoint and record hold it."""

    train_loss: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    subspaces: list[tuple[int, dict[str, tuple[int, float]]]] = field(default_factory=list)
    peak_bytes: int = 0
    # Of all threads, in steps: what a machine that others use makes longer least.
    cpu_seconds: float = 0.0


class Run:
    """The state of a run, and how it moves on by a step."""

    def __init__(self, settings: Settings, job: Job, data: Path, vocab_size: int):
        self.settings, self.job = settings, job
        self.device = torch.device(settings.device)
        self.batches = Batches(data, settings.seq_len, job.seed)
        self.memory = PeakMemory(self.device)
        torch.manual_seed(job.seed)
        with self.device:
            self.model = build_model(MODELS[settings.model], vocab_size, settings.seq_len)
        if settings.autocast and self.device.type == "cpu":
            attend_by_products(self.model)
        if settings.weights is not None:
            weights = torch.load(settings.weights, map_location=self.device, weights_only=True)
            self.model.load_state_dict(weights)
        cast_parameters(self.model, DTYPES[settings.dtype])
        method, options = named(job.optimizer)
        recipe = settings.recipe_of(job)
        groups = param_groups(
            self.model,
            rank=int(options.get("rank", settings.rank)),
            scale=recipe.scale,
            update_proj_gap=settings.update_proj_gap,
        )
        self.optimizer = method.optimizer_of(self.model, groups, job.lr, recipe)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.clock = StepClock(self.device)
        self.history = History()

    @property
    def step(self) -> int:
        return len(self.history.train_loss)

    @property
    def diverged(self) -> bool:
        return self.step > 0 and not math.isfinite(self.history.train_loss[-1])

    def advance(self) -> None:
        """Takes one optimizer step."""
        settings, began = self.settings, time.process_time()
        factor = schedule(self.step, settings.steps, settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        batch = self.batches.train(self.step, settings.batch_size).to(self.device)
        self.clock.mark()
        loss = self.gradients(batch)
        self.clock.mark()
        self.optimizer.step()
        self.clock.mark()
        self.optimizer.zero_grad()
        self.history.train_loss.append(loss.item())
        self.clock.mark()
        seconds, optimizer_seconds = self.clock.read()
        if self.step % max(1, settings.steps // SUBSPACE_POINTS) == 0:
            self._note_subspaces()
        self.history.step_seconds.append(round(seconds, 6))
        self.history.optimizer_seconds.append(round(optimizer_seconds, 6))
        self.history.cpu_seconds += time.process_time() - began

    def gradients(self, batch: torch.Tensor) -> torch.Tensor:
        """Those of a batch, clipped; returns its loss."""
        settings, loss = self.settings, torch.zeros((), device=self.device)
        parts = batch.split(settings.micro_batch)
        for part in parts:
            part_loss = self._loss(part) / len(parts)
            part_loss.backward()
            loss += part_loss.detach()
        if settings.clip > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        return loss

    @torch.no_grad()
    def validate(self) -> float:
        """Measures the mean loss per token on the fixed validation windows, and records it."""
        settings, total, count = self.settings, 0.0, 0
        for batch in self.batches.validation(settings.eval_tokens, settings.micro_batch):
            total += self._loss(batch.to(self.device)).item() * len(batch)
            count += len(batch)
        self.history.validation.append((self.step, total / count))
        return total / count

    def _loss(self, batch: torch.Tensor) -> torch.Tensor:
        kind, enabled = self.device.type, self.settings.autocast
        with torch.autocast(kind, torch.bfloat16, enabled=enabled, cache_enabled=False):
            logits = self.model(input_ids=batch[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    def save(self, path: Path) -> None:
        """Writes a checkpoint that is either complete or not there."""
        self._note_peak()
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": asdict(self.history),
            # For optimizers that draw random numbers; batches do not use this generator.
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = History(**state["history"])
        torch.set_rng_state(state["rng"])
        torch.cuda.set_rng_state_all(state["cuda_rng"])

    def record(self) -> dict:
        """Sums the run up for the report."""
        self._note_peak()
        return {
            **asdict(self.job),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "weight_bytes": tensor_bytes(list(self.model.parameters())),
            "state_bytes": tensor_bytes(dict(self.optimizer.state)),
            "weights_digest": weights_digest(self.model),
            "backends": self._backends(),
            **asdict(self.history),
        }

    def _note_subspaces(self) -> None:
        """Rank and captured energy of every projected matrix."""
        stats = getattr(self.optimizer, "stats", list)()
        if stats:
            rows = {row["name"]: (row["rank"], round(row["captured"], 4)) for row in stats}
            self.history.subspaces.append((self.step, rows))

    def _backends(self) -> dict[str, int]:
        """Counts the projected matrices by the backend that trains them."""
        explain = getattr(self.optimizer, "explain", list)
        return dict(Counter(row["backend"] for row in explain() if row["projected"]))

    def _note_peak(self) -> None:
        self.history.peak_bytes = max(self.history.peak_bytes, self.memory.read())


def schedule(step: int, steps: int, warmup: int) -> float:
    """Returns the factor on the learning rate: linear warm-up, then a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def train(
    settings: Settings,
    job: Job,
    data: Path,
    vocab_size: int,
    folder: Path,
    make: Callable[[Settings, Job, Path, int], Run] = Run,
) -> dict:
    """Trains to the end, from the checkpoint in `folder` if any, and leaves the record there."""
    run = make(settings, job, data, vocab_size)
    checkpoint = folder / "checkpoint.pt"
    folder.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        run.load(checkpoint)
    with tqdm(total=settings.steps, initial=run.step, desc=job.name, disable=None) as bar:
        while run.step < settings.steps and not run.diverged:
            _stop_if_orphaned()
            run.advance()
            bar.update()
            bar.set_postfix_str(_progress(run), refresh=False)
            if run.step % settings.eval_every == 0 or run.step == settings.steps:
                validation = f"validation {run.validate():.4f}"
                tqdm.write(f"{job.name} {run.step}/{settings.steps} {_progress(run)} {validation}")
            if run.step % settings.checkpoint_every == 0 and run.step < settings.steps:
                run.save(checkpoint)
    if settings.keep_weights:
        torch.save(run.model.state_dict(), folder / "weights.pt")
    record = run.record()
    partial = folder / "record.partial"
    partial.write_text(json.dumps(record))
    os.replace(partial, folder / "record.json")
    checkpoint.unlink(missing_ok=True)
    return record


def _stop_if_orphaned() -> None:
    # A comparison killed outright cannot stop its run, which would then race with the resumed one.
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise SystemExit("the comparison that started this run is gone")


def _progress(run: Run) -> str:
    lr = max(group["lr"] for group in run.optimizer.param_groups)
    return f"loss {run.history.train_loss[-1]:.4f} lr {lr:.2e}"
