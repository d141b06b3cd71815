"""Every backend against the float64 oracle: at most twice the error of plain torch.

Plain torch is the literal step at the same precision. Where it happens to be exact (1 x 1), one
rounding of the result counts in its place.
"""

import pytest
import torch
from oracles.low_rank import Matrix, literal_step, low_rank_gradient, orthonormal

from lowrank_kernels.ops import (
    AdamScalars,
    Noise,
    Residual,
    Side,
    back_project_update,
    channel_scale,
    project_moments,
)
from lowrank_kernels.ops.reference import stochastically_rounded
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
        """One step of the package's operations and of the literal code."""
        grad = self.grads[index]
        literal_step(self.oracle, grad.double(), form=self.form, **self.options)
        literal_step(self.plain, grad, form=self.form, **self.options)
        for seed, plain in enumerate(self.reordered):
            literal_step(plain, _reordered(grad, self.side, seed), form=self.form, **self.options)
        factor = Run.step_group([self], index)
        if factor is not None:
            unlimited = factor[0].unsqueeze(0 if self.side is Side.LEFT else 1) * grad
            self.energy = float(unlimited.double().square().sum())

    @staticmethod
    def step_group(runs, index, device_scalars=False):
        """One step of the package's operations on equal matrices; returns phi'."""
        first = runs[0]
        side, backend, grads = first.side, first.backend, [run.grads[index] for run in runs]
        bases = [run.basis for run in runs]
        step = torch.full((len(runs),), index + 1.0) if device_scalars else index + 1
        scalars = step_scalars(
            {**first.options, "betas": (0.9, 0.999)}, step, first.form, first.form == "paper"
        )
        projection = project_moments(
            grads,
            bases,
            side,
            [run.exp_avg for run in runs],
            [run.exp_avg_sq for run in runs],
            scalars.adam,
            scalars.residual,
            backend=backend,
        )
        factor = None
        if scalars.residual:
            norms = [run.limiter_norm for run in runs]
            factor = channel_scale(projection.sums, norms, backend=backend)
            outside = projection.sums.residual
            outside = outside.sum(1) if outside.dim() == 3 else outside
            for run, phi, residual_sq in zip(runs, factor, outside, strict=True):
                run.residual_norm = float((phi.square() * residual_sq).double().sum().sqrt())
        back_project_update(
            [run.weight for run in runs],
            grads,
            bases,
            side,
            projection,
            scalars.residual,
            factor,
            scale=scalars.scale,
            step_size=scalars.step_size,
            decay=scalars.decay,
            backend=backend,
        )
        return factor

    def outputs(self):
        yield "weight", self.weight, self.plain.weight, self.oracle.weight
        yield "exp_avg", self.exp_avg, self.plain.exp_avg, self.oracle.exp_avg
        yield "exp_avg_sq", self.exp_avg_sq, self.plain.exp_avg_sq, self.oracle.exp_avg_sq

    def plain_error(self, name):
        """The worst of plain torch over a few orders of summation.

        phi divides by |r|, which may be a small sum of large terms: one order alone may happen to
        be right where any other is not.
        """
        exact = getattr(self.oracle, name)
        errors = [error(getattr(self.plain, name), exact)]
        for seed, plain in enumerate(self.reordered):
            expected = _reordered(exact, self.side, seed) if name == "weight" else exact
            errors.append(error(getattr(plain, name), expected))
        return max(errors)


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
    for name, value, _, exact in run.outputs():
        # In float64 both errors are roundings of an oracle that rounds as much itself.
        unit = 1e-13 if dtype is torch.float64 else torch.finfo(value.dtype).eps
        rounding = unit * float(torch.linalg.norm(exact))
        assert error(value, exact) <= 2 * max(run.plain_error(name), rounding), name


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
    """At scale 1 all but `outside` of the gradient cancels in the residual, and what is left is too
    little to be stored. At the first step the limiter lets everything through.
    """
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
    assert abs(run.residual_norm - exact) <= 2 * max(plain, floor)


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
        "grads": [run.grads[0]],
        "bases": [run.basis],
        "side": Side.LEFT,
        "exp_avgs": [run.exp_avg],
        "exp_avg_sqs": [run.exp_avg_sq],
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
    plural = {"grad": "grads", "basis": "bases", "exp_avg": "exp_avgs", "exp_avg_sq": "exp_avg_sqs"}
    for name, value, exception in wrong:
        with pytest.raises(exception, match=name):
            project_moments(**{**good, plural[name]: [value]}, adam=adam)
    assert not run.exp_avg.any()

    projection = project_moments(**good, adam=adam, residual=Residual(0.25, 1.0))
    with pytest.raises(TypeError, match="limiter_norm"):
        channel_scale(projection.sums, [torch.zeros((), dtype=torch.float64)])
    weight = run.weight.clone()
    fira = (run.grads[:1], [run.basis], Side.LEFT, projection, Residual(0.25, 1.0))
    scalars = {"scale": 0.25, "step_size": 0.1, "decay": 0.0}
    with pytest.raises(ValueError, match="residual and factor"):
        back_project_update([weight], *fira, **scalars)
    with pytest.raises(ValueError, match="factor"):
        back_project_update([weight], *fira, torch.ones(1, 8), **scalars)
    with pytest.raises(TypeError, match="stochastic rounding serves bfloat16"):
        back_project_update([weight], *fira, torch.ones(1, 12), noise=Noise((1,), 1), **scalars)
    with pytest.raises(ValueError, match="overlap"):
        back_project_update([weight[:1].expand(8, 12)], *fira, torch.ones(1, 12), **scalars)
    assert torch.equal(weight, run.weight)


def test_matrices_of_a_group_have_to_be_alike():
    grads, basis = [torch.ones(8, 12), torch.ones(8, 12)], torch.ones(8, 4)
    moments = [torch.zeros(4, 12), torch.zeros(4, 12)]

    def project(**changed):
        arguments = {"grads": grads, "bases": [basis] * 2, "exp_avgs": moments, **changed}
        adam = AdamScalars(0.9, 0.999, 1e-6)
        project_moments(**arguments, side=Side.LEFT, exp_avg_sqs=moments, adam=adam)

    with pytest.raises(ValueError, match=r"grad 1 must have shape \(8, 12\)"):
        project(grads=[grads[0], torch.ones(7, 12)])
    with pytest.raises(ValueError, match=r"grad 1 must have the strides .* \(12, 1\)"):
        project(grads=[grads[0], torch.ones(12, 8).T])
    with pytest.raises(TypeError, match=r"basis 1 must be torch.float32"):
        project(bases=[basis, basis.double()])
    with pytest.raises(ValueError, match="basis: a group needs 2 tensors, got 1"):
        project(bases=[basis])
    with pytest.raises(ValueError, match="grad: a group needs at least 1"):
        project(grads=[])
    assert not any(moment.any() for moment in moments)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_a_group_is_its_matrices_one_by_one(backend, dtype, side, form):
    def runs():
        made = [Run(backend, dtype, (37, 61), 13, side, form) for _ in range(3)]
        for factor, run in enumerate(made, start=1):
            run.grads = [factor * grad for grad in run.grads]
            run.step(0)
        return made

    alone, together = runs(), runs()
    for run in alone:
        run.step(1)
    Run.step_group(together, 1)
    for one, other in zip(alone, together, strict=True):
        for name in ("weight", "exp_avg", "exp_avg_sq", "limiter_norm"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scalars_on_the_device_give_the_same_step(dtype, form):
    """As numbers and as tensors with one value a matrix, which need not be equal."""
    numbers = steps_through("reference", dtype, (37, 61), 13, Side.LEFT, form)
    tensors = [Run("reference", dtype, (37, 61), 13, Side.LEFT, form) for _ in range(2)]
    for index in range(STEPS):
        Run.step_group(tensors, index, device_scalars=True)
    for run in tensors:
        for name in ("weight", "exp_avg", "exp_avg_sq", "limiter_norm"):
            got, expected = getattr(run, name), getattr(numbers, name)
            torch.testing.assert_close(got, expected, rtol=4 * torch.finfo(dtype).eps, atol=0.0)


def rounded(values, side=Side.RIGHT, salt=7, step=3):
    return stochastically_rounded(values, side, Noise((salt,), step), 0)


def test_stochastic_rounding_is_unbiased_and_reproducible():
    """The mean over many draws lies within 5 standard errors of the value."""
    rng = torch.Generator().manual_seed(0)
    values = torch.randn(64, 64, generator=rng)
    below = (values.view(torch.int32) & -0x10000).view(torch.float32)
    above = ((values.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    draws = torch.stack([rounded(values, step=step).double() for step in range(2000)])
    assert ((draws == below) | (draws == above)).all()
    assert torch.equal(draws[3], rounded(values).double())
    spread = (above - below).double().abs()
    share = (values - below).double().abs() / spread
    deviation = spread * (share * (1 - share) / len(draws)).sqrt()
    error = (draws.mean(0) - values.double()).abs()
    assert (error <= 5 * deviation + 1e-9 * spread).all()
    overall = (draws.mean(0) - values.double()).sum().abs()
    assert overall <= 5 * deviation.square().sum().sqrt()


def test_stochastic_rounding_keeps_what_bfloat16_holds():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = every.float().view(256, 256)
    got = rounded(values)
    assert torch.equal(got[~values.isnan()], values[~values.isnan()])
    assert got[values.isnan()].isnan().all()
    # What tells these from Inf lies in the bits that bfloat16 drops, or would carry into the sign.
    nan = torch.tensor([[0x7F800001, 0x7FFFFFFF, -0x7FFFFF, -1]], dtype=torch.int32)
    assert rounded(nan.view(torch.float32)).isnan().all()


def test_stochastic_rounding_differs_between_matrices_steps_sides_and_elements():
    values = torch.full((64, 64), 1 + 2**-8)  # halfway between two neighbours
    base = rounded(values)
    for other in (rounded(values, salt=8), rounded(values, step=4)):
        assert 0.4 < float((base != other).float().mean()) < 0.6
    assert torch.equal(rounded(values, Side.LEFT), base.T)
    ups = (base > 1).float()
    for lines in (ups.mean(0), ups.mean(1)):
        assert (lines - 0.5).abs().max() < 5 * 0.5 / 8


def test_bfloat16_weights_move_in_the_mean_under_stochastic_rounding():
    """Steps of 2^-12 on weights of 1 round to nothing, or move a 16th of them by 2^-8."""
    grad, basis = torch.ones(64, 48), torch.zeros(48, 4)
    basis[:4] = torch.eye(4)
    weights = {}
    for rounding, noise in (("nearest", None), ("stochastic", Noise((5,), 1))):
        weights[rounding] = torch.ones(64, 48, dtype=torch.bfloat16)
        moments = [[torch.zeros(64, 4)] for _ in range(2)]
        arguments = ([grad], [basis], Side.RIGHT)
        adam, residual = AdamScalars(0.9, 0.999, 1e-6), Residual(0.0, 1.0)
        projection = project_moments(*arguments, *moments, adam, residual)
        back_project_update(
            [weights[rounding]],
            *arguments,
            projection,
            residual,
            torch.full((1, 64), 2.0**-12),
            scale=0.0,
            step_size=1.0,
            decay=0.0,
            noise=noise,
        )
    assert (weights["nearest"] == 1).all()
    assert float(weights["stochastic"].float().mean()) == pytest.approx(1 - 2**-12, abs=5e-5)
