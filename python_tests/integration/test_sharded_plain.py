"""AdamW groups on shards: each rank steps what it has, and asks nobody."""

import re

import pytest
import torch
from integration.ranks import mesh_of, on_ranks, whole
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from lowrank_kernels import FiraAdamW

# The first test of each world size waits for all that its ranks do.
pytestmark = pytest.mark.timeout(900)

STEPS = 4
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# 21 and 2 rows are uneven or empty on some ranks; 4100 elements and more could be codes.
SHAPES = ((21, 5), (2,), (82, 50), (7, 3))
FORMATS = ({}, {"state": "int8"}, {"state": "bfloat16", "master": 24})


def grads_of(seed, dtype):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng).to(dtype) for shape in SHAPES]


def run(dtype, spread, options=None):
    """Weights and moments after some steps, and the collectives that these made."""
    weights = [nn.Parameter(spread(value)) for value in grads_of(100, dtype)]
    named = [(f"w{place}", weight) for place, weight in enumerate(weights)]
    groups = [{"params": named[:2], "weight_decay": 0.1}, {"params": named[2:], "scale": 0.5}]
    optimizer = FiraAdamW(groups, lr=0.01, **(options or {}))
    count = 0
    for seed in range(STEPS):
        for weight, grad in zip(weights, grads_of(seed, dtype), strict=True):
            weight.grad = spread(grad)
        with CommDebugMode() as collectives:
            optimizer.step()
        count += collectives.get_total_counts()
    states = [optimizer.state[weight] for weight in weights]
    moments = [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")]
    return weights, moments, count


def plain_runs(rank, world):
    mesh, found = mesh_of(world), {}
    for dtype in DTYPES:
        for place, options in enumerate(FORMATS[: 1 if dtype is torch.float64 else None]):
            weights, moments, count = run(
                dtype, lambda value: distribute_tensor(value, mesh, [Shard(0)]), options
            )
            assert all(isinstance(moment, DTensor) for moment in moments)
            found[dtype, place] = [whole(x) for x in weights + moments], count
    return found


def moved_local_gradients(rank, world):
    """The local layout of a gradient changes under a DTensor that says nothing of it."""
    weight = distribute_tensor(torch.ones(6 * world, 4), mesh_of(world), [Shard(0)])
    weight = nn.Parameter(weight)
    optimizer = FiraAdamW([("w", weight)], lr=0.01)
    values = torch.arange(24.0 * world).view(6 * world, 4)
    for transposed in (False, True, False):
        grad = distribute_tensor(values, weight.device_mesh, [Shard(0)])
        if transposed:
            grad._local_tensor = grad._local_tensor.mT.contiguous().mT
        weight.grad = grad
        optimizer.step()
    return whole(weight)


def refusals(rank, world):
    """What is said of DTensors that cannot be stepped."""
    mesh, told = mesh_of(world), {}
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))

    def say(what, function):
        with pytest.raises((NotImplementedError, RuntimeError, ValueError)) as error:
            function()
        told[what] = type(error.value).__name__, str(error.value)

    say("capturable", lambda: FiraAdamW([("w", weight)], capturable=True))
    optimizer = FiraAdamW([("w", weight)])
    weight.grad = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])
    optimizer.step()
    optimizer.state[weight]["exp_avg"] = torch.zeros(4, 4)
    say("plain moments", optimizer.step)
    return told


FUNCTIONS = (plain_runs, moved_local_gradients, refusals)


@pytest.fixture(scope="module", params=(2, 3))
def results(request, tmp_path_factory):
    return on_ranks(request.param, FUNCTIONS, tmp_path_factory.mktemp("ranks"))


def test_each_rank_takes_the_bits_of_an_optimizer_of_its_rows(results):
    """Not those of one process with all rows: torch's kernels round the last few elements of a
    tensor in another way.
    """
    world = len(results["plain_runs"])
    for found in results["plain_runs"]:
        for (dtype, form), (tensors, collectives) in found.items():
            parts = [
                run(dtype, lambda value, rank=rank: part(value, world, rank))
                for rank in range(world)
            ]
            every = zip(*(weights + moments for weights, moments, _ in parts), strict=True)
            for here, expected in zip(tensors, map(torch.cat, every), strict=True):
                assert torch.equal(here, expected), (dtype, form)
            assert collectives == 0


def part(value, world, rank):
    size = -(-len(value) // world)
    return value[rank * size : (rank + 1) * size].clone()


def test_shards_train_as_one_process(results):
    weights, moments, _ = run(torch.float64, torch.clone)
    for found in results["plain_runs"]:
        tensors, _ = found[torch.float64, 0]
        for here, one in zip(tensors, weights + moments, strict=True):
            assert (here - one).abs().max() <= 1e-10 * one.abs().max()


def test_a_gradient_whose_shards_lie_otherwise_is_seen(results):
    size = len(results["moved_local_gradients"][0])
    weight = nn.Parameter(torch.ones(size, 4))
    optimizer = FiraAdamW([("w", weight)], lr=0.01)
    for _ in range(3):
        weight.grad = torch.arange(4.0 * size).view(size, 4)
        optimizer.step()
    for found in results["moved_local_gradients"]:
        assert torch.equal(found, weight)


@pytest.mark.parametrize(
    ("what", "kind", "text"),
    [
        ("capturable", "NotImplementedError", "w is a DTensor.*leave capturable out"),
        ("plain moments", "ValueError", "w is a DTensor.*exp_avg in its state is a plain tensor"),
    ],
)
def test_what_cannot_be_stepped_is_refused_by_name(results, what, kind, text):
    for found in results["refusals"]:
        assert found[what][0] == kind
        assert re.search(text, found[what][1]), found[what]
