"""Gradients and bases that `native` must not take for what they are not."""

import pytest
import torch
from oracles.low_rank import Matrix, literal_step, orthonormal
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_kernels import FiraAdamW, GaLoreAdamW
from lowrank_kernels.ops import AdamScalars, Matrices, Residual, Side, prepare
from lowrank_kernels.ops.contract import basis_shape, projected_shape

SHAPES = pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=["left", "right"])
SIDES = pytest.mark.parametrize("side", list(Side), ids=lambda side: side.name.lower())
LR, CACHE_LINE = 0.5, 64


def project(grads, bases, side, residual, backend="native", dtype=torch.float32):
    """Operation 1 from moments of zero."""
    shape = tuple(grads[0].shape)
    low = projected_shape(shape, side, bases[0].shape[1])
    params = [torch.zeros(shape, dtype=grads[0].dtype) for _ in grads]
    moments = [[torch.zeros(low, dtype=dtype) for _ in grads] for _ in "mv"]
    norms = [torch.zeros((), dtype=dtype) for _ in grads]
    matrices = Matrices(side, residual, params, grads, bases, *moments, norms)
    operations = prepare(matrices, backend=backend)
    return operations.project_moments(matrices, AdamScalars(0.9, 0.999, 1e-6))


def among_nan(shape, strides, dtype):
    """A matrix of random numbers with these strides; whatever is not its own is NaN."""
    rng = torch.Generator().manual_seed(0)
    guard = shape[0] * shape[1]
    memory = torch.full((3 * guard,), torch.nan, dtype=dtype)
    reached = {i * strides[0] + j * strides[1] for i in range(shape[0]) for j in range(shape[1])}
    memory[[guard + place for place in sorted(reached)]] = torch.randn(
        len(reached), generator=rng
    ).to(dtype)
    return memory.as_strided(shape, strides, guard)


@pytest.mark.parametrize("strides", [(0, 1), (1, 0), (1, 1), (3, 1)], ids=str)
@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("cls", [GaLoreAdamW, FiraAdamW])
def test_a_gradient_whose_rows_overlap_is_read_where_it_lies(cls, backend, dtype, shape, strides):
    """As torch.autograd.grad and torch.func leave those of sums: expanded, or in windows."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    param = nn.Parameter(weight.clone())
    param.grad = among_nan(shape, strides, dtype)
    optimizer = cls([{"params": [param], "rank": 5}], lr=LR, subspace="random", backend=backend)
    optimizer.step()

    state, left = optimizer.state[param], shape[0] < shape[1]
    grad, basis = param.grad.clone(), state["basis"]
    form = "official" if cls is FiraAdamW else None
    exact = Matrix(weight.double(), basis.double(), left, torch.float64)
    plain = Matrix(weight.clone(), basis.clone(), left, torch.float32)
    literal_step(exact, grad.double(), form=form, lr=LR)
    literal_step(plain, grad, form=form, lr=LR)
    every = [(param.detach(), plain.weight, exact.weight)]
    for name in ("exp_avg", "exp_avg_sq"):
        every.append((state[name], getattr(plain, name), getattr(exact, name)))
    for got, coarse, value in every:
        # Plain torch may be lucky: one rounding of the result counts in its place.
        rounding = torch.finfo(got.dtype).eps * value.norm()
        assert (got - value).norm() <= 2 * max((coarse - value).norm(), rounding)


@SIDES
@pytest.mark.parametrize("basis_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_residual_next_to_a_rounded_basis_is_formed(basis_dtype, side, rng):
    """|g|^2 - |r|^2 holds for an orthonormal basis, which one of half precision is not."""
    shape, rank = (48, 80), 12
    basis = orthonormal(basis_shape(shape, side, rank)[0], rank, rng)
    low = torch.randn(projected_shape(shape, side, rank), generator=rng, dtype=torch.float64)
    inside = basis @ low if side is Side.LEFT else low @ basis.T
    outside = torch.randn(shape, generator=rng, dtype=torch.float64)
    grad = (inside + 0.01 * outside * inside.norm() / outside.norm()).float()
    basis = basis.to(basis_dtype)

    def residual_sq(dtype, grad, basis, backend):
        made = project([grad], [basis], side, Residual(1.0, 0.25), backend, dtype)
        return made.sums.residual[0].double()

    exact = residual_sq(torch.float64, grad.double(), basis.double(), "reference")
    plain = residual_sq(torch.float32, grad, basis, "reference")
    got = residual_sq(torch.float32, grad, basis, "native")
    rounding = torch.finfo(torch.float32).eps * exact.norm()
    assert (got - exact).norm() <= 2 * max((plain - exact).norm(), rounding)


class Products(TorchDispatchMode):
    """Whether each row of every product begins at a cache line."""

    def __init__(self):
        super().__init__()
        self.aligned = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = (keywords or {}).get("out")
        if out is not None:
            steps = [stride * out.itemsize for stride in out.stride()[:-1]]
            self.aligned.append(not any(place % CACHE_LINE for place in (out.data_ptr(), *steps)))
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@SIDES
def test_products_begin_at_cache_lines_and_have_the_same_bits_in_any_batch(side, dtype, rng):
    """What BLAS computes may depend on where it is written to, and a batch is one memory."""
    shape, rank, count = (37, 61), 3, 7
    size, _ = basis_shape(shape, side, rank)
    grads = [torch.randn(shape, generator=rng).to(dtype) for _ in range(count)]
    bases = [orthonormal(size, rank, rng).to(dtype) for _ in range(count)]

    with Products() as products:
        together = project(grads, bases, side, None)
    assert products.aligned
    assert all(products.aligned)
    for index, projected in enumerate(together.projected):
        alone = project(grads[index : index + 1], bases[index : index + 1], side, None)
        assert torch.equal(alone.projected[0], projected)
