"""Factored layers under DDP and FSDP2: one process' gradients, refactorization, a saved run."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from integration.ranks import mesh_of, on_ranks, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lowrank_kernels import FactoredLinear, Restarts, factorize, refactorize

EVERY, STEPS, TOKENS = 3, 8, 10
KINDS = ("ddp", "fsdp2", "replicas")


def net() -> nn.Sequential:
    """Rows that two ranks share unevenly, a sparse part and a dense layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 31), nn.Tanh(), nn.Linear(31, 24), nn.Linear(24, 5))
    model = model.double()
    factorize(model, 5, ["^[02]$"], sparse=0.05)
    return model


def wrapped(model: nn.Sequential, how: str, world: int) -> nn.Module:
    if how == "ddp":
        return DistributedDataParallel(model, broadcast_buffers=False)
    mesh = mesh_of(world) if how == "fsdp2" else mesh_of(world, 1)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def batch(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(2 * TOKENS, 24, generator=generator, dtype=torch.float64)


def train(model: nn.Module, parts: slice, steps=range(STEPS), **options) -> None:
    """Two restarts; each process has its part of every batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    restarts = Restarts(optimizer, model, every=EVERY, recovery=2, **options)
    for step in steps:
        optimizer.zero_grad()
        x = batch(step)[parts]
        (model(x) - x[:, :5]).square().mean().backward()
        optimizer.step()
        restarts.step()


def part_of(rank: int) -> slice:
    return slice(rank * TOKENS, (rank + 1) * TOKENS)


def trained(rank, world):
    found = {}
    for how in KINDS:
        model = wrapped(net(), how, world)
        group = dist.group.WORLD if how == "ddp" else None
        train(model, part_of(rank), process_group=group)
        found[how] = [whole(param) for param in model.parameters()]
    return found


def sent_by_the_first(rank, world):
    """Ranks whose factors differ have those of the first afterwards."""
    model = net()
    for module in (model[0], model[2]):
        module.B.data.mul_(1 + rank)
    refactorize(model, process_group=dist.group.WORLD)
    return [param.detach().clone() for param in model.parameters()]


def saved_and_loaded(rank, world, folder):
    """A sharded checkpoint of a trained model, loaded into another one."""
    first, second = (wrapped(net(), "fsdp2", world) for _ in range(2))
    train(first, part_of(rank))
    dcp.save(get_model_state_dict(first), checkpoint_id=folder)
    state = get_model_state_dict(second)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(second, state)
    x = batch(99)
    return first(x).detach(), second(x).detach()


def told(function) -> str:
    try:
        function()
    except ValueError as error:
        return str(error)
    return ""


def refused(rank, world):
    model = wrapped(net(), "fsdp2", world)
    optimizer = torch.optim.AdamW(model.parameters())
    sharded = told(lambda: refactorize(model, 0.1, optimizer=optimizer))
    plain = net()
    optimizer = torch.optim.AdamW(plain.parameters())
    several = told(lambda: refactorize(plain, 0.1, optimizer=optimizer))
    if rank == 1:  # a shard of one rank alone
        model[0].A.to_local().detach()[0, 0] = torch.nan
    return sharded, several, told(lambda: refactorize(model))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    saved = functools.partial(saved_and_loaded, folder=str(tmp_path_factory.mktemp("saved")))
    functions = (trained, sent_by_the_first, saved, refused)
    return on_ranks(2, functions, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("how", KINDS)
def test_as_one_process(results, how: str) -> None:
    model = net()
    train(model, slice(None))
    for found in results["trained"]:
        for (name, param), other in zip(model.named_parameters(), found[how], strict=True):
            assert (param - other).norm() <= 1e-10 * param.norm(), name
    first, second = results["trained"]
    assert all(map(torch.equal, first[how], second[how]))


def test_the_first_rank_sends_what_it_has(results) -> None:
    model = net()
    refactorize(model)
    for found in results["sent_by_the_first"]:
        assert all(map(torch.equal, found, model.parameters()))


def test_a_sharded_checkpoint(results) -> None:
    for first, second in results["saved_and_loaded"]:
        assert torch.equal(first, second)


def test_what_is_refused(results) -> None:
    for sharded, several, values in results["refused"]:
        assert "shrink=0.1: the factors of 0 are of type DTensor" in sharded
        assert "shrink=0.1 in one of several processes" in several
        assert "0.A, (5, 24) torch.float64, has values that are not finite" in values


def test_a_compiled_model_that_is_trained_with_restarts() -> None:
    models = net(), net()
    compiled = torch.compile(models[1], backend="aot_eager")
    for model in (models[0], compiled):
        train(model, slice(None))
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert (one - other).norm() <= 1e-10 * one.norm()
    assert isinstance(models[1][0], FactoredLinear)
