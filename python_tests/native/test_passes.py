"""The other passes of `_native` against float64, bit for bit in groups, and at their borders."""

import functools
import math

import pytest
import torch
from guarded import (
    DEVICES,
    DTYPES,
    SIDES,
    Guarded,
    assert_as_accurate,
    assert_same_bits,
    place,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import pairwise

from lowrank_kernels import _native
from lowrank_kernels.ops import ChannelSums
from lowrank_kernels.ops.reference import channel_scale

SHAPES = [(1, 1), (37, 61), (61, 37), (3, 5000), (5000, 3), (130, 1376), (0, 5), (5, 0)]
ANY_SHAPE = {"rows": st.integers(0, 60), "cols": st.integers(0, 60)}
ANY = {
    **ANY_SHAPE,
    "count": st.integers(1, 3),
    "gap": st.integers(0, 3),
    "seed": st.integers(0, 2**32),
    "rows_are_channels": st.booleans(),
}


def channels(values, rows_are_channels):
    return values.unsqueeze(1 if rows_are_channels else 0)


class ResidualSums:
    def __init__(self, count, rows, cols, dtype, gap, rows_are_channels, device="cpu", seed=0):
        rng = torch.Generator().manual_seed(seed)
        self.rows_are_channels, self.device = rows_are_channels, device
        size = rows if rows_are_channels else cols
        self.matrix = Guarded(count, rows, cols, dtype, gap, device).fill(rng)
        self.projected_sq = Guarded(count, 1, size, device=device).fill(rng)
        for view in self.projected_sq.views:
            view.square_()
        self.residual_sq = Guarded(count, 1, size, device=device)
        self.arguments = {
            "matrix": self.matrix.matrices,
            "residual_sq": self.residual_sq.addresses,
            "projected_sq": self.projected_sq.addresses,
            "rows": rows,
            "cols": cols,
            "channels_are_rows": rows_are_channels,
            "kappa": 0.25,
        }

    def run(self, threads=1, **overrides):
        where = place(self.device, threads)
        _native.residual_sums(**{**self.arguments, **where, **overrides})
        for guarded in (self.matrix, self.projected_sq, self.residual_sq):
            guarded.assert_nothing_else_was_written()
        return self.residual_sq.views

    def expected(self, dtype, kappa=0.25):
        axis = 1 if self.rows_are_channels else 0
        for matrix, projected_sq in zip(self.matrix.views, self.projected_sq.views, strict=True):
            energy = matrix.to(dtype).square().sum(axis)
            share = 2 * kappa - kappa**2
            yield (energy - share * projected_sq[0].to(dtype)).clamp(min=0.0)


@DEVICES
@SIDES
@pytest.mark.parametrize(("shape", "dtype", "gap"), pairwise(SHAPES, DTYPES, (0, 3)), ids=str)
def test_residual_sums(shape, dtype, gap, rows_are_channels, device):
    problem = ResidualSums(2, *shape, dtype, gap, rows_are_channels, device)
    exact, torch32 = problem.expected(torch.float64), problem.expected(torch.float32)
    for got, plain, value in zip(problem.run(threads=2), torch32, exact, strict=True):
        assert_as_accurate(got[0], plain, value)


@settings(max_examples=60)
@given(dtype=st.sampled_from(DTYPES), kappa=st.floats(0, 1), **ANY)
def test_residual_sums_of_any_shape(kappa, **problem):
    problem = ResidualSums(**problem)
    exact = problem.expected(torch.float64, kappa)
    torch32 = problem.expected(torch.float32, kappa)
    for got, plain, value in zip(problem.run(kappa=kappa), torch32, exact, strict=True):
        assert_as_accurate(got[0], plain, value)


@SIDES
def test_residual_sums_without_a_projection_are_squared_norms(rows_are_channels):
    problem = ResidualSums(1, 37, 61, torch.bfloat16, 0, rows_are_channels)
    (exact,) = problem.expected(torch.float64, kappa=0.0)
    (got,) = problem.run(projected_sq=None)
    torch.testing.assert_close(got[0].double(), exact, rtol=2**-20, atol=0)


@DEVICES
@SIDES
def test_residual_sums_are_never_negative_and_keep_nan(rows_are_channels, device):
    problem = ResidualSums(1, 37, 61, torch.float32, 0, rows_are_channels, device)
    problem.projected_sq.views[0].fill_(1e9)
    problem.matrix.views[0][5, 7] = torch.nan
    (got,) = problem.run()
    hole = 5 if rows_are_channels else 7
    assert got[0].isnan().nonzero().tolist() == [[hole]]
    assert (got.nan_to_num(0.0) == 0).all()


@DEVICES
@SIDES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_sums_of_a_group_have_the_bits_of_each(dtype, rows_are_channels, device):
    together = ResidualSums(50, 40, 700, dtype, 1, rows_are_channels, device)
    got = [view.clone() for view in together.run(threads=3)]
    for index, view in enumerate(together.matrix.views):
        alone = ResidualSums(1, 40, 700, dtype, 1, rows_are_channels, device)
        alone.matrix.views[0].copy_(view)
        alone.projected_sq.views[0].copy_(together.projected_sq.views[index])
        assert_same_bits(alone.run(), [got[index]])


class Scale:
    def __init__(self, count, size, device="cpu", seed=0, previous=1.0):
        rng = torch.Generator().manual_seed(seed)
        self.size, self.device = size, device
        self.sums = [Guarded(count, 1, size, device=device).fill(rng) for _ in range(3)]
        for sums in self.sums:
            for view in sums.views:
                view.square_()
        self.norms = Guarded(count, 1, 1, device=device)
        for view in self.norms.views:
            view.fill_(previous)
        self.factor = Guarded(count, 1, size, device=device)

    def run(self, threads=1, **overrides):
        direction, projected, residual = (sums.addresses for sums in self.sums)
        arguments = {
            "direction_sq": direction,
            "projected_sq": projected,
            "residual_sq": residual,
            "limiter_norm": self.norms.addresses,
            "factor": self.factor.addresses,
            "channels": self.size,
            **place(self.device, threads),
        }
        _native.channel_scale(**{**arguments, **overrides})
        for guarded in (*self.sums, self.norms, self.factor):
            guarded.assert_nothing_else_was_written()
        return [view[0].clone() for view in self.factor.views]

    def expected(self, dtype):
        stacks = [torch.cat([view.to(dtype) for view in sums.views]) for sums in self.sums]
        norms = [view[0, 0].to(dtype, copy=True) for view in self.norms.views]
        return channel_scale(ChannelSums(*stacks), norms), norms


@DEVICES
@pytest.mark.parametrize("previous", [0.0, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("size", [0, 1, 37, 5461])
def test_channel_scale(size, previous, device):
    problem = Scale(3, size, device, previous=previous)
    exact, exact_norms = problem.expected(torch.float64)
    plain, plain_norms = problem.expected(torch.float32)
    for got, torch32, value in zip(problem.run(threads=2), plain, exact, strict=True):
        assert_as_accurate(got, torch32, value)
    norms = problem.norms.double()
    for got, torch32, value in zip(norms, plain_norms, exact_norms, strict=True):
        assert_as_accurate(got.float(), torch32, value)


@DEVICES
@pytest.mark.parametrize("hole", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_channel_scale_leaves_out_what_is_not_finite(which, hole, device):
    problem, whole = Scale(1, 50, device), Scale(1, 50, device)
    for scale in (problem, whole):
        scale.sums[2].views[0][0, 3] = 0.0
    problem.sums[which].views[0][0, 3] = hole
    expected, (norm,) = problem.expected(torch.float32)
    (got,), _ = problem.run(), whole.run()
    assert got.isfinite().all()
    torch.testing.assert_close(got, expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(problem.norms.views[0][0, 0], norm, rtol=1e-6, atol=0)


@DEVICES
@pytest.mark.parametrize("energy", [0.0, torch.nan, torch.inf])
def test_limiter_keeps_its_norm_when_there_is_none_to_store(energy, device):
    problem = Scale(1, 50, device, previous=0.25)
    problem.sums[2].views[0].fill_(energy)
    problem.run()
    assert problem.norms.views[0].item() == 0.25


class Combine:
    def __init__(
        self, count, rows, cols, dtype, gap, rows_are_channels, fira=True, device="cpu", seed=0
    ):
        rng = torch.Generator().manual_seed(seed)
        self.rows_are_channels, self.fira, self.device = rows_are_channels, fira, device
        self.direction = Guarded(count, rows, cols, device=device).fill(rng)
        self.projected = Guarded(count, rows, cols, device=device).fill(rng)
        size = rows if rows_are_channels else cols
        self.factor = Guarded(count, 1, size, device=device).fill(rng)
        self.combined = Guarded(count, rows, cols, dtype, gap, device)
        self.arguments = {
            "direction": self.direction.addresses,
            "projected": self.projected.addresses,
            "factor": self.factor.addresses if fira else None,
            "combined": self.combined.matrices,
            "rows": rows,
            "cols": cols,
            "channels_are_rows": rows_are_channels,
            "scale": 0.25,
            "rho_kappa": 0.7,
        }

    def run(self, threads=1, **overrides):
        _native.combine(**{**self.arguments, **place(self.device, threads), **overrides})
        for guarded in (self.direction, self.projected, self.factor, self.combined):
            guarded.assert_nothing_else_was_written()
        return self.combined.views

    def expected(self, dtype):
        views = (self.direction.views, self.projected.views, self.factor.views)
        for direction, projected, factor in zip(*views, strict=True):
            combined = 0.25 * direction.to(dtype)
            if self.fira:
                phi = channels(factor[0].to(dtype), self.rows_are_channels)
                combined = combined - 0.7 * phi * projected.to(dtype)
            yield combined


@DEVICES
@SIDES
@pytest.mark.parametrize(
    ("shape", "dtype", "gap", "fira"), pairwise(SHAPES, DTYPES, (0, 3), (True, False)), ids=str
)
def test_combine(shape, dtype, gap, fira, rows_are_channels, device):
    problem = Combine(2, *shape, dtype, gap, rows_are_channels, fira, device)
    exact, torch32 = problem.expected(torch.float64), problem.expected(torch.float32)
    for got, plain, value in zip(problem.run(threads=2), torch32, exact, strict=True):
        assert_as_accurate(got, plain, value)


@settings(max_examples=60)
@given(dtype=st.sampled_from(DTYPES), fira=st.booleans(), **ANY)
def test_combine_any_shape(**problem):
    problem = Combine(**problem)
    exact, torch32 = problem.expected(torch.float64), problem.expected(torch.float32)
    for got, plain, value in zip(problem.run(), torch32, exact, strict=True):
        assert_as_accurate(got, plain, value)


class Update:
    def __init__(
        self,
        count,
        rows,
        cols,
        dtype,
        grad_dtype,
        gap,
        rows_are_channels,
        fira=True,
        device="cpu",
        seed=0,
    ):
        rng = torch.Generator().manual_seed(seed)
        self.rows_are_channels, self.fira, self.device = rows_are_channels, fira, device
        self.param = Guarded(count, rows, cols, dtype, gap, device).fill(rng)
        self.grad = Guarded(count, rows, cols, grad_dtype, gap, device).fill(rng)
        self.product = Guarded(count, rows, cols, dtype, gap, device).fill(rng)
        size = rows if rows_are_channels else cols
        self.factor = Guarded(count, 1, size, device=device).fill(rng)
        self.arguments = {
            "param": self.param.matrices,
            "product": self.product.matrices,
            "grad": self.grad.matrices if fira else None,
            "factor": self.factor.addresses if fira else None,
            "rows": rows,
            "cols": cols,
            "channels_are_rows": rows_are_channels,
            "step_size": 0.02,
            "decay": 0.01,
            "rho": 0.3,
            "salts": None,
            "step": 0,
            "first_row": 0,
            "first_col": 0,
        }

    def run(self, threads=1, **overrides):
        _native.update(**{**self.arguments, **place(self.device, threads), **overrides})
        for guarded in (self.param, self.grad, self.product, self.factor):
            guarded.assert_nothing_else_was_written()
        return self.param.views

    def expected(self, dtype):
        """Before `run`."""
        step_size, decay, rho = 0.02, 0.01, 0.3
        views = (self.param.views, self.grad.views, self.product.views, self.factor.views)
        results = []
        for param, grad, product, factor in zip(*views, strict=True):
            change = product.to(dtype)
            if self.fira:
                phi = channels(factor[0].to(dtype), self.rows_are_channels)
                change = change + rho * phi * grad.to(dtype).where(phi != 0, 0.0)
            results.append((1 - decay) * (param.to(dtype) - step_size * change))
        return results


@DEVICES
@SIDES
@pytest.mark.parametrize(
    ("shape", "dtype", "grad_dtype", "gap", "fira"),
    pairwise([(1, 1), (37, 61), (3, 5000), (130, 1376)], DTYPES, DTYPES, (0, 3), (True, False)),
    ids=str,
)
def test_update(shape, dtype, grad_dtype, gap, fira, rows_are_channels, device):
    problem = Update(2, *shape, dtype, grad_dtype, gap, rows_are_channels, fira, device)
    exact, torch32 = problem.expected(torch.float64), problem.expected(torch.float32)
    for got, plain, value in zip(problem.run(threads=2), torch32, exact, strict=True):
        assert_as_accurate(got, plain, value)
        if dtype is not torch.float32:
            assert_rounded_once(got, value)


def assert_rounded_once(got, exact):
    """The nearest value that the dtype has, but for the roundings of float32 before that."""
    error, unit = (got.double() - exact).abs(), torch.finfo(got.dtype).eps
    assert (error <= 0.5 * unit * exact.abs() + 2**-20).all()


@settings(max_examples=60)
@given(
    dtype=st.sampled_from(DTYPES),
    grad_dtype=st.sampled_from(DTYPES),
    fira=st.booleans(),
    **ANY,
)
def test_update_any_shape(**problem):
    problem = Update(**problem)
    exact, torch32 = problem.expected(torch.float64), problem.expected(torch.float32)
    for got, plain, value in zip(problem.run(), torch32, exact, strict=True):
        assert_as_accurate(got, plain, value)


@DEVICES
@SIDES
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_gradient_of_a_channel_that_is_left_out_is_ignored(bad, rows_are_channels, device):
    problem = Update(1, 37, 61, torch.float32, torch.bfloat16, 0, rows_are_channels, device=device)
    channel = problem.grad.views[0][5] if rows_are_channels else problem.grad.views[0][:, 5]
    channel.fill_(bad)
    problem.factor.views[0][0, 5] = 0.0
    (exact,), (plain,) = problem.expected(torch.float64), problem.expected(torch.float32)
    assert exact.isfinite().all()
    (got,) = problem.run()
    assert_as_accurate(got, plain, exact)


@DEVICES
@SIDES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_of_a_group_has_the_bits_of_each(dtype, rows_are_channels, device):
    together = Update(50, 20, 700, dtype, dtype, 1, rows_are_channels, device=device)
    apart = Update(50, 20, 700, dtype, dtype, 1, rows_are_channels, device=device)
    got = together.run(threads=3)
    for index, view in enumerate(apart.param.views):
        alone = Update(1, 20, 700, dtype, dtype, 1, rows_are_channels, device=device)
        for name in ("param", "grad", "product", "factor"):
            getattr(alone, name).views[0].copy_(getattr(apart, name).views[index])
        assert_same_bits(alone.run(), [got[index]])
        assert not torch.equal(view, got[index])


PROBLEMS = {
    "residual_sums": functools.partial(ResidualSums, 1, 64, 1100, torch.bfloat16, 0, True),
    "combine": functools.partial(Combine, 1, 64, 1100, torch.bfloat16, 0, True),
    "update": functools.partial(Update, 1, 64, 1100, torch.bfloat16, torch.bfloat16, 0, True),
    "channel_scale": functools.partial(Scale, 3, 20000),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_bits_do_not_depend_on_threads(name):
    alone, *others = (PROBLEMS[name]().run(threads=threads) for threads in (1, 2, 3, 64))
    for other in others:
        assert_same_bits(other, alone)


def rejected():
    somewhere = torch.zeros(64 * 1100)
    address = somewhere.data_ptr()
    for name in ("residual_sums", "combine", "update"):
        yield name, {"rows": -1}, "rows must not be negative"
        yield name, {"cols": 2**62}, r"rows \* cols overflows"
    for name in PROBLEMS:
        yield name, {"threads": 0}, "threads must be at least 1"
        yield name, {"device": -2}, "device must be -1"
    for name, array in (
        ("residual_sums", "projected_sq"),
        ("channel_scale", "direction_sq"),
        ("channel_scale", "projected_sq"),
        ("channel_scale", "residual_sq"),
        ("channel_scale", "limiter_norm"),
        ("combine", "projected"),
        ("combine", "factor"),
        ("update", "factor"),
    ):
        count = 3 if name == "channel_scale" else 1
        yield name, {array: []}, f"{array} must have {count} addresses, got 0"
        yield name, {array: [0] * count}, f"{array} is a null pointer"
        yield name, {array: [address + 2] * count}, f"{array} is not aligned to 4 bytes"
    for name, array in (
        ("residual_sums", "matrix"),
        ("combine", "combined"),
        ("update", "param"),
        ("update", "product"),
        ("update", "grad"),
    ):
        yield name, {array: ([address], 3, 1100)}, f"{array} has an unknown dtype code 3"
        yield name, {array: ([address], 1, 1099)}, f"{array} has rows of 1100 elements but"
        yield name, {array: ([address + 1], 1, 1100)}, f"{array} is not aligned to 2 bytes"
        yield name, {array: ([address, address], 1, 1100)}, "must have"
        yield name, {array: ([0], 1, 1100)}, f"{array} is a null pointer"
    yield "channel_scale", {"channels": -1}, "channels must not be negative"
    yield "residual_sums", {"kappa": math.nan}, "kappa must be finite"
    yield "combine", {"scale": math.inf}, "scale must be finite"
    yield "combine", {"rho_kappa": math.nan}, "rho_kappa must be finite"
    for scalar in ("step_size", "decay", "rho"):
        yield "update", {scalar: math.nan}, f"{scalar} must be finite"
    yield "update", {"grad": None}, "grad and factor go together"
    yield "update", {"factor": None}, "grad and factor go together"
    yield "update", {"first_row": -1}, "first_row and first_col must not be negative"


REJECTED = list(rejected())


@pytest.mark.parametrize(("name", "wrong", "match"), REJECTED)
def test_bad_argument_is_named_and_nothing_is_written(name, wrong, match):
    problem = PROBLEMS[name]()
    guarded = [value for value in vars(problem).values() if isinstance(value, Guarded)]
    before = [value.storage.clone() for value in guarded]
    with pytest.raises(ValueError, match=match):
        problem.run(**wrong)
    assert_same_bits([value.storage for value in guarded], before)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("update", {"param": "no matrix"}),
        ("update", {"factor": ["one"]}),
        ("combine", {"direction": 5}),
        ("combine", {"scale": "half"}),
        ("channel_scale", {"factor": [-8] * 3}),
    ],
)
def test_argument_of_a_wrong_type(name, wrong):
    with pytest.raises(TypeError):
        PROBLEMS[name]().run(**wrong)


def test_what_is_written_may_not_overlap():
    update, combine = PROBLEMS["update"](), PROBLEMS["combine"]()
    with pytest.raises(ValueError, match="overlaps"):
        update.run(product=update.param.matrices)
    with pytest.raises(ValueError, match="overlaps"):
        combine.run(combined=(combine.direction.addresses, 0, 1100))
    scale = Scale(1, 50)
    with pytest.raises(ValueError, match="overlaps"):
        scale.run(factor=scale.sums[0].addresses)
    combine.run(projected=combine.direction.addresses)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", PROBLEMS)
def test_missing_cuda_is_an_error_that_says_so(name):
    with pytest.raises(RuntimeError, match="CUDA"):
        PROBLEMS[name]().run(device=0)
