"""Steps and options, as torch tests its own optimizers; see `test_torch_suite_names.py`."""

import copy
import functools

import pytest
import torch
from optim.torch_suite import (
    GAP,
    TORCH,
    assert_close,
    assert_same,
    every_input,
    every_kind,
    model,
    set_grads,
    snapshot,
    train,
    with_holes,
)
from torch import nn
from torch.optim import lr_scheduler, swa_utils

# Direction


def linear_problem(layout=torch.clone):
    """A weight, a bias, and the loss |W x + b|^2 with autograd's own gradients."""
    rng = torch.Generator().manual_seed(0)
    weight = nn.Parameter(layout(torch.randn(10, 5, generator=rng)))
    bias = nn.Parameter(layout(torch.randn(10, generator=rng)))
    inputs = torch.randn(5, generator=rng)
    return [weight, bias], lambda: (weight.mv(inputs) + bias).square().sum()


def closure_of(optimizer, loss):
    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def first_and_last_loss(optimizer, loss, scheduler=None):
    values = []
    for _ in range(8):
        values.append(optimizer.step(closure_of(optimizer, loss)).detach())
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(values[-1])
        elif scheduler is not None:
            scheduler.step()
    return float(values[0]), float(loss().detach())


@every_kind
@every_input
@pytest.mark.parametrize("layout", [torch.clone, with_holes])
def test_the_loss_goes_in_the_right_direction(layout, options, kind):
    params, loss = linear_problem(layout)
    first, last = first_and_last_loss(kind(params, **copy.deepcopy(options)), loss)
    assert last > first if options.get("maximize") else last < first


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, gamma=0.9, step_size=3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], gamma=0.9),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.4, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.4, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, power=0.9, total_iters=4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.01, step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.01, total_steps=30),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, threshold=1.0),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=4), lr_scheduler.ExponentialLR(o, gamma=0.9)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, total_iters=4), lr_scheduler.ExponentialLR(o, gamma=0.9)],
        milestones=[4],
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.001, anneal_epochs=5),
}


def test_every_scheduler_of_torch_is_in_the_table():
    assert set(SCHEDULERS) == {"SWALR", *lr_scheduler.__all__} - {"LRScheduler"}


@functools.cache
def set_for_torch(name):
    return options_and_losses(TORCH, name)[0]


def options_and_losses(kind, name):
    """What a float and a tensor, each of a group of its own, are at each step; the losses."""
    params, loss = linear_problem()
    own = {"params": params[1:], "lr": torch.tensor(0.01)}
    optimizer = kind([{"params": params[:1]}, own], lr=0.005)
    scheduler, options = SCHEDULERS[name](optimizer), []

    def note(*_):
        groups = optimizer.param_groups
        options.append([(float(group["lr"]), *map(float, group["betas"])) for group in groups])

    optimizer.register_step_post_hook(note)
    return options, first_and_last_loss(optimizer, loss, scheduler)


@every_kind
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_sets_what_it_sets_for_torch(name, kind):
    options, (first, last) = options_and_losses(kind, name)
    assert options == set_for_torch(name)
    assert any(later != options[0] for later in options)
    assert last < first


# Options


@every_kind
@pytest.mark.parametrize("dims", [0, 2])
def test_a_tensor_lr_and_tensor_betas_are_their_floats(dims, kind):
    def tensor(value):
        return torch.tensor(value, dtype=torch.float64).reshape([1] * dims)

    runs = []
    for options in (
        {"lr": 0.01, "betas": (0.8, 0.9)},
        {"lr": tensor(0.01), "betas": (0.8, 0.9)},
        {"lr": tensor(0.01), "betas": (tensor(0.8), tensor(0.9))},
    ):
        module = model(torch.float64)
        optimizer = kind(module.parameters(), **options)
        train(module, optimizer, range(2 * GAP))
        runs.append(snapshot(module, optimizer))
    assert_close(runs[0], runs[1])
    assert_close(runs[0], runs[2])


GROUP_OPTIONS = [
    ("lr", 0.1, 0.001),
    ("weight_decay", 0.0, 0.5),
    ("betas", (0.9, 0.99), (0.5, 0.99)),
    ("betas", (0.9, 0.99), (0.9, 0.5)),
    ("eps", 1e-8, 1e-2),
    ("maximize", False, True),
]


def stepped(module, optimizers, seeds):
    """The weights after a step of each optimizer, seed by seed."""
    for seed in seeds:
        set_grads(module.parameters(), seed)
        for optimizer in optimizers:
            optimizer.step()
    return [(name, param.detach()) for name, param in module.named_parameters()]


def halves(module):
    named = list(module.named_parameters())
    return named[:2], named[2:]


@every_kind
@pytest.mark.parametrize(("option", "first", "second"), GROUP_OPTIONS)
def test_two_groups_are_two_optimizers(option, first, second, kind):
    """Names make their random numbers equal."""
    one, two, same = model(), model(), model()
    early, late = halves(one)
    groups = kind([{"params": early, option: first}, {"params": late, option: second}])
    early, late = halves(two)
    pair = [kind(early, **{option: first}), kind(late, **{option: second})]
    seeds = range(GAP + 1)
    result = stepped(one, [groups], seeds)
    assert_same(result, stepped(two, pair, seeds))
    equal = stepped(same, [kind(same.named_parameters(), **{option: first})], seeds)
    for (name, a), (_, b) in zip(result, equal, strict=True):
        assert torch.equal(a, b) == name.startswith("0."), name


@every_kind
def test_a_group_that_is_added_later_is_an_optimizer_that_starts_later(kind):
    one, other = model(), model()
    early, late = halves(one)
    optimizer, pair = kind(early), [kind(halves(other)[0])]
    stepped(one, [optimizer], range(2))
    stepped(other, pair, range(2))
    for group in kind.divided({"params": late, "lr": 0.01}):
        optimizer.add_param_group(group)
    pair.append(kind(halves(other)[1], lr=0.01))
    assert_same(
        stepped(one, [optimizer], range(2, 3 + GAP)), stepped(other, pair, range(2, 3 + GAP))
    )


# Gradients that are missing or zero, layers that are frozen


@every_kind
@pytest.mark.parametrize("trained", [False, True])
def test_without_gradients_a_step_does_nothing(trained, kind):
    module = model()
    optimizer = kind(module.parameters(), weight_decay=0.1)
    if trained:
        train(module, optimizer, range(2))
    before = snapshot(module, optimizer)
    optimizer.zero_grad()
    assert optimizer.step(lambda: 3.5) == 3.5
    assert_same(before, snapshot(module, optimizer))
    assert bool(optimizer.state) == trained


@every_kind
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_zero_gradients_decay_weights_and_move_nothing(weight_decay, kind):
    module = model()
    optimizer = kind(module.parameters(), lr=0.1, weight_decay=weight_decay)
    before = copy.deepcopy(list(module.parameters()))
    for param in module.parameters():
        param.grad = torch.zeros_like(param)
    for _ in range(GAP + 1):
        optimizer.step()
    for param, old in zip(module.parameters(), before, strict=True):
        torch.testing.assert_close(param, old * (1 - 0.1 * weight_decay) ** (GAP + 1))
        assert weight_decay or torch.equal(param, old)


@every_kind
@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_are_never_written(maximize, kind):
    """Their values too: a compiled kernel that writes leaves no trace in `_version`."""
    module = model()
    optimizer = kind(module.parameters(), maximize=maximize)
    set_grads(module.parameters(), 0)
    before = [(param.grad.clone(), param.grad._version) for param in module.parameters()]
    for _ in range(GAP + 1):
        optimizer.step()
    for param, (grad, version) in zip(module.parameters(), before, strict=True):
        assert torch.equal(param.grad, grad)
        assert param.grad._version == version


@every_kind
def test_autograd_sees_that_a_step_changed_the_weights(kind):
    """A graph that has kept the old weights must refuse to go backward."""
    module = model()
    optimizer = kind(module.parameters())
    set_grads(module.parameters(), 0)
    before = [(name, param, param._version) for name, param in module.named_parameters()]
    optimizer.step()
    assert [name for name, param, version in before if param._version == version] == []


@every_kind
def test_frozen_layers_stay_and_go_on_with_the_state_they_had(kind):
    module = model()
    optimizer = kind(module.named_parameters(), weight_decay=0.1)
    train(module, optimizer, range(2))
    frozen = module[2].requires_grad_(False)
    optimizer.zero_grad()
    before = snapshot(frozen, optimizer)
    train(module[0], optimizer, range(2, 4))
    assert_same(before, snapshot(frozen, optimizer))
    frozen.requires_grad_(True)
    train(module, optimizer, range(4, 6))
    assert [int(optimizer.state[param]["step"]) for param in module.parameters()] == [6, 6, 4, 4, 4]


@every_kind
def test_implementations_agree_whatever_is_frozen_or_missing(kind):
    """As torch compares its loop and its fused code: ours with the specification."""
    other = {"foreach": True} if kind is TORCH else {"backend": "reference"}
    finals = []
    for options in ({}, other):
        module = model()
        module.register_parameter("scalar", nn.Parameter(torch.ones(())))
        optimizer = kind(module.named_parameters(), lr=0.01, **options)
        for seed in range(7):
            set_grads(module.parameters(), seed)
            if seed == 2:
                optimizer.zero_grad()
            if seed in (3, 4):
                module[2].zero_grad()
            optimizer.step()
        finals.append(snapshot(module, optimizer))
    assert_close(*finals)


# Parameters


@every_kind
@pytest.mark.parametrize("shape", [(), (0,), (1,), (0, 5), (5, 0), (2, 0, 3)])
def test_scalars_and_empty_parameters(shape, kind):
    params = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(shape))]
    optimizer = kind(params, lr=0.1)
    for _ in range(GAP + 1):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert bool((params[1] < 1).all())
    assert params[0].sum() < 12
    assert all(int(optimizer.state[param]["step"]) == GAP + 1 for param in params)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_parameter_moves_and_has_a_state(dtype, kind):
    module = model(dtype)
    optimizer = kind(module.parameters(), lr=0.1)
    before = copy.deepcopy(list(module.parameters()))
    train(module, optimizer, range(GAP + 1))
    for param, old in zip(module.parameters(), before, strict=True):
        assert optimizer.state[param]
        assert param.isfinite().all()
        assert not torch.equal(param, old)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_default_dtype_changes_nothing(dtype, kind):
    runs = []
    for default in (torch.float32, dtype):
        module = model()
        optimizer = kind(module.parameters(), lr=0.01)
        torch.set_default_dtype(default)
        try:
            train(module, optimizer, range(GAP + 1))
        finally:
            torch.set_default_dtype(torch.float32)
        # torch counts steps in the default dtype if that is float64.
        runs.append([row for row in snapshot(module, optimizer) if "step of" not in row[0]])
    assert_same(*runs)


@every_kind
def test_an_optimizer_can_be_printed(kind):
    optimizer = kind(model().parameters(), lr=0.125)
    assert repr(optimizer).startswith(type(optimizer).__name__)
    assert "lr: 0.125" in repr(optimizer)


@every_kind
def test_a_closure_is_called_once_and_with_gradients_enabled(kind):
    params, loss = linear_problem()
    optimizer = kind(params)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        return closure_of(optimizer, loss)()

    with torch.no_grad():
        value = optimizer.step(closure)
    assert calls == [True]
    assert isinstance(value, torch.Tensor)
