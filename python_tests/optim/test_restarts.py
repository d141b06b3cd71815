"""Restarts: what is forgotten and what stays, the rate of each step, schedulers, resume."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from lowrank_kernels import (
    FiraAdamW,
    GaLoreAdamW,
    LowRankAdamW,
    Restarts,
    Subspace,
    release_gradients,
)

SHAPES = ((24, 40), (40, 24), (80, 64), (7,))
EVERY, RECOVERY = 12, 5
FACTORS = [0.001, 0.25075, 0.5005, 0.75025, 1.0]


def parameters(dtype=torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def groups(params: list[nn.Parameter], **options) -> list[dict]:
    """Two projected matrices, one that is not, and a vector."""
    return [{"params": params[:2], "rank": 5, **options}, {"params": params[2:]}]


def galore(params, lr=0.01, gap=7, **options):
    return GaLoreAdamW(groups(params, update_proj_gap=gap), lr=lr, weight_decay=0.1, **options)


def fira(params, lr=0.01, gap=7, **options):
    return FiraAdamW(groups(params, update_proj_gap=gap), lr=lr, weight_decay=0.1, **options)


def train(params, optimizer, restarts, steps: range, *schedulers) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()
        if restarts is not None:
            restarts.step()
        for scheduler in schedulers:
            scheduler.step()


def tensors_of(optimizer) -> list[torch.Tensor]:
    states = [optimizer.state[p] for g in optimizer.param_groups for p in g["params"]]
    return [v for state in states for v in state.values() if isinstance(v, torch.Tensor)]


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


MAKERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "sgd, dampened": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, dampening=0.5),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "adamw, fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "adamw, tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "nadam": lambda params: torch.optim.NAdam(params, lr=0.01),
    "radam": lambda params: torch.optim.RAdam(params, lr=0.01),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.9, centered=True),
    "rprop": lambda params: torch.optim.Rprop(params, lr=0.01),
    "asgd": lambda params: torch.optim.ASGD(params, lr=0.01),
    "adadelta": lambda params: torch.optim.Adadelta(params, lr=0.5),
    "adamax": lambda params: torch.optim.Adamax(params, lr=0.01),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=0.01),
    "galore": galore,
    "fira": fira,
    "fira, paper": lambda params: fira(params, residual="paper"),
    "plain": lambda params: LowRankAdamW(params, lr=0.01),
}
OURS = ("galore", "fira", "fira, paper")


@pytest.mark.parametrize("name", MAKERS)
def test_the_rate_of_every_step(name: str) -> None:
    params = parameters()
    optimizer = MAKERS[name](params)
    restarts, seen = Restarts(optimizer, every=EVERY, recovery=RECOVERY), []
    optimizer.register_step_pre_hook(
        lambda *_: seen.append([g["lr"] for g in optimizer.param_groups])
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(3 * EVERY):
        train(params, optimizer, restarts, range(step, step + 1))
        assert all(g["lr"] is rate for g, rate in zip(optimizer.param_groups, rates, strict=True))
    expected = [1.0] * EVERY + 2 * (FACTORS + [1.0] * (EVERY - RECOVERY))
    for rates_within, factor in zip(seen, expected, strict=True):
        for within, rate in zip(rates_within, rates, strict=True):
            assert float(within) == pytest.approx(float(rate) * factor, rel=1e-7)


def test_ten_steps_recover_by_default() -> None:
    """The published code: 0.001 + 0.999 k / 9."""
    restarts = Restarts(torch.optim.AdamW(parameters()))
    factors = []
    for _ in range(215):
        factors.append(restarts.factor)
        restarts.step()
    assert factors[:200] == [1.0] * 200
    assert factors[200:210] == pytest.approx([0.001 + 0.999 * k / 9 for k in range(10)], rel=1e-15)
    assert factors[209:] == [1.0] * 6


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in OURS])
def test_after_a_restart_as_a_new_optimizer(name: str) -> None:
    params = parameters()
    optimizer = MAKERS[name](params)
    restarts = Restarts(optimizer, every=EVERY, recovery=0)
    train(params, optimizer, restarts, range(EVERY))
    others = [nn.Parameter(param.detach().clone()) for param in params]
    new = MAKERS[name](others)
    train(params, optimizer, restarts, range(EVERY, EVERY + 4))
    train(others, new, None, range(EVERY, EVERY + 4))
    assert_same(params, others)
    assert_same(tensors_of(optimizer), tensors_of(new))


def test_muon_begins_anew_too() -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch is older than Muon")
    params = parameters()[:2]
    optimizer = torch.optim.Muon(params, lr=0.01)
    restarts = Restarts(optimizer, every=EVERY, recovery=0)
    train(params, optimizer, restarts, range(EVERY))
    others = [nn.Parameter(param.detach().clone()) for param in params]
    new = torch.optim.Muon(others, lr=0.01)
    train(params, optimizer, restarts, range(EVERY, EVERY + 4))
    train(others, new, None, range(EVERY, EVERY + 4))
    assert_same(params, others)


@pytest.mark.parametrize("backend", ["reference", "foreach", "native"])
@pytest.mark.parametrize("name", OURS)
def test_after_a_restart_as_a_new_optimizer_with_the_old_bases(name: str, backend: str) -> None:
    """The new one is given the bases, at its first step, and counts from there."""
    options = {"backend": backend, "gap": 10**6}
    make = {
        "galore": galore,
        "fira": fira,
        "fira, paper": lambda params, **given: fira(params, residual="paper", **given),
    }[name]
    params = parameters()
    optimizer = make(params, **options)
    restarts = Restarts(optimizer, every=EVERY, recovery=0)
    train(params, optimizer, restarts, range(EVERY))

    others = [nn.Parameter(param.detach().clone()) for param in params]
    new = make(others, **options)
    set_gradients(others, 0)
    new.step()
    for param, other in zip(params, others, strict=True):
        other.data.copy_(param.detach())
        state = new.state[other]
        for entry in ("step", "exp_avg", "exp_avg_sq", "limiter_norm"):
            if entry in state:
                state[entry].zero_()
        if "basis" in state:
            state["basis"].copy_(optimizer.state[param]["basis"])
    train(params, optimizer, restarts, range(EVERY, EVERY + 4))
    train(others, new, None, range(EVERY, EVERY + 4))
    assert_same(params, others)
    for param, other in zip(params, others, strict=True):
        for entry in ("exp_avg", "exp_avg_sq", "limiter_norm"):
            if entry in new.state[other]:
                assert torch.equal(optimizer.state[param][entry], new.state[other][entry])


FORMATS = [
    {"state": state, "basis": basis, "master": master}
    for state, basis, master in (
        ("float32", "weight", None),
        ("bfloat16", "weight", 24),
        ("int8", "weight", None),
        ("int8", "int8", 24),
        ("int8", "int4", None),
    )
]


@pytest.mark.parametrize("options", FORMATS, ids=str)
@pytest.mark.parametrize("make", [galore, fira])
def test_what_is_forgotten_and_what_stays(make, options: dict) -> None:
    params = parameters(torch.bfloat16)
    optimizer = make(params, monitor=True, **options)
    restarts = Restarts(optimizer, every=EVERY, recovery=RECOVERY)
    train(params, optimizer, restarts, range(EVERY - 1))
    set_gradients(params, EVERY - 1)
    optimizer.step()
    before = copy.deepcopy([optimizer.state[param] for param in params])
    weights = [param.detach().clone() for param in params]
    restarts.step()
    assert_same(params, weights)
    forgotten = {"exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale", "limiter_norm"}
    for param, old in zip(params, before, strict=True):
        state = optimizer.state[param]
        assert state.keys() == old.keys()
        moved = {"moments_step"} if "basis" in state else {"step"}
        for entry, value in state.items():
            if entry in forgotten:
                assert old[entry].count_nonzero()
                assert not value.count_nonzero()
            elif entry not in moved:
                same = (
                    torch.equal(value, old[entry])
                    if torch.is_tensor(value)
                    else value == old[entry]
                )
                assert same, entry
        if "basis" in state:
            assert state["moments_step"] == EVERY == int(state["step"])
        else:
            assert int(state["step"]) == 0
        exp_avg, exp_avg_sq = optimizer.moments(param)
        assert not exp_avg.count_nonzero()
        assert not exp_avg_sq.count_nonzero()


@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_the_bias_correction_counts_from_the_restart(options: dict) -> None:
    """At the rate of the first step, whose update of an entry of the direction is its sign's."""
    params = parameters()[:1]
    optimizer = GaLoreAdamW(
        [{"params": params, "rank": 24, "update_proj_gap": 10**6, "scale": 1.0}],
        lr=0.01,
        **{**options, "master": None},
    )
    restarts = Restarts(optimizer, every=EVERY, recovery=0)
    train(params, optimizer, restarts, range(EVERY))
    before = params[0].detach().clone()
    train(params, optimizer, restarts, range(EVERY, EVERY + 1))
    moved = (params[0].detach() - before).square().mean().sqrt()
    assert float(moved) == pytest.approx(0.01, rel=0.15)


SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.97),
    "step": lambda o: lr_scheduler.StepLR(o, 4, gamma=0.7),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.95),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 30),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 9),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=50),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=15), lr_scheduler.CosineAnnealingLR(o, 20)],
        [15],
    ),
}


@pytest.mark.parametrize("restarts_first", [True, False])
@pytest.mark.parametrize("make", [MAKERS["adamw"], MAKERS["adamw, tensor"], galore])
@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_scheduler_never_sees_the_lower_rate(schedule, make, restarts_first: bool) -> None:
    params, others = parameters(), parameters()
    alone, optimizer = make(others), make(params)
    expected_schedule, own_schedule = schedule(alone), schedule(optimizer)
    restarts, within = Restarts(optimizer, every=EVERY, recovery=RECOVERY), []
    optimizer.register_step_pre_hook(
        lambda *_: within.append(float(optimizer.param_groups[0]["lr"]))
    )
    for step in range(3 * EVERY):
        set_gradients(params, step)
        factor, rate = restarts.factor, float(alone.param_groups[0]["lr"])
        optimizer.step()
        assert within[-1] == pytest.approx(rate * factor, rel=1e-6)
        alone.step()
        for each in (restarts, own_schedule)[:: 1 if restarts_first else -1]:
            each.step()
        expected_schedule.step()
        for group, expected in zip(optimizer.param_groups, alone.param_groups, strict=True):
            assert group["lr"] == expected["lr"]


def test_a_plateau_is_seen_at_the_groups_rate() -> None:
    params = parameters()
    optimizer = galore(params)
    restarts = Restarts(optimizer, every=2, recovery=2)
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for step in range(4):
        train(params, optimizer, restarts, range(step, step + 1))
        plateau.step(1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01 / 8] * 2


RESUMED = {
    "adamw": MAKERS["adamw"],
    "sgd": MAKERS["sgd"],
    "nadam": MAKERS["nadam"],
    "galore": galore,
    "fira": fira,
    "fira int8": lambda p: fira(p, state="int8", basis="int4", monitor=True),
    "carried": lambda p: fira(p, subspace=Subspace(residual_energy=0.5, moments="carry_ldadam")),
}


@pytest.mark.parametrize("stop", [EVERY - 1, EVERY, EVERY + 2, EVERY + 8, 2 * EVERY])
@pytest.mark.parametrize("name", RESUMED)
def test_resume_bit_for_bit(name: str, stop: int) -> None:
    def start():
        params = parameters()
        optimizer = RESUMED[name](params)
        return params, optimizer, Restarts(optimizer, every=EVERY, recovery=RECOVERY)

    params, optimizer, restarts = start()
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.97)
    train(params, optimizer, restarts, range(stop), schedule)
    buffer = io.BytesIO()
    saved = [each.state_dict() for each in (optimizer, restarts, schedule)]
    torch.save(([param.detach() for param in params], saved), buffer)
    train(params, optimizer, restarts, range(stop, 3 * EVERY), schedule)

    buffer.seek(0)
    weights, saved = torch.load(buffer, weights_only=True)
    others, resumed, again = start()
    again.every, again.recovery = 5, 3  # those of the run are loaded
    own_schedule = lr_scheduler.ExponentialLR(resumed, 0.97)
    for other, weight in zip(others, weights, strict=True):
        other.data.copy_(weight)
    for each, state in zip((resumed, again, own_schedule), saved, strict=True):
        each.load_state_dict(state)
    train(others, resumed, again, range(stop, 3 * EVERY), own_schedule)
    assert_same(params, others)
    assert_same(tensors_of(optimizer), tensors_of(resumed))
    assert again.state_dict() == restarts.state_dict()


@pytest.mark.parametrize("make", [galore, fira])
def test_steps_in_the_backward_pass_recover_as_well(make) -> None:
    """Bit for bit; a closure goes backward within the step, where rates are lower already."""

    def run(release: bool, closure: bool) -> list[nn.Parameter]:
        params = parameters()
        optimizer = make(params)
        restarts = Restarts(optimizer, every=EVERY, recovery=RECOVERY)
        if release:
            release_gradients(None, optimizer)
        for step in range(2 * EVERY + 3):
            generator = torch.Generator().manual_seed(step)
            factors = [torch.randn(param.shape, generator=generator) for param in params]

            def backward(factors=factors) -> torch.Tensor:
                optimizer.zero_grad()
                loss = sum((p * f).sum() for p, f in zip(params, factors, strict=True))
                loss.backward()
                return loss

            if closure:
                optimizer.step(backward)
            else:
                backward()
                optimizer.step()
            restarts.step()
        return params

    expected = run(False, False)
    assert_same(expected, run(True, False))
    assert_same(expected, run(True, True))


def test_a_step_that_raises_leaves_no_lower_rate_in_a_checkpoint() -> None:
    params = parameters()
    optimizer = galore(params)
    restarts = Restarts(optimizer, every=EVERY, recovery=RECOVERY)
    train(params, optimizer, restarts, range(EVERY))
    for after in (optimizer.state_dict, restarts.step, lambda: set_gradients(params, 0)):
        set_gradients(params, 0)
        params[0].grad.data = torch.randn(3, 3)
        with pytest.raises(RuntimeError, match="zero_grad"):
            optimizer.step()
        saved = after()
        if saved:
            assert [group["lr"] for group in saved["param_groups"]] == [0.01, 0.01]
        set_gradients(params, 0)
        optimizer.step()
        assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.01]


@pytest.mark.parametrize("name", ["sgd", "adamw", "adamw, tensor", "galore"])
def test_a_state_dict_within_a_step_has_the_own_rates_and_the_step_the_lower(name: str) -> None:
    def run(saving: bool) -> list[nn.Parameter]:
        params = parameters()
        optimizer = MAKERS[name](params)
        rates = [group["lr"] for group in optimizer.param_groups]
        restarts = Restarts(optimizer, every=EVERY, recovery=RECOVERY)
        for step in range(EVERY + 2):

            def closure(step: int = step) -> float:
                set_gradients(params, step)
                if saving:
                    saved = optimizer.state_dict()["param_groups"]
                    assert [group["lr"] for group in saved] == rates
                return 0.0

            optimizer.step(closure)
            restarts.step()
        return params

    assert_same(run(False), run(True))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scheduler_first", [True, False])
@pytest.mark.parametrize("where", ["in the closure", "in the step", "in a hook"])
@pytest.mark.parametrize("make", [MAKERS["sgd"], MAKERS["adamw"], galore])
def test_a_scheduler_after_a_step_that_raised_in_a_recovery(
    make, where: str, scheduler_first: bool
) -> None:
    params = parameters()
    optimizer = make(params)
    made = [Restarts, lr_scheduler.ExponentialLR]
    first, second = made[:: -1 if scheduler_first else 1]
    arguments = {Restarts: ((), EVERY, RECOVERY), lr_scheduler.ExponentialLR: (0.5,)}
    parts = {kind: kind(optimizer, *arguments[kind]) for kind in (first, second)}
    restarts, schedule = (parts[kind] for kind in made)
    train(params, optimizer, restarts, range(EVERY))

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    set_gradients(params, EVERY)
    closure, handle = None, None
    if where == "in the closure":
        closure = fail
    elif where == "in the step":
        params[0].grad.data = torch.randn(3, 3)
    else:
        handle = optimizer.register_step_pre_hook(fail)
    for expected in (0.005, 0.0025):
        with pytest.raises(RuntimeError):
            optimizer.step(closure)
        schedule.step()
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [expected] * len(optimizer.param_groups), rel=1e-12
        )
    if handle is not None:
        handle.remove()
    within = []
    optimizer.register_step_pre_hook(lambda *_: within.append(optimizer.param_groups[0]["lr"]))
    train(params, optimizer, restarts, range(EVERY, EVERY + 1), schedule)
    assert within == [pytest.approx(0.0025 * FACTORS[0])]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.00125)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("make", [MAKERS["adamw"], galore])
def test_a_copy_has_no_restarts_and_is_told_so(make, copied) -> None:
    params = parameters()
    optimizer = make(params)
    restarts = Restarts(optimizer, every=EVERY, recovery=RECOVERY)
    train(params, optimizer, restarts, range(EVERY + 1))
    others, twin, lost = copied((params, optimizer, restarts))
    before = lost.state_dict()
    with pytest.raises(RuntimeError, match="is a copy"):
        lost.step()
    assert lost.state_dict() == before
    again = Restarts(twin)
    again.load_state_dict(before)
    train(params, optimizer, restarts, range(EVERY + 1, 2 * EVERY + 2))
    train(others, twin, again, range(EVERY + 1, 2 * EVERY + 2))
    assert_same(params, others)


def test_gradient_scaling_goes_on() -> None:
    """It asks the step for its signature."""
    params = parameters()
    optimizer = MAKERS["adamw, fused"](params)
    expected = inspect.signature(optimizer.step)
    Restarts(optimizer)
    assert inspect.signature(optimizer.step) == expected


def test_removed() -> None:
    params = parameters()
    optimizer = galore(params)
    restarts = Restarts(optimizer, every=EVERY, recovery=RECOVERY)
    train(params, optimizer, restarts, range(EVERY))
    restarts.remove()
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(optimizer.param_groups[0]["lr"]))
    train(params, optimizer, None, range(1))
    assert seen == [0.01]
    assert optimizer.lr_factor == 1.0
    with pytest.raises(RuntimeError, match="were removed"):
        restarts.step()
    Restarts(optimizer, every=EVERY, recovery=RECOVERY)


def test_parameters_without_a_state_are_left_alone() -> None:
    params = parameters()
    params[1].requires_grad_(False)
    optimizer = galore(params)
    restarts = Restarts(optimizer, every=2, recovery=2)
    for step in range(5):
        set_gradients(params, step)
        params[1].grad = None
        optimizer.step()
        restarts.step()
    assert params[1] not in optimizer.state


class Wrapped(torch.optim.Optimizer):
    """As accelerate's: an Optimizer by name."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


def some_galore():
    return galore(parameters())


REFUSED = {
    "no optimizer": (lambda: (nn.Linear(2, 2),), TypeError, "not Linear"),
    "wrapped": (lambda: (Wrapped(galore(parameters())),), TypeError, "before it is wrapped"),
    "adagrad": (lambda: (torch.optim.Adagrad(parameters()),), TypeError, "Adagrad"),
    "every as modules": (lambda: (some_galore(), 20), TypeError, "by their names"),
    "every": (lambda: (some_galore(), (), 0), ValueError, "every must be at least 1"),
    "every, float": (lambda: (some_galore(), (), 2.5), TypeError, "every must be an int"),
    "recovery of one": (
        lambda: (some_galore(), (), 20, 1),
        ValueError,
        "from 2 up to every=20",
    ),
    "recovery too long": (lambda: (some_galore(), (), 5, 6), ValueError, "got 6"),
    "recovery below": (
        lambda: (some_galore(), (), 5, -1),
        ValueError,
        "recovery must be at",
    ),
    "recovery, bool": (
        lambda: (some_galore(), (), 5, False),
        TypeError,
        "recovery must be an",
    ),
    "capturable": (
        lambda: (galore(parameters(), capturable=True),),
        ValueError,
        "capturable=True and Restarts",
    ),
    "torch's capturable": (
        lambda: (torch.optim.AdamW([{"params": parameters(), "capturable": True}]),),
        ValueError,
        "capturable=True and Restarts",
    ),
}


@pytest.mark.parametrize(("arguments", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(arguments, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Restarts(*arguments())


def test_a_second_one_is_refused() -> None:
    optimizer = galore(parameters())
    Restarts(optimizer)
    with pytest.raises(ValueError, match="already"):
        Restarts(optimizer)


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ({}, ValueError),
        (None, ValueError),
        ({"every": 5, "recovery": 1, "steps": 3}, ValueError),
        ({"every": 5, "recovery": -1, "steps": 3}, ValueError),
        ({"every": 5, "recovery": 2, "steps": -1}, ValueError),
        ({"every": 5, "recovery": 2, "steps": 1.5}, TypeError),
        ({"every": 5, "recovery": 2, "steps": "3"}, TypeError),
    ],
)
def test_a_state_dict_that_is_none(state: dict | None, error: type[Exception]) -> None:
    restarts = Restarts(galore(parameters()), every=EVERY, recovery=RECOVERY)
    before = restarts.state_dict()
    with pytest.raises(error):
        restarts.load_state_dict(state)
    assert restarts.state_dict() == before
