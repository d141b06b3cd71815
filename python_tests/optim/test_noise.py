"""The gradient's noise that `stats` tells: right on gradients of known mean and variance."""

import io
import math
import statistics

import pytest
import torch
from torch import nn

from lowrank_kernels import FiraAdamW, GaLoreAdamW, Restarts, Subspace
from lowrank_kernels.optim.state import MONITORED
from python_tests.devices import device_of

RANK = 40
SHAPES = ((50, 60), (60, 50))
BACKENDS = ("reference", "foreach", "native", "triton")


class Source:
    """Gradients of a fixed mean, with white noise of a given ratio to it: both inside and outside
    of any basis, of which the first gradients have both.
    """

    def __init__(self, ratio: float, seed: int, shapes=SHAPES, device="cpu") -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.means = [torch.randn(shape, generator=self.generator) for shape in shapes]
        self.deviation = math.sqrt(ratio)
        self.params = [nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]

    def optimizer(self, make=GaLoreAdamW, gap: int = 10**6, betas=(0.9, 0.999), **options):
        group = {"params": self.params, "rank": RANK, "update_proj_gap": gap}
        return make([group], lr=1e-3, betas=betas, **{"monitor": True, **options})

    def draw(self) -> None:
        for param, mean in zip(self.params, self.means, strict=True):
            noise = torch.randn(mean.shape, generator=self.generator)
            param.grad = (mean + self.deviation * noise).to(param.device)

    def inside(self, optimizer) -> tuple[float, float]:
        """Noise and signal in the subspaces: the variance of each entry of R is that of an entry
        of G, since bases are orthonormal.
        """
        noise = signal = 0.0
        for param, mean in zip(self.params, self.means, strict=True):
            basis = optimizer.state[param]["basis"].cpu().float()
            low = basis.mT @ mean if len(basis) == mean.shape[0] else mean @ basis
            noise += self.deviation**2 * optimizer.state[param]["exp_avg"].numel()
            signal += float(low.square().sum())
        return noise, signal


def sums(rows: list[dict]) -> tuple[float, float]:
    return sum(row["noise"] for row in rows), sum(row["signal"] for row in rows)


def measured(source: Source, optimizer, first: int, steps: int) -> tuple[float, float]:
    """Over the true ones: the mean of what each step tells from the `first` on. The first gradient
    chose the basis, and so has more of its noise inside than others.
    """
    noise = signal = 0.0
    for step in range(steps):
        source.draw()
        optimizer.step()
        if step >= first:
            more = sums(optimizer.stats())
            noise, signal = noise + more[0], signal + more[1]
    true_noise, true_signal = source.inside(optimizer)
    count = steps - first
    return noise / count / true_noise, signal / count / true_signal


# Relative errors that six seeds of 150 steps reach, of two matrices with R of 2,000 entries.
RATIOS = {1.0: 0.01, 10.0: 0.03, 100.0: 0.15}


@pytest.mark.parametrize("ratio", RATIOS)
def test_true_ratios_are_found_within_their_error(ratio: float) -> None:
    found = []
    for seed in range(6):
        source = Source(ratio, seed)
        found.append(measured(source, source.optimizer(), 50, 200))
    for values in zip(*found, strict=True):
        mean = statistics.mean(values)
        error = statistics.stdev(values) / math.sqrt(len(values))
        assert error < RATIOS[ratio]
        assert abs(mean - 1) < 4 * error + 0.002


@pytest.mark.parametrize("steps", [2, 3, 6])
def test_the_first_steps_are_right_in_the_mean(steps: int) -> None:
    """The sum of M's squared weights is far from its limit. Given bases, whose first gradient is
    like any other.
    """
    found = []
    for seed in range(12):
        source = Source(2.0, seed, shapes=SHAPES * 8)
        optimizer = source.optimizer()
        source.draw()
        optimizer.step()
        for param in source.params:
            state = optimizer.state[param]
            for entry in ("step", "exp_avg", "exp_avg_sq", "norm_sq"):
                state[entry].zero_()
        for _ in range(steps):
            source.draw()
            optimizer.step()
        told = sums(optimizer.stats())
        true = source.inside(optimizer)
        found.append([one / other for one, other in zip(told, true, strict=True)])
    for values in zip(*found, strict=True):
        error = statistics.stdev(values) / math.sqrt(len(values))
        assert error < 0.03
        assert abs(statistics.mean(values) - 1) < 4 * error + 0.002


@pytest.mark.parametrize("make", [GaLoreAdamW, FiraAdamW])
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_every_backend_tells_the_same(backend: str, make) -> None:
    steps = 3 if backend == "triton" else 12
    told = []
    for name in ("reference", backend):
        source = Source(4.0, 0, device=device_of(name))
        optimizer = source.optimizer(make, backend=name)
        for _ in range(steps):
            source.draw()
            optimizer.step()
        told.append([(row["noise"], row["signal"]) for row in optimizer.stats()])
    for expected, own in zip(*told, strict=True):
        assert own == pytest.approx(expected, rel=1e-4)


def test_gradients_that_are_not_finite_tell_nothing() -> None:
    source = Source(1.0, 0)
    optimizer = source.optimizer(subspace="random")
    for step in range(46):
        source.draw()
        if step >= 40:
            for param in source.params:
                param.grad.fill_(math.nan)
        optimizer.step()
        if step == 39:
            before = sums(optimizer.stats())
    assert sums(optimizer.stats()) == pytest.approx(before, rel=0.05)


@pytest.mark.parametrize("state", ["bfloat16", "int8"])
def test_moments_in_fewer_bits_tell_nearly_the_same(state: str) -> None:
    ratios = []
    for form in ("float32", state):
        source = Source(4.0, 0)
        ratios.append(measured(source, source.optimizer(state=form), 20, 60))
    assert ratios[1] == pytest.approx(ratios[0], rel=0.02)


def test_nothing_is_kept_or_told_unless_asked_for() -> None:
    source = Source(1.0, 0)
    optimizer = source.optimizer(monitor=False)
    for _ in range(3):
        source.draw()
        optimizer.step()
    for param in source.params:
        assert not {"norm_sq", "norm_step"} & optimizer.state[param].keys()
    for row in optimizer.stats():
        assert row["noise"] is None
        assert row["signal"] is None


def test_one_step_tells_nothing() -> None:
    source = Source(1.0, 0)
    optimizer = source.optimizer()
    for expected in (False, True):
        source.draw()
        optimizer.step()
        assert all((row["noise"] is not None) == expected for row in optimizer.stats())


def test_without_momentum_nothing_tells_it() -> None:
    source = Source(1.0, 0)
    optimizer = source.optimizer(betas=(0.0, 0.999))
    for _ in range(3):
        source.draw()
        optimizer.step()
    assert all(row["noise"] is row["signal"] is None for row in optimizer.stats())


def test_asked_for_in_the_middle_of_a_run() -> None:
    """The mean of |R|^2 begins there, and M does not."""
    found = []
    for seed in range(6):
        source = Source(2.0, seed, shapes=SHAPES * 8)
        optimizer = source.optimizer(monitor=False)
        for _ in range(60):
            source.draw()
            optimizer.step()
        optimizer.monitor = True
        found.append(measured(source, optimizer, 0, 2))
    for values in zip(*found, strict=True):
        error = statistics.stdev(values) / math.sqrt(len(values))
        assert error < 0.02
        assert abs(statistics.mean(values) - 1) < 4 * error + 0.002


WATCHED = ("nonfinite", "limited", "noise", "signal")


def test_nothing_is_told_while_it_is_off_and_it_begins_anew_after() -> None:
    """Gradients of ten times the size between, of which M is but not the mean of |R|^2."""
    source = Source(2.0, 0, shapes=SHAPES * 8)
    optimizer = source.optimizer()
    for _ in range(20):
        source.draw()
        optimizer.step()
    optimizer.monitor = False
    assert all(row[key] is None for row in optimizer.stats() for key in WATCHED)
    source.means = [10 * mean for mean in source.means]
    source.deviation *= 10
    for _ in range(60):
        source.draw()
        optimizer.step()
    assert all(row[key] is None for row in optimizer.stats() for key in WATCHED)
    resumed = source.optimizer(monitor=True)
    resumed.load_state_dict(optimizer.state_dict())
    for each in (optimizer, resumed):
        each.monitor = True
        assert all(row["noise"] is row["signal"] is None for row in each.stats())
        source.draw()
        each.step()
        assert {state["norm_step"] for state in each.state.values()} == {80}
        assert sums(each.stats()) == pytest.approx(source.inside(each), rel=0.2)


def test_turned_off_and_on_between_two_steps_goes_on() -> None:
    source = Source(1.0, 0)
    optimizer = source.optimizer()
    for _ in range(3):
        source.draw()
        optimizer.step()
    told, optimizer.monitor = optimizer.stats(), False
    optimizer.monitor = True
    assert optimizer.stats() == told
    source.draw()
    optimizer.step()
    assert {state["norm_step"] for state in optimizer.state.values()} == {0}


def test_a_checkpoint_tells_nothing_where_it_is_not_asked_for() -> None:
    source = Source(1.0, 0)
    optimizer = source.optimizer()
    for _ in range(5):
        source.draw()
        optimizer.step()
    resumed = source.optimizer(monitor=False)
    resumed.load_state_dict(optimizer.state_dict())
    for _ in range(2):
        assert all(row[key] is None for row in resumed.stats() for key in WATCHED)
        source.draw()
        resumed.step()
    assert not any(set(MONITORED) & state.keys() for state in resumed.state.values())


@pytest.mark.parametrize("how", ["restarts", "reset"])
def test_begins_anew_with_the_moments(how: str) -> None:
    """Gradients of a hundred times the size before that leave no trace."""
    source = Source(1.0, 0, shapes=SHAPES * 8)
    moments = "reset" if how == "reset" else "keep"
    optimizer = source.optimizer(gap=20, subspace=Subspace(stagger=False, moments=moments))
    restarts = Restarts(optimizer, every=20, recovery=0) if how == "restarts" else None
    for step in range(26):
        source.draw()
        if step < 20:
            for param in source.params:
                param.grad *= 100
        optimizer.step()
        if restarts is not None:
            restarts.step()
            if step == 19:
                assert all(row["noise"] is row["signal"] is None for row in optimizer.stats())
    told, true = sums(optimizer.stats()), source.inside(optimizer)
    assert told == pytest.approx(true, rel=0.25)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38, 1e19])
@pytest.mark.parametrize("backend", BACKENDS[:3])
def test_what_is_left_out_of_a_step_leaves_it_finite(backend: str, bad: float) -> None:
    source = Source(1.0, 0)
    optimizer = source.optimizer(backend=backend)
    for step in range(30):
        source.draw()
        if step == 5:
            source.params[0].grad[3] = bad
            source.params[1].grad.fill_(bad)
        optimizer.step()
    for row in optimizer.stats():
        assert math.isfinite(row["noise"])
        assert math.isfinite(row["signal"])
        assert row["nonfinite"] == (bad != 1e19)


def test_resume() -> None:
    source = Source(1.0, 0)
    optimizer = source.optimizer(gap=7)
    for _ in range(10):
        source.draw()
        optimizer.step()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    twin = Source(1.0, 0)
    resumed = twin.optimizer(gap=7)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert resumed.stats() == optimizer.stats()
    twin.generator.set_state(source.generator.get_state())
    for _ in range(10):
        for each, own in ((source, optimizer), (twin, resumed)):
            each.draw()
            own.step()
    assert resumed.stats() == optimizer.stats()


def test_a_checkpoint_that_counted_but_had_no_noise_begins_it() -> None:
    source = Source(1.0, 0)
    optimizer = source.optimizer()
    for _ in range(10):
        source.draw()
        optimizer.step()
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        del state["norm_sq"], state["norm_step"]
    twin = Source(1.0, 0)
    resumed = twin.optimizer()
    resumed.load_state_dict(saved)
    assert all(row["noise"] is None for row in resumed.stats())
    twin.generator.set_state(source.generator.get_state())
    twin.draw()
    resumed.step()
    assert [resumed.state[param]["norm_step"] for param in twin.params] == [10, 10]
    assert sums(resumed.stats()) == pytest.approx(twin.inside(resumed), rel=0.2)


def test_a_state_that_was_not_left_by_a_run_is_refused() -> None:
    source = Source(1.0, 0)
    optimizer = source.optimizer()
    source.draw()
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["norm_step"] = 2
    with pytest.raises(ValueError, match="was not left by a run"):
        optimizer.load_state_dict(saved)
    saved["state"][0]["norm_step"] = 0
    saved["state"][0]["norm_sq"] = torch.zeros(2)
    with pytest.raises(ValueError, match="norm_sq has shape"):
        optimizer.load_state_dict(saved)


def test_a_plan_counts_it() -> None:
    source = Source(1.0, 0)
    bytes_of = {}
    for monitor in (False, True):
        optimizer = source.optimizer(monitor=monitor)
        planned = [row["state_bytes"] for row in optimizer.plan()]
        source.draw()
        optimizer.step()
        assert [row["state_bytes"] for row in optimizer.explain()] == planned
        bytes_of[monitor] = planned
    # norm_sq, nonfinite and limited.
    assert [more - less for less, more in zip(*bytes_of.values(), strict=True)] == [12, 12]
