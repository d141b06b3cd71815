"""A case of a part, and what the parts share."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.host import without_collector
from bench.record import result
from bench.timing import Candidate, Samples, interleaved

CPU = torch.device("cpu")
# A case that takes longer than so many seconds hangs.
HANGS, STEPS_HANG = 120.0, 200.0


class Skipped(Exception):
    """What a case needs is not here, which is no failure."""


@dataclass(frozen=True)
class Task:
    """What a case is called in the record, and what finds its facts."""

    name: str
    run: Callable[[], dict]
    hangs: float = HANGS


def is_fatal(error: Exception) -> bool:
    """Whether every later call of this process would fail, too."""
    return "CUDA" in str(error) and not isinstance(error, torch.OutOfMemoryError)


def text_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def device_of(options: argparse.Namespace) -> torch.device:
    return torch.device(options.device)


def need_gpu(options: argparse.Namespace) -> None:
    if options.device != "cuda":
        raise Skipped("needs a CUDA device")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_times(runs: dict[str, Candidate], device: torch.device, rounds: int) -> dict[str, Samples]:
    """What the host takes until a run returns; the device has nothing to do when it begins."""
    with without_collector():
        return interleaved(
            runs, CPU, rounds, clock=time.perf_counter, prepare=lambda _: synchronize(device)
        )


def captured(run: Callable[[], object]) -> Candidate:
    """Replays of a graph of what a run launches."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    return lambda _: graph.replay()


def as_results(times: dict[str, Samples]) -> dict[str, dict]:
    return {name: result(samples) for name, samples in times.items()}
