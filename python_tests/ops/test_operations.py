"""Every backend against the float64 oracle: at most twice the error of plain torch.

Plain torch is the literal step at the same precision. The gradients are such that no error is
amplified: what remains is how many roundings there are, and not which.
"""

import math

import pytest
import torch
from devices import GPU, device_of
from oracles.low_rank import Matrix, balanced_gradients, literal_step, orthonormal
from pairs import pairwise

from lowrank_kernels.ops import AdamScalars, Matrices, Residual, Scalars, Side, prepare
from lowrank_kernels.ops.reference import stochastically_rounded
from lowrank_kernels.optim.batches import step_scalars
from lowrank_kernels.optim.outside import Outside

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
    ("foreach", torch.float64),
    ("foreach", torch.float32),
    ("foreach", torch.bfloat16),
    ("foreach", torch.float16),
    ("native", torch.float32),
    ("native", torch.bfloat16),
    ("triton", torch.float32),
    pytest.param("triton", torch.bfloat16, marks=GPU),
]


def take_step(operations, matrices, scalars):
    """The three operations; returns phi'."""
    projection = operations.project_moments(matrices, scalars.adam)
    factor = None
    if matrices.residual is not None:
        factor = operations.channel_scale(matrices, projection.sums)
    operations.back_project_update(matrices, projection, factor, scalars)
    return factor


class Run:
    """The same steps through the package's operations and through the literal code."""

    def __init__(
        self,
        backend,
        dtype,
        shape,
        rank,
        side,
        form,
        scale=0.25,
        weight_decay=0.125,
        seed=0,
        outside=1.0,
    ):
        self.form, self.side, self.backend = form, side, backend
        self.device = device_of(backend)
        rng = torch.Generator().manual_seed(1000 * seed + sum(shape) + rank)
        weight = torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)
        left = side is Side.LEFT
        basis = orthonormal(shape[0] if left else shape[1], rank, rng)
        grads = balanced_gradients(shape, basis, left, STEPS, rng, outside)
        basis, self.grads = basis.to(dtype), [grad.to(self.device, dtype) for grad in grads]
        # Steps as long as the weights, so that an error of a step is one of the weight. Scale and
        # decay are exact in any dtype: their roundings would be the same in all elements.
        self.options = {"lr": 1.0, "eps": 1e-6, "scale": scale, "weight_decay": weight_decay}
        moments = torch.promote_types(dtype, torch.float32)
        self.oracle = Matrix(weight.double(), basis.double(), left, torch.float64)
        self.plain = Matrix(weight.clone(), basis, left, moments)
        self.weight, self.basis = weight.to(self.device, copy=True), basis.to(self.device)
        self.exp_avg = torch.zeros_like(self.plain.exp_avg, device=self.device)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        self.limiter_norm = torch.zeros((), dtype=moments, device=self.device)

    def step(self, index):
        """One step of the package's operations and of the literal code."""
        self.literal_step(index)
        Run.step_batch([self], index)

    def literal_step(self, index):
        grad = self.grads[index].cpu()
        literal_step(self.oracle, grad.double(), form=self.form, **self.options)
        literal_step(self.plain, grad, form=self.form, **self.options)

    @staticmethod
    def matrices(runs, index):
        """Equal matrices as one batch, with the gradients of a step."""
        first = runs[0]
        names = ("weight", "basis", "exp_avg", "exp_avg_sq", "limiter_norm")
        params, *rest = ([getattr(run, name) for run in runs] for name in names)
        grads = [run.grads[index] for run in runs]
        residual = Outside(first.form).numbers(first.options["scale"], first.weight.shape)
        return Matrices(first.side, residual, params, grads, *rest)

    @staticmethod
    def step_batch(runs, index, device_scalars=False):
        """One step of the package's operations on equal matrices; returns phi'."""
        first, matrices = runs[0], Run.matrices(runs, index)
        step = torch.full((len(runs),), index + 1.0) if device_scalars else index + 1
        group = {**first.options, "betas": (0.9, 0.999)}
        scalars = step_scalars(group, step, first.form == "paper")
        return take_step(prepare(matrices, backend=first.backend), matrices, scalars)

    def outputs(self):
        for name in ("weight", "exp_avg", "exp_avg_sq"):
            yield (
                name,
                getattr(self, name).cpu(),
                *(getattr(literal, name) for literal in (self.plain, self.oracle)),
            )


def error(value, exact):
    return float(torch.linalg.norm(value.double() - exact))


def steps_through(*args, **kwargs):
    run = Run(*args, **kwargs)
    for index in range(STEPS):
        run.step(index)
    return run


def assert_as_accurate(run):
    """W, M and V, and the square of the norm that the limiter stored.

    Torch may be lucky in a single number: eight roundings of the largest are allowed. |S|^2 is one
    number, whose error depends on what cancels in it, |phi (x) G|^2.
    """
    for name, value, plain, exact in run.outputs():
        if exact.numel():
            roundings = 8 * unit(value.dtype) * float(exact.abs().max())
            # In float16 plain torch ends in NaN where the limiter divides by what underflows.
            of_plain = error(plain, exact) if plain.isfinite().all() else 0.0
            assert error(value, exact) <= 2 * of_plain + roundings, name
    if run.form and run.weight.numel():
        norms = (run.limiter_norm, run.plain.limiter_norm, run.oracle.limiter_norm)
        # A basis that spans everything leaves nothing to store, which is -1.
        got, plain, exact = (max(float(norm), 0.0) ** 2 for norm in norms)
        scaled = run.oracle.factor * run.grads[run.oracle.step - 1].cpu().double()
        energy = float(scaled.square().sum())
        of_plain = abs(plain - exact) if math.isfinite(plain) else 0.0
        allowed = 2 * max(of_plain, unit(run.weight.dtype) * energy)
        roundings = 8 * unit(run.limiter_norm.dtype) * energy
        assert abs(got - exact) <= allowed + roundings, "limiter_norm"


def unit(dtype):
    """A rounding; in float64 those of the oracle, which plain torch then is, count too."""
    return 1e-13 if dtype is torch.float64 else torch.finfo(dtype).eps


# Scale 1 leaves nothing of what a basis spans.
ROWS = pairwise(SHAPES_AND_RANKS, Side, FORMS, (1.0, 0.25))


@pytest.mark.parametrize(("shape_rank", "side", "form", "scale"), ROWS, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_against_oracle(backend, dtype, shape_rank, side, form, scale):
    assert_as_accurate(steps_through(backend, dtype, *shape_rank, side, form, scale=scale))


@pytest.mark.parametrize(("scale", "outside"), [(1.0, 0.1), (1.0, 0.001), (0.25, 0.001)])
@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_residual_norms_of_a_gradient_near_the_span_of_the_basis(
    backend, dtype, side, scale, outside
):
    """At scale 1 all but `outside` of the gradient cancels in the residual."""
    run = Run(backend, dtype, (96, 160), 24, side, "official", scale=scale, outside=outside)
    grad, axis = run.grads[0].cpu(), 0 if side is Side.LEFT else 1

    def residual_sq(matrix, grad):
        return (grad - scale * matrix.back(matrix.down(grad))).double().square().sum(axis)

    matrices = Run.matrices([run], 0)
    operations = prepare(matrices, backend=backend)
    sums = operations.project_moments(matrices, AdamScalars(0.9, 0.999, 1e-6)).sums
    exact = residual_sq(run.oracle, grad.double())
    plain = error(residual_sq(run.plain, grad), exact)
    grad_sq = grad.double().square().sum(axis)
    # The identity subtracts squares, so what counts is a rounding of those. The residual itself is
    # formed in float32 at least.
    if backend == "reference" or (dtype is torch.bfloat16 and scale == 1.0):
        rounding = unit(run.exp_avg.dtype) * torch.linalg.norm((grad_sq * exact).sqrt())
    else:
        rounding = unit(dtype) * torch.linalg.norm(grad_sq)
    got = sums.residual.reshape(-1, len(exact)).sum(0).cpu()
    assert error(got, exact) <= 2 * max(plain, float(rounding))


LAYOUTS = {
    "transposed": lambda like, rows, cols: like.new_empty(cols, rows).T,
    "every other row": lambda like, rows, cols: like.new_empty(2 * rows, cols)[::2],
    "every other column": lambda like, rows, cols: like.new_empty(rows, 2 * cols)[:, ::2],
}


@pytest.mark.parametrize(("layout", "form", "side"), pairwise(LAYOUTS, FORMS, Side), ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_strided_weights_and_gradients(backend, dtype, side, layout, form):
    def strided(matrix):
        return LAYOUTS[layout](matrix, *matrix.shape).copy_(matrix)

    run = Run(backend, dtype, (37, 61), 13, side, form)
    run.weight, run.grads = strided(run.weight), [strided(grad) for grad in run.grads]
    weight = run.weight
    for index in range(STEPS):
        run.step(index)
    assert run.weight is weight
    assert_as_accurate(run)


@pytest.mark.parametrize("rows_cols", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_empty(backend, dtype, side, rows_cols):
    run = steps_through(backend, dtype, rows_cols, 0, side, "official")
    assert run.weight.shape == rows_cols
    assert float(run.limiter_norm) == 0


@pytest.mark.parametrize(
    ("bad", "form", "side"), pairwise((math.nan, math.inf, -math.inf), FORMS, Side), ids=str
)
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
    names = ("weight", "exp_avg", "exp_avg_sq")
    before = [channel_of(getattr(poisoned, name)).clone() for name in names]
    for run in (poisoned, clean):
        run.step(1)
    for name, unchanged in zip(names, before, strict=True):
        assert torch.equal(channel_of(getattr(poisoned, name)), unchanged), name
        tensors = [getattr(run, name).clone() for run in (poisoned, clean)]
        for tensor in tensors:
            channel_of(tensor).zero_()
        assert torch.equal(*tensors), name
    assert torch.equal(poisoned.limiter_norm, clean.limiter_norm)


@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_limiter_bounds_growth_and_skips_zero_and_non_finite_norms(backend, dtype):
    run = Run(backend, dtype, (48, 48), 16, Side.RIGHT, "official")
    larger = Run(backend, dtype, (48, 48), 16, Side.RIGHT, "official", outside=100.0)
    run.grads = [run.grads[0], 0 * run.grads[1], larger.grads[2]]
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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_a_batch_is_its_matrices_one_by_one(backend, dtype, side, form):
    def runs():
        made = [Run(backend, dtype, (37, 61), 13, side, form) for _ in range(3)]
        for factor, run in enumerate(made, start=1):
            run.grads = [factor * grad for grad in run.grads]
            run.step(0)
        return made

    alone, together = runs(), runs()
    for run in alone:
        run.step(1)
    Run.step_batch(together, 1)
    for one, other in zip(alone, together, strict=True):
        for name in ("weight", "exp_avg", "exp_avg_sq", "limiter_norm"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", ["reference", "foreach"])
def test_scalars_on_the_device_give_the_same_step(backend, dtype, form):
    """As numbers and as tensors with one value a matrix, which need not be equal.

    1 - beta^t is as wrong as beta^t, which may be another in its last bit, 1 / (1 - beta) times.
    """
    numbers = steps_through(backend, dtype, (37, 61), 13, Side.LEFT, form)
    tensors = [Run(backend, dtype, (37, 61), 13, Side.LEFT, form) for _ in range(2)]
    for index in range(STEPS):
        Run.step_batch(tensors, index, device_scalars=True)
    for run in tensors:
        for name in ("weight", "exp_avg", "exp_avg_sq", "limiter_norm"):
            got, expected = getattr(run, name), getattr(numbers, name).double()
            roundings = 4 * torch.finfo(dtype).eps + torch.finfo(torch.float64).eps / (1 - 0.999)
            assert error(got, expected) <= roundings * float(torch.linalg.norm(expected)), name


def rounded(values, side=Side.RIGHT, salt=7, step=3):
    return stochastically_rounded(values, side, salt, step)


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
    for rounding, salts in (("nearest", None), ("stochastic", (5,))):
        weights[rounding] = torch.ones(64, 48, dtype=torch.bfloat16)
        state = ([torch.zeros(64, 4)], [torch.zeros(64, 4)], [torch.zeros(())])
        matrices = Matrices(
            Side.RIGHT, Residual(0.0, 1.0), [weights[rounding]], [grad], [basis], *state, salts
        )
        scalars = Scalars(AdamScalars(0.9, 0.999, 1e-6), 0.0, step_size=1.0, decay=0.0, step=1)
        operations = prepare(matrices)
        projection = operations.project_moments(matrices, scalars.adam)
        factor = torch.full((1, 64), 2.0**-12)
        operations.back_project_update(matrices, projection, factor, scalars)
    assert (weights["nearest"] == 1).all()
    assert float(weights["stochastic"].float().mean()) == pytest.approx(1 - 2**-12, abs=5e-5)
