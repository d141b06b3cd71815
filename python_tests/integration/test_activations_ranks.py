"""Sampled inputs and offloaded activations beside DDP, FSDP2 and compiled models."""

import functools

import pytest
import torch
from integration.easy_tasks import repeated_pairs, tiny_llama
from integration.ranks import mesh_of, on_ranks, whole
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lowrank_kernels import (
    GaLoreAdamW,
    offload_activations,
    param_groups,
    project_linears,
    recompute_activations,
    release_gradients,
    sample_linears,
)

DRAWS = 200


def net():
    torch.manual_seed(0)
    layers = (nn.Linear(12, 20), nn.GELU(), nn.LayerNorm(20), nn.Linear(20, 12))
    return nn.Sequential(*layers).double()


def inputs(rank):
    rng = torch.Generator().manual_seed(rank)
    return torch.randn(30, 12, generator=rng, dtype=torch.float64)


def wrapped(model, how, world):
    if how == "ddp":
        return DistributedDataParallel(model)
    for layer in (model[0], model[3]):
        fully_shard(layer, mesh=mesh_of(world))
    fully_shard(model, mesh=mesh_of(world))
    return model


def gradients(model, rank):
    model.zero_grad()
    model(inputs(rank)).square().sum().backward()
    return [whole(param.grad) for param in model.parameters()]


def sampled(rank, world):
    """Of each wrapper: exact gradients, the mean of sampled ones, and its error."""
    found = {}
    for how in ("ddp", "fsdp2"):
        model = net()
        handle = sample_linears(model, 0.4)
        model = wrapped(model, how, world)
        handle.keep = 1.0
        exact = gradients(model, rank)
        handle.keep = 0.4
        total, squares = [0.0] * len(exact), [0.0] * len(exact)
        for seed in range(DRAWS):
            torch.manual_seed(1000 * seed + rank)
            for place, grad in enumerate(gradients(model, rank)):
                total[place] = total[place] + grad
                squares[place] += float((grad - exact[place]).square().sum())
        found[how] = exact, [each / DRAWS for each in total], squares
    return found


def offloaded(rank, world, folder):
    """Of each wrapper: gradients without and with, and what was written."""
    found = {}
    for how in ("ddp", "fsdp2"):
        plain = gradients(wrapped(net(), how, world), rank)
        offload = offload_activations(folder, least=1)
        model = net()
        handle = offload.install(model) if how == "ddp" else None
        model = wrapped(model, how, world)
        if handle is None:
            offload.install(model)
        found[how] = plain, gradients(model, rank), offload.counts.packed, offload.places_in_use
    return found


def llama_of(how, world, recomputes):
    torch.manual_seed(0)
    # Whose norms compute in float32: elsewhere they are summed in another order.
    model = tiny_llama().bfloat16()
    if recomputes:
        assert recompute_activations(model).rows
    if how == "ddp":
        return DistributedDataParallel(model)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh_of(world))
    return fully_shard(model, mesh=mesh_of(world))


def recomputed(rank, world):
    """Of each wrapper: gradients without and with."""
    found, batch = {}, repeated_pairs(rank, 4)
    for how in ("ddp", "fsdp2"):
        both = []
        for recomputes in (False, True):
            model = llama_of(how, world, recomputes)
            model(**batch).loss.backward()
            both.append([whole(param.grad) for param in model.parameters()])
        found[how] = both
    return found


def refused(rank, world):
    """What projected gradients of shards are told, and released ones."""
    model, found = llama_of("fsdp2", world, False), {}
    optimizer = GaLoreAdamW(param_groups(model, rank=8), lr=0.01)
    for call in (project_linears, release_gradients):
        try:
            call(model, optimizer)
            model(**repeated_pairs(rank, 4)).loss.backward()
        except Exception as error:
            found[call.__name__] = f"{type(error).__name__}: {error}"
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    functions = (sampled, functools.partial(offloaded, folder=folder), recomputed, refused)
    return on_ranks(2, functions, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_sampled_gradients_are_exact_in_the_mean(results, how):
    for found in results["sampled"]:
        names = [name for name, _ in net().named_parameters()]
        for name, exact, mean, squares in zip(names, *found[how], strict=True):
            if name in ("0.weight", "3.weight"):
                assert squares > 0
                assert (mean - exact).norm() < 4 * squares**0.5 / DRAWS, name
            else:
                torch.testing.assert_close(mean, exact)


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_offloaded_gradients_are_the_same_in_every_bit(results, how):
    for found in results["offloaded"]:
        plain, offloaded, packed, in_use = found[how]
        assert all(map(torch.equal, plain, offloaded))
        assert packed > 0
        assert in_use == 0


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_recomputed_activations_give_the_same_gradients(results, how):
    for found in results["recomputed"]:
        plain, again = found[how]
        assert all(map(torch.equal, plain, again))


def test_what_shards_cannot_do_is_told(results):
    for found in results["refused"]:
        assert "shard" in found["project_linears"]
        assert "whose step waits for other ranks" in found["release_gradients"]


def test_compiled_models(tmp_path):
    """A sampled layer is a break in the graph; of a compiled graph what it saves is offloaded."""
    model = net()
    plain = gradients(model, 0)
    offload = offload_activations(tmp_path, least=1)
    compiled = torch.compile(net(), backend="aot_eager")
    with offload:
        loss = compiled(inputs(0)).square().sum()
    loss.backward()
    for one, other in zip(compiled.parameters(), plain, strict=True):
        torch.testing.assert_close(one.grad, other)
    assert offload.counts.packed > 0
    model = net()
    sample_linears(model, 0.4)
    torch.manual_seed(5)
    expected = gradients(model, 0)
    torch.manual_seed(5)
    for one, other in zip(
        gradients(torch.compile(model, backend="aot_eager"), 0), expected, strict=True
    ):
        torch.testing.assert_close(one, other)
