"""AdamW of a whole bfloat16 parameter with moments in every format, beside torch's fused kernels.

    python -m bench.adamw            # 33e6 elements, as the embedding and the head of LLaMA 60M
    python -m bench.adamw --quick    # figures of no use

Beside the time is that of all threads together on processors, which says more on a busy machine.
"""

from __future__ import annotations

import argparse
import time

import torch

from bench.tables import SPREAD, new_table, show
from bench.timing import Candidate, interleaved
from lowrank_kernels.ops import AdamScalars, Scalars
from lowrank_kernels.ops.adamw import adamw
from lowrank_kernels.ops.codes import FLAT_GROUPS, FORMATS, new_stored

ELEMENTS, QUICK_ELEMENTS = 33_000_000, 10_000
OPTIONS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
LR, WEIGHT_DECAY = 1e-3, 0.1


def candidates(elements: int) -> dict[str, Candidate]:
    """What takes a step: ours by the format of the moments, torch's by the dtype of everything."""
    cpu = torch.device("cpu")
    param, grad = (torch.randn(elements).bfloat16() for _ in "wg")
    adam = AdamScalars(**OPTIONS, bias_correction1=0.5, bias_correction2=0.25)
    scalars = Scalars(adam, 1.0, LR, LR * WEIGHT_DECAY, 7)
    found: dict[str, Candidate] = {}
    for name, dtype in FORMATS.items():
        stored = new_stored((elements,), dtype, cpu, FLAT_GROUPS)
        found[f"ours, moments in {name}"] = lambda _, stored=stored: adamw(
            param, grad, stored, scalars, 5
        )
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.nn.Parameter(param.to(dtype, copy=True))
        weight.grad = grad.to(dtype)
        optimizer = torch.optim.AdamW([weight], LR, weight_decay=WEIGHT_DECAY, fused=True)
        name = f"torch's fused, all in {str(dtype).removeprefix('torch.')}"
        found[name] = lambda _, optimizer=optimizer: optimizer.step()
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.adamw")
    parser.add_argument("--elements", type=int, default=ELEMENTS, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15, help="of each clock; %(default)s")
    parser.add_argument("--quick", action="store_true", help="figures of no use")
    options = parser.parse_args(arguments)
    elements, rounds = options.elements, options.rounds
    if options.quick:
        elements, rounds = QUICK_ELEMENTS, 2
    torch.set_num_threads(options.threads)
    todo = candidates(elements)
    cpu = torch.device("cpu")
    times = interleaved(todo, cpu, rounds)
    on_processors = interleaved(todo, cpu, rounds, clock=time.process_time)
    title = f"AdamW, {elements:,} elements, {options.threads} threads"
    table = new_table(title, SPREAD, ["step"], ["ms", "on processors", "ns an element"])
    for name, samples in times.items():
        own = on_processors[name]
        ms = (f"{1e3 * one.median:.2f} ± {100 * one.spread:.0f} %" for one in (samples, own))
        table.add_row(name, *ms, f"{1e9 * own.median / elements:.2f}")
    show(table)


if __name__ == "__main__":
    main()
