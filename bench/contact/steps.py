"""The parts about steps of whole models: times of Python, of a graph, of the device."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import torch

from bench import kernels, model_step
from bench.contact.operations import SMALL_RANK
from bench.contact.tasks import (
    STEPS_HANG,
    Task,
    as_results,
    captured,
    device_of,
    host_times,
    need_gpu,
    synchronize,
)
from bench.model_step import Groups, Problem
from bench.timing import LEAD_OF_STEPS, Candidate, interleaved
from lowrank_kernels import FiraAdamW, GaLoreAdamW

OURS = {"fira": FiraAdamW, "galore": GaLoreAdamW}
# Beside its gradients, and the copy of them that a timing needs, only few optimizers have room.
LARGE = ("7b",)


def name_of(problem: Problem) -> str:
    return f"{problem.model} r{problem.rank} {problem.dtype}"


def problems(options: argparse.Namespace) -> list[Problem]:
    wanted = {name: getattr(options, name) for name in ("models", "dtypes", "quick")}
    return list(model_step.problems(SimpleNamespace(ranks=["preset"], **wanted)))


def python(options: argparse.Namespace) -> Iterator[Task]:
    """How long does a step keep the host, and how long the device?"""
    for problem in problems(options):
        run = functools.partial(python_times, problem, options)
        yield Task(name_of(problem), run, STEPS_HANG)


def python_times(problem: Problem, options: argparse.Namespace) -> dict:
    """Until a step returns, when nobody waits for the device, and until the device is done."""
    device = device_of(options)
    groups, runs = model_step.parameters(problem, device), {}
    for name, backend in subjects(problem, options):
        optimizer = model_step.started(name, groups, backend or "auto")
        runs[f"{name} {backend}".strip()] = lambda _, step=optimizer.step: step()

    def with_device(run: Candidate) -> Candidate:
        return lambda turn: (run(turn), synchronize(device))

    whole = {name: with_device(run) for name, run in runs.items()}
    return {
        "results": as_results(host_times(runs, device, options.rounds)),
        "with_device": as_results(host_times(whole, device, options.rounds)),
    }


def subjects(problem: Problem, options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Optimizers, ours with a backend."""
    yield "adamw", ""
    yield from here(options, "fira", "triton", "native")
    if problem.model not in LARGE:
        yield "hybrid-fira", ""
        yield from here(options, "fira", "foreach")
        yield from here(options, "galore", "triton", "native")


def here(options: argparse.Namespace, name: str, *names: str) -> Iterator[tuple[str, str]]:
    """An optimizer by those of the backends that serve this device."""
    modules, _ = kernels.candidates(options.backend, options.device)
    yield from ((name, backend) for backend in names if backend in modules)


def replay(options: argparse.Namespace) -> Iterator[Task]:
    """What does a captured step take?"""
    for problem in problems(options):
        if problem.model not in LARGE:
            run = functools.partial(replayed, problem, options)
            yield Task(name_of(problem), run, STEPS_HANG)


def replayed(problem: Problem, options: argparse.Namespace) -> dict:
    """Beside an eager step of the same optimizer, which waits for the device once."""
    need_gpu(options)
    device, runs = device_of(options), {}
    for name, optimizer in capturable(model_step.parameters(problem, device), options):
        optimizer.step()
        runs[f"{name} eager"] = lambda _, step=optimizer.step: step()
        runs[f"{name} replay"] = captured(optimizer.step)
    of_device = interleaved(runs, device, options.rounds, lead=LEAD_OF_STEPS)
    of_host = host_times(runs, device, options.rounds)
    return {"results": as_results(of_device), "host": as_results(of_host)}


def capturable(
    groups: Groups, options: argparse.Namespace
) -> Iterator[tuple[str, torch.optim.Optimizer]]:
    rate = torch.tensor(1e-4, device=device_of(options))
    common = {"lr": rate, "weight_decay": 0.1, "capturable": True}
    yield "adamw", torch.optim.AdamW(model_step.tensors(groups), fused=True, **common)
    fira, galore = here(options, "fira", "triton", "foreach"), here(options, "galore", "triton")
    for name, backend in (*fira, *galore):
        own = [dict(group) for group in groups]
        yield f"{name} {backend}", OURS[name](own, backend=backend, **common)


def models(options: argparse.Namespace) -> Iterator[Task]:
    """What does a step of a whole model take beside AdamW's?"""
    found = problems(options)
    if not options.quick:
        small = [p for p in found if p.model in SMALL_RANK]
        found += [replace(p, rank=SMALL_RANK[p.model]) for p in small]
    for problem in found:
        for _, backend in here(options, "", *dict.fromkeys((options.backend, "native"))):
            run = functools.partial(model_times, problem, backend, options)
            yield Task(f"{name_of(problem)} {backend}", run, STEPS_HANG)


def model_times(problem: Problem, backend: str, options: argparse.Namespace) -> dict:
    """A row of `bench.model_step`."""
    names = ["adamw", "fira", "galore"]
    if backend == options.backend:
        names = ["adamw", "fira", "hybrid-fira"]
        if problem.model not in LARGE and not options.quick:
            names += ["galore", "hybrid-galore", "adamw-master"]
    wanted = SimpleNamespace(backend=backend, rounds=options.rounds, quick=options.quick)
    row = model_step.bench_problem(problem, names, device_of(options), wanted)
    return {**row, "backend": backend}
