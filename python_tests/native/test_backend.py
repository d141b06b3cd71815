"""What the native backend adds to its passes: products in tiles, any layout, no large copies."""

import dataclasses

import pytest
import torch
from guarded import DTYPES, assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.test_operations import take_step
from oracles.low_rank import balanced_gradients, orthonormal
from pairs import pairwise
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_kernels.ops import (
    AdamScalars,
    Matrices,
    Projection,
    Residual,
    Scalars,
    Side,
    native,
    prepare,
    products,
)
from lowrank_kernels.ops.contract import basis_shape, projected_shape
from lowrank_kernels.ops.dry import meta_stands_for

SCALARS = Scalars(AdamScalars(0.9, 0.999, 1e-6), scale=0.25, step_size=0.1, decay=0.01)
FORMS = {"galore": None, "official": Residual(0.25, 1.0), "paper": Residual(1.0, 0.25)}
SIDES = pytest.mark.parametrize("side", list(Side))


def written(matrices):
    """What a step writes."""
    lists = (matrices.params, matrices.exp_avgs, matrices.exp_avg_sqs, matrices.limiter_norms)
    return [tensor for tensors in lists for tensor in tensors]


def step(matrices, backend="native", scalars=SCALARS):
    take_step(prepare(matrices, backend=backend), matrices, scalars)
    return matrices


def with_lists(matrices, change):
    """A batch in which every list of tensors is another."""
    return Matrices(*matrices[:2], *map(change, matrices[2:8]), matrices.salts)


def alone(matrices, index):
    """One of them, as a batch of its own."""
    return with_lists(matrices, lambda tensors: [tensors[index].clone()])


def in_dtype(matrices, dtype):
    """The same numbers in one dtype."""
    return with_lists(matrices, lambda tensors: [one.to(dtype, copy=True) for one in tensors])


def problem(
    shape,
    rank,
    side,
    form="official",
    *,
    count=1,
    dtype=torch.float32,
    grad_dtype=None,
    layout=lambda matrix: matrix,
    grad_layout=lambda matrix: matrix,
    seed=0,
):
    rng = torch.Generator().manual_seed(seed)
    size, _ = basis_shape(shape, side, rank)
    low = projected_shape(shape, side, rank)

    params = [torch.randn(shape, generator=rng) for _ in range(count)]
    bases = [orthonormal(size, rank, rng) for _ in range(count)]
    left = side is Side.LEFT
    grads = [grad for basis in bases for grad in balanced_gradients(shape, basis, left, 1, rng)]
    return Matrices(
        side,
        FORMS[form],
        [layout(param.to(dtype)) for param in params],
        [grad_layout(grad.to(grad_dtype or dtype)) for grad in grads],
        [basis.to(dtype) for basis in bases],
        [torch.zeros(low) for _ in range(count)],
        [torch.zeros(low) for _ in range(count)],
        [torch.tensor(0.5) for _ in range(count)],
    )


def assert_right(made):
    """Against the reference in float64; "plain" is the reference in float32, rounded once.

    It may be lucky in a single number: eight roundings of the largest are allowed.
    """
    exact, plain = (
        written(step(in_dtype(made, dtype), "reference"))
        for dtype in (torch.float64, torch.float32)
    )
    dtypes = [tensor.dtype for tensor in written(made)]
    every = zip(written(step(made)), plain, exact, dtypes, strict=True)
    for got, torch32, value, dtype in every:
        assert got.dtype is dtype
        coarse = min(made.grads[0].dtype, dtype, key=lambda one: -torch.finfo(one).eps)
        if dtype is torch.float32 and got.shape == made.params[0].shape:
            coarse = made.grads[0].dtype
        error = (torch32.double() - value).norm() + torch.finfo(coarse).eps * value.norm()
        roundings = 8 * torch.finfo(torch.float32).eps * value.abs().max()
        assert (got.double() - value).norm() <= 2 * error + roundings


LAYOUTS = {
    "dense": lambda matrix: matrix.clone(),
    "transposed": lambda matrix: matrix.T.contiguous().T,
    "rows apart": lambda matrix: matrix.repeat(1, 2)[:, : matrix.shape[1]],
    "every other column": lambda matrix: matrix.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize(
    ("layout", "grad_layout", "side", "form", "dtype"),
    pairwise(LAYOUTS, LAYOUTS, Side, FORMS, (torch.float32, torch.bfloat16)),
    ids=str,
)
def test_layouts_of_weight_and_gradient_in_small_tiles(
    dtype, layout, grad_layout, side, form, monkeypatch
):
    monkeypatch.setattr(native, "TILE_ELEMENTS", {"cpu": 32 * 10})
    monkeypatch.setattr(native, "TILE_ROWS", {"cpu": 7})
    layouts = {"layout": LAYOUTS[layout], "grad_layout": LAYOUTS[grad_layout]}
    assert_right(problem((45, 83), 9, side, form, count=2, dtype=dtype, **layouts))


@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "side", "form"), pairwise(DTYPES, DTYPES, Side, FORMS), ids=str
)
def test_dtypes_of_weight_and_gradient(dtype, grad_dtype, side, form):
    assert_right(problem((45, 83), 9, side, form, count=2, dtype=dtype, grad_dtype=grad_dtype))


@settings(max_examples=60)
@given(
    rows=st.integers(1, 60),
    cols=st.integers(1, 60),
    rank=st.integers(1, 60),
    side=st.sampled_from(list(Side)),
    form=st.sampled_from(list(FORMS)),
    count=st.integers(1, 4),
    tile_elements=st.integers(1, 5000),
    tile_rows=st.integers(1, 70),
    seed=st.integers(0, 2**32),
)
def test_any_shape_in_any_tiles(rows, cols, rank, tile_elements, tile_rows, **made):
    rank = min(rank, rows, cols)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "TILE_ELEMENTS", {"cpu": tile_elements})
        patch.setattr(native, "TILE_ROWS", {"cpu": tile_rows})
        assert_right(problem((rows, cols), rank, **made))


@SIDES
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
def test_broadcast_gradient(grad_dtype, side):
    """As `weight.sum().backward()` leaves one."""
    grads = [torch.tensor(0.5, dtype=grad_dtype).expand(45, 83)]
    assert_right(problem((45, 83), 9, side)._replace(grads=grads))


@pytest.mark.parametrize(
    ("dtype", "form", "side", "threads"), pairwise(DTYPES, FORMS, Side, (1, 2)), ids=str
)
def test_a_batch_has_the_bits_of_its_matrices(dtype, threads, side, form):
    torch.set_num_threads(threads)
    for shape, rank in (((37, 61), 13), ((29, 17), 5), ((17, 29), 5), ((128, 200), 16)):
        together = problem(shape, rank, side, form, count=7, dtype=dtype)
        apart = [step(alone(together, index)) for index in range(7)]
        step(together)
        for index, one in enumerate(apart):
            assert_same_bits(written(alone(together, index)), written(one))


class Allocations(TorchDispatchMode):
    """The largest storage, in elements, that any operation made."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    elements = storage.nbytes() // tensor.dtype.itemsize
                    self.largest = max(self.largest, elements)
        return result


COPIED = ["dense", "transposed", "every other column"]


@pytest.mark.parametrize(
    ("layout", "grad_layout", "dtype", "form", "side"),
    pairwise(COPIED, COPIED, DTYPES, FORMS, Side),
    ids=str,
)
def test_nothing_of_the_size_of_the_weight_is_allocated(dtype, layout, grad_layout, side, form):
    """A tile is the largest, or the two low-rank matrices of the step's workspace."""
    layouts = {"layout": LAYOUTS[layout], "grad_layout": LAYOUTS[grad_layout]}
    made = problem((2100, 2100), 16, side, form, dtype=dtype, **layouts)
    with Allocations([*written(made), *made.grads, *made.bases]) as allocations:
        step(made)
    assert 0 < allocations.largest <= 2**20 + 512 * native.ALIGNED_ELEMENTS < 2100**2 / 3


@SIDES
def test_stochastic_rounding_is_that_of_the_reference_in_any_tiles(side, monkeypatch):
    """A basis of ones and zeros and a direction that bfloat16 holds: the products are exact."""
    shape, rank = (70, 90), 8
    made = problem(shape, rank, side, "galore", count=2, dtype=torch.bfloat16)
    made = made._replace(salts=(3, 2**31 - 1))
    for basis in made.bases:
        basis.copy_(torch.eye(*basis.shape)[torch.randperm(len(basis))])
    rng = torch.Generator().manual_seed(0)
    direction = torch.randint(-8, 8, (2, *made.exp_avgs[0].shape), generator=rng) / 8
    projection = Projection(direction, direction, None)
    scalars = SCALARS._replace(scale=1.0, step_size=0.01, decay=0.001, step=17)

    def rounded(backend):
        matrices = made._replace(params=[param.clone() for param in made.params])
        operations = prepare(matrices, backend=backend)
        operations.back_project_update(matrices, projection, None, scalars)
        return matrices.params

    expected = rounded("reference")
    assert_same_bits(rounded("native"), expected)
    monkeypatch.setattr(native, "TILE_ELEMENTS", {"cpu": 32 * 16})
    monkeypatch.setattr(native, "TILE_ROWS", {"cpu": 16})
    assert_same_bits(rounded("native"), expected)
    made = made._replace(params=[LAYOUTS["transposed"](param) for param in made.params])
    assert_same_bits(rounded("native"), expected)


def test_autograd_sees_that_the_weights_were_written():
    made = problem((8, 12), 4, Side.LEFT, count=2)
    versions = [param._version for param in made.params]
    step(made)
    assert all(
        param._version > version for param, version in zip(made.params, versions, strict=True)
    )
    with torch.inference_mode():
        step(problem((8, 12), 4, Side.LEFT))


def test_batch_size_fills_a_tile():
    small, large = torch.empty(64, 64), torch.empty(4096, 1024)
    assert native.batch_size(small, small, 8) == 2**20 // 2**12
    assert native.batch_size(large, large, 8) == 1
    assert native.batch_size(torch.empty(0, 5), torch.empty(0, 5), 0) >= 1


def test_batch_size_on_a_gpu_fills_a_share_of_its_memory(monkeypatch):
    monkeypatch.setattr(products, "_workspace_bytes", lambda _: 2**28)
    matrix = torch.empty(2048, 2048, device="meta")
    with meta_stands_for("cuda"):
        assert native.batch_size(matrix, matrix, 512) == 2**28 // (16 * 512 * 2048)


def test_float64_state_is_refused():
    made = problem((8, 12), 4, Side.LEFT)
    moments = [torch.zeros(4, 12, dtype=torch.float64)]
    wide = made._replace(residual=None, exp_avgs=moments, exp_avg_sqs=moments, limiter_norms=[])
    with pytest.raises(TypeError, match=r"exp_avg is torch\.float64"):
        prepare(wide, backend="native")


@pytest.mark.parametrize("name", ["bias_correction1", "bias_correction2"])
def test_corrections_on_the_device_are_refused_before_any_write(name):
    made = problem((8, 12), 4, Side.LEFT)
    before = [tensor.clone() for tensor in written(made)]
    one = torch.ones(1, dtype=torch.float64)
    scalars = SCALARS._replace(adam=dataclasses.replace(SCALARS.adam, **{name: one}))
    with pytest.raises(TypeError, match=f"{name} is a tensor"):
        step(made, scalars=scalars)
    assert_same_bits(written(made), before)


@pytest.mark.parametrize("name", ["step_size", "decay", "step"])
def test_scalars_on_the_device_are_refused_before_any_write(name):
    made = problem((8, 12), 4, Side.LEFT, dtype=torch.bfloat16)._replace(salts=(1,))
    before = made.params[0].clone()
    scalars = SCALARS._replace(**{name: torch.ones(1, dtype=torch.int32)})
    with pytest.raises(TypeError, match=f"{name} is a tensor"):
        step(made, scalars=scalars)
    assert_same_bits(made.params, [before])
