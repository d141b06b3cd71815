"""The parts about single operations: right or wrong, rates, times, configurations, counters."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from types import ModuleType, SimpleNamespace

import torch

from bench import kernels
from bench.cases import (
    DTYPES,
    METHODS,
    STEP,
    Case,
    Inputs,
    Oracle,
    input_sets,
    make_inputs,
    outputs,
)
from bench.contact import profiled
from bench.contact.tasks import (
    HANGS,
    Skipped,
    Task,
    captured,
    device_of,
    host_times,
    is_fatal,
    need_gpu,
    text_of,
)
from bench.record import result
from bench.step import products
from bench.timing import LEAD_OF_STEPS, Rates, interleaved, measure_rates

# A race need not show at the first repetition.
REPETITIONS = 4
# Neither rows nor directions begin at multiples of 16 bytes.
ODD, QUICK_ODD = [((777, 1003), 101), ((1003, 777), 101)], [((37, 61), 13)]
# At this rank a step waits for memory alone.
SMALL_RANK = {"7b": 64}
LAUNCHES, QUICK_LAUNCHES = 500, 20
# Which configurations an operation depends on.
KINDS = {
    "project_moments": ("project",),
    "channel_scale": (),
    "back_project_update": ("update",),
    STEP: ("project", "update"),
}
# The first case compiles for all of them.
FIRST_HANGS = HANGS + 100.0


def name_of(case: Case) -> str:
    shape = f"{case.rows} x {case.cols} {case.side.name.lower()}"
    return f"{case.matrices} of {shape} r{case.rank} {case.dtype} {case.method}"


def cases(options: argparse.Namespace, methods: list[str]) -> list[Case]:
    """As `bench.kernels` has them, and those of a small rank."""
    fields = {name: getattr(options, name) for name in ("backend", "device", "dtypes", "quick")}
    found = kernels.cases(SimpleNamespace(models=options.models, methods=methods, **fields))
    for model in [] if options.quick else SMALL_RANK.keys() & set(options.models):
        same = kernels.cases(SimpleNamespace(models=[model], methods=methods, **fields))
        found += [replace(case, rank=SMALL_RANK[model]) for case in same]
    return found


def check(options: argparse.Namespace) -> Iterator[Task]:
    """Is every backend right, and has it the same bits each time?"""
    modules, _ = kernels.candidates(options.backend, options.device)
    del modules[kernels.PLAIN]  # what the others are held against
    for case in checked_cases(options):
        yield Task(name_of(case), functools.partial(checked, case, modules, device_of(options)))


def checked_cases(options: argparse.Namespace) -> list[Case]:
    """The projected shapes of the models, squares on the other side, too, and odd ones."""
    found = cases(options, list(METHODS))
    squares = [case for case in found if case.rows == case.cols]
    found += [replace(case, proj_type="reverse_std") for case in squares]
    for dtype in options.dtypes:
        for shape, rank in QUICK_ODD if options.quick else ODD:
            found += [Case(*shape, rank, dtype, method, matrices=3) for method in METHODS]
    return found


def checked(case: Case, modules: dict[str, ModuleType], device: torch.device) -> dict:
    """Errors as shares of what they may be, and the outputs whose bits differ."""
    inputs = make_inputs(case, device, seed=1)
    oracle, found = Oracle(case, inputs), {}
    for name, module in modules.items():
        try:
            with poisoned_memory():
                found[name] = {
                    "shares": oracle.shares(module),
                    "unequal": unequal(case, module, inputs),
                }
        except Exception as error:
            # A full disk is no fault of a kernel.
            if is_fatal(error) or isinstance(error, OSError):
                raise
            found[name] = {"raised": text_of(error)}
    return {"backends": found}


def unequal(case: Case, module: ModuleType, inputs: Inputs) -> list[str]:
    """The outputs whose bits are not always the same."""
    first, found = outputs(module, case, inputs), set()
    for _ in range(REPETITIONS):
        again = outputs(module, case, inputs)
        found |= {name for name in first if not all(map(torch.equal, first[name], again[name]))}
    return sorted(found)


def is_right(found: dict) -> bool:
    """A share is None where it was NaN or infinite."""
    shares = found.get("shares", {"": None}).values()
    near = all(share is not None and share <= 1 for share in shares)
    return near and not found["unequal"]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN: an output that nobody writes must not hold what an earlier run left."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def rates(options: argparse.Namespace) -> Iterator[Task]:
    """What does this device do at best?"""
    device = device_of(options)
    for dtype in options.dtypes:
        yield Task(f"copy and product {dtype}", lambda d=dtype: asdict(rates_of(options, d)))
    yield Task("reads from L2", lambda: l2_reads(options))
    yield Task("launches", lambda: launches(device, options))
    for case in cases(options, ["galore"]):
        one = replace(case, matrices=1)
        name = f"products of {name_of(one).removesuffix(' galore')}"
        yield Task(name, functools.partial(product_rates, one, device, options.rounds))


def l2_reads(options: argparse.Namespace) -> dict:
    need_gpu(options)
    from bench.contact.l2_reads import bytes_per_second

    return {"bytes_per_second": bytes_per_second(device_of(options))}


def launches(device: torch.device, options: argparse.Namespace) -> dict:
    """Microseconds from one tiny kernel to the next: of Python, in a full queue, in a graph."""
    count = QUICK_LAUNCHES if options.quick else LAUNCHES
    number = torch.zeros(1, device=device)

    def many(_: int = 0) -> None:
        for _ in range(count):
            number.add_(1)

    times = {"python_us": host_times({"": many}, device, options.rounds)[""]}
    if device.type == "cuda":
        runs = {"queue_us": many, "graph_us": captured(many)}
        times |= interleaved(runs, device, options.rounds, lead=LEAD_OF_STEPS)
    return {name: 1e6 * samples.median / count for name, samples in times.items()}


def product_rates(case: Case, device: torch.device, rounds: int) -> dict:
    """What torch's products of operations 1 and 3 take."""
    sets = input_sets(make_inputs(case, device, seed=0), device)
    runs = {name: run for name, run in products(case, sets).items() if name != STEP}
    flops = {name: flops for name, (_, flops) in case.traffic().items()}
    return {
        "results": {
            name: {**result(samples), "flops_per_second": flops[name] / samples.median}
            for name, samples in interleaved(runs, device, rounds).items()
        }
    }


def rates_of(options: argparse.Namespace, dtype: str) -> Rates:
    return _rates(device_of(options), DTYPES[dtype], options.quick)


_rates = functools.cache(measure_rates)


def operations(options: argparse.Namespace) -> Iterator[Task]:
    """Where does the time of a step go, and would another configuration take less?"""
    modules, _ = kernels.candidates(options.backend, options.device)
    found = cases(options, ["fira", "galore"])

    @functools.cache
    def ahead() -> None:
        _compile_ahead(
            [(case, *each) for case in found for each in variants(case, options).values()], options
        )

    def times(case: Case) -> dict:
        ahead()
        return operation_times(case, modules, options)

    for case in found:
        yield Task(name_of(case), functools.partial(times, case), FIRST_HANGS)


def operation_times(
    case: Case, modules: dict[str, ModuleType], options: argparse.Namespace
) -> dict:
    """Rows as of `bench.kernels`, with Triton's variants among the candidates."""
    others = variants(case, options)
    if others:
        from bench.tune import with_config

        modules = modules | {name: with_config(*each) for name, each in others.items()}
    device, best = device_of(options), rates_of(options, case.dtype)
    rows = kernels.bench_case(case, modules, device, best, options.rounds)
    configs = {name: {"kind": kind, **one._asdict()} for name, (kind, one) in others.items()}
    for row in rows:
        foreign = [n for n in configs if configs[n]["kind"] not in KINDS[row["operation"]]]
        row["results"] = {n: one for n, one in row["results"].items() if n not in foreign}
    return {
        **asdict(case),
        "backend": options.backend,
        "operations": rows,
        "configs": configs,
    }


def variants(case: Case, options: argparse.Namespace) -> dict[str, tuple]:
    """Tiles that may be tried beside the one that is taken, as near to its split and stages."""
    if options.backend != "triton":
        return {}
    from bench.tune import TILES, problems_of
    from lowrank_kernels.ops.triton import config

    gpu, found = config.gpu_of(device_of(options)), {}
    for kind in TILES:
        problem, alike = problems_of(case)[kind], {}
        taken = config.config_of(kind, problem, gpu)
        for each in config.candidates(kind, problem, gpu):
            alike.setdefault(each._replace(split=1, stages=1), []).append(each)
        alike.pop(taken._replace(split=1, stages=1), None)
        for some in alike.values():
            nearest = min(some, key=lambda one: _apart(one, taken))
            found[f"{kind} {'/'.join(map(str, nearest))}"] = kind, nearest
    return found


def _apart(one: tuple, other: tuple) -> int:
    return abs(one.split - other.split) + abs(one.stages - other.stages)


def _compile_ahead(todo: list[tuple], options: argparse.Namespace) -> None:
    if options.device == "cuda" and todo:
        from bench.tune import compile_ahead

        compile_ahead(todo, device_of(options))


def tune(options: argparse.Namespace) -> Iterator[Task]:
    """Which configuration, and which size of a batch, takes the least time?"""
    if options.device != "cuda" or options.backend != "triton":
        yield Task("configurations", _no_triton_on_gpu)
        return
    from bench.tune import BATCH, TILES, Tuner
    from bench.tune import problems as tuned

    device = device_of(options)
    tuner = Tuner(device, lambda runs: interleaved(runs, device, options.rounds))
    found = list(tuned(options.models, options.dtypes, device))

    @functools.cache
    def ahead() -> None:
        _compile_ahead(
            [one for case, _ in found for kind in TILES for one in tuner.every(kind, case)], options
        )

    def times(kind: str, case: Case, count: int) -> dict:
        ahead()
        return {"kind": kind, **asdict(case), "times": tuner.times(kind, case, count)}

    for kind in (*TILES, BATCH):
        for case, count in found:
            run = functools.partial(times, kind, case, count)
            yield Task(f"{kind} {name_of(case)}", run, FIRST_HANGS)


def _no_triton_on_gpu() -> dict:
    raise Skipped("needs the triton backend on a CUDA device")


def profile(options: argparse.Namespace) -> Iterator[Task]:
    """What do the counters of the device say?"""
    found = cases(options, ["fira"])
    large = [case for case in found if case.rows == case.cols and case.rows > 1024]
    for case in found[:1] if options.quick else large:
        yield Task(name_of(case), functools.partial(profile_of, case, options))


def profile_of(case: Case, options: argparse.Namespace) -> dict:
    need_gpu(options)
    try:
        return {"kernels": profiled.profile(case, options.out)}
    except profiled.NotProfiled as error:
        raise Skipped(str(error)) from error
