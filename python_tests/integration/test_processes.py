"""DDP, ZeRO 1 and FSDP2, on one and on two gloo processes."""

import copy

import pytest
import torch
from integration.tiny_runs import (
    GAP,
    METHODS,
    STEPS,
    STOP,
    assert_same_result,
    every_method,
    loss_of,
    process_group,
    set_grads,
    setup,
    tiny_model,
    train,
    uninterrupted,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from lowrank_kernels import FiraAdamW, param_groups


@pytest.fixture
def one_rank(tmp_path):
    with process_group(0, 1, tmp_path / "store"):
        yield


ADAMW = {
    "ours": lambda groups: FiraAdamW(groups, lr=0.01, eps=1e-8),
    "torch": lambda groups: torch.optim.AdamW(groups, lr=0.01, eps=1e-8, fused=True),
}


FORMATS = ({}, {"state": "int8"}, {"state": "bfloat16", "master": 24})


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


def fsdp_bfloat16(**formats):
    """bfloat16 weights of AdamW groups under FSDP2, one large enough for codes, and what explains
    them.
    """
    model = fully_shard(wide_model())
    optimizer = FiraAdamW(list(model.named_parameters()), lr=0.01, weight_decay=0.1, **formats)
    for seed in range(STEPS):
        set_sharded_grads(model, seed)
        optimizer.step()
    assert all(isinstance(s["exp_avg"], DTensor) for s in optimizer.state.values())
    planned = [row["state_bytes"] for row in optimizer.plan()]
    assert planned == [row["state_bytes"] for row in optimizer.explain()]
    reasons = {row["reason"] for row in optimizer.explain()}
    return {name: full(param) for name, param in model.named_parameters()}, reasons


def wide_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(65, 81), torch.nn.Linear(81, 3)).bfloat16()


def set_sharded_grads(model, seed):
    """What FSDP2 leaves behind a backward pass in which all ranks agree."""
    rng = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        grad = torch.randn(param.shape, generator=rng).bfloat16()
        param.grad = distribute_tensor(grad, param.device_mesh, param.placements)


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
    # It hands over no names, on which a randomized basis would depend.
    optimizer = ZeroRedundancyOptimizer(groups, optimizer_class=FiraAdamW, lr=0.01, subspace="svd")
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
            "fsdp bfloat16": [fsdp_bfloat16(**formats) for formats in FORMATS],
        }
        torch.save(result, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (2, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


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
    model, _ = uninterrupted("fira", subspace="svd")
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


def test_fsdp2_trains_bfloat16_weights_in_wide_copies(two_ranks):
    """As torch's AdamW does with float32 weights that are rounded after each step; in every format,
    since shards keep wide moments.
    """
    model = wide_model().float()
    torchs = torch.optim.AdamW(
        model.parameters(), lr=0.01, weight_decay=0.1, eps=1e-6, foreach=False
    )
    for seed in range(STEPS):
        set_grads(model, seed)
        for param in model.parameters():
            param.grad = param.grad.bfloat16().float()
        torchs.step()
        for param in model.parameters():
            param.data = param.data.bfloat16().float()
    for result in two_ranks:
        for formats, (weights, reasons) in zip(FORMATS, result["fsdp bfloat16"], strict=True):
            for name, value in model.state_dict().items():
                assert torch.equal(weights[name].float(), value), (formats, name)
            told = all("a DTensor keeps its dtype" in reason for reason in reasons)
            assert told == bool(formats)


@every_method
@pytest.mark.parametrize("steps_before", [0, STOP])
def test_a_weight_that_is_sharded_later(method, steps_before, one_rank):
    """Trainers shard the model after they have made the optimizer. A state from before does not
    fit, and nothing is changed; where there is none, the step is taken.

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
    if not steps_before:
        optimizer.step()
        assert isinstance(optimizer.state[model[3].weight]["exp_avg"], DTensor)
        return
    expected = r"^3\.weight is a DTensor.*exp_avg in its state is a plain tensor"
    with pytest.raises(ValueError, match=expected):
        optimizer.step()
    for param, value in zip(model.parameters(), weights, strict=True):
        assert torch.equal(full(param), value)
    assert optimizer.state.keys() == states.keys()
    for param, state in states.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(optimizer.state[param][key]), torch.as_tensor(value))
