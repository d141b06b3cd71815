"""What torch puts around an optimizer: schedulers, scaling, hooks, copies, compilation."""

import copy
import io
import math
import pickle

import pytest
import torch
from integration.tiny_runs import (
    FORMS,
    GAP,
    METHODS,
    STEPS,
    STOP,
    assert_same_bits,
    every_dtype,
    every_method,
    loss_of,
    set_grads,
    setup,
    tiny_model,
    train,
    uninterrupted,
)
from oracles.low_rank import Matrix, literal_step
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from lowrank_kernels import FiraAdamW, param_groups
from lowrank_kernels.ops import Side

# Schedulers


SCHEDULERS = {
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, T_max=STEPS),
    "one cycle": lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, total_steps=STEPS),
    "one cycle, lr only": lambda optimizer: OneCycleLR(
        optimizer, max_lr=0.1, total_steps=STEPS, cycle_momentum=False
    ),
    "one cycle, a group": lambda optimizer: OneCycleLR(
        optimizer,
        max_lr=[0.1 * (i + 1) for i in range(len(optimizer.param_groups))],
        total_steps=STEPS,
    ),
}
every_scheduler = pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)


def scheduled(optimizer):
    return [(float(group["lr"]), tuple(group["betas"])) for group in optimizer.param_groups]


@every_scheduler
def test_schedulers_set_what_they_set_for_adamw(make):
    model = tiny_model()
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    ours = FiraAdamW([{"params": list(model.parameters())}], **options)
    twin = tiny_model()
    adamw = torch.optim.AdamW(twin.parameters(), fused=True, **options)
    scheduler, twin_scheduler = make(ours), make(adamw)
    seen = set()
    for seed in range(STEPS - 1):
        assert scheduled(ours) == scheduled(adamw)
        seen.update(scheduled(ours))
        train(model, ours, [seed])
        train(twin, adamw, [seed])
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(a, b)
        scheduler.step()
        twin_scheduler.step()
    assert len(seen) > 3


@pytest.mark.parametrize("method", FORMS)
@every_scheduler
def test_a_scheduled_step_is_the_literal_step_at_those_values(make, method):
    """In float64, under the basis that the optimizer took."""
    model, optimizer = setup(method, torch.float64)
    scheduler = make(optimizer)
    projected = next(i for i, group in enumerate(optimizer.param_groups) if "rank" in group)
    twins = {}
    for seed in range(STEPS - 1):
        lr, betas = scheduled(optimizer)[projected]
        before = {param: param.detach().clone() for param in model.parameters()}
        train(model, optimizer, [seed])
        for param in optimizer.param_groups[projected]["params"]:
            state = optimizer.state[param]
            left = Side(state["side"]) is Side.LEFT
            if seed == 0:
                twins[param] = Matrix(before[param], state["basis"], left, torch.float64)
            twins[param].basis = state["basis"].clone()
            literal_step(
                twins[param], param.grad, form=FORMS[method], lr=lr, betas=betas, weight_decay=0.1
            )
            torch.testing.assert_close(param.detach(), twins[param].weight, rtol=1e-10, atol=1e-12)
        scheduler.step()
    assert len(twins) == 2


@every_method
def test_a_tensor_lr_is_followed(method):
    model, optimizer = setup(method, lr=torch.tensor(0.01, dtype=torch.float64))
    twin, floats = setup(method, lr=0.01)
    scheduler, twin_scheduler = (LambdaLR(o, lambda step: 0.5**step) for o in (optimizer, floats))
    for seed in range(STEPS):
        train(model, optimizer, [seed])
        train(twin, floats, [seed])
        scheduler.step()
        twin_scheduler.step()
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    assert_same_bits((model, optimizer), (twin, floats))


@every_method
@every_scheduler
def test_optimizer_and_scheduler_resume_together(make, method):
    model, optimizer = setup(method)
    scheduler = make(optimizer)
    twin, resumed = setup(method)
    for seed in range(STEPS - 1):
        if seed == STOP:
            resumed_scheduler = make(resumed)
            twin.load_state_dict(model.state_dict())
            resumed.load_state_dict(optimizer.state_dict())  # no copy: the other run goes on
            resumed_scheduler.load_state_dict(scheduler.state_dict())
        train(model, optimizer, [seed])
        scheduler.step()
        if seed >= STOP:
            train(twin, resumed, [seed])
            resumed_scheduler.step()
    assert scheduled(optimizer) == scheduled(resumed)
    assert_same_bits((model, optimizer), (twin, resumed))


# Scaling and clipping


@every_method
def test_grad_scaler_skips_a_step_that_overflowed(method):
    """The scale is a power of two, so unscaled gradients are the plain ones, in bits."""
    model, optimizer = setup(method)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, backoff_factor=0.5)
    twin, plain = setup(method)
    for seed in range(STEPS):
        overflow = seed in (0, STOP)
        optimizer.zero_grad()
        scaler.scale(loss_of(model, seed, math.inf if overflow else 1.0)).backward()
        before = [param.detach().clone() for param in model.parameters()]
        steps = [int(state["step"]) for state in optimizer.state.values()]
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            assert [int(state["step"]) for state in optimizer.state.values()] == steps
            for param, value in zip(model.parameters(), before, strict=True):
                assert torch.equal(param, value)
            continue
        plain.zero_grad()
        loss_of(twin, seed).backward()
        plain.step()
    assert scaler.get_scale() == 2.0**8
    assert_same_bits((model, optimizer), (twin, plain))


@every_method
def test_unscaling_then_clipping(method):
    model, optimizer = setup(method)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    twin, plain = setup(method)
    for seed in range(STEPS):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, seed)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        scaler.step(optimizer)
        scaler.update()
        plain.zero_grad()
        loss_of(twin, seed).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
        plain.step()
    assert_same_bits((model, optimizer), (twin, plain))


@every_method
@pytest.mark.parametrize("foreach", [False, True])
def test_clipped_gradients_are_the_ones_used(method, foreach):
    model, optimizer = setup(method)
    twin, scaled = setup(method)
    for seed in range(STEPS):
        set_grads(model, seed)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5, foreach=foreach)
        assert norm > 0.5
        optimizer.step()
        set_grads(twin, seed)
        for param in twin.parameters():
            param.grad *= 0.5 / (norm + 1e-6)
        scaled.step()
    assert_same_bits((model, optimizer), (twin, scaled))


@every_method
def test_accumulated_gradients_are_one_gradient(method):
    model, optimizer = setup(method)
    twin, summed = setup(method)
    for seed in range(STEPS):
        optimizer.zero_grad()
        for part in (0, 100):
            loss_of(model, seed + part).backward()
        optimizer.step()
        summed.zero_grad()
        parts = []
        for part in (0, 100):
            parts.append(torch.autograd.grad(loss_of(twin, seed + part), list(twin.parameters())))
        for param, *grads in zip(twin.parameters(), *parts, strict=True):
            param.grad = sum(grads)
        summed.step()
    assert_same_bits((model, optimizer), (twin, summed))


@every_method
def test_one_optimizer_a_parameter_stepping_in_the_backward_pass(method):
    """Gradient release with torch's own hook: every parameter's step stands alone."""
    model, whole = setup(method)
    twin = tiny_model()
    optimizers = {}
    for group in param_groups(twin, rank=3, update_proj_gap=GAP, weight_decay=0.1):
        for pair in group["params"]:
            optimizers[pair[1]] = METHODS[method]([group | {"params": [pair]}], lr=0.01)

    def release(param):
        optimizers[param].step()
        param.grad = None

    for param in twin.parameters():
        param.register_post_accumulate_grad_hook(release)
    for seed in range(STEPS):
        whole.zero_grad()
        loss_of(model, seed).backward()
        whole.step()
        loss_of(twin, seed).backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert b.grad is None
        assert torch.equal(a, b)


# Hooks


def test_step_hooks_run_around_the_step():
    model, optimizer = setup("fira")
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(int(_step_of(model, optimizer))))
    optimizer.register_step_post_hook(lambda *_: calls.append(int(_step_of(model, optimizer))))
    train(model, optimizer, range(2))
    assert calls == [0, 1, 1, 2]


def _step_of(model, optimizer):
    return optimizer.state.get(model[0].weight, {"step": 0})["step"]


def test_a_pre_hook_may_rewrite_the_state_dict_that_is_loaded():
    model, optimizer = setup("fira", torch.bfloat16)
    train(model, optimizer, range(STOP))

    def zero_moments(_, state_dict):
        state_dict = copy.deepcopy(state_dict)
        for state in state_dict["state"].values():
            state["exp_avg"].zero_()
        return state_dict

    _, loaded = setup("fira", torch.bfloat16)
    loaded.register_load_state_dict_pre_hook(zero_moments)
    loaded.load_state_dict(optimizer.state_dict())
    for state in loaded.state.values():
        assert state["exp_avg"].dtype is torch.float32
        assert not state["exp_avg"].any()
        assert state["exp_avg_sq"].any()


def test_a_post_hook_sees_the_loaded_state_and_may_change_it():
    model, optimizer = setup("fira", torch.bfloat16)
    train(model, optimizer, range(STOP))
    _, loaded = setup("fira", torch.bfloat16)
    seen = []

    def zero_moments(hooked):
        for state in hooked.state.values():
            seen.append(state["exp_avg"].dtype)
            state["exp_avg"].zero_()

    loaded.register_load_state_dict_post_hook(zero_moments)
    loaded.load_state_dict(optimizer.state_dict())
    assert set(seen) == {torch.float32}
    assert not any(state["exp_avg"].any() for state in loaded.state.values())


# Copies and files


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "torch.save": lambda pair: _through_torch_save(pair, weights_only=False),
}


def _through_torch_save(value, weights_only):
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=weights_only)


@every_method
@every_dtype
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_goes_on_as_the_original(how, dtype, method):
    model, optimizer = setup(method, dtype)
    train(model, optimizer, range(STOP))
    twin, copied = COPIES[how]((model, optimizer))
    assert type(copied) is type(optimizer)
    assert copied.explain() == optimizer.explain()
    assert repr(copied) == repr(optimizer)
    train(model, optimizer, range(STOP, STEPS))
    assert_same_bits((model, optimizer), uninterrupted(method, dtype))
    train(twin, copied, range(STOP, STEPS))
    assert_same_bits((model, optimizer), (twin, copied))


@every_method
@every_dtype
def test_a_safely_loaded_file_resumes_bit_for_bit(dtype, method):
    model, optimizer = setup(method, dtype)
    train(model, optimizer, range(STOP))
    file = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    file = _through_torch_save(file, weights_only=True)
    twin, resumed = setup(method, dtype, seed=1)
    twin.load_state_dict(file["model"])
    resumed.load_state_dict(state_dict=file["optimizer"])
    train(twin, resumed, range(STOP, STEPS))
    assert_same_bits((twin, resumed), uninterrupted(method, dtype))


# torch.compile


def test_a_compiled_step_is_the_step():
    """It stays eager: nothing is traced anew when the learning rate changes, and bits are equal."""
    from torch._dynamo.testing import CompileCounter  # loads dynamo, for this test alone

    torch._dynamo.reset()
    counter = CompileCounter()
    model, twin = tiny_model(), tiny_model()
    optimizer, eager = (
        FiraAdamW(param_groups(m, rank=3, update_proj_gap=GAP), lr=0.01) for m in (model, twin)
    )
    step = torch.compile(optimizer.step, backend=counter)
    for seed in range(STEPS):
        for group in (*optimizer.param_groups, *eager.param_groups):
            group["lr"] = 0.01 / (1 + seed)
        set_grads(model, seed)
        step()
        train(twin, eager, [seed])
    assert counter.frame_count == 0
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    torch._dynamo.reset()
