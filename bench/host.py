"""What Python costs a step: microseconds a matrix, and the way of a gradient through the package.

    python -m bench.host                                # LLaMA-like blocks, 224 matrices; a minute
    python -m bench.host --blocks 8 --hidden 512 --ffn 1376 --rank 128
    python -m bench.host --models 60m,1b,7b --backends triton   # as many matrices as a model has
    python -m bench.host --quick                        # seconds, figures of no use

Steps between two refreshes, on one thread of the CPU, and beside them the calls that such a step
makes to compute, alone in a loop: of the native backend the matrix products and the compiled
passes, each with its arguments taken from Python; of the reference and of torch's AdamW every
operation that computes. "Python" is a step less these: whatever decides about the calls, with the
temporaries and views that it makes. An optimizer takes five steps in a row, of which the first
finds its memory in no cache; `--steps 1` takes that one alone. The reference's calls find its
temporaries cold, so that too much is taken off. Triton's kernels are compiled for sm_90 and
called, and nothing is launched: see
`bench.no_launch`. Gradients lie where they lay at the step before, or have moved. The garbage
collector sleeps.

With `--models` small matrices stand for those of a model, in batches and by kernels as the model's
would be on an H200: what Python does depends on how many there are, not on how large they are.

The way of a gradient is that of one step of two equal matrices and a bias; no clock is in it.
Another version of the package is measured where a folder that holds nothing but it comes first:

    PYTHONPATH=/folder/of/another:. python -P -m bench.host
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import torch
from rich.table import Table
from torch import Tensor

from bench import no_launch
from bench.absent_gpu import H200_BYTES, H200_NAME, memory_of_h200
from bench.calls import PACKAGE, Way, followed
from bench.cases import DTYPES
from bench.models import PRESETS
from bench.options import QUICK_ROUNDS, about, words
from bench.record import commit, head, result, write_lines
from bench.replay import Calls, recorded_operations, recorded_passes
from bench.tables import SPREAD, missing_text, new_table, show
from bench.timing import Samples, interleaved
from lowrank_kernels import FiraAdamW, GaLoreAdamW, backends
from lowrank_kernels.ops import native
from lowrank_kernels.ops.dispatch import load
from lowrank_kernels.ops.dry import meta_stands_for

if TYPE_CHECKING:
    from lowrank_kernels.ops.triton.config import Config, Problem

CPU = torch.device("cpu")
OURS = {"fira": FiraAdamW, "galore": GaLoreAdamW}
ADAMW = {"adamw": {"fused": True}, "adamw-foreach": {"foreach": True}}
IN_PLACE, MOVED = "in place", "moved"
NEVER = 2**40
ALIGNED_ELEMENTS = 16


@dataclass(frozen=True)
class Size:
    """Blocks of a LLaMA: four squares, two matrices up and one down."""

    blocks: int
    hidden: int
    ffn: int
    rank: int

    def shapes(self) -> list[tuple[int, int]]:
        hidden, ffn = self.hidden, self.ffn
        return [*[(hidden, hidden)] * 4, *[(ffn, hidden)] * 2, (hidden, ffn)] * self.blocks


def stand_in(model: str, size: Size) -> Size:
    """A model in small, with rows that are a multiple of 16 where its are."""
    preset = PRESETS[model]
    ffn = preset.ffn * size.hidden // preset.hidden
    ffn = -(-ffn // 16) * 16 - (1 if preset.ffn % 16 else 0)
    return replace(size, blocks=preset.layers, ffn=ffn)


@contextmanager
def batches_of(model: str, size: Size) -> Iterator[None]:
    """Within it, matrices that stand for a model's go in batches, by native in tiles and by triton
    through the kernels, as the model's would on an H200.
    """
    preset = PRESETS[model]
    whole = dict(zip((size.hidden, size.ffn), (preset.hidden, preset.ffn), strict=True))
    scale = preset.hidden // size.hidden
    tile = {"cpu": native.TILE_ELEMENTS["cuda"] // scale**2}
    rows = {"cpu": native.TILE_ROWS["cuda"] // scale}

    def as_meant(batch_size: Callable[..., int]) -> Callable[..., int]:
        def meant(param: Tensor, grad: Tensor, rank: int) -> int:
            shape = [whole[length] for length in param.shape]
            matrix = torch.empty(shape, dtype=param.dtype, device="meta")
            with meta_stands_for("cuda"):
                return batch_size(matrix, matrix, preset.rank)

        return meant

    with ExitStack() as stack:
        stack.enter_context(memory_of_h200())
        for name in ("native", "triton"):
            backend = load(name)
            replaced = as_meant(backend.batch_size)
            stack.enter_context(mock.patch.object(backend, "batch_size", replaced))
        stack.enter_context(mock.patch.dict(native.TILE_ELEMENTS, tile))
        stack.enter_context(mock.patch.dict(native.TILE_ROWS, rows))
        stack.enter_context(_kernels_of(whole, preset.rank, scale))
        yield


@contextmanager
def _kernels_of(whole: dict[int, int], rank: int, scale: int) -> Iterator[None]:
    """Within it, triton's configurations are those of matrices of the whole size on an H200, and
    gradients are copied where those would be.
    """
    from bench.triton_compile import TARGETS
    from lowrank_kernels.ops import triton

    h200 = next(target.gpu for target in TARGETS if target.capability == no_launch.CAPABILITY)
    config_of = triton.config_of

    def meant(operation: str, problem: Problem, _: object) -> Config:
        lengths = {"channels": whole[problem.channels], "depth": whole[problem.depth]}
        return config_of(operation, problem._replace(rank=rank, **lengths), h200)

    from_elements = triton.PAD_FROM // scale**2
    with mock.patch.multiple(triton, config_of=meant, PAD_FROM=from_elements):
        yield


class Gradients:
    """The gradients of some weights, which can be brought to another place."""

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        self._params = params
        starts = [0]
        for param in params:
            starts.append(starts[-1] - (-param.numel() // ALIGNED_ELEMENTS) * ALIGNED_ELEMENTS)
        self._starts = starts
        rng = torch.Generator().manual_seed(1)
        self._values = torch.empty(starts[-1]).normal_(0, 1e-3, generator=rng)
        self._values = self._values.to(params[0].dtype)

    def stay(self) -> None:
        self._lie_in(self._values)

    def move(self, turn: int) -> None:
        """To where they were at no turn before."""
        size, first = len(self._values), (turn + 1) * ALIGNED_ELEMENTS
        room = self._values.new_empty(first + size)[first:]
        self._lie_in(room.copy_(self._values))

    def _lie_in(self, memory: Tensor) -> None:
        for param, start in zip(self._params, self._starts, strict=False):
            param.grad = memory[start : start + param.numel()].view(param.shape)


@dataclass(frozen=True)
class Subject:
    """An optimizer after some steps, and what it calls in one."""

    optimizer: str
    backend: str | None
    step: torch.optim.Optimizer
    calls: Calls | None
    count: int

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.optimizer, self.backend)))

    def runs(self, steps: int) -> Iterator[tuple[str, object]]:
        """So many steps, and so many times their calls, one right after the other."""
        yield f"{self.name} step", lambda _: _repeat(self.step.step, steps)
        if self.calls is not None:
            yield f"{self.name} calls", lambda _: _repeat(self.calls.run, steps)


def _repeat(run: Callable[[], object], times: int) -> None:
    for _ in range(times):
        run()


def parameters(size: Size, dtype: str) -> list[torch.nn.Parameter]:
    rng = torch.Generator().manual_seed(0)
    weights = (torch.randn(shape, generator=rng).mul_(0.02) for shape in size.shapes())
    return [torch.nn.Parameter(weight.to(DTYPES[dtype])) for weight in weights]


def ours(
    method: str, backend: str, params: list[torch.nn.Parameter], rank: int
) -> torch.optim.Optimizer:
    """With names, as `param_groups` gives them."""
    named = [(f"layers.{place}.weight", param) for place, param in enumerate(params)]
    groups = [{"params": named, "rank": rank, "update_proj_gap": NEVER}]
    return OURS[method](groups, lr=1e-4, weight_decay=0.1, backend=backend)


def subjects(
    size: Size, params: list[torch.nn.Parameter], options: argparse.Namespace
) -> Iterator[Subject]:
    """Ours by every backend and torch's, all of the same weights."""
    for method in options.methods:
        for backend in options.backends:
            optimizer = ours(method, backend, params, size.rank)
            for _ in range(3):
                optimizer.step()
            if backend == "triton":
                before = options.launches.count
                optimizer.step()
                yield Subject(method, backend, optimizer, None, options.launches.count - before)
                continue
            record = recorded_passes if backend == "native" else recorded_operations
            calls = record(optimizer.step)
            yield Subject(method, backend, optimizer, calls, len(calls))
    for name, how in ADAMW.items():
        optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.1, **how)
        optimizer.step()
        calls = recorded_operations(optimizer.step)
        yield Subject(name, None, optimizer, calls, len(calls))


def bench_dtype(size: Size, dtype: str, options: argparse.Namespace) -> list[dict]:
    """A row a subject and place of the gradients."""
    params = parameters(size, dtype)
    gradients = Gradients(params)
    gradients.stay()
    found = list(subjects(size, params, options))
    runs = {name: run for subject in found for name, run in subject.runs(options.steps)}
    with without_collector():
        stayed, moved = (
            interleaved(runs, CPU, options.rounds, clock=time.process_time, prepare=prepare)
            for prepare in (None, gradients.move)
        )
    return [
        {**vars(size), **row(subject, dtype, where, len(params), options.steps, times)}
        for subject in found
        for where, times in ((IN_PLACE, stayed), (MOVED, moved))
    ]


def row(
    subject: Subject,
    dtype: str,
    where: str,
    matrices: int,
    steps: int,
    times: dict[str, Samples],
) -> dict:
    """A step, the calls in it and what is left, in microseconds a matrix."""
    step, calls = times[f"{subject.name} step"], times.get(f"{subject.name} calls")
    seconds = {"step": step.median, "calls": calls.median if calls else 0.0}
    seconds["python"] = seconds["step"] - seconds["calls"]
    return {
        "dtype": dtype,
        "optimizer": subject.optimizer,
        "backend": subject.backend,
        "gradients": where,
        "matrices": matrices,
        "steps": steps,
        "calls": subject.count,
        "us_a_matrix": {name: 1e6 * value / (matrices * steps) for name, value in seconds.items()},
        "results": {"step": result(step), **({"calls": result(calls)} if calls else {})},
    }


@contextmanager
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def way_of_a_gradient(method: str, backend: str = "native", *, nameless: bool = False) -> Way:
    """One step of two equal matrices and a bias, between two refreshes."""
    rng = torch.Generator().manual_seed(0)
    shapes = {"first": (64, 64), "second": (64, 64), "bias": (64,)}
    named = []
    for name, shape in shapes.items():
        param = torch.nn.Parameter(torch.randn(shape, generator=rng))
        param.grad = torch.randn(shape, generator=rng)
        named.append((name, param))
    matrices = {"params": named[:2], "rank": 16, "update_proj_gap": NEVER}
    optimizer = OURS[method]([matrices, {"params": named[2:]}], lr=1e-3, backend=backend)
    for _ in range(3):
        optimizer.step()
    return followed(optimizer.step, nameless=nameless)


def ways(methods: list[str]) -> dict[str, dict]:
    """By method; with comprehensions and their like, too, where they are functions."""
    return {
        method: {
            "named": way_of_a_gradient(method)._asdict(),
            "all": way_of_a_gradient(method, nameless=True)._asdict(),
        }
        for method in methods
    }


def table(record: dict, rows: list[dict]) -> Table:
    """A row a subject: gradients in place, and moved."""
    card = record["batches_of"]
    found = new_table(
        f"{record['environment']['device']}, one thread: microseconds a matrix,"
        f" package {(record['package_commit'] or 'unknown')[:7]}",
        f"{SPREAD}; triton's calls are launches, which do nothing;"
        + (f" batches as on an {card['gpu']} of {card['bytes'] >> 30} GiB;" if card else "")
        + f" {missing_text(record['missing'])}",
        ("model", "sizes", "dtype", "optimizer", "backend"),
        (
            *("matrices", "calls", "step", "calls alone", "Python", "moved: step", "moved: Python"),
            "ms",
        ),
    )
    pairs = {}
    for each in rows:
        sizes = "{hidden}, {ffn}, r{rank}".format(**each)
        key = (each["model"] or "", sizes)
        key += tuple(each[name] or "" for name in ("dtype", "optimizer", "backend"))
        pairs.setdefault(key, {})[each["gradients"]] = each
    for key, pair in pairs.items():
        stayed, moved = (pair[where]["us_a_matrix"] for where in (IN_PLACE, MOVED))
        spread = pair[IN_PLACE]["results"]["step"]["spread"]
        found.add_row(
            *(*key, str(pair[IN_PLACE]["matrices"]), str(pair[IN_PLACE]["calls"])),
            f"{stayed['step']:.1f} ± {100 * spread:.0f} %",
            *(f"{stayed[name]:.1f}" for name in ("calls", "python")),
            *(f"{moved[name]:.1f}" for name in ("step", "python")),
            f"{stayed['step'] * pair[IN_PLACE]['matrices'] / 1e3:.2f}",
        )
    return found


def table_of_ways(found: dict[str, dict]) -> Table:
    result = new_table(
        "one step of two equal matrices and a bias, native backend: what Python goes through",
        f"Python {sys.version_info.major}.{sys.version_info.minor}",
        ("method", "functions counted"),
        ("functions", "files", "changes of file", "calls"),
    )
    texts = {"named": "with a name", "all": "and comprehensions, generators' and lambdas"}
    for method, counts in found.items():
        for which, text in texts.items():
            result.add_row(method, text, *map(str, counts[which].values()))
    return result


def _parse(arguments: list[str]) -> argparse.Namespace:
    line = about("host", __doc__)
    for name, known in (("methods", OURS), ("backends", backends()), ("dtypes", ("fp32", "bf16"))):
        every = ",".join(known)
        line.add_argument(f"--{name}", type=words(known), default=every, help=f"default: {every}")
    for name, value in (("blocks", 32), ("hidden", 64), ("ffn", 172), ("rank", 16)):
        line.add_argument(f"--{name}", type=int, default=value, help="default: %(default)s")
    stood_for = f"instead of --blocks and --ffn; of {', '.join(PRESETS)}"
    line.add_argument("--models", type=words(PRESETS), default=[], help=stood_for)
    line.add_argument("--rounds", type=int, default=25, help="default: %(default)s")
    line.add_argument("--steps", type=int, default=5, help="in a row; default: %(default)s")
    line.add_argument("--quick", action="store_true", help="seconds: figures of no use")
    line.add_argument("--out", type=Path, help="the JSON record; none by default")
    options = line.parse_args(arguments)
    if options.quick:
        options.rounds, options.blocks = QUICK_ROUNDS, 2
    return options


def missing_backends(names: list[str]) -> dict[str, str]:
    """Those that cannot be measured here, and why not; a GPU is not asked for."""
    status = {**backends(), "triton": (no_launch.obstacle() is None, no_launch.obstacle())}
    return {name: status[name][1] for name in names if not status[name][0]}


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parse(arguments)
    missing = missing_backends(options.backends)
    options.backends = [name for name in options.backends if name not in missing]
    size = Size(options.blocks, options.hidden, options.ffn, options.rank)
    with ExitStack() as stack:
        stack.enter_context(_one_thread())
        if "triton" in options.backends:
            options.launches = stack.enter_context(no_launch.no_launch())
        rows = []
        for model in options.models or [None]:
            own = stand_in(model, size) if model else size
            with batches_of(model, own) if model else nullcontext():
                for dtype in options.dtypes:
                    rows += [{"model": model} | row for row in bench_dtype(own, dtype, options)]
        card = {"gpu": H200_NAME, "bytes": H200_BYTES} if options.models else None
        facts = {"batches_of": card, "missing": missing, "package_commit": commit(PACKAGE)}
        facts["ways"] = ways(options.methods)
        record = head("host", "cpu", arguments, **facts)
    if options.out:
        write_lines(options.out, record, "rows", rows)
    show(table(record, rows))
    show(table_of_ways(record["ways"]))


if __name__ == "__main__":
    main()
