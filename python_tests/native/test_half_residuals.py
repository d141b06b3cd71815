"""Residuals that half-precision products form, as on a GPU; here on a CPU, which takes float32."""

import math

import pytest
import torch
from guarded import assert_same_bits
from ops.test_operations import SHAPES_AND_RANKS, Run, assert_as_accurate, error, steps_through
from pairs import pairwise

from lowrank_kernels.ops import AdamScalars, Side, native, prepare

SIDES = pytest.mark.parametrize("side", list(Side))
ADAM = AdamScalars(0.9, 0.999, 1e-6)


@pytest.fixture(autouse=True)
def products(monkeypatch):
    """In half precision on this device too; how many channels a block has is another matter."""
    monkeypatch.setattr(native, "FORMS_RESIDUALS_IN_HALF", {"cpu"})
    monkeypatch.setattr(native, "BATCH_ELEMENTS", {"cpu": 3000})
    seen = []
    form = native.Operations._form_residuals

    def form_and_tell(self, *arguments):
        seen.append(arguments)
        form(self, *arguments)

    monkeypatch.setattr(native.Operations, "_form_residuals", form_and_tell)
    return seen


def run_of(side, outside, shape=(96, 160), rank=24, seed=0):
    more = {"scale": 1.0, "outside": outside, "seed": seed}
    return Run("native", torch.bfloat16, shape, rank, side, "official", **more)


def residual_sq(matrix, grad):
    axis = 0 if matrix.left else 1
    return (grad - matrix.back(matrix.down(grad))).double().square().sum(axis)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("outside", [1.0, 0.1, 0.01, 0.001])
@SIDES
def test_at_most_twice_the_error_of_torch(side, outside, seed, products):
    """Of |e|^2 of each channel, by plain torch in bfloat16; nothing else is allowed for."""
    run = run_of(side, outside, seed=seed)
    matrices = Run.matrices([run], 0)
    sums = prepare(matrices, backend="native").project_moments(matrices, ADAM).sums
    assert len(products) == 1
    exact = residual_sq(run.oracle, run.grads[0].double())
    plain = error(residual_sq(run.plain, run.grads[0]), exact)
    assert error(sums.residual[0], exact) <= 2 * plain


ROWS = pairwise(SHAPES_AND_RANKS, Side, (("paper", 0.25), ("paper", 1.0), ("official", 1.0)))


@pytest.mark.parametrize(("shape_rank", "side", "form"), ROWS, ids=str)
def test_steps_against_the_oracle(shape_rank, side, form, products):
    form, scale = form
    run = steps_through("native", torch.bfloat16, *shape_rank, side, form, scale=scale)
    assert products
    assert_as_accurate(run)


@SIDES
def test_transposed_gradients(side, products):
    run = run_of(side, 1.0)
    run.grads = [grad.T.contiguous().T for grad in run.grads]
    for index in range(2):
        run.step(index)
    assert len(products) == 2
    assert_as_accurate(run)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@SIDES
def test_a_channel_that_is_not_finite_is_left_out(side, bad):
    run, clean = run_of(side, 1.0), run_of(side, 1.0)
    for one, value in ((run, bad), (clean, 0.0)):
        grad = one.grads[0].T if side is Side.LEFT else one.grads[0]
        grad[5] = value
        one.step(0)
    assert run.weight.isfinite().all()
    assert torch.equal(run.exp_avg_sq, clean.exp_avg_sq)
    assert torch.equal(run.limiter_norm, clean.limiter_norm)


@SIDES
def test_a_batch_is_its_matrices_one_by_one(side):
    alone, together = ([run_of(side, 0.1, seed=seed) for seed in range(3)] for _ in "ab")
    for run in alone:
        run.step(0)
    Run.step_batch(together, 0)
    for name in ("weight", "exp_avg", "exp_avg_sq", "limiter_norm"):
        pairs = ([getattr(run, name) for run in runs] for runs in (alone, together))
        assert_same_bits(*([one.reshape(1, -1) for one in tensors] for tensors in pairs))


@pytest.mark.parametrize("seed", range(8))
@SIDES
def test_of_a_gradient_in_the_span_no_norm_is_stored(side, seed):
    """What rounding leaves of its residual is far below the share that the limiter stores."""
    run = run_of(side, 0.0, seed=seed)
    run.step(0)
    assert float(run.limiter_norm) == -1


@pytest.mark.parametrize("kappa", [0.25, 0.5])
def test_a_small_kappa_needs_no_residual(kappa, products):
    run = run_of(Side.LEFT, 1.0)
    run.options["scale"] = kappa
    run.step(0)
    assert not products


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_a_gpu_takes_half_precision_here(device, monkeypatch):
    monkeypatch.undo()
    assert (device in native.FORMS_RESIDUALS_IN_HALF) == (device == "cuda")
