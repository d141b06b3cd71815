"""Operation 1 where gradients arrive projected: R in the place of G, everything else as ever."""

import math

import pytest
import torch
from ops.test_operations import (
    BACKEND_DTYPES,
    LAYOUTS,
    SHAPES_AND_RANKS,
    STEPS,
    Run,
    assert_as_accurate,
    take_step,
)
from ops.test_prepared import SERVED, elsewhere, in_one_place
from oracles.low_rank import literal_step
from pairs import pairwise
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_kernels.ops import AdamScalars, Matrices, Scalars, Side, prepare
from lowrank_kernels.ops.codes import FORMATS, channel_groups, new_stored
from lowrank_kernels.ops.dry import meta_stands_for
from lowrank_kernels.optim.batches import step_scalars

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SALTS = (7, 2**32 - 1, 11)


class Given(Run):
    """Steps of GaLore on gradients that arrive projected, in a dtype of their own."""

    def __init__(self, backend, dtype, shape, rank, side, *, grad_dtype=None, **options):
        super().__init__(backend, dtype, shape, rank, side, None, **options)
        grads = [self.oracle.down(grad.cpu().double()) for grad in self.grads]
        self.grads = [grad.to(self.device, grad_dtype or dtype).contiguous() for grad in grads]

    def literal_step(self, index):
        grad = self.grads[index].cpu()
        for matrix, own in ((self.oracle, grad.double()), (self.plain, grad)):
            literal_step(matrix, own, form=None, projected=True, **self.options)

    def step(self, index):
        self.literal_step(index)
        Given.step_batch([self], index)

    @staticmethod
    def matrices(runs, index):
        return Run.matrices(runs, index)._replace(limiter_norms=[], projected=True)

    @staticmethod
    def step_batch(runs, index):
        first, matrices = runs[0], Given.matrices(runs, index)
        group = {**first.options, "betas": (0.9, 0.999)}
        take_step(
            prepare(matrices, backend=first.backend),
            matrices,
            step_scalars(group, index + 1, False),
        )


ROWS = pairwise(SHAPES_AND_RANKS, Side, (*DTYPES, None))


@pytest.mark.parametrize(("shape_rank", "side", "grad_dtype"), ROWS, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_against_oracle(backend, dtype, shape_rank, side, grad_dtype):
    """In the weight's dtype or another one; it is not written."""
    run = Given(backend, dtype, *shape_rank, side, grad_dtype=grad_dtype)
    before = [grad.clone() for grad in run.grads]
    for index in range(STEPS):
        run.step(index)
    assert_as_accurate(run)
    assert all(map(torch.equal, run.grads, before))


@pytest.mark.parametrize(("layout", "side"), pairwise(LAYOUTS, Side), ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_strided_weights(backend, dtype, side, layout):
    run = Given(backend, dtype, (37, 61), 13, side)
    run.weight = LAYOUTS[layout](run.weight, *run.weight.shape).copy_(run.weight)
    for index in range(STEPS):
        run.step(index)
    assert_as_accurate(run)


@pytest.mark.parametrize("rows_cols", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_empty(backend, dtype, side, rows_cols):
    run = Given(backend, dtype, rows_cols, 0, side)
    run.step(0)
    assert run.weight.shape == rows_cols


BAD = [
    (torch.float32, math.nan),
    (torch.float32, math.inf),
    (torch.float32, -(2.0**64)),
    (torch.bfloat16, math.inf),
    (torch.bfloat16, 2.0**64),
    (torch.float16, math.nan),
    (torch.float16, -math.inf),
]


@pytest.mark.parametrize(("bad_in_dtype", "side"), pairwise(BAD, Side), ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_an_entry_without_a_finite_square_is_left_out(backend, dtype, side, bad_in_dtype):
    """It keeps its moments and moves nothing, and all others are as if it were not there."""
    grad_dtype, bad = bad_in_dtype
    if dtype is torch.float64 and math.isfinite(bad):
        grad_dtype, bad = torch.float64, 2.0**512
    poisoned, clean = (
        Given(backend, dtype, (37, 61), 13, side, grad_dtype=grad_dtype) for _ in "ab"
    )
    for run, value in ((poisoned, bad), (clean, 0.0)):
        run.step(0)
        run.grads[1][3, 5] = value
    before = [getattr(poisoned, name)[3, 5].clone() for name in ("exp_avg", "exp_avg_sq")]
    assert all(before)
    projections = []
    for run in (poisoned, clean):
        matrices = Given.matrices([run], 1)
        operations = prepare(matrices, backend=backend)
        projections.append(operations.project_moments(matrices, AdamScalars(0.9, 0.999, 1e-6)))
    for name, kept in zip(("exp_avg", "exp_avg_sq"), before, strict=True):
        assert torch.equal(getattr(poisoned, name)[3, 5], kept), name
    for one in (poisoned.exp_avg, poisoned.exp_avg_sq, clean.exp_avg, clean.exp_avg_sq):
        one[3, 5] = 0
    assert float(projections[0].direction[0, 3, 5]) == float(projections[0].projected[0, 3, 5]) == 0
    projections[1].direction[0, 3, 5] = 0
    for got, expected in zip(*(each[:2] for each in projections), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(poisoned.exp_avg, clean.exp_avg)
    assert torch.equal(poisoned.exp_avg_sq, clean.exp_avg_sq)
    assert poisoned.grads[1][3, 5].isfinite() == math.isfinite(bad)


def in_format(matrices, moments):
    """Moments that begin at 0 in a format, or in the dtype of arithmetic."""
    if moments == "float32":
        return matrices
    device, groups = matrices.params[0].device, channel_groups(matrices.side)
    stored = [
        new_stored(each.shape, FORMATS[moments], device, groups) for each in matrices.exp_avgs
    ]
    columns = [list(each) for each in zip(*stored, strict=True) if each[0] is not None]
    names = ("exp_avgs", "exp_avg_sqs", "exp_avg_scales", "exp_avg_sq_scales")
    return matrices._replace(
        **dict(zip(names, columns, strict=False)), moment_salts=SALTS[: len(stored)]
    )


def in_place_of_a_product(backend, dtype, side, moments, rounds):
    """Two batches of equal matrices: of gradients, and of none yet."""
    for _ in range(2):
        runs = [Run(backend, dtype, (150, 61), 13, side, None, seed=seed) for seed in range(3)]
        grads = [run.grads for run in runs]
        matrices = in_format(Run.matrices(runs, 0)._replace(limiter_norms=[]), moments)
        yield grads, matrices._replace(salts=SALTS if rounds else None)


EXACT = [row for row in SERVED if row[0] != "triton" or not torch.cuda.is_available()]


@pytest.mark.parametrize(("side", "moments"), pairwise(Side, FORMATS), ids=str)
@pytest.mark.parametrize(("backend", "dtype"), EXACT, ids=str)
def test_from_what_the_product_gives_come_the_same_bits(backend, dtype, side, moments):
    """M, V, N and W, also where W is rounded stochastically, in each format of moments.

    A GPU's compiler may contract one kernel and not the other.
    """
    if dtype is torch.float64 and moments != "float32":
        pytest.skip("no such state")
    (grads, dense), (_, given) = in_place_of_a_product(
        backend, dtype, side, moments, dtype is torch.bfloat16
    )
    for index in range(STEPS):
        adam = AdamScalars(0.9, 0.999, 1e-6, 1 - 0.9 ** (index + 1), 1 - 0.999 ** (index + 1))
        scalars = Scalars(adam, 0.25, step_size=0.5, decay=0.125, step=index + 1)
        dense = dense._replace(grads=[each[index] for each in grads])
        found = prepare(dense, backend=backend).project_moments(dense, adam, index + 1)
        low = [each.clone() for each in found.projected]
        given = given._replace(grads=low, projected=True)
        again = prepare(given, backend=backend).project_moments(given, adam, index + 1)
        for one, other in zip(found[:2], again[:2], strict=True):
            assert one.dtype is other.dtype
            assert torch.equal(one, other)
        for matrices, projection in ((dense, found), (given, again)):
            operations = prepare(matrices, backend=backend)
            operations.back_project_update(matrices, projection, None, scalars)
        for name in ("params", "exp_avgs", "exp_avg_sqs", "exp_avg_scales", "exp_avg_sq_scales"):
            pairs = zip(getattr(dense, name), getattr(given, name), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs), name
    assert not torch.equal(given.params[0], given.params[1])


@pytest.mark.parametrize("places", [in_one_place, elsewhere])
@pytest.mark.parametrize(("backend_dtype", "side"), pairwise(EXACT, Side), ids=str)
def test_prepared_once_serves_a_batch_wherever_it_lies(backend_dtype, side, places):
    """With the bits of its matrices one by one, prepared anew."""
    backend, dtype = backend_dtype

    def runs():
        return [Given(backend, dtype, (37, 61), 13, side, seed=seed) for seed in range(3)]

    together, alone = runs(), runs()
    operations = None
    for index, grads in enumerate(
        places([[run.grads[index] for run in together] for index in range(STEPS)])
    ):
        scalars = step_scalars({**together[0].options, "betas": (0.9, 0.999)}, index + 1, False)
        matrices = Given.matrices(together, index)._replace(grads=grads)
        operations = operations or prepare(matrices, backend=backend)
        take_step(operations, matrices, scalars)
        for one, other in zip(together, alone, strict=True):
            Given.step_batch([other], index)
            for name in ("weight", "exp_avg", "exp_avg_sq"):
                assert torch.equal(getattr(one, name), getattr(other, name)), (name, index)


class Products(TorchDispatchMode):
    """The names of the products that torch is asked for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.found += [name for name in (function.__name__,) if "mm" in name]
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "foreach", "native"])
def test_operation_1_multiplies_nothing(backend, dtype, device):
    """As it would run there: on the meta device."""
    with meta_stands_for(device):
        runs = [Given(backend, dtype, (37, 61), 13, Side.LEFT, seed=seed) for seed in range(2)]
        given = Given.matrices(runs, 0)
        dense = Run.matrices(runs, 0)._replace(grads=given.params)
        for matrices, count in ((given, 0), (dense, 2)):
            lists = ([x.to("meta") for x in each] for each in matrices[2:8])
            matrices = Matrices(Side.LEFT, None, *lists, projected=matrices.projected)
            operations = prepare(matrices, backend=backend)
            with Products() as products:
                operations.project_moments(matrices, AdamScalars(0.9, 0.999, 1e-6))
            assert len(products.found) == count


class Unreadable:
    """In the place of a gradient."""

    def __getattribute__(self, name):
        pytest.fail(f"{name} of a gradient")


@pytest.mark.parametrize(("layout", "side"), pairwise(LAYOUTS, Side), ids=str)
@pytest.mark.parametrize(("backend", "dtype"), SERVED, ids=str)
def test_operation_3_asks_nothing_of_a_gradient(backend, dtype, side, layout):
    """Whichever way a weight is written."""
    for salts in (None, SALTS) if dtype is torch.bfloat16 else (None,):
        runs = [Given(backend, dtype, (37, 61), 13, side, seed=seed) for seed in range(3)]
        for run in runs:
            run.weight = LAYOUTS[layout](run.weight, *run.weight.shape).copy_(run.weight)
        matrices = Given.matrices(runs, 0)._replace(salts=salts)
        scalars = Scalars(AdamScalars(0.9, 0.999, 1e-6), 0.25, step_size=0.5, decay=0.125, step=1)
        operations = prepare(matrices, backend=backend)
        projection = operations.project_moments(matrices, scalars.adam, 1)
        matrices = matrices._replace(grads=[Unreadable() for _ in runs])
        operations.back_project_update(matrices, projection, None, scalars)
