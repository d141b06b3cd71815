"""What the native backend adds to its passes: products in tiles, any layout, no large copies."""

from dataclasses import dataclass

import pytest
import torch
from guarded import DTYPES, assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.low_rank import balanced_gradients, orthonormal
from pairs import pairwise
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_kernels.ops import AdamScalars, Noise, Projection, Residual, Side, native, reference
from lowrank_kernels.ops.contract import basis_shape, projected_shape

ADAM = AdamScalars(0.9, 0.999, 1e-6)
FORMS = {"galore": None, "official": Residual(0.25, 1.0), "paper": Residual(1.0, 0.25)}
SIDES = pytest.mark.parametrize("side", list(Side))


@dataclass
class Problem:
    params: list
    grads: list
    bases: list
    side: Side
    exp_avgs: list
    exp_avg_sqs: list
    norms: list
    residual: Residual | None

    def tensors(self):
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs, *self.norms]

    def step(self, backend=native, noise=None):
        """A step in two parts, so that each matrix of the group enters both."""
        projection = backend.project_moments(
            self.grads,
            self.bases,
            self.side,
            self.exp_avgs,
            self.exp_avg_sqs,
            ADAM,
            self.residual,
        )
        factor = None
        if self.residual is not None:
            factor = backend.channel_scale(projection.sums, self.norms)
        backend.back_project_update(
            self.params,
            self.grads,
            self.bases,
            self.side,
            projection,
            self.residual,
            factor,
            scale=0.25,
            step_size=0.1,
            decay=0.01,
            noise=noise,
        )
        return self

    def alone(self, index):
        lists = (self.params, self.grads, self.bases, self.exp_avgs, self.exp_avg_sqs, self.norms)
        params, grads, bases, *state = ([tensors[index].clone()] for tensors in lists)
        return Problem(params, grads, bases, self.side, *state, self.residual)

    def to(self, dtype):
        """The same numbers in one dtype."""

        def cast(tensors):
            return [tensor.to(dtype, copy=True) for tensor in tensors]

        params, grads, bases = cast(self.params), cast(self.grads), cast(self.bases)
        state = (cast(self.exp_avgs), cast(self.exp_avg_sqs), cast(self.norms))
        return Problem(params, grads, bases, self.side, *state, self.residual)


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
    return Problem(
        [layout(param.to(dtype)) for param in params],
        [grad_layout(grad.to(grad_dtype or dtype)) for grad in grads],
        [basis.to(dtype) for basis in bases],
        side,
        [torch.zeros(low) for _ in range(count)],
        [torch.zeros(low) for _ in range(count)],
        [torch.tensor(0.5) for _ in range(count)],
        FORMS[form],
    )


def assert_right(made):
    """Against the reference in float64; "plain" is the reference in float32, rounded once.

    It may be lucky in a single number: eight roundings of the largest are allowed.
    """
    exact, plain = made.to(torch.float64).step(reference), made.to(torch.float32).step(reference)
    dtypes = [tensor.dtype for tensor in made.tensors()]
    made.step()
    every = zip(made.tensors(), plain.tensors(), exact.tensors(), dtypes, strict=True)
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
    made = problem((45, 83), 9, side, grad_dtype=grad_dtype)
    made.grads = [torch.tensor(0.5, dtype=grad_dtype).expand(45, 83)]
    assert_right(made)


@pytest.mark.parametrize(
    ("dtype", "form", "side", "threads"), pairwise(DTYPES, FORMS, Side, (1, 2)), ids=str
)
def test_a_group_has_the_bits_of_its_matrices(dtype, threads, side, form):
    torch.set_num_threads(threads)
    for shape, rank in (((37, 61), 13), ((128, 200), 16)):
        together = problem(shape, rank, side, form, count=7, dtype=dtype)
        alone = [together.alone(index).step() for index in range(7)]
        together.step()
        for index, one in enumerate(alone):
            assert_same_bits(together.alone(index).tensors(), one.tensors())


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
    known = [*made.tensors(), *made.grads, *made.bases]
    with Allocations(known) as allocations:
        made.step()
    assert 0 < allocations.largest <= 2**20 + 512 * native.ALIGNED_ELEMENTS < 2100**2 / 3


@SIDES
def test_stochastic_rounding_is_that_of_the_reference_in_any_tiles(side, monkeypatch):
    """A basis of ones and zeros and a direction that bfloat16 holds: the products are exact."""
    shape, rank = (70, 90), 8
    made = problem(shape, rank, side, "galore", count=2, dtype=torch.bfloat16)
    for basis in made.bases:
        basis.copy_(torch.eye(*basis.shape)[torch.randperm(len(basis))])
    rng = torch.Generator().manual_seed(0)
    direction = torch.randint(-8, 8, (2, *made.exp_avgs[0].shape), generator=rng) / 8
    projection = Projection(direction, direction, None)
    noise = Noise((3, 2**31 - 1), 17)

    def rounded(backend):
        params = [param.clone() for param in made.params]
        backend.back_project_update(
            params,
            made.grads,
            made.bases,
            side,
            projection,
            None,
            None,
            scale=1.0,
            step_size=0.01,
            decay=0.001,
            noise=noise,
        )
        return params

    expected = rounded(reference)
    assert_same_bits(rounded(native), expected)
    monkeypatch.setattr(native, "TILE_ELEMENTS", {"cpu": 32 * 16})
    monkeypatch.setattr(native, "TILE_ROWS", {"cpu": 16})
    assert_same_bits(rounded(native), expected)
    made.params = [LAYOUTS["transposed"](param) for param in made.params]
    assert_same_bits(rounded(native), expected)


def test_autograd_sees_that_the_weights_were_written():
    made = problem((8, 12), 4, Side.LEFT, count=2)
    versions = [param._version for param in made.params]
    made.step()
    assert all(
        param._version > version for param, version in zip(made.params, versions, strict=True)
    )
    with torch.inference_mode():
        problem((8, 12), 4, Side.LEFT).step()


def test_group_size_fills_a_tile():
    small, large = torch.empty(64, 64), torch.empty(4096, 1024)
    assert native.group_size(small, small, 8) == 2**20 // 2**12
    assert native.group_size(large, large, 8) == 1
    assert native.group_size(torch.empty(0, 5), torch.empty(0, 5), 0) >= 1


def assert_refused(made, match, change):
    before = [tensor.clone() for tensor in made.tensors()]
    with pytest.raises(TypeError, match=match):
        change(made)
    assert_same_bits(made.tensors(), before)


def test_what_it_does_not_take_is_an_error_before_any_write(monkeypatch):
    made = problem((8, 12), 4, Side.LEFT)
    moments = [[torch.zeros(4, 12, dtype=torch.float64)] for _ in "mv"]
    wide = Problem(made.params, made.grads, made.bases, Side.LEFT, *moments, made.norms, None)
    with pytest.raises(TypeError, match=r"exp_avg is torch\.float64"):
        wide.step()
    assert not moments[0][0].any()

    device_scalars = AdamScalars(0.9, 0.999, 1e-6, torch.ones(1, dtype=torch.float64))
    monkeypatch.setattr("test_backend.ADAM", device_scalars)
    assert_refused(made, "bias_correction1 is a tensor", Problem.step)
    monkeypatch.undo()

    projection = Projection(torch.ones(1, 4, 12), torch.ones(1, 4, 12), None)

    def update(made, projection=projection, noise=None, **scalars):
        native.back_project_update(
            made.params,
            made.grads,
            made.bases,
            made.side,
            projection,
            None,
            None,
            **{"scale": 0.25, "step_size": 0.1, "decay": 0.0, "noise": noise, **scalars},
        )

    for name in ("step_size", "decay"):
        scalars = {name: torch.ones(1, dtype=torch.float64)}
        assert_refused(made, f"{name} is a tensor", lambda made, s=scalars: update(made, **s))
    wide = Projection(*(tensor.double() for tensor in projection[:2]), None)
    assert_refused(made, "projection is torch.float64", lambda made: update(made, wide))
    rounded = problem((8, 12), 4, Side.LEFT, dtype=torch.bfloat16)
    noise = Noise((1,), torch.ones(1, dtype=torch.int32))
    assert_refused(rounded, "noise.step is a tensor", lambda made: update(made, noise=noise))
