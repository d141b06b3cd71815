"""Residuals that half-precision products form, as on a GPU; here on a CPU, which takes float32."""

import math

import pytest
import torch
from ops.test_operations import SHAPES_AND_RANKS, Run, assert_as_accurate, error, steps_through
from pairs import pairwise

from lowrank_kernels.ops import AdamScalars, Side, foreach, native, prepare, products

SIDES = pytest.mark.parametrize("side", list(Side))
BACKENDS = pytest.mark.parametrize("backend", ["native", "foreach"])
ADAM = AdamScalars(0.9, 0.999, 1e-6)


@pytest.fixture(autouse=True)
def formed(monkeypatch):
    """In half precision on this device too, a few channels at a time; who formed them."""
    monkeypatch.setattr(products, "FAST_IN_HALF", {"cpu"})
    monkeypatch.setattr(native, "BATCH_ELEMENTS", {"cpu": 3000})
    monkeypatch.setattr(foreach, "BLOCK_ELEMENTS", {"cpu": 3000})
    calls = []
    for backend, name in ((native, "_form_residuals"), (foreach, "_residual_sq_in_half")):
        form = getattr(backend.Operations, name)

        def form_and_tell(*arguments, form=form, backend=backend):
            calls.append(backend)
            return form(*arguments)

        monkeypatch.setattr(backend.Operations, name, form_and_tell)
    return calls


def run_of(backend, side, outside, shape=(96, 160), rank=24, seed=0):
    more = {"scale": 1.0, "outside": outside, "seed": seed}
    return Run(backend, torch.bfloat16, shape, rank, side, "official", **more)


def residual_sq(matrix, grad):
    axis = 0 if matrix.left else 1
    return (grad - matrix.back(matrix.down(grad))).double().square().sum(axis)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("outside", [1.0, 0.1, 0.01, 0.001])
@SIDES
@BACKENDS
def test_at_most_twice_the_error_of_torch(backend, side, outside, seed, formed):
    """Of |e|^2 of each channel, by plain torch in bfloat16; nothing else is allowed for."""
    run = run_of(backend, side, outside, seed=seed)
    matrices = Run.matrices([run], 0)
    sums = prepare(matrices, backend=backend).project_moments(matrices, ADAM).sums
    assert len(formed) == 1
    exact = residual_sq(run.oracle, run.grads[0].double())
    plain = error(residual_sq(run.plain, run.grads[0]), exact)
    assert error(sums.residual[0], exact) <= 2 * plain


ROWS = pairwise(SHAPES_AND_RANKS, Side, (("paper", 0.25), ("paper", 1.0), ("official", 1.0)))


@pytest.mark.parametrize(("shape_rank", "side", "form"), ROWS, ids=str)
@BACKENDS
def test_steps_against_the_oracle(backend, shape_rank, side, form, formed):
    form, scale = form
    run = steps_through(backend, torch.bfloat16, *shape_rank, side, form, scale=scale)
    assert formed
    assert_as_accurate(run)


@SIDES
@BACKENDS
def test_transposed_gradients(backend, side, formed):
    run = run_of(backend, side, 1.0)
    run.grads = [grad.T.contiguous().T for grad in run.grads]
    for index in range(2):
        run.step(index)
    assert len(formed) == 2
    assert_as_accurate(run)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@SIDES
@BACKENDS
def test_a_channel_that_is_not_finite_is_left_out(backend, side, bad):
    run, clean = run_of(backend, side, 1.0), run_of(backend, side, 1.0)
    for one, value in ((run, bad), (clean, 0.0)):
        grad = one.grads[0].T if side is Side.LEFT else one.grads[0]
        grad[5] = value
        one.step(0)
    assert run.weight.isfinite().all()
    assert torch.equal(run.exp_avg_sq, clean.exp_avg_sq)
    assert torch.equal(run.limiter_norm, clean.limiter_norm)


@SIDES
@BACKENDS
def test_a_batch_is_its_matrices_one_by_one(backend, side):
    alone, together = ([run_of(backend, side, 0.1, seed=seed) for seed in range(3)] for _ in "ab")
    for run in alone:
        run.step(0)
    Run.step_batch(together, 0)
    for one, other in zip(alone, together, strict=True):
        for name in ("weight", "exp_avg", "exp_avg_sq", "limiter_norm"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("seed", range(8))
@SIDES
@BACKENDS
def test_of_a_gradient_in_the_span_no_norm_is_stored(backend, side, seed):
    """What rounding leaves of its residual is far below the share that the limiter stores."""
    run = run_of(backend, side, 0.0, seed=seed)
    run.step(0)
    assert float(run.limiter_norm) == -1


@pytest.mark.parametrize("kappa", [0.25, 0.5])
@BACKENDS
def test_a_small_kappa_needs_no_residual(backend, kappa, formed):
    run = run_of(backend, Side.LEFT, 1.0)
    run.options["scale"] = kappa
    run.step(0)
    assert not formed


def test_only_a_gpu_takes_half_precision_here(monkeypatch):
    monkeypatch.undo()
    grad = torch.empty(8, 8, dtype=torch.bfloat16)
    assert products.fast_in_half(grad, grad, "cuda")
    assert not products.fast_in_half(grad, grad, "cpu")
    assert not products.fast_in_half(grad, grad.float(), "cuda")
    assert not products.fast_in_half(grad.float(), grad.float(), "cuda")
    assert not products.fast_in_half(grad[::2, ::2], grad, "cuda")
