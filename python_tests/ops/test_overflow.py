"""Numbers that are finite and whose squares, or sums of squares, are not: nothing stays infinite.

The basis is of unit vectors, so that an entry of R is one of G.
"""

import itertools
import math

import pytest
import torch
from devices import device_of
from pairs import pairwise

from lowrank_kernels.ops import (
    AdamScalars,
    ChannelSums,
    Matrices,
    Residual,
    Scalars,
    Side,
    prepare,
    products,
)

ROWS, COLS, RANK = 24, 40, 8
FORMS = {"galore": None, "official": Residual(0.25, 1.0), "paper": Residual(1.0, 0.25)}
WIDE = [
    ("reference", torch.float32),
    ("reference", torch.float64),
    ("foreach", torch.float32),
    ("foreach", torch.float64),
    ("native", torch.float32),
    ("triton", torch.float32),
]
HALF = [(backend, torch.bfloat16) for backend in ("reference", "foreach", "native")]
SIDES = pytest.mark.parametrize("side", list(Side))
LAYOUTS = {
    "dense": lambda matrix: matrix.clone(),
    "every other column": lambda matrix: matrix.repeat_interleave(2, 1)[:, ::2],
}


PLACES = ["in R", "in R, all in the span", "outside of R"]
ROWS_OF_OVERFLOW = [
    *pairwise(PLACES, FORMS, LAYOUTS, Side),
    # Where the residual is formed, of what R was before entries were left out or after.
    *itertools.product(PLACES[1:2], ["paper"], LAYOUTS, Side),
]


def largest_square_root(dtype):
    """The largest number whose square is finite."""
    power = torch.tensor(2.0 ** (64 if dtype is torch.float32 else 512), dtype=dtype)
    return torch.nextafter(power, torch.zeros((), dtype=dtype))


def made(backend, dtype, side, form, layout="dense"):
    """A gradient of ordinary entries, all of whose R and part of the rest are the basis'."""
    rng = torch.Generator().manual_seed(0)
    shape = (COLS, ROWS) if side is Side.LEFT else (ROWS, COLS)
    grad = torch.randn(shape, generator=rng, dtype=torch.float64)
    low = (RANK, ROWS) if side is Side.LEFT else (ROWS, RANK)
    own = {"dtype": dtype, "device": device_of(backend)}
    of_moments = {**own, "dtype": torch.promote_types(dtype, torch.float32)}
    return Matrices(
        side,
        FORMS[form],
        [torch.zeros(shape, **own)],
        [LAYOUTS[layout](grad.to(**own))],
        [torch.eye(COLS, RANK, **own)],
        [torch.zeros(low, **of_moments)],
        [torch.zeros(low, **of_moments)],
        [torch.ones((), **of_moments)],
    )


def channel_of(matrix, side, channel=3):
    return matrix[:, channel] if side is Side.LEFT else matrix[channel]


def take_step(matrices, backend, beta2=0.999, step_size=1.0):
    """phi' and what the limiter was given."""
    adam = AdamScalars(0.9, beta2, 1e-6)
    operations = prepare(matrices, backend=backend)
    projection, factor = operations.project_moments(matrices, adam), None
    if matrices.residual is not None:
        factor = operations.channel_scale(matrices, projection.sums)
    scalars = Scalars(adam, scale=0.25, step_size=step_size, decay=0.0)
    operations.back_project_update(matrices, projection, factor, scalars)
    return factor


def written(matrices):
    return [matrices.params, matrices.exp_avgs, matrices.exp_avg_sqs, matrices.limiter_norms]


def assert_finite(matrices):
    assert all(tensor.isfinite().all() for tensors in written(matrices) for tensor in tensors)


@pytest.mark.parametrize(
    ("beta2", "form", "side"),
    pairwise((0.0, 0.8, 0.95, 0.98, 0.99, 0.998, 0.999, 0.9999), FORMS, Side),
    ids=str,
)
@pytest.mark.parametrize(("backend", "dtype"), WIDE)
def test_a_second_moment_of_the_largest_squares_stays_finite(backend, dtype, beta2, form, side):
    """Where thousands of steps lead, and one back; rounded to float32 some of these betas and 1 -
    beta add up to more than 1.
    """
    matrices = made(backend, dtype, side, form)
    channel_of(matrices.grads[0], side).fill_(largest_square_root(dtype))
    matrices.exp_avg_sqs[0].fill_(torch.finfo(dtype).max)
    take_step(matrices, backend, beta2)
    assert_finite(matrices)
    matrices.grads[0].zero_()
    take_step(matrices, backend, beta2)
    largest = float(matrices.exp_avg_sqs[0].max())
    assert largest == pytest.approx(beta2 * torch.finfo(dtype).max, rel=1e-6)


def test_no_beta_takes_the_largest_squares_beyond_the_largest_number():
    """In the arithmetic that all backends share."""
    rng = torch.Generator().manual_seed(0)
    digits = 7 * torch.rand(10**6, generator=rng, dtype=torch.float64)
    betas = torch.cat([1 - 10**-digits, torch.rand(10**6, generator=rng, dtype=torch.float64)])
    largest = torch.finfo(torch.float32).max
    square = largest_square_root(torch.float32).square()
    assert (betas.float() * largest + (1 - betas).float() * square).isfinite().all()
    assert ((betas.float().double() + (1 - betas).float().double()) > 1).any()


@pytest.mark.parametrize(("where", "form", "layout", "side"), ROWS_OF_OVERFLOW, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), WIDE + HALF)
def test_a_channel_with_an_entry_too_large_to_be_squared(where, backend, dtype, form, layout, side):
    """Its residual is left out, and the entry; all else of it and all other channels are as ever.

    All in the span, nothing is left of the residual but what was left out of R.
    """
    large = 1e160 if dtype is torch.float64 else 1e20
    place = RANK if where == "outside of R" else 2
    matrices, clean = (made(backend, dtype, side, form, layout) for _ in "ab")
    for one, value in ((matrices, large), (clean, 0.0)):
        channel = channel_of(one.grads[0], side)
        if where == "in R, all in the span":
            channel[RANK:] = 0.0
        channel[place] = value
    factors = [take_step(one, backend) for one in (matrices, clean)]
    assert_finite(matrices)
    for moments in ("exp_avgs", "exp_avg_sqs"):
        got, expected = (getattr(one, moments)[0] for one in (matrices, clean))
        assert torch.equal(got, expected), moments
    if form != "galore":
        assert float(factors[0][0, 3]) == 0
        assert float(channel_of(matrices.params[0], side).abs().max()) < 8


@SIDES
@pytest.mark.parametrize("form", ["official", "paper"])
@pytest.mark.parametrize(("backend", "dtype"), WIDE + HALF)
def test_a_channel_whose_sum_of_squares_overflows_has_no_residual(backend, dtype, form, side):
    """Each entry of R can be squared, and moves."""
    matrices = made(backend, dtype, side, form)
    channel_of(matrices.grads[0], side)[:RANK] = 1e154 if dtype is torch.float64 else 1e19
    factor = take_step(matrices, backend)
    assert_finite(matrices)
    assert float(factor[0, 3]) == 0
    assert (factor[0] > 0).sum() == ROWS - 1
    moved = channel_of(matrices.params[0], side)
    assert (moved[:RANK] != 0).all()
    assert float(moved.abs().max()) < 8


@pytest.mark.parametrize("previous", [1.0, 1e-6, 0.0, -1.0])
@pytest.mark.parametrize(("backend", "dtype"), [row for row in WIDE if row[1] is torch.float32])
def test_a_norm_is_finite_where_the_sum_of_squares_is_not(backend, dtype, previous):
    """As in float64, where it is."""
    exact_norm = torch.tensor(previous, dtype=torch.float64)
    squares = [torch.full((1, ROWS), square) for square in (1.0, 1.0, 2.0**127)]
    sums = ChannelSums(*(square.to(device_of(backend)) for square in squares))
    matrices = made(backend, dtype, Side.RIGHT, "official")
    matrices.limiter_norms[0].fill_(previous)
    factor = prepare(matrices, backend=backend).channel_scale(matrices, sums)
    oracle = made("reference", torch.float64, Side.RIGHT, "official")
    oracle = oracle._replace(limiter_norms=[exact_norm])
    wide = ChannelSums(*(square.double() for square in squares))
    exact = prepare(oracle, backend="reference").channel_scale(oracle, wide)
    torch.testing.assert_close(factor.cpu().double(), exact, rtol=1e-6, atol=0)
    got = float(matrices.limiter_norms[0])
    assert got == pytest.approx(float(exact_norm), rel=1e-6)
    assert math.isfinite(got)


@SIDES
@pytest.mark.parametrize("backend", ["foreach", "native"])
def test_half_precision_products_leave_a_channel_out_too(backend, side, monkeypatch):
    monkeypatch.setattr(products, "FAST_IN_HALF", {"cpu"})
    where = "in R, all in the span"
    test_a_channel_with_an_entry_too_large_to_be_squared(
        where, backend, torch.bfloat16, "paper", "dense", side
    )
