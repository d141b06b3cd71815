"""The gradient's noise that `stats` tells, beside that of many batches at the same weights.

    python -m bench.noise --out bench/results/noise-nano.json   # nano, GaLore; two minutes

A model is trained as by `bench.pretrain`, with monitor=True. At some steps its weights and bases
stand still for `--batches` fresh batches of the recipe's size. Of their gradients R, clipped as in
training and projected by those bases,

    signal   mean of R_i . R_j over i != j         noise   mean of |R_i|^2, less the signal

are |g|^2 and tr Var(R) in the mean, whatever their distribution; errors are those of leaving out a
batch at a time. Beside them stands what `stats` told in the `--window` steps before, in the mean,
both summed over the matrices: all of them, and those whose bases are older than the window and
another 2 / (1 - beta1) steps. The noise scale is in sequences.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch

from bench.data import prepare
from bench.options import about
from bench.record import head, write_lines
from bench.settings import Job, Settings, parse
from bench.tables import new_table, show
from bench.train import Run
from lowrank_kernels.ops import Side
from lowrank_kernels.ops.bases import loaded_basis
from lowrank_kernels.ops.products import project

# Batches of training are numbered by their steps.
FRESH = 10**6


class Watched:
    """A run whose optimizer tells the noise of its projected gradients."""

    def __init__(self, settings: Settings, job: Job, data: Path, vocab_size: int):
        self.run = Run(settings, job, data, vocab_size)
        self.run.optimizer.monitor = True
        self.projected = {
            name: param
            for group in self.run.optimizer.param_groups
            if "rank" in group
            for name, param in zip(group["param_names"], group["params"], strict=True)
        }
        self._told: list[dict[str, tuple[float, float]]] = []

    def advance(self) -> None:
        """Takes a step, and notes what is told of it."""
        self.run.advance()
        rows = self.run.optimizer.stats()
        self._told.append({row["name"]: (row["noise"], row["signal"]) for row in rows})

    def settled(self, window: int) -> list[str]:
        """Matrices whose bases are older than the window, and M of one basis in all of it."""
        beta1, _ = self.run.optimizer.param_groups[0]["betas"]
        least = window + 2 / (1 - beta1)
        return [row["name"] for row in self.run.optimizer.stats() if row["age"] >= least]

    def told(self, names: Iterable[str], window: int) -> dict[str, float]:
        """Means over the last steps of the sums over some matrices."""
        last = self._told[-window:]
        noise, signal = (
            sum(step[name][which] for step in last for name in names) / len(last)
            for which in (0, 1)
        )
        return {"noise": noise, "signal": signal}

    def products(self, batches: int) -> dict[str, torch.Tensor]:
        """R_i . R_j of every two of some fresh batches, by matrix."""
        run, lows = self.run, {name: [] for name in self.projected}
        for number in range(batches):
            batch = run.batches.train(FRESH + run.step * batches + number, run.settings.batch_size)
            run.gradients(batch.to(run.device))
            for name, param in self.projected.items():
                state = run.optimizer.state[param]
                low = project(param.grad.float(), loaded_basis(state).float(), Side(state["side"]))
                lows[name].append(low.flatten())
            run.optimizer.zero_grad()
        found = {}
        for name in self.projected:
            stack = torch.stack(lows.pop(name)).double()
            found[name] = stack @ stack.T
        return found


def estimates(products: torch.Tensor) -> dict[str, float]:
    """Noise, signal and their ratio, each with its standard error by the jackknife.

    Args:
        products: R_i . R_j, summed over matrices.
    """
    count = len(products)
    own = products.diagonal()
    whole = _estimate(products.sum(), own.sum(), count)
    less = products.sum() - 2 * products.sum(0) + own
    without = _estimate(less, own.sum() - own, count - 1)
    result = {}
    for name, value in whole.items():
        deviations = without[name] - without[name].mean()
        variance = (count - 1) / count * deviations.square().sum()
        result |= {name: float(value), f"{name}_error": math.sqrt(float(variance))}
    return result


def _estimate(total: torch.Tensor, own: torch.Tensor, count: int) -> dict[str, torch.Tensor]:
    signal = (total - own) / (count * (count - 1))
    noise = own / count - signal
    return {"noise": noise, "signal": signal, "ratio": noise / signal}


def measure(
    settings: Settings, data: Path, vocab_size: int, points: list[int], batches: int, window: int
) -> list[dict]:
    """A row for each of these steps and kind of matrices; see the head of this file."""
    (name, rates), *_ = settings.lrs.items()
    watched, rows = Watched(settings, Job(name, rates[0], settings.seeds[0]), data, vocab_size), []
    while watched.run.step < max(points):
        watched.advance()
        step = watched.run.step
        if step not in points:
            continue
        products = watched.products(batches)
        for kind, names in (("all", list(products)), ("settled", watched.settled(window))):
            if not names:
                continue
            told = watched.told(names, window)
            direct = estimates(sum(products[name] for name in names))
            scale = settings.batch_size * told["noise"] / told["signal"]
            row = {"step": step, "matrices": kind, "count": len(names), "told": told}
            row |= {"batches": direct, "told_scale": scale}
            row["batches_scale"] = settings.batch_size * direct["ratio"]
            row["batches_scale_error"] = settings.batch_size * direct["ratio_error"]
            rows.append(row)
    return rows


def print_table(rows: list[dict], batches: int) -> None:
    names = ("step", "matrices")
    figures = ("noise, told", "of batches", "signal, told", "of batches")
    figures += ("noise scale, told", "of batches")
    table = new_table("", f"{batches} batches; noise scale in sequences", names, figures)
    for row in rows:
        told, direct = row["told"], row["batches"]
        texts = [str(row["step"]), f"{row['matrices']} ({row['count']})"]
        for name in ("noise", "signal"):
            texts.append(f"{told[name]:.4g}")
            texts.append(f"{direct[name]:.4g} ± {direct[f'{name}_error']:.2g}")
        texts.append(f"{row['told_scale']:.4g}")
        texts.append(f"{row['batches_scale']:.4g} ± {row['batches_scale_error']:.2g}")
        table.add_row(*texts)
    show(table)


def main(arguments: list[str] | None = None) -> None:
    words = sys.argv[1:] if arguments is None else arguments
    parser = about("noise", __doc__)
    parser.add_argument("--out", type=Path, help="the JSON record; none by default")
    parser.add_argument("--points", default="50,100,200,400", help="steps; default: %(default)s")
    parser.add_argument("--batches", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--window", type=int, default=20, help="steps; default: %(default)s")
    # What is left is the recipe of bench.pretrain.
    options, recipe = parser.parse_known_args(words)
    points = [int(point) for point in options.points.split(",")]
    if min(points) < options.window + 1:
        parser.error(f"the first step tells nothing: --points from {options.window + 1} on")
    if "--optimizers" not in recipe:
        recipe = ["--optimizers", "galore", *recipe]
    with tempfile.TemporaryDirectory() as folder:
        settings = parse(["--out", folder, *recipe]).settings
        data = Path(folder) / "data"
        tokens = settings.seq_len + 1
        text = prepare(settings.data, settings.tokenizer, settings.vocab_size, tokens, data)
        rows = measure(settings, data, text.vocab_size, points, options.batches, options.window)
    print_table(rows, options.batches)
    if options.out:
        facts = head("noise", settings.device, words, settings=asdict(settings))
        write_lines(options.out, facts, "rows", rows)


if __name__ == "__main__":
    main()
