"""torchtitan's container of optimizers, where torchtitan is installed: its trainer needs GPUs."""

import functools
from dataclasses import dataclass

import pytest
import torch
from integration.easy_tasks import STEPS, STOP, assert_learned, repeated_pairs, tiny_llama
from integration.ranks import mesh_of, on_ranks, whole
from integration.recipes import cook
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard

from lowrank_kernels import FiraAdamW

pytest.importorskip("torchtitan")


def start(world):
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

    torch.manual_seed(0)
    model = tiny_llama()
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh_of(world))
    names = cook(
        "torchtitan",
        dataclass=dataclass,
        FiraAdamW=FiraAdamW,
        OptimizersContainer=OptimizersContainer,
        ParamGroupConfig=ParamGroupConfig,
    )
    return model, names["LowRankOptimizers"](names["config"], model_parts=[model])


def take(rank, model, optimizers, seeds):
    losses = []
    for seed in seeds:
        loss = model(**repeated_pairs(10 * seed + rank, 16)).loss
        loss.backward()
        optimizers.step()
        optimizers.zero_grad()
        losses.append(loss.item())
    return losses


def runs(rank, world, folder):
    """Losses, and weights of a run and of one that goes on from its middle."""
    model, optimizers = start(world)
    losses = take(rank, model, optimizers, range(STOP))
    found = {"model": get_model_state_dict(model), "optimizer": optimizers.state_dict()}
    dcp.save(found, checkpoint_id=folder)
    losses += take(rank, model, optimizers, range(STOP, STEPS))
    twin, resumed = start(world)
    found = {"model": get_model_state_dict(twin), "optimizer": resumed.state_dict()}
    dcp.load(found, checkpoint_id=folder)
    set_model_state_dict(twin, found["model"])
    resumed.load_state_dict(found["optimizer"])
    take(rank, twin, resumed, range(STOP, STEPS))
    projected = sum(row["projected"] for row in optimizers.optimizers[0].explain())
    return losses, projected, [[whole(p) for p in each.parameters()] for each in (model, twin)]


@pytest.mark.parametrize("world", [2, 3])
def test_a_container_goes_on_in_every_bit(world, tmp_path):
    functions = [functools.partial(runs, folder=tmp_path / "saved")]
    for losses, projected, (straight, resumed) in on_ranks(world, functions, tmp_path)["runs"]:
        assert_learned(losses)
        assert projected == 14
        assert all(map(torch.equal, straight, resumed))
