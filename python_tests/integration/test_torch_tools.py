"""What torch puts around an optimizer: schedulers, scaling, checkpoints, DDP, FSDP2, copies."""

import copy
import io
import math
import pickle
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from oracles.low_rank import Matrix, literal_step
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from lowrank_kernels import FiraAdamW, GaLoreAdamW, param_groups
from lowrank_kernels.ops import Side

GAP, STOP, STEPS = 3, 4, 9
METHODS = {
    "galore": lambda groups, **options: GaLoreAdamW(groups, **options),
    "fira": lambda groups, **options: FiraAdamW(groups, **options),
    "fira-paper": lambda groups, **options: FiraAdamW(groups, residual="paper", **options),
}
FORMS = {"galore": None, "fira": "official", "fira-paper": "paper"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
every_method = pytest.mark.parametrize("method", METHODS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def tiny_model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    layers = nn.Linear(12, 20), nn.LayerNorm(20), nn.GELU(), nn.Linear(20, 8)
    return nn.Sequential(*layers).to(dtype)


def setup(method, dtype=torch.float32, seed=0, **options):
    model = tiny_model(dtype, seed)
    groups = param_groups(model, rank=3, update_proj_gap=GAP, weight_decay=0.1)
    return model, METHODS[method](groups, **{"lr": 0.01} | options)


def set_grads(model, seed, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = (scale * torch.randn(param.shape, generator=rng)).to(param.dtype)


def train(model, optimizer, seeds):
    for seed in seeds:
        set_grads(model, seed)
        optimizer.step()


def assert_same_bits(first, second):
    """Weights and optimizer states of two (model, optimizer) pairs, in bits and dtypes."""
    (model, optimizer), (twin, twin_optimizer) = first, second
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b), name
        state, other = optimizer.state[a], twin_optimizer.state[b]
        assert state.keys() == other.keys()
        for key, value in state.items():
            assert type(other[key]) is type(value), (name, key)
            if isinstance(value, torch.Tensor):
                assert other[key].dtype is value.dtype, (name, key)
                assert torch.equal(other[key], value), (name, key)
            else:
                assert other[key] == value, (name, key)


def uninterrupted(method, dtype=torch.float32):
    model, optimizer = setup(method, dtype)
    train(model, optimizer, range(STEPS))
    return model, optimizer


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


@every_method
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


def loss_of(model, seed, factor=1.0):
    rng = torch.Generator().manual_seed(seed)
    return factor * model(torch.randn(4, 12, generator=rng)).square().mean()


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


# Distributed checkpoints


CHECKPOINTS = {
    "nested": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "full on the CPU": StateDictOptions(full_state_dict=True, cpu_offload=True),
}
every_checkpoint = pytest.mark.parametrize("options", CHECKPOINTS.values(), ids=CHECKPOINTS)


def distributed_state(model, optimizer, options):
    return {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def set_distributed_state(model, optimizer, state, options):
    set_model_state_dict(model, state["model"], options=options)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


@every_method
@every_dtype
@every_checkpoint
def test_distributed_checkpoint_resumes_bit_for_bit(options, dtype, method, tmp_path):
    """Saved to files; the template to load into comes from a zero-gradient step, as torch does."""
    model, optimizer = setup(method, dtype)
    train(model, optimizer, range(STOP))
    dcp.save(distributed_state(model, optimizer, options), checkpoint_id=tmp_path, no_dist=True)

    twin, resumed = setup(method, dtype, seed=1)
    before = [param.detach().clone() for param in twin.parameters()]
    template = distributed_state(twin, resumed, options)
    for param, value in zip(twin.parameters(), before, strict=True):
        assert torch.equal(param, value)
        assert param.grad is None
    dcp.load(template, checkpoint_id=tmp_path, no_dist=True)
    set_distributed_state(twin, resumed, template, options)
    assert_same_bits((model, optimizer), (twin, resumed))
    train(twin, resumed, range(STOP, STEPS))
    assert_same_bits((twin, resumed), uninterrupted(method, dtype))


@every_method
@every_checkpoint
def test_state_set_on_a_fresh_optimizer(options, method):
    """Without a template: torch makes the state by a zero-gradient step inside the setter."""
    model, optimizer = setup(method, torch.bfloat16)
    train(model, optimizer, range(STOP))
    state = copy.deepcopy(distributed_state(model, optimizer, options))
    twin, resumed = setup(method, torch.bfloat16, seed=1)
    set_distributed_state(twin, resumed, state, options)
    train(twin, resumed, range(STOP, STEPS))
    assert_same_bits((twin, resumed), uninterrupted(method, torch.bfloat16))


def test_flat_state_is_keyed_by_names():
    model, optimizer = setup("fira")
    train(model, optimizer, range(STOP))
    options = CHECKPOINTS["flat"]
    flat = get_optimizer_state_dict(model, optimizer, options=options)
    state = optimizer.state[model[3].weight]
    for key in ("step", "exp_avg", "exp_avg_sq", "basis", "side", "basis_step", "limiter_norm"):
        assert f"state.3.weight.{key}" in flat
    assert torch.equal(flat["state.3.weight.basis"], state["basis"])
    assert flat["param_groups.3.weight.rank"] == 3
    assert "param_groups.3.bias.rank" not in flat


@every_checkpoint
def test_distributed_checkpoint_with_frozen_and_tied_parameters(options, tmp_path):
    def make(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Embedding(16, 12), nn.Linear(12, 12), nn.Linear(12, 16, False))
        model[2].weight = model[0].weight
        model[1].bias.requires_grad_(False)
        return model, FiraAdamW(param_groups(model, rank=3, update_proj_gap=GAP), lr=0.01)

    def run(model, optimizer, seeds):
        for seed in seeds:
            set_grads(model, seed)
            model[1].bias.grad = None
            optimizer.step()

    model, optimizer = make(0)
    run(model, optimizer, range(STOP))
    dcp.save(distributed_state(model, optimizer, options), checkpoint_id=tmp_path, no_dist=True)
    twin, resumed = make(1)
    template = distributed_state(twin, resumed, options)
    dcp.load(template, checkpoint_id=tmp_path, no_dist=True)
    set_distributed_state(twin, resumed, template, options)
    run(model, optimizer, range(STOP, STEPS))
    run(twin, resumed, range(STOP, STEPS))
    assert_same_bits((model, optimizer), (twin, resumed))


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


# Processes


@contextmanager
def process_group(rank, world, store):
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(store), world), rank=rank, world_size=world
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture
def one_rank(tmp_path):
    with process_group(0, 1, tmp_path / "store"):
        yield


ADAMW = {
    "ours": lambda groups: FiraAdamW(groups, lr=0.01, eps=1e-8),
    "torch": lambda groups: torch.optim.AdamW(groups, lr=0.01, eps=1e-8, fused=True),
}


def fsdp_adamw(which):
    """A run of AdamW groups under FSDP2."""
    model = fully_shard(tiny_model())
    groups = [{"params": list(model.named_parameters()), "weight_decay": 0.1}]
    optimizer = ADAMW[which](groups)
    for seed in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()
    assert all(isinstance(s["exp_avg"], DTensor) for s in optimizer.state.values())
    return {name: full(param) for name, param in model.named_parameters()}


def fsdp_refusal():
    """What projected groups under FSDP2 say."""
    try:
        FiraAdamW(param_groups(fully_shard(tiny_model()), rank=3))
    except NotImplementedError as error:
        return str(error)


def full(param):
    return (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()


def ddp_part(rank):
    """A Fira run under DDP on this rank's data."""
    model = DistributedDataParallel(tiny_model(seed=rank))
    groups = param_groups(model, rank=3, update_proj_gap=GAP, weight_decay=0.1)
    optimizer = FiraAdamW(groups, lr=0.01)
    for seed in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, 10 * seed + rank).backward()
        optimizer.step()
    return model.module.state_dict(), list(optimizer.state.values())


def zero_part():
    """torch's ZeRO 1 gives whole parameters to ranks; it takes no (name, parameter) pairs."""
    model = tiny_model()
    groups = param_groups(model, rank=3, update_proj_gap=GAP, weight_decay=0.1)
    for group in groups:
        group["params"] = [param for _, param in group["params"]]
    optimizer = ZeroRedundancyOptimizer(groups, optimizer_class=FiraAdamW, lr=0.01)
    train(model, optimizer, range(STEPS))
    return model.state_dict()


def broadcast_part(rank):
    """A full state dict that only rank 0 has, into fresh optimizers."""
    model, optimizer = setup("fira", torch.bfloat16)
    train(model, optimizer, range(STOP))
    full = StateDictOptions(full_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=full) if rank == 0 else {}
    twin, resumed = setup("fira", torch.bfloat16)
    twin.load_state_dict(model.state_dict())
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(twin, resumed, state, options=options)
    train(twin, resumed, range(STOP, STEPS))
    return twin.state_dict(), list(resumed.state.values())


def worker(rank, world, folder):
    torch.set_num_threads(1)
    with process_group(rank, world, folder / "store"):
        result = {
            "ddp": ddp_part(rank),
            "zero": zero_part(),
            "broadcast": broadcast_part(rank),
            "fsdp": {which: fsdp_adamw(which) for which in ADAMW},
            "refusal": fsdp_refusal(),
        }
        torch.save(result, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (2, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def assert_same_result(result, expected):
    """(weights, states) of two runs, in bits and dtypes."""
    (weights, states), (expected_weights, expected_states) = result, expected
    for name, value in weights.items():
        assert torch.equal(value, expected_weights[name]), name
    for state, other in zip(states, expected_states, strict=True):
        assert state.keys() == other.keys()
        for key, value in state.items():
            value, expected_value = torch.as_tensor(value), torch.as_tensor(other[key])
            assert value.dtype is expected_value.dtype, key
            assert torch.equal(value, expected_value), key


def test_ddp_ranks_agree_in_every_bit(two_ranks):
    assert_same_result(*(result["ddp"] for result in two_ranks))


def test_ddp_is_one_process_on_the_averaged_gradient(two_ranks):
    model, optimizer = setup("fira")
    params = list(model.parameters())
    for seed in range(STEPS):
        ranks = [torch.autograd.grad(loss_of(model, 10 * seed + r), params) for r in range(2)]
        for param, first, second in zip(params, *ranks, strict=True):
            param.grad = first / 2 + second / 2
        optimizer.step()
    # The optimizer of DDP got its parameters in the same order, so the states come in it too.
    assert_same_result(two_ranks[0]["ddp"], (model.state_dict(), optimizer.state.values()))


def test_torch_zero_redundancy_is_one_process(two_ranks):
    model, _ = uninterrupted("fira")
    for result in two_ranks:
        for name, value in model.state_dict().items():
            assert torch.equal(result["zero"][name], value), name


def test_a_broadcast_checkpoint_resumes_bit_for_bit(two_ranks):
    model, optimizer = uninterrupted("fira", torch.bfloat16)
    for result in two_ranks:
        expected = model.state_dict(), optimizer.state.values()
        assert_same_result(result["broadcast"], expected)


def test_fsdp2_trains_adamw_groups_as_torch(two_ranks):
    start = tiny_model().state_dict()
    for result in two_ranks:
        for name, value in result["fsdp"]["torch"].items():
            assert torch.equal(result["fsdp"]["ours"][name], value), name
            assert not torch.equal(value, start[name]), name


def test_fsdp2_refuses_projected_groups_on_every_rank(two_ranks):
    for result in two_ranks:
        assert result["refusal"] is not None, "a DTensor was accepted in a projected group"
        assert result["refusal"].startswith("0.weight is a DTensor")
        assert "group without rank" in result["refusal"]


@every_method
def test_fsdp2_is_refused_when_the_optimizer_is_made(method, one_rank):
    model = fully_shard(tiny_model())
    with pytest.raises(NotImplementedError, match=r"^0\.weight is a DTensor.*without rank"):
        METHODS[method](param_groups(model, rank=3))
    optimizer = METHODS[method](param_groups(tiny_model(), rank=3))
    groups = len(optimizer.param_groups)
    added = {"params": [("3.weight", model[3].weight)], "rank": 3}
    with pytest.raises(NotImplementedError, match=r"^3\.weight is a DTensor"):
        optimizer.add_param_group(added)
    assert len(optimizer.param_groups) == groups
    assert added == {"params": [("3.weight", model[3].weight)], "rank": 3}


@every_method
@pytest.mark.parametrize("steps_before", [0, STOP])
def test_fsdp2_is_refused_when_a_weight_is_swapped_later(method, steps_before, one_rank):
    """Trainers shard the model after they have made the optimizer.

    Only the last group is sharded, so a step would already have changed the others.
    """
    model = tiny_model()
    projected = {name: param for name, param in model.named_parameters() if param.dim() == 2}
    plain = [(name, param) for name, param in model.named_parameters() if param.dim() == 1]
    options = {"rank": 3, "update_proj_gap": GAP}
    groups = [{"params": [pair], **options} for pair in projected.items()]
    optimizer = METHODS[method]([groups[0], {"params": plain[:-1]}, groups[1]], lr=0.01)
    train(model, optimizer, range(steps_before))
    old = list(model.parameters())
    fully_shard(model[3])
    new = dict(zip(old, model.parameters(), strict=True))
    assert isinstance(model[3].weight, DTensor)
    for group in optimizer.param_groups:
        group["params"] = [new[param] for param in group["params"]]
    for param in [*optimizer.state]:
        optimizer.state[new[param]] = optimizer.state.pop(param)

    loss_of(model, 0).backward()
    weights = [full(param) for param in model.parameters()]
    states = {param: copy.deepcopy(state) for param, state in optimizer.state.items()}
    with pytest.raises(NotImplementedError, match=r"^3\.weight is a DTensor.*without rank"):
        optimizer.step()
    for param, value in zip(model.parameters(), weights, strict=True):
        assert torch.equal(full(param), value)
    assert optimizer.state.keys() == states.keys()
    for param, state in states.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(optimizer.state[param][key]), torch.as_tensor(value))
