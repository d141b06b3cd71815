"""Every backend against the float64 oracle: at most twice the error of plain torch.

Plain torch is the literal step at the same precision. Where it happens to be exact (1 x 1), one
rounding of the result counts in its place.
"""

import pytest
import torch
from oracles.low_rank import Matrix, literal_step, low_rank_gradient, orthonormal

from lowrank_kernels.ops import (
    AdamScalars,
    Residual,
    Side,
    back_project_update,
    channel_scale,
    project_moments,
)
from lowrank_kernels.optim.schedule import step_scalars

STEPS = 3
FORMS = [None, "official", "paper"]
SHAPES_AND_RANKS = [
    ((1, 1), 1),
    ((1, 17), 1),
    ((17, 1), 1),
    ((7, 13), 5),
    ((37, 61), 1),
    ((61, 37), 13),
    ((48, 48), 16),
    ((64, 173), 64),
    ((5, 211), 3),
    ((211, 130), 64),
]
BACKEND_DTYPES = [
    ("reference", torch.float64),
    ("reference", torch.float32),
    ("reference", torch.bfloat16),
    ("native", torch.float32),
    ("native", torch.bfloat16),
    ("triton", torch.float32),
]


def _order(size, seed):
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def _reordered(matrix, side, seed):
    """The same step in another order of summation."""
    axis = 0 if side is Side.LEFT else 1
    return matrix.index_select(axis, _order(matrix.shape[axis], seed))


class Run:
    """The same steps through the package's operations and through the literal code."""

    def __init__(self, backend, dtype, shape, rank, side, form, scale=0.25, weight_decay=0.1):
        self.form, self.side, self.backend = form, side, backend
        rng = torch.Generator().manual_seed(sum(shape) + rank)
        weight = torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)
        size = shape[0] if side is Side.LEFT else shape[1]
        basis = orthonormal(size, rank, rng).to(dtype)
        self.grads = [low_rank_gradient(*shape, rng).to(dtype) for _ in range(STEPS)]
        self.options = {"lr": 0.02, "eps": 1e-6, "scale": scale, "weight_decay": weight_decay}
        moments = torch.promote_types(dtype, torch.float32)
        left = side is Side.LEFT
        self.oracle = Matrix(weight.double(), basis.double(), left, torch.float64)
        self.plain = Matrix(weight.clone(), basis, left, moments)
        self.reordered = [
            Matrix(_reordered(weight, side, seed), basis[_order(size, seed)], left, moments)
            for seed in range(3)
        ]
        self.weight, self.basis = weight.clone(), basis
        self.exp_avg = torch.zeros_like(self.plain.exp_avg)
        self.exp_avg_sq = torch.zeros_like(self.plain.exp_avg)
        self.limiter_norm = torch.zeros((), dtype=moments)
        self.energy = 0.0

    def step(self, index):
        grad = self.grads[index]
        literal_step(self.oracle, grad.double(), form=self.form, **self.options)
        literal_step(self.plain, grad, form=self.form, **self.options)
        for seed, plain in enumerate(self.reordered):
            literal_step(plain, _reordered(grad, self.side, seed), form=self.form, **self.options)
        group = {**self.options, "betas": (0.9, 0.999)}
        scalars = step_scalars(group, index + 1, self.form)
        projection = project_moments(
            grad,
            self.basis,
            self.side,
            self.exp_avg,
            self.exp_avg_sq,
            scalars.adam,
            scalars.residual,
            backend=self.backend,
        )
        factor = None
        if scalars.residual:
            factor = channel_scale(projection.sums, self.limiter_norm, backend=self.backend)
        back_project_update(
            self.weight,
            grad,
            self.basis,
            self.side,
            projection,
            scalars.residual,
            factor,
            scale=scalars.scale,
            step_size=scalars.step_size,
            decay=scalars.decay,
            backend=self.backend,
        )
        if factor is not None:
            unlimited = factor.unsqueeze(0 if self.side is Side.LEFT else 1) * grad
            self.energy = float(unlimited.double().square().sum())

    def outputs(self):
        yield "weight", self.weight, self.plain.weight, self.oracle.weight
        yield "exp_avg", self.exp_avg, self.plain.exp_avg, self.oracle.exp_avg
        yield "exp_avg_sq", self.exp_avg_sq, self.plain.exp_avg_sq, self.oracle.exp_avg_sq


def error(value, exact):
    return float(torch.linalg.norm(value.double() - exact))


def steps_through(*args, **kwargs):
    run = Run(*args, **kwargs)
    for index in range(STEPS):
        run.step(index)
    return run


@pytest.mark.parametrize("shape", SHAPES_AND_RANKS, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_against_oracle(backend, dtype, side, form, shape):
    run = steps_through(backend, dtype, *shape, side, form)
    for name, value, plain, exact in run.outputs():
        # In float64 both errors are roundings of an oracle that rounds as much itself.
        unit = 1e-13 if dtype is torch.float64 else torch.finfo(value.dtype).eps
        rounding = unit * float(torch.linalg.norm(exact))
        assert error(value, exact) <= 2 * max(error(plain, exact), rounding), name


@pytest.mark.parametrize("shape", SHAPES_AND_RANKS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("form", ["official", "paper"])
@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_limiter_norm_against_oracle(backend, dtype, side, form, scale, shape):
    """A basis that spans everything leaves 0: the floor is a rounding of |phi' (x) G|^2.

    phi divides by |r|, which may be a small sum of large terms, so the error of plain torch depends
    on the order of that sum: its worst over a few orders counts.
    """
    run = steps_through(backend, dtype, *shape, side, form, scale=scale)
    assert_limiter_norm(run, dtype)


def assert_limiter_norm(run, dtype):
    exact = float(run.oracle.limiter_norm) ** 2
    plains = [run.plain, *run.reordered]
    plain = max(abs(float(matrix.limiter_norm) ** 2 - exact) for matrix in plains)
    got = abs(float(run.limiter_norm) ** 2 - exact)
    unit = 1e-13 if dtype is torch.float64 else torch.finfo(dtype).eps
    assert got <= 2 * max(plain, unit * run.energy)


@pytest.mark.parametrize("outside", [0.1, 0.01, 0.001])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_limiter_norm_of_a_gradient_near_the_span_of_the_basis(
    backend, dtype, side, scale, outside, rng
):
    """At scale 1 all but `outside` of the gradient cancels in the residual."""
    run = Run(backend, dtype, (96, 160), 24, side, "official", scale=scale)
    low = torch.randn(run.exp_avg.shape, generator=rng, dtype=torch.float64)
    inside = run.oracle.back(low)
    noise = torch.randn(inside.shape, generator=rng, dtype=torch.float64)
    noise *= outside * torch.linalg.norm(inside) / torch.linalg.norm(noise)
    run.grads[0] = (inside + noise).to(dtype)
    run.step(0)
    exact = float(run.oracle.limiter_norm)
    plain = abs(float(run.plain.limiter_norm) - exact)
    # A literal residual rounds as the oracle's does. The identity subtracts squares instead, so its
    # floor is a rounding of the energy that cancels.
    literal = backend == "reference" or (dtype is torch.bfloat16 and scale == 1.0)
    unit = 1e-13 if dtype is torch.float64 else torch.finfo(dtype).eps
    floor = unit * (exact if literal else run.energy / exact)
    assert abs(float(run.limiter_norm) - exact) <= 2 * max(plain, floor)


LAYOUTS = {
    "transposed": lambda rows, cols: torch.empty(cols, rows).T,
    "every other row": lambda rows, cols: torch.empty(2 * rows, cols)[::2],
    "every other column": lambda rows, cols: torch.empty(rows, 2 * cols)[:, ::2],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_strided_weights_and_gradients(backend, dtype, side, layout, form):
    def strided(matrix):
        return LAYOUTS[layout](*matrix.shape).to(dtype).copy_(matrix)

    dense = steps_through(backend, dtype, (37, 61), 13, side, form)
    run = Run(backend, dtype, (37, 61), 13, side, form)
    run.weight, run.grads = strided(run.weight), [strided(grad) for grad in run.grads]
    weight = run.weight
    for index in range(STEPS):
        run.step(index)
    assert run.weight is weight
    rounding = torch.finfo(dtype).eps * float(torch.linalg.norm(dense.weight))
    assert error(weight, dense.weight.double()) <= 2 * rounding


@pytest.mark.parametrize("rows_cols", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_empty(backend, dtype, side, rows_cols):
    run = steps_through(backend, dtype, rows_cols, 0, side, "official")
    assert run.weight.shape == rows_cols
    assert float(run.limiter_norm) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_channel_with_a_non_finite_gradient_is_left_out(backend, dtype, side, form, bad):
    """Nothing of it changes, and the other channels are as if it were not there."""
    shape, rank, channel = (37, 61), 13, 5

    def channel_of(tensor):
        return tensor[:, channel] if side is Side.LEFT else tensor[channel]

    poisoned, clean = (Run(backend, dtype, shape, rank, side, form, weight_decay=0) for _ in "ab")
    for run in (poisoned, clean):
        run.step(0)
    channel_of(poisoned.grads[1])[3] = bad
    channel_of(clean.grads[1]).zero_()
    before = [channel_of(t).clone() for t in (poisoned.weight, poisoned.exp_avg_sq)]
    for run in (poisoned, clean):
        run.step(1)
    assert torch.equal(channel_of(poisoned.weight), before[0])
    assert torch.equal(channel_of(poisoned.exp_avg_sq), before[1])
    for name in ("weight", "exp_avg", "exp_avg_sq"):
        tensors = [getattr(run, name).clone() for run in (poisoned, clean)]
        for tensor in tensors:
            channel_of(tensor).zero_()
        assert torch.equal(*tensors), name
    assert torch.equal(poisoned.limiter_norm, clean.limiter_norm)


@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_limiter_bounds_growth_and_skips_zero_and_non_finite_norms(backend, dtype):
    run = Run(backend, dtype, (48, 48), 16, Side.RIGHT, "official")
    run.grads = [g * factor for g, factor in zip(run.grads, (1, 0, 100), strict=True)]
    run.step(0)
    first = float(run.limiter_norm)
    assert first > 0
    run.step(1)
    assert float(run.limiter_norm) == first
    run.grads[1].fill_(float("nan"))
    run.step(1)
    assert float(run.limiter_norm) == first
    run.step(2)
    assert float(run.limiter_norm) == pytest.approx(1.01 * (first + 1e-8), rel=1e-6)


def test_wrong_arguments_name_the_argument_and_write_nothing():
    run = Run("reference", torch.float32, (8, 12), 4, Side.LEFT, "official")
    adam = AdamScalars(0.9, 0.999, 1e-6)
    good = {
        "grad": run.grads[0],
        "basis": run.basis,
        "side": Side.LEFT,
        "exp_avg": run.exp_avg,
        "exp_avg_sq": run.exp_avg_sq,
    }
    wrong = [
        ("grad", torch.ones(8), ValueError),
        ("grad", torch.ones(8, 12, dtype=torch.int32), ValueError),
        ("basis", torch.ones(12, 4), ValueError),
        ("exp_avg", torch.zeros(12, 4), ValueError),
        ("exp_avg", torch.zeros(4, 12, dtype=torch.bfloat16), TypeError),
        ("exp_avg", torch.zeros(12, 4).T, ValueError),
        ("exp_avg_sq", torch.zeros(4, 12, dtype=torch.float64), TypeError),
        ("exp_avg_sq", torch.zeros(4, 12, device="meta"), ValueError),
    ]
    for name, value, exception in wrong:
        with pytest.raises(exception, match=name):
            project_moments(**{**good, name: value}, adam=adam)
    assert not run.exp_avg.any()

    projection = project_moments(**good, adam=adam, residual=Residual(0.25, 1.0))
    with pytest.raises(TypeError, match="limiter_norm"):
        channel_scale(projection.sums, torch.zeros((), dtype=torch.float64))
    weight = run.weight.clone()
    scalars = {"scale": 0.25, "step_size": 0.1, "decay": 0.0}
    with pytest.raises(ValueError, match="residual and factor"):
        back_project_update(
            weight, run.grads[0], run.basis, Side.LEFT, projection, Residual(0.25, 1.0), **scalars
        )
    with pytest.raises(ValueError, match="factor"):
        back_project_update(
            weight,
            run.grads[0],
            run.basis,
            Side.LEFT,
            projection,
            Residual(0.25, 1.0),
            torch.ones(8),
            **scalars,
        )
    assert torch.equal(weight, run.weight)
