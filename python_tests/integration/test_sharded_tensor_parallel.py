"""Projected weights under tensor parallelism, with FSDP2 and without: as in one process."""

import re

import pytest
import torch
from integration.ranks import mesh_of, on_ranks, whole
from integration.spread_runs import METHODS, STEPS, plain, setup, take, ways
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from lowrank_kernels import FiraAdamW, LowRankAdamW, param_groups

# The first test of each world size waits for all that its ranks do.
pytestmark = pytest.mark.timeout(900)

NAMES = ("galore", "fira", "apollo mini", "adaptive", "orthogonal", "interpolation", "int8 bases")
# Where ranks have parts of the same channels, R is summed, and no form of E as a whole is made.
SUMMED = tuple(name for name in NAMES if name != "orthogonal")


def side_of(where):
    return "left" if "rowwise" in where else "right"


def methods_of(where):
    return {name: METHODS[name] for name in (SUMMED if "summed" in where else NAMES)}


def trajectories(rank, world):
    """Of each way and method: weights, what is the same on all ranks, collectives, bytes."""
    found = {}
    for where, way in ways(world).items():

        def spread(value, way=way):
            return distribute_tensor(value, *way, src_data_rank=None)

        for method, options in methods_of(where).items():
            proj_type = "right" if where == "summed" else "std"
            weights, optimizer = setup(spread, proj_type=proj_type, **options)
            names = take(weights, optimizer, spread, range(STEPS))
            states = [optimizer.state[weight] for weight in weights]
            assert all(isinstance(state["exp_avg"], DTensor) for state in states)
            rows = [row["state_bytes"] for row in optimizer.explain()]
            assert rows == [row["state_bytes"] for row in optimizer.plan()] or "adap" in method
            result = [whole(weight) for weight in weights], [plain(state) for state in states]
            found[where, method] = *result, names, rows
    return found


class Net(nn.Module):
    """Two products as tensor parallelism divides them, and a bias that it does not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(12, 22, bias=False), nn.Linear(22, 12, bias=False)
        self.bias = nn.Parameter(torch.zeros(12))
        self.double()

    def forward(self, inputs):
        return self.down(nn.functional.gelu(self.up(inputs))) + self.bias


def columnwise_net(rank, world):
    """The first product alone is divided, on two ranks with FSDP2 beside it on four."""
    net = Net()
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(net, mesh["tp"], {"up": ColwiseParallel(output_layouts=Replicate())})
    if world > 2:
        fully_shard(net, mesh=mesh["dp"])
    return train(net)


def train(net):
    options = {"update_proj_gap": 3, "weight_decay": 0.1, "proj_type": "right"}
    groups = param_groups(net, rank=3, targets=["up", "down"], **options)
    optimizer = FiraAdamW(groups, lr=0.01)
    for seed in range(STEPS):
        rng = torch.Generator().manual_seed(seed)
        inputs = torch.randn(32, 12, generator=rng, dtype=torch.float64)
        optimizer.zero_grad()
        net(inputs).square().mean().backward()
        optimizer.step()
    return [whole(param) for param in net.parameters()]


def refusals(rank, world):
    mesh, told = mesh_of(world), {}

    def say(what, shape, placements, proj_type="std", **options):
        weight = nn.Parameter(distribute_tensor(torch.ones(shape), mesh, placements))
        group = {"params": [("w", weight)], "rank": 2, "proj_type": proj_type}
        with pytest.raises((NotImplementedError, ValueError)) as error:
            LowRankAdamW([group], **options)
        told[what] = str(error.value)

    say("left", (12, 12), [Shard(0)], "left")
    say("unknown", (12, 12), [_StridedShard(0, split_factor=3)])
    say("orthogonal", (12, 12), [Shard(1)], "right", residual="orthogonal")
    say("momentum", (12, 12), [Shard(1)], residual="sign", residual_momentum=0.5)
    return told


FUNCTIONS = (trajectories, columnwise_net, refusals)


@pytest.fixture(scope="module", params=(2, 4))
def results(request, tmp_path_factory):
    return on_ranks(request.param, FUNCTIONS, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def one_process():
    found = {}
    for side in ("left", "right"):
        for method in NAMES:
            weights, optimizer = setup(torch.clone, proj_type=side, **METHODS[method])
            take(weights, optimizer, torch.clone, range(STEPS))
            found[side, method] = (
                list(map(whole, weights)),
                [optimizer.state[weight] for weight in weights],
            )
    return found


def assert_near(weights, expected):
    for here, one in zip(weights, expected, strict=True):
        assert (here - one).abs().max() <= 1e-10 * one.abs().max()


def test_every_method_trains_as_in_one_process(results, one_process):
    for found in results["trajectories"]:
        for (where, method), (weights, states, *_) in found.items():
            expected, expected_states = one_process[side_of(where), method]
            assert_near(weights, expected)
            for state, one in zip(states, expected_states, strict=True):
                for key in ("side", "rank", "refreshes", "basis_step", "kept", "gap_factor"):
                    assert state[key] == one[key], (where, method, key)


def test_what_is_not_spread_has_the_same_bits_on_all_ranks(results):
    first, *others = results["trajectories"]
    for other in others:
        for case, (_, states, *_) in other.items():
            for state, one in zip(states, first[case][1], strict=True):
                assert state.keys() == one.keys()
                for key, value in state.items():
                    assert torch.equal(torch.as_tensor(value), torch.as_tensor(one[key])), key


def test_ranks_talk_at_refreshes_and_for_a_limiter(results):
    for found in results["trajectories"]:
        for (where, method), (*_, names, _) in found.items():
            counts = list(map(len, names))
            # Of what ranks are about to do, and of R.
            summed = {"summed": 2, "summed over fsdp": 3}.get(where, 0)
            if method == "galore":
                assert min(counts) == summed, (where, method)
            if method in ("fira", "apollo mini"):
                channels = {"summed": 0, "columnwise and fsdp": 2, "rows twice": 2}.get(where, 1)
                assert min(counts) == summed + channels, (where, method)
                assert names.count(["all_reduce"] * (summed + channels)) >= 2, (where, method)


def test_columnwise_layers_of_torch_train_as_one_process(results):
    expected = train(Net())
    for weights in results["columnwise_net"]:
        assert_near(weights, expected)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("left", r"^w \(12, 12\), torch.float32, .*proj_type='left'.*take proj_type='right'"),
        ("unknown", r"^w \(12, 12\), torch.float32, .*group without rank"),
        ("orthogonal", "residual='orthogonal' sums over columns that are on several ranks"),
        ("momentum", "residual_momentum shares a scale between columns that are on several ranks"),
    ],
)
def test_what_cannot_be_projected_is_refused_by_name(results, what, text):
    for found in results["refusals"]:
        assert re.search(text, found[what]), found[what]
