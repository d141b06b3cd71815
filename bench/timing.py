"""Times side by side: interleaved rounds, and the two rates of a device that floors are made of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

# A run of one candidate takes a round's number, by which it picks its inputs: a candidate that
# finds them in a cache, because it has just used them, is measured at another problem.
Candidate = Callable[[int], object]

# Seconds of spinning before a run on a GPU: its queue must not run dry while Python launches, or
# events would time the gaps. A step of a whole model takes Python longer than an operation.
LEAD, LEAD_OF_STEPS = 1e-3, 50e-3
CYCLES_PER_SECOND = 2e9


@dataclass(frozen=True)
class Samples:
    """Seconds of one candidate, one a round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half of what lies between the first and the third quartile, as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (third - first) / 2 / self.median


def interleaved(
    candidates: dict[str, Candidate],
    device: torch.device,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    prepare: Callable[[int], object] | None = None,
    lead: float = LEAD,
    idle: int = 2,
) -> dict[str, Samples]:
    """Runs every candidate once a round, each round from another one on, after some idle rounds.

    What disturbs the machine for a while then disturbs all of them, and none always comes after the
    same one. On a GPU events take the time, the host has a `lead` and waits once a run. `prepare`
    goes before each run, and no clock sees it.
    """
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-idle, rounds):
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            if prepare:
                prepare(turn + idle)
            elapsed = _time_once(candidates[name], turn + idle, device, clock, lead)
            if turn >= 0:
                seconds[name].append(elapsed)
    return {name: Samples(values) for name, values in seconds.items()}


def _time_once(
    candidate: Candidate,
    turn: int,
    device: torch.device,
    clock: Callable[[], float],
    lead: float,
) -> float:
    if device.type != "cuda":
        start = clock()
        candidate(turn)
        return clock() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
    torch.cuda._sleep(int(lead * CYCLES_PER_SECOND))
    begin.record()
    candidate(turn)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@dataclass(frozen=True)
class Rates:
    """What the device was measured to do: bytes read and written, and FLOPs, a second."""

    bytes_per_second: float
    flops_per_second: float

    def floor(self, bytes_moved: float, flops: float) -> float:
        """Seconds that no implementation on this device can beat by much."""
        return max(bytes_moved / self.bytes_per_second, flops / self.flops_per_second)


def best(one: Rates, other: Rates) -> Rates:
    """Of two measurements: a machine can only be disturbed downwards."""
    return Rates(
        max(one.bytes_per_second, other.bytes_per_second),
        max(one.flops_per_second, other.flops_per_second),
    )


def measure_rates(device: torch.device, dtype: torch.dtype, quick: bool = False) -> Rates:
    """The best of a few large copies or passes in place, and of a few large products in this dtype.

    A CPU's copy also reads what it overwrites; a pass in place moves what it counts.
    """
    cuda = device.type == "cuda"
    numbers = (2**30 if cuda else 2**28) // dtype.itemsize
    side = 8192 if cuda else 2048
    if quick:
        numbers, side = 2**16, 256
    source = torch.randn(numbers, device=device).to(dtype)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in "lr")
    product = torch.empty_like(left)
    times = interleaved(
        {
            "copy": lambda _: target.copy_(source),
            "in place": lambda _: target.neg_(),
            "product": lambda _: torch.mm(left, right, out=product),
        },
        device,
        rounds=2 if quick else 10,
    )
    passes = min(times["copy"].seconds + times["in place"].seconds)
    moved = 2 * source.numel() * source.element_size()
    return Rates(moved / passes, 2 * side**3 / min(times["product"].seconds))


def copies_beyond_cache(bytes_of_one: int, device: torch.device) -> int:
    """How many sets of inputs, used in turn, a cache does not hold."""
    return max(2, min(16, -(-3 * cache_bytes(device) // max(1, bytes_of_one))))


def cache_bytes(device: torch.device) -> int:
    """The last cache of a GPU; what a share of a server's CPU may have of its own."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return 64 * 2**20


def rates_record(rates: dict[str, Rates]) -> dict[str, dict[str, float]]:
    return {name: asdict(rate) for name, rate in rates.items()}
