"""What a refresh leaves in the state, and at which steps one comes, through the optimizer."""

import itertools

import pytest
import torch
from oracles.low_rank import orthonormal
from torch import nn

from lowrank_kernels import GaLoreAdamW, Subspace
from lowrank_kernels.subspace.moments import MOMENTS

GAP = 4
SHAPES = pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=["left", "right"])


def start(params, *, rank=4, gap=GAP, **options):
    """Params are tensors, or (name, tensor) pairs."""
    group = {"params": params, "rank": rank, "update_proj_gap": gap}
    return GaLoreAdamW([group], lr=0.01, **options)


def together(**options):
    return Subspace(stagger=False, **options)


def flat_gradient(shape, first, last):
    """Of equal singular values, in some of eight directions on either side."""
    rng = torch.Generator().manual_seed(0)
    left, right = (orthonormal(size, 8, rng).float() for size in shape)
    return left[:, first:last] @ right[:, first:last].T


def random_gradient(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# The state.


@SHAPES
@pytest.mark.parametrize("moments", MOMENTS)
def test_a_basis_of_the_same_rank_comes_in_place(moments, shape):
    """A captured graph holds the addresses."""
    param = nn.Parameter(torch.zeros(shape))
    optimizer = start([param], subspace=together(moments=moments))
    names = ("basis", "exp_avg", "exp_avg_sq")
    for step in range(GAP + 1):
        param.grad = random_gradient(shape, step)
        if step == GAP:
            state = optimizer.state[param]
            tensors = [state[name] for name in names]
            before = [(tensor.data_ptr(), tensor.clone()) for tensor in tensors]
        optimizer.step()
    assert optimizer.stats()[0]["refreshes"] == 2
    for name, (address, value) in zip(names, before, strict=True):
        assert optimizer.state[param][name].data_ptr() == address, name
        assert not torch.equal(optimizer.state[param][name], value), name


@SHAPES
@pytest.mark.parametrize("ranks", [(2, 6), (6, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_basis_of_another_rank_has_the_dtype_and_an_overlap_with_the_old_one(dtype, ranks, shape):
    """One basis spans the other, so the overlap is 1 whichever has more directions."""
    param = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = start([param], rank=8, gap=1, subspace=together(residual_energy=0.05))
    for rank in ranks:
        param.grad = flat_gradient(shape, 0, rank).to(dtype)
        optimizer.step()
        state = optimizer.state[param]
        assert optimizer.stats()[0]["rank"] == rank
        assert state["basis"].dtype is dtype
        assert state["exp_avg"].dtype is state["exp_avg_sq"].dtype is torch.float32
    # The gradient and the basis are rounded to bfloat16, which turns them by 2^-9 at most.
    assert optimizer.stats()[0]["overlap"] == pytest.approx(1.0, abs=2**-6)


@pytest.mark.parametrize("moments", ["carry", "carry_ldadam", "carry_absolute"])
def test_no_variance_is_negative_after_a_gradient_that_has_grown(moments):
    """Then V < M^2, and a direction that M hardly has gets the difference."""
    shape, gap = (24, 40), 50
    param = nn.Parameter(torch.zeros(shape))
    optimizer = start([param], gap=gap, subspace=together(moments=moments))
    for step in range(gap + 2):
        scale = 1.0 if step >= gap - 10 else 1e-3
        param.grad = scale * random_gradient(shape, step // gap)
        optimizer.step()
        assert (optimizer.state[param]["exp_avg_sq"] >= 0).all()
    assert optimizer.stats()[0]["refreshes"] == 2
    assert param.isfinite().all()


# The steps.


def test_turns_are_spread_over_the_whole_interval():
    """Their places in the interval come from their names."""
    gap = 40
    named = [(f"layers.{index}.weight", nn.Parameter(torch.zeros(8, 12))) for index in range(32)]
    optimizer = start(named, gap=gap, subspace="random")
    for _ in range(gap + 1):
        for _, param in named:
            param.grad = torch.ones(8, 12)
        optimizer.step()
    ages = [row["age"] for row in optimizer.stats()]
    assert max(ages) < gap, "each has taken its turn"
    quarters = [sum(age * 4 // gap == quarter for age in ages) for quarter in range(4)]
    assert min(quarters) >= 4, "of 8 in the mean"


def refreshes(param, optimizer, steps, directions=lambda step: (0, 4)):
    """The steps, out of these, at which the basis changes."""
    found = []
    for step in steps:
        param.grad = flat_gradient(param.shape, *directions(step))
        optimizer.step()
        if optimizer.stats()[0]["age"] == 0:
            found.append(step)
    return found


def test_a_lazy_interval_doubles_from_the_fifth_overlap_on():
    """And is counted from the last refresh, not in multiples of itself."""
    param = nn.Parameter(torch.zeros(12, 20))
    optimizer = start([param], subspace=together(lazy=0.0))
    found = refreshes(param, optimizer, range(80))
    assert found == [0, 4, 8, 12, 16, 20, 28, 44, 76]
    assert optimizer.stats()[0]["gap_factor"] == 16


def test_a_lazy_interval_doubles_for_a_matrix_that_comes_early_too():
    param = nn.Parameter(torch.zeros(12, 20))
    optimizer = start([("layers.1.weight", param)], subspace=Subspace(lazy=0.0))
    first, *later = refreshes(param, optimizer, range(60))
    assert first == 0
    assert 0 < later[0] < GAP, "a turn of its own"
    assert [b - a for a, b in itertools.pairwise(later)] == [4, 4, 4, 4, 8, 16]


def test_a_lazy_interval_grows_only_while_the_last_five_bases_overlap():
    param = nn.Parameter(torch.zeros(12, 20))
    optimizer = start([param], gap=2, subspace=together(lazy=0.9))
    turned_at = 11
    found = refreshes(
        param, optimizer, range(43), lambda step: (0, 4) if step < turned_at else (4, 8)
    )
    assert found == [0, 2, 4, 6, 8, 10, 14, 18, 22, 26, 30, 34, 42]
    assert optimizer.stats()[0]["gap_factor"] == 8


def test_a_lazy_interval_goes_on_after_a_resume():
    """In the middle of a doubled one."""
    runs = []
    for stop in (0, 23):
        param = nn.Parameter(torch.zeros(12, 20))
        optimizer = start([param], subspace=together(lazy=0.0))
        found = refreshes(param, optimizer, range(stop))
        other = nn.Parameter(param.detach().clone())
        resumed = start([other], subspace=together(lazy=0.0))
        resumed.load_state_dict(optimizer.state_dict())
        found += refreshes(other, resumed, range(stop, 50))
        runs.append((found, other.detach()))
    assert runs[0][0] == runs[1][0] == [0, 4, 8, 12, 16, 20, 28, 44]
    assert torch.equal(runs[0][1], runs[1][1])


# Company.


@pytest.mark.parametrize("finder", ["randomized", "power"])
def test_a_matrix_of_another_rank_beside_it_changes_no_basis(finder):
    """Batches of equal matrices start from as many directions as all of them had."""
    rng = torch.Generator().manual_seed(0)
    left, right = (orthonormal(size, 20, rng).float() for size in (64, 96))
    grad = left @ right.T + 0.02 * torch.randn(64, 96, generator=rng)

    def captured(mates):
        params = [nn.Parameter(torch.zeros(64, 96)) for _ in range(1 + mates)]
        subspace = together(range_finder=finder, residual_energy=0.3)
        named = list(zip("ab", params, strict=False))
        optimizer = start(named, rank=24, gap=1, subspace=subspace)
        for _ in range(2):
            for param, gradient in zip(params, (grad, left[:, :2] @ right[:, :2].T), strict=False):
                param.grad = gradient
            optimizer.step()
        assert len({row["rank"] for row in optimizer.stats()}) == 1 + mates
        return optimizer.stats()[0]["captured"]

    assert captured(1) == pytest.approx(captured(0), rel=1e-7)


@pytest.mark.parametrize("finder", ["randomized", "svd", "power", "random", "gaussian"])
def test_equal_matrices_beside_it_change_no_bit_of_a_basis(finder):
    """On a CPU: products of a batch, and of matrices at odd addresses, have other bits."""

    def basis(mates):
        params = [nn.Parameter(torch.zeros(29, 17)) for _ in range(1 + mates)]
        named = [(f"w{number}", param) for number, param in enumerate(params)][::-1]
        optimizer = start(named, rank=5, gap=1, subspace=together(range_finder=finder))
        for step in range(3):
            for seed, param in enumerate(params):
                param.grad = random_gradient((29, 17), 10 * seed + step)
            optimizer.step()
        return optimizer.state[params[0]]["basis"]

    assert torch.equal(basis(0), basis(3))
