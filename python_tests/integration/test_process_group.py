"""Whole weights of which every rank has a copy: bases are dealt to owners, and sent."""

import re
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from integration.ranks import mesh_of, on_ranks
from integration.spread_runs import METHODS, SHAPES, setup, take, values
from torch import nn
from torch.distributed.tensor import Replicate, distribute_tensor

from lowrank_kernels import LowRankAdamW, Subspace, release_gradients
from lowrank_kernels.optim import owners

STEPS = 7
RANK = 4
CASES = {
    **{name: (options, "std") for name, options in METHODS.items()},
    "left": ({"residual": "official"}, "left"),
    "int8": ({"residual": "official", "state": "int8", "basis": "int8"}, "std"),
}
ALIKE = torch.clone
# Of the weights, where they differ.
DTYPES = (torch.bfloat16, torch.float32, torch.bfloat16, torch.float32)
# All bases are due at the first step.
AT_ONCE = {"subspace": Subspace("svd", stagger=False)}


def result(weights, optimizer):
    return [w.detach() for w in weights], [dict(optimizer.state[w]) for w in weights]


def run(case, dtype, **options):
    """Weights and states after some steps, and the collectives of each."""
    own, proj_type = CASES[case]
    weights, optimizer = setup(ALIKE, dtype, proj_type, **own, **options)
    names = take(weights, optimizer, ALIKE, range(STEPS))
    return (*result(weights, optimizer), names)


def trained(rank, world):
    """Every method with a group, and without one."""
    group, found = dist.group.WORLD, {}
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            shared = run(case, dtype, process_group=group)
            found[case, dtype] = shared, run(case, dtype)[:2]
    return found


def of_unlike_gradients(rank, world):
    """What ranks have if their gradients differ in the last bits: only the owner's is looked at."""

    def unlike(value):
        return value * (1 + 1e-6 * rank)

    found = {}
    for name, group in (("shared", dist.group.WORLD), ("alone", None)):
        weights, optimizer = setup(unlike, torch.float32, process_group=group, **AT_ONCE)
        take(weights, optimizer, unlike, range(1))
        found[name] = [optimizer.state[weight]["basis"] for weight in weights]
    return found


def work_and_bytes(rank, world):
    """Of a step in which all is due, and of the next: who computes, and what is broadcast."""
    computed, sent = Counter(), Counter()
    found_bases, broadcast = owners.found_bases, dist.broadcast

    def counted_bases(due, subspace):
        computed[step] += len(due)
        return found_bases(due, subspace)

    def counted_broadcast(tensor, *args, **options):
        sent[step] += tensor.nbytes
        return broadcast(tensor, *args, **options)

    weights, optimizer = setup(ALIKE, torch.float32, process_group=dist.group.WORLD, **AT_ONCE)
    with (
        mock.patch.object(owners, "found_bases", counted_bases),
        mock.patch.object(dist, "broadcast", counted_broadcast),
    ):
        for step in range(2):
            take(weights, optimizer, ALIKE, [step])
    bases = sum(optimizer.state[weight]["basis"].nbytes for weight in weights)
    return computed[0], computed[1], sent[0], sent[1], bases


def mixed_dtypes(rank, world):
    """Bases of two dtypes that are due in one step, with a group and without one."""
    found = []
    for process_group in (dist.group.WORLD, None):
        weights = [nn.Parameter(v.to(d)) for v, d in zip(values(100), DTYPES, strict=True)]
        named = [(f"w{place}", weight) for place, weight in enumerate(weights)]
        group = {"params": named, "rank": RANK}
        optimizer = LowRankAdamW([group], process_group=process_group, **AT_ONCE)
        for weight, grad in zip(weights, values(0), strict=True):
            weight.grad = grad.to(weight.dtype)
        optimizer.step()
        found.append([optimizer.state[weight]["basis"] for weight in weights])
    return found


def failures(rank, world):
    """A gradient of zeros, and owners that fail."""
    weights, optimizer = setup(ALIKE, torch.float32, process_group=dist.group.WORLD, **AT_ONCE)
    take(weights, optimizer, ALIKE, [0], lambda grads, _: grads[1].zero_())
    kept = [optimizer.state[weight]["kept"] for weight in weights]
    steps = [int(optimizer.state[weight]["step"]) for weight in weights]

    def failing(due, subspace):
        raise MemoryError("none left")

    # w1, which still has no basis.
    before = [weight.detach().clone() for weight in weights]
    with (
        mock.patch.object(owners, "found_bases", failing),
        pytest.raises(RuntimeError) as error,
    ):
        take(weights, optimizer, ALIKE, [1])
    same = all(map(torch.equal, before, weights))
    take(weights, optimizer, ALIKE, [1])
    return kept, steps, str(error.value), same, optimizer.state[weights[1]]["refreshes"]


def differences(rank, world):
    """One rank is about to do something else."""
    told = {}

    def say(what, change):
        weights, optimizer = setup(ALIKE, process_group=dist.group.WORLD)
        for weight, grad in zip(weights, values(0), strict=True):
            weight.grad = grad
        if rank == world - 1:
            change(weights, optimizer)
        before = [weight.detach().clone() for weight in weights]
        with pytest.raises(RuntimeError) as error:
            optimizer.step()
        assert all(map(torch.equal, before, weights))
        told[what] = str(error.value)

    say("rank", lambda _, optimizer: optimizer.param_groups[0].update(rank=3))
    say("gradient", lambda weights, _: setattr(weights[1], "grad", None))
    say("method", lambda _, optimizer: setattr(optimizer, "residual", "official"))
    return told


def refusals(rank, world):
    told, group = {}, dist.group.WORLD

    def say(what, function):
        with pytest.raises((NotImplementedError, TypeError)) as error:
            function()
        told[what] = type(error.value).__name__, str(error.value)

    copies = nn.Parameter(distribute_tensor(torch.ones(6, 4), mesh_of(world), [Replicate()]))
    plain = nn.Parameter(torch.ones(6, 4))
    say("DTensor", lambda: LowRankAdamW([("w", copies)], process_group=group))
    say("name", lambda: LowRankAdamW([("w", plain)], process_group="gloo"))
    optimizer = LowRankAdamW([("w", plain)], process_group=group)
    say("release", lambda: release_gradients(None, optimizer))
    # Trainers put shards into the groups of an optimizer that there is already.
    optimizer.param_groups[0]["params"] = [copies]
    copies.grad = torch.zeros_like(copies)
    say("later", optimizer.step)
    return told


FUNCTIONS = (
    *(trained, of_unlike_gradients, work_and_bytes, mixed_dtypes),
    *(failures, differences, refusals),
)


@pytest.fixture(scope="module", params=(2, 3))
def results(request, tmp_path_factory):
    return on_ranks(request.param, FUNCTIONS, tmp_path_factory.mktemp("ranks"))


def assert_same(result, expected):
    (weights, states), (expected_weights, expected_states) = result, expected
    assert all(map(torch.equal, weights, expected_weights))
    for state, other in zip(states, expected_states, strict=True):
        assert state.keys() == other.keys()
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_have_the_bits_of_one_that_computes_all(case, dtype, results):
    (first, alone), *others = (found[case, dtype] for found in results["trained"])
    assert_same(first[:2], alone)
    for other, _ in others:
        assert_same(other[:2], first[:2])


def test_ranks_meet_only_where_a_basis_is_due(results):
    for found in results["trained"]:
        (_, _, names), _ = found["galore", torch.float32]
        assert names[0]
        assert [] in names
        # Header and agreement, and a broadcast for each owner.
        assert set(names[0]) == {"all_reduce", "broadcast"}


def test_a_basis_is_that_of_its_owner(results):
    first, *others = results["of_unlike_gradients"]
    for other in others:
        assert all(map(torch.equal, other["shared"], first["shared"]))
        assert not all(map(torch.equal, other["alone"], first["alone"]))


def test_work_is_dealt_and_each_basis_sent_once(results):
    computed, next_computed, sent, next_sent, bases = zip(*results["work_and_bytes"], strict=True)
    assert sum(computed) == len(SHAPES)
    assert min(computed) >= 1
    assert set(next_computed) == set(next_sent) == {0}
    assert sent == bases


def test_bases_of_several_dtypes(results):
    for shared, alone in results["mixed_dtypes"]:
        for dtype, basis, own in zip(DTYPES, shared, alone, strict=True):
            assert basis.dtype is dtype
            assert torch.equal(basis, own)


def test_what_an_owner_cannot_do_all_ranks_know(results):
    for kept, steps, error, same, refreshes in results["failures"]:
        assert kept == [0, 1, 0, 0]
        assert set(steps) == {1}
        assert re.match(r"rank \d of .* could not compute the basis of w1, and says why", error)
        assert same
        assert refreshes == 1


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("rank", r"rank 0 has w0 \(21, 12\), .*rank 4.*, and rank \d has w0 .*rank 3"),
        ("gradient", r"rank 0 has w1 .*, and rank \d has w1 .*, without a gradient"),
        ("method", r"rank 0 has residual=None.*, and rank \d has residual=official"),
    ],
)
def test_ranks_that_differ_hear_it(what, text, results):
    for told in results["differences"]:
        assert re.search(text, told[what]), told[what]


@pytest.mark.parametrize(
    ("what", "kind", "text"),
    [
        ("DTensor", "NotImplementedError", r"w \(6, 4\), torch.float32, is a DTensor"),
        ("later", "NotImplementedError", r"w \(6, 4\), torch.float32, is a DTensor"),
        ("name", "TypeError", "process_group is a str: give it a group of torch.distributed"),
        ("release", "NotImplementedError", "has a process_group.*leave process_group out"),
    ],
)
def test_what_is_refused(what, kind, text, results):
    for told in results["refusals"]:
        assert told[what][0] == kind
        assert re.search(text, told[what][1])
