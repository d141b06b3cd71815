"""Projected weights that are spread over ranks, on gradients that every rank knows."""

import torch
from integration.ranks import counted_collectives, mesh_of
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from lowrank_kernels import LowRankAdamW, Subspace
from lowrank_kernels.optim.placement import SPREAD

# On 2 ranks rows are uneven, on 3 and 4 some rank has none of the third; 16 x 16 is even on all.
SHAPES = ((21, 12), (12, 30), (2, 9), (16, 16))
STEPS = 10
ADAPTIVE = {"residual_energy": 0.3, "criterion": "relative_norm", "threshold": 0.95}
METHODS = {
    "galore": {},
    "fira": {"residual": "official"},
    "fira paper": {"residual": "paper"},
    "apollo": {"residual": "scale", "subspace": "gaussian"},
    "apollo mini": {"residual": "scale", "subspace": "gaussian", "per": "matrix"},
    "normalize": {"residual": "normalize"},
    "sign": {"residual": "sign"},
    "sign, averaged": {"residual": "sign", "residual_momentum": 0.9},
    "orthogonal": {"residual": "orthogonal"},
    "orthogonal, averaged": {"residual": "orthogonal", "residual_momentum": 0.9},
    "adaptive": {
        "residual": "official",
        "subspace": Subspace(**ADAPTIVE, check_gap=2, moments="carry"),
    },
    "displacement": {
        "subspace": Subspace(
            "svd", criterion="displacement", threshold=0.3, check_gap=2, moments="reset", lazy=0.1
        )
    },
    "interpolation": {
        "subspace": Subspace("power", interpolation=0.5, moments="carry_ldadam"),
    },
    "int8 bases": {"residual": "official", "basis": "int8"},
}


def spreads(world):
    """How weights may be spread over so many ranks: functions from a whole to a DTensor."""
    one, two = mesh_of(world), mesh_of(2, world // 2) if world % 2 == 0 else None
    ways = {"fsdp": (one, [Shard(0)]), "copies": (one, [Replicate()])}
    if two is not None and world > 2:
        ways = {"hsdp": (two, [Replicate(), Shard(0)])}
    elif two is None:
        del ways["copies"]
    return {
        name: lambda value, way=way: distribute_tensor(value, *way) for name, way in ways.items()
    }


def ways(world):
    """Meshes and placements over so many ranks, for tensor parallelism."""
    one, two = mesh_of(world), mesh_of(2, world // 2)
    if world == 2:
        return {
            "columnwise": (one, [Shard(0)]),
            "rowwise": (one, [Shard(1)]),
            "summed": (one, [Shard(1)]),
        }
    under_fsdp = [_StridedShard(0, split_factor=2), Shard(0)]
    return {
        "columnwise and fsdp": (two, under_fsdp),
        "rows twice": (two, [Shard(0), Shard(0)]),
        "rowwise copies": (two, [Replicate(), Shard(1)]),
        "summed over fsdp": (two, [Shard(0), Shard(1)]),
    }


def values(seed, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for shape in SHAPES]


def setup(spread, dtype=torch.float64, proj_type="right", **options):
    """Weights and their optimizer: two groups with different intervals."""
    weights = [nn.Parameter(spread(value)) for value in values(100, dtype)]
    named = [(f"w{place}", weight) for place, weight in enumerate(weights)]
    common = {"rank": 4, "proj_type": proj_type}
    groups = [
        {"params": named[:2], "update_proj_gap": 3, **common},
        {"params": named[2:], "update_proj_gap": 4, "weight_decay": 0.1, **common},
    ]
    return weights, LowRankAdamW(groups, **{"lr": 0.01} | options)


def take(weights, optimizer, spread, seeds, changed=lambda grads, seed: None):
    """Steps on the gradients of some seeds; names of the collectives of each."""
    names = []
    for seed in seeds:
        grads = values(seed, weights[0].dtype)
        changed(grads, seed)
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = spread(grad)
        with counted_collectives() as called:
            optimizer.step()
        names.append(list(called))
    return names


def plain(state):
    """What a state has that is the same on all ranks."""
    return {key: value for key, value in state.items() if key not in SPREAD}
