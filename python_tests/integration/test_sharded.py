"""Projected weights on shards, FSDP2, HSDP and copies: one process on the same gradients."""

import re

import pytest
import torch
from integration.ranks import mesh_of, on_ranks, whole
from integration.spread_runs import METHODS, STEPS, plain, setup, spreads, take
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lowrank_kernels import FiraAdamW, LowRankAdamW, OrthoFiraAdamW, Subspace, param_groups
from lowrank_kernels.optim import owners, sharded
from lowrank_kernels.optim.transformed import Transformation

# The first test of each world size waits for all that its ranks do.
pytestmark = pytest.mark.timeout(900)

GAP = 3
BACKENDS = [
    (backend, dtype)
    for backend in ("reference", "foreach", "native")
    for dtype in (torch.float32, torch.bfloat16)
]


def trajectories(rank, world):
    """Of each way to spread weights and each method: weights, what is the same, collectives."""
    found = {}
    for where, spread in spreads(world).items():
        for method, options in METHODS.items():
            weights, optimizer = setup(spread, **options)
            names = take(weights, optimizer, spread, range(STEPS))
            states = [optimizer.state[weight] for weight in weights]
            assert all(isinstance(state["exp_avg"], DTensor) for state in states)
            rows = [row["state_bytes"] for row in optimizer.explain()]
            assert rows == [row["state_bytes"] for row in optimizer.plan()] or "adap" in method
            assert all(weight.grad is not None for weight in weights)
            result = [whole(weight) for weight in weights], [plain(state) for state in states]
            found[where, method] = *result, names, rows
    return found


def told(rank, world):
    """What `explain` says of a weight's ranks, and of the same in a group without a rank."""
    spread, found = next(iter(spreads(world).values())), {}
    for method in ("galore", "fira", "orthogonal"):
        weights, optimizer = setup(spread, **METHODS[method])
        row = optimizer.explain()[0]
        found[method] = row["placement"], row["collectives"]
    (row,) = LowRankAdamW([weights[0]]).explain()
    return {**found, "plain": (row["placement"], row["collectives"])}


def backends(rank, world):
    """Of each backend and dtype: weights and bases."""
    spread, found = next(iter(spreads(world).values())), {}
    for backend, dtype in BACKENDS:
        weights, optimizer = setup(spread, dtype, residual="official", backend=backend)
        take(weights, optimizer, spread, range(STEPS))
        bases = [optimizer.state[weight]["basis"] for weight in weights]
        found[backend, dtype] = [whole(weight) for weight in weights], bases
    return found


def small_messages(rank, world):
    """A bucket a matrix, and rounds of a matrix an owner."""
    spread = next(iter(spreads(world).values()))
    sizes = sharded.BUCKET_BYTES, owners.ROUND_ELEMENTS
    sharded.BUCKET_BYTES = owners.ROUND_ELEMENTS = 1
    found = {}
    for method in ("adaptive", "orthogonal, averaged"):
        weights, optimizer = setup(spread, **METHODS[method])
        names = take(weights, optimizer, spread, range(STEPS))
        found[method] = [whole(weight) for weight in weights], names
    sharded.BUCKET_BYTES, owners.ROUND_ELEMENTS = sizes
    return found


def left_copies(rank, world):
    """Where every rank has all rows, the side goes by the shape; of shards it is right."""
    sides = {}
    for where, spread in spreads(world).items():
        weights, optimizer = setup(spread, proj_type="std", residual="official")
        take(weights, optimizer, spread, range(STEPS))
        sides[where] = [optimizer.state[weight]["side"] for weight in weights]
        if where == "copies":
            sides["weights"] = [whole(weight) for weight in weights]
    return sides


def half_precision(rank, world):
    """Bases and counters of bfloat16 weights, which no two ranks compute apart; moments are float32
    whatever is asked for.
    """
    spread = next(iter(spreads(world).values()))
    weights, optimizer = setup(spread, torch.bfloat16, residual="official", state="int8", master=24)
    assert all(row["state"] == "float32" and not row["master"] for row in optimizer.explain())
    take(weights, optimizer, spread, range(STEPS))
    return [whole(w) for w in weights], [plain(optimizer.state[w]) for w in weights]


def fsdp2(rank, world):
    """Real passes of a model whose layers are sharded, on one batch of all ranks."""
    model = net()
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh_of(world))
    fully_shard(model, mesh=mesh_of(world))
    return train(model, FiraAdamW(groups_of(model), lr=0.01))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 21), nn.GELU(), nn.Linear(21, 5)).double()


def groups_of(model):
    return param_groups(model, rank=3, update_proj_gap=GAP, proj_type="right", weight_decay=0.1)


def train(model, optimizer):
    for seed in range(STEPS):
        rng = torch.Generator().manual_seed(seed)
        inputs = torch.randn(32, 12, generator=rng, dtype=torch.float64)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    return [whole(param) for param in model.parameters()]


def spoil(grads, seed):
    """A NaN in rows of one rank, all energy in those of another, nothing at all."""
    if seed in (1, GAP):
        grads[0][-1, 2] = float("nan")
    if seed == 2:
        grads[1][1:] = 0
    if seed in (4, 2 * GAP):
        for grad in grads:
            grad.zero_()


def hostile_gradients(rank, world):
    spread = next(iter(spreads(world).values()))
    weights, optimizer = setup(spread, residual="official")
    take(weights, optimizer, spread, range(STEPS), spoil)
    return [whole(w) for w in weights], [plain(optimizer.state[w]) for w in weights]


def failing_owner(rank, world):
    """A factorization that fails on its owner, and one that fails in an unforeseen way."""
    spread = next(iter(spreads(world).values()))
    weights, optimizer = setup(spread, subspace=Subspace("svd", stagger=False))
    take(weights, optimizer, spread, range(1))
    found = owners.found_bases

    def failing(error):
        def instead(due, subspace):
            if any(item.name == "w1" for item in due):
                raise error
            return found(due, subspace)

        return instead

    problem = owners.Result("the factorization failed")
    owners.found_bases = lambda due, subspace: [problem for _ in due]
    take(weights, optimizer, spread, range(1, GAP + 1))
    kept = [optimizer.state[weight]["kept"] for weight in weights]
    owners.found_bases = failing(MemoryError("none left"))
    with pytest.raises(RuntimeError) as error:
        take(weights, optimizer, spread, range(GAP + 1, 2 * GAP + 1))
    owners.found_bases = found
    return kept, str(error.value)


def failing_factor(rank, world):
    """An orthogonal factor that its owner cannot compute."""
    spread = next(iter(spreads(world).values()))
    weights, optimizer = setup(spread, residual="orthogonal")
    factor = Transformation.factor

    def fails(self, values):
        if values.shape[-2:] == (21, 12):
            raise MemoryError("none left")
        return factor(self, values)

    Transformation.factor = fails
    with pytest.raises(RuntimeError, match="could not be computed") as error:
        take(weights, optimizer, spread, range(1))
    Transformation.factor = factor
    return type(error.value.__cause__).__name__


def nothing_outside(rank, world):
    """A weight without rows beside others."""
    mesh, rng = mesh_of(world), torch.Generator().manual_seed(0)
    shapes, found = ((0, 8), (9, 8)), []
    weights = [
        nn.Parameter(distribute_tensor(torch.randn(shape, generator=rng), mesh, [Shard(0)]))
        for shape in shapes
    ]
    optimizer = OrthoFiraAdamW([{"params": weights, "rank": 2, "proj_type": "right"}])
    for _ in range(2):
        for weight in weights:
            value = torch.randn(weight.shape, generator=rng)
            weight.grad = distribute_tensor(value, mesh, [Shard(0)])
        optimizer.step()
        found = [whole(weight).isfinite().all() for weight in weights]
    return found


def refusals(rank, world):
    mesh, told = mesh_of(world), {}

    def say(what, proj_type="std", **options):
        weight = nn.Parameter(distribute_tensor(torch.ones(12, 12), mesh, [Shard(0)]))
        group = {"params": [("w", weight)], "rank": 2, "proj_type": proj_type}
        with pytest.raises((NotImplementedError, ValueError)) as error:
            LowRankAdamW([group], **options)
        told[what] = str(error.value)

    say("left", proj_type="left")
    say("capturable", capturable=True)
    say("monitor", monitor=True)
    say("stochastic", rounding="stochastic")
    return told


FUNCTIONS = (
    *(
        trajectories,
        told,
        backends,
        small_messages,
        left_copies,
        half_precision,
        fsdp2,
        hostile_gradients,
        failing_owner,
        failing_factor,
        nothing_outside,
    ),
    refusals,
)


@pytest.fixture(scope="module", params=(2, 3, 4))
def results(request, tmp_path_factory):
    return on_ranks(request.param, FUNCTIONS, tmp_path_factory.mktemp("ranks"))


def assert_near(weights, expected):
    for here, one in zip(weights, expected, strict=True):
        assert (here - one).abs().max() <= 1e-10 * one.abs().max()


def assert_same(states, others):
    """In every bit and number."""
    for state, other in zip(states, others, strict=True):
        assert state.keys() == other.keys()
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key


@pytest.fixture(scope="module")
def one_process():
    found = {}
    for method, options in METHODS.items():
        weights, optimizer = setup(torch.clone, **options)
        take(weights, optimizer, torch.clone, range(STEPS))
        found[method] = weights, [optimizer.state[weight] for weight in weights]
    return found


def test_every_method_trains_as_in_one_process(results, one_process):
    for found in results["trajectories"]:
        for (_, method), (weights, states, *_) in found.items():
            expected, expected_states = one_process[method]
            assert_near(weights, expected)
            for state, one in zip(states, expected_states, strict=True):
                for key in ("rank", "refreshes", "basis_step", "kept", "gap_factor"):
                    assert state[key] == one[key], (method, key)


def test_what_is_not_spread_has_the_same_bits_on_all_ranks(results):
    first, *others = results["trajectories"]
    for other in others:
        for case, (_, states, names, _) in other.items():
            assert_same(states, first[case][1])
            if case[0] != "hsdp":  # there, some pass bases on
                assert names == first[case][2], case
    first, *others = results["half_precision"]
    for weights, states in others:
        assert all(map(torch.equal, weights, first[0]))
        assert_same(states, first[1])


def test_ranks_talk_at_refreshes_and_once_a_step_for_a_limiter(results):
    for found in results["trajectories"]:
        for (where, method), (*_, names, _) in found.items():
            counts = list(map(len, names))
            if method in ("galore", "normalize", "sign", "sign, averaged"):
                assert min(counts) == 0, (where, method)
            if method in ("fira", "fira paper", "apollo", "apollo mini"):
                least = [] if where == "copies" else ["all_reduce"]
                assert names.count(least) >= 2, (where, method)
                assert min(counts) == len(least), (where, method)
            if method in ("orthogonal", "orthogonal, averaged"):
                gathers = ["all_reduce", "all_to_all_single", "all_to_all_single"]
                least = [] if where == "copies" else gathers
                assert names.count(least) >= 2, (where, method)
                assert min(counts) == len(least), (where, method)


def test_buckets_and_rounds_change_nothing(results, one_process):
    # Of four ranks each owns one of the four matrices.
    rounds = 1 if len(results["small_messages"]) == 4 else 2
    for found in results["small_messages"]:
        for method, (weights, _) in found.items():
            assert_near(weights, one_process[method][0])
        names = found["adaptive"][1]
        assert max(step.count("all_to_all_single") for step in names) == rounds
        assert min(step.count("all_reduce") for step in names) >= 4
        # As many matrices a bucket as shards, to keep all owners busy.
        shards = {2: 2, 3: 3, 4: 2}[len(results["small_messages"])]
        names = found["orthogonal, averaged"][1]
        assert min(step.count("all_reduce") for step in names) == -(-4 // shards)


def test_every_backend_steps_shards_as_wholes(results):
    """Of given gradients: bases in every bit, since an owner computes as one process does."""
    for backend, dtype in BACKENDS:
        weights, optimizer = setup(torch.clone, dtype, residual="official", backend=backend)
        take(weights, optimizer, torch.clone, range(STEPS))
        for found in results["backends"]:
            shards, bases = found[backend, dtype]
            for weight, basis in zip(weights, bases, strict=True):
                assert torch.equal(optimizer.state[weight]["basis"], basis), (backend, dtype)
            for weight, shard in zip(weights, shards, strict=True):
                # Norms are summed in another order.
                error = (shard - weight).norm() / weight.norm()
                assert error < 4 * torch.finfo(dtype).eps, (backend, dtype)


def test_explain_says_how_weights_are_spread_and_what_ranks_do(results):
    world = len(results["told"])
    copies = "Replicate() over replicas of 2, " if world == 4 else ""
    placement = f"{copies}Shard(dim=0) over shards of {2 if world == 4 else world}"
    refresh = "at a refresh all-to-all of G to an owner and broadcast of P"
    for found in results["told"]:
        assert found == {
            "galore": (placement, refresh),
            "fira": (placement, f"{refresh}; in every step all-reduce of norms"),
            "orthogonal": (
                placement,
                f"{refresh}; in every step all-reduce of a claim and two all-to-alls of what is"
                " outside",
            ),
            "plain": (placement, None),
        }


def test_copies_go_by_their_shape_and_shards_are_right(results):
    weights, optimizer = setup(torch.clone, proj_type="std", residual="official")
    take(weights, optimizer, torch.clone, range(STEPS))
    for sides in results["left_copies"]:
        assert all(sides[where] == [1, 1, 1, 1] for where in sides.keys() & {"fsdp", "hsdp"})
        if "copies" in sides:
            assert sides["copies"] == [1, 0, 0, 1]
            assert_near(sides["weights"], weights)


def test_a_rank_holds_its_share_of_the_moments(results, one_process):
    for found in results["trajectories"]:
        world = len(results["trajectories"])
        shards = {"fsdp": world, "hsdp": world // 2, "copies": 1}
        for where, divided in shards.items():
            if (where, "galore") not in found:
                continue
            rows = found[where, "galore"][3]
            for (m, n), size in zip(
                ((21, 12), (12, 30), (16, 16)), (*rows[:2], rows[3]), strict=True
            ):
                most = 8 * (2 * 4 * -(-m // divided) + 4 * n) + 4
                assert size <= most, (where, m, n)


def test_fsdp2_trains_as_one_process(results):
    model = net()
    expected = train(model, FiraAdamW(groups_of(model), lr=0.01))
    for weights in results["fsdp2"]:
        assert_near(weights, expected)


def test_hostile_gradients_do_what_they_do_in_one_process(results):
    weights, optimizer = setup(torch.clone, residual="official")
    take(weights, optimizer, torch.clone, range(STEPS), spoil)
    assert max(optimizer.state[weight]["kept"] for weight in weights)
    for found, states in results["hostile_gradients"]:
        assert_near(found, weights)
        for state, weight in zip(states, weights, strict=True):
            assert state["kept"] == optimizer.state[weight]["kept"]


def test_a_factor_that_fails_is_known_to_all(results):
    causes = results["failing_factor"]
    owners = 2 if len(causes) == 4 else 1  # of HSDP's replicas, each
    assert sorted(causes) == ["MemoryError"] * owners + ["NoneType"] * (len(causes) - owners)


def test_a_weight_without_rows_changes_nothing(results):
    for found in results["nothing_outside"]:
        assert all(found)


def test_a_failure_of_an_owner_is_known_to_all(results):
    for kept, told in results["failing_owner"]:
        assert kept == [1, 1, 0, 0]  # the others were not due
        assert re.search(r"rank \d+ .* could not compute the basis of w\d", told)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("left", "proj_type='left'.*take proj_type='right'"),
        ("capturable", "leave capturable out"),
        ("monitor", "^w is a DTensor.*monitor=True.*leave that out"),
        ("stochastic", "rounding='stochastic'.*leave that out"),
    ],
)
def test_what_shards_cannot_do_is_refused_by_name(results, what, text):
    for found in results["refusals"]:
        assert re.search(text, found[what]), found[what]


def test_the_largest_matrix_goes_to_who_has_least():
    assert owners.owners_of([5, 9, 4, 4, 1], 2) == [1, 0, 1, 0, 1]


def test_buckets_have_room_and_as_many_as_keep_owners_busy(monkeypatch):
    monkeypatch.setattr(sharded, "BUCKET_BYTES", 10)
    sizes = [6, 4, 1, 30, 2, 3]
    assert sharded.bucketed(sizes) == [range(2), range(2, 3), range(3, 4), range(4, 6)]
    assert sharded.bucketed(sizes, 3) == [range(3), range(3, 6)]
    assert sharded.bucketed(sizes, 3, 2) == [range(2), range(2, 4), range(4, 6)]
    assert sharded.bucketed([]) == []


def test_rounds_bound_what_an_owner_gathers(monkeypatch):
    monkeypatch.setattr(owners, "ROUND_ELEMENTS", 10)
    assert owners._rounds([6, 6, 6, 3, 30], [0, 0, 1, 1, 0]) == [[0, 2, 3], [1], [4]]
