"""Gradients of a tiny LLaMA at several points of its training, for benches and tests of subspaces.

python -m bench.gradients --out gradients.pt       # nano, GaLore; a minute on two cores
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from bench.data import prepare
from bench.settings import Job, parse
from bench.train import Run

# One layer, both sides and every shape of a block.
MATRICES = ("q_proj", "o_proj", "up_proj", "down_proj")


def collect(settings, data: Path, vocab_size: int, points: list[int], layer: int) -> dict:
    """The projected gradients of one layer at these steps, by name."""
    run = Run(settings, Job("galore", 2e-2, 0), data, vocab_size)
    found = {}
    names = {
        name: param
        for name, param in run.model.named_parameters()
        if f".layers.{layer}." in f".{name}" and any(part in name for part in MATRICES)
    }
    while run.step < max(points):
        if run.step + 1 in points:
            step = run.optimizer.step

            def noting(step=step, at=run.step + 1) -> None:
                for name, param in names.items():
                    kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
                    found[f"{kind} at {at}"] = param.grad.detach().clone()
                step()

            run.optimizer.step = noting
            run.advance()
            run.optimizer.step = step
        else:
            run.advance()
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gradients")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--points", default="1,50,200,400", help="steps")
    parser.add_argument("--layer", type=int, default=1)
    options = parser.parse_args(arguments)
    points = [int(point) for point in options.points.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        settings = parse(["--out", folder]).settings
        window = settings.seq_len + 1
        text = prepare(None, "bytes", 0, window, Path(folder) / "data")
        gradients = collect(settings, Path(folder) / "data", text.vocab_size, points, options.layer)
    torch.save({"rank": settings.rank, "gradients": gradients}, options.out)
    print(f"{len(gradients)} gradients in {options.out}")


if __name__ == "__main__":
    main()
