"""Ranks that are about to take different steps: an error on all of them that says what differs."""

import re

import pytest
from integration.ranks import on_ranks
from integration.spread_runs import setup, spreads, take, values

from lowrank_kernels import Subspace
from lowrank_kernels.optim import agreement

# The first test of each world size waits for all that its ranks do.
pytestmark = pytest.mark.timeout(900)

STEPS_BEFORE = 2


def told(function):
    """What an error says, or nothing."""
    try:
        function()
    except RuntimeError as error:
        return str(error)
    return None


def without_gradient(rank, world, residual, steps):
    """The last rank finds no gradient of one weight, after some steps in which it did."""
    spread = next(iter(spreads(world).values()))
    weights, optimizer = setup(spread, residual=residual)
    take(weights, optimizer, spread, range(steps))
    for weight, grad in zip(weights, values(steps), strict=True):
        weight.grad = spread(grad)
    if rank == world - 1:
        weights[1].grad = None
    return told(optimizer.step)


def first_step(rank, world):
    return without_gradient(rank, world, None, 0)


def later_with_a_limiter(rank, world):
    # What is said along one axis of the mesh, others do not hear before the next refresh.
    return without_gradient(rank, world, "official", STEPS_BEFORE) if world < 4 else "skipped"


def later_without_a_word(rank, world):
    """Of a method that sends nothing: who has changed asks, and is not answered."""
    spread = next(iter(spreads(world).values()))
    weights, optimizer = setup(spread, subspace=Subspace("svd", stagger=False))
    optimizer.param_groups[0]["update_proj_gap"] = optimizer.param_groups[1]["update_proj_gap"] = 50
    take(weights, optimizer, spread, range(STEPS_BEFORE))
    for group in optimizer.param_groups:
        group["scale"] = 0.5
    # The same change of all of them is none to speak of.
    take(weights, optimizer, spread, range(STEPS_BEFORE, STEPS_BEFORE + 1))
    if rank == world - 1:
        optimizer.param_groups[1]["scale"] = 0.125
    patience, agreement.PATIENCE = agreement.PATIENCE, 2.0
    error = told(
        lambda: take(weights, optimizer, spread, range(STEPS_BEFORE + 1, STEPS_BEFORE + 2))
    )
    agreement.PATIENCE = patience
    return error


def another_rate(rank, world):
    spread = next(iter(spreads(world).values()))
    weights, optimizer = setup(spread, lr=0.01 + 0.01 * rank)
    return told(lambda: take(weights, optimizer, spread, range(1)))


def another_basis(rank, world):
    spread = next(iter(spreads(world).values()))
    weights, optimizer = setup(spread, basis="int8" if rank else "weight")
    return told(lambda: take(weights, optimizer, spread, range(1)))


def nothing_to_do(rank, world):
    """A rank that finds no gradient at all."""
    spread = next(iter(spreads(world).values()))
    weights, optimizer = setup(spread)
    for weight, grad in zip(weights, values(0), strict=True):
        # Ranks spread it together.
        weight.grad = spread(grad)
        if rank:
            weight.grad = None
    return told(optimizer.step)


def another_rank(rank, world):
    spread = next(iter(spreads(world).values()))
    weights, optimizer = setup(spread)
    optimizer.param_groups[0]["rank"] = 3 + (rank > 0)
    return told(lambda: take(weights, optimizer, spread, range(1)))


def another_name(rank, world):
    spread = next(iter(spreads(world).values()))
    weights, optimizer = setup(spread)
    optimizer.param_groups[1]["param_names"][0] += "x" * rank
    return told(lambda: take(weights, optimizer, spread, range(1)))


def another_method(rank, world):
    spread = next(iter(spreads(world).values()))
    weights, optimizer = setup(spread, residual="official" if rank else None)
    return told(lambda: take(weights, optimizer, spread, range(1)))


def another_age(rank, world):
    """A state that was loaded on one rank only."""
    spread = next(iter(spreads(world).values()))
    weights, optimizer = setup(spread)
    take(weights, optimizer, spread, range(STEPS_BEFORE))
    if rank == 0:
        optimizer.state[weights[0]]["basis_step"] = -1
    optimizer.state[weights[2]]["basis_step"] = -1  # all of them have something that is due
    return told(lambda: take(weights, optimizer, spread, range(1)))


def in_step_again(rank, world):
    """After an error that all have heard, what is mended goes on."""
    spread = next(iter(spreads(world).values()))
    weights, optimizer = setup(spread, residual="official")
    optimizer.param_groups[0]["rank"] = 3 + (rank > 0)
    error = told(lambda: take(weights, optimizer, spread, range(1)))
    optimizer.param_groups[0]["rank"] = 4
    optimizer.state.clear()
    return error is not None and told(lambda: take(weights, optimizer, spread, range(3))) is None


CASES = {
    "first_step": r"rank 0 has w1 .*, and rank \d has w1 .*, without a gradient",
    "later_with_a_limiter": r"rank 0 has w1 .*, and rank \d has w1 .*, without a gradient|skipped",
    "another_rate": r"rank 0 has w0 at lr 0.01, and rank 1 has w0 at lr 0.02",
    "another_basis": r"rank 0 has bases in weight, and rank 1 has bases in int8",
    "nothing_to_do": r"rank 0 has w0 .*, and rank \d has w0 .*, without a gradient",
    "another_rank": r"rank 0 has w0 \(21, 12\),.*rank 3.*, and rank 1 has w0 .*rank 4",
    "another_name": r"rank 0 has w2 .*, and rank 1 has w2x ",
    "another_method": r"rank 0 has residual=None.*, and rank 1 has residual=official",
    "another_age": r"rank 0 has w0, due for a basis after 2 steps, and rank 1 has w\d, due",
}
FUNCTIONS = (
    *(
        first_step,
        later_with_a_limiter,
        later_without_a_word,
        another_rate,
        another_basis,
        nothing_to_do,
        another_rank,
        another_name,
        another_method,
        another_age,
    ),
    in_step_again,
)


@pytest.fixture(scope="module", params=(2, 4))
def results(request, tmp_path_factory):
    return on_ranks(request.param, FUNCTIONS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_ranks_that_differ_say_so_on_all_of_them(results, case):
    for text in results[case]:
        assert text is not None
        assert re.search(CASES[case], text), text


def test_who_changes_alone_hears_no_answer_and_says_what_changed(results):
    *others, last = results["later_without_a_word"]
    assert others == [None] * len(others)
    assert re.search(
        r"what changed on rank \d did not change on others.*w2 .*scale 0.125.*w2 .*scale 0.5", last
    )


def test_what_was_mended_goes_on(results):
    assert all(results["in_step_again"])
