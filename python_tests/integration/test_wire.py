"""Bytes that ranks send, counted as they are handed to torch.distributed, against the formulas that
`plan --gpus` goes by.
"""

import pytest
import torch
from integration.ranks import mesh_of, on_ranks, sent_bytes
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from lowrank_kernels import LowRankAdamW, Subspace
from lowrank_kernels.cli import traffic
from lowrank_kernels.ops.orthogonal import factor_dtype

# Rows that two and three ranks have as many of.
SHAPES = ((24, 12), (12, 36), (48, 48))
GAP = 4
AT_ONCE = Subspace(stagger=False)
METHODS = {
    "galore": {"subspace": AT_ONCE},
    "fira": {"subspace": AT_ONCE, "residual": "official"},
    "apollo": {"subspace": Subspace("gaussian", stagger=False), "residual": "scale"},
    "orthogonal": {"subspace": AT_ONCE, "residual": "orthogonal"},
    "interpolation": {
        "subspace": Subspace("power", interpolation=0.5, moments="carry_ldadam", stagger=False)
    },
}


def optimizer_of(spread, options):
    rng = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(spread(torch.randn(shape, generator=rng))) for shape in SHAPES]
    group = {"params": weights, "rank": 4, "update_proj_gap": GAP, "proj_type": "right"}
    return weights, LowRankAdamW([group], lr=0.01, **options)


def steps(rank, world):
    """Of each method what this rank sends in steps."""
    mesh, found = mesh_of(world), {}

    def spread(value):
        return distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)

    for name, options in METHODS.items():
        weights, optimizer = optimizer_of(spread, options)
        found[name] = []
        for seed in range(GAP + 1):
            rng = torch.Generator().manual_seed(seed)
            for weight in weights:
                weight.grad = spread(torch.randn(weight.shape, generator=rng))
            with sent_bytes() as sent:
                optimizer.step()
            found[name].append(sent)
    return found


@pytest.fixture(scope="module", params=(2, 3))
def results(request, tmp_path_factory):
    return on_ranks(request.param, [steps], tmp_path_factory.mktemp("ranks"))["steps"]


@pytest.fixture
def needs(results, monkeypatch):
    """What the formulas say of each method, with these CPUs' dtype of iterations."""
    monkeypatch.setattr(traffic, "factor_dtype", lambda dtype, _: factor_dtype(dtype, "cpu"))
    layout = traffic.Layout.of("fsdp2", len(results))
    return {
        name: traffic.needs_of(optimizer_of(torch.clone, options)[1], layout)
        for name, options in METHODS.items()
    }


@pytest.mark.parametrize("name", METHODS)
def test_between_refreshes(name, results, needs):
    """In the mean: owners have matrices of unlike sizes. Of GaLore it is nothing at all."""
    for step in range(1, GAP):
        sent = [sum(found[name][step].values()) for found in results]
        assert sum(sent) / len(sent) == pytest.approx(needs[name].sent, abs=name != "galore")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("step", [0, GAP])
def test_new_bases(name, step, results, needs):
    """Gradients to owners, in the mean of all ranks, and bases to everybody."""
    kinds = ("all_to_all_single", "broadcast")
    sent = [sum(found[name][step].get(kind, 0) for kind in kinds) for found in results]
    usual = [found[name][1].get("all_to_all_single", 0) for found in results]
    mean = (sum(sent) - sum(usual)) / len(results)
    assert mean == pytest.approx(needs[name].bases_sent, abs=1)
