"""Products with a sparse matrix: against dense ones, in every dtype, and their derivatives."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_kernels.factors.sparse import sparse_linear

ROWS, COLS, TOKENS, COUNT = 23, 37, 11, 90


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An input of three dimensions, values and places; row 3 and column 5 are empty."""
    generator = torch.Generator().manual_seed(0)
    free = torch.ones(ROWS, COLS, dtype=torch.bool)
    free[3], free[:, 5] = False, False
    places = free.view(-1).nonzero().flatten()
    places = places[torch.randperm(len(places), generator=generator)[:COUNT]].sort().values
    x = torch.randn(2, TOKENS, COLS, generator=generator, dtype=torch.float64).to(dtype)
    values = torch.randn(COUNT, generator=generator, dtype=torch.float64).to(dtype)
    return x, values, places.int()


def whole(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    dense = values.new_zeros(ROWS * COLS)
    return dense.index_put((places.long(),), values).view(ROWS, COLS)


def results(product, x, values, weights) -> list[torch.Tensor]:
    x, values = x.clone().requires_grad_(), values.clone().requires_grad_()
    y = product(x, values)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), (x, values))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_at_most_twice_the_error_of_the_dense_product(dtype: torch.dtype) -> None:
    x, values, places = problem(dtype)
    weights = torch.randn(2, TOKENS, ROWS, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = results(lambda x, v: sparse_linear(x, v, places, ROWS), x, values, weights)
    dense = results(lambda x, v: x @ whole(v, places).mT, x, values, weights)
    wide = (each.double() for each in (x, values, weights))
    exact = results(lambda x, v: x @ whole(v, places).mT, *wide)
    for one, other, right in zip(ours, dense, exact, strict=True):
        assert one.dtype is dtype
        assert one.shape == right.shape
        least = torch.finfo(dtype).eps * right.norm()
        assert (one - right).norm() <= 2 * max((other - right).norm(), least)


def test_derivatives_of_both_orders() -> None:
    x, values, places = problem(torch.float64)
    x, values = x[:, :3].clone().requires_grad_(), values.requires_grad_()

    def product(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return sparse_linear(x, values, places, ROWS)

    assert torch.autograd.gradcheck(product, (x, values))
    assert torch.autograd.gradgradcheck(product, (x, values))


@pytest.mark.parametrize("transposed", [False, True])
def test_the_operations_are_what_compilers_are_told(transposed: bool) -> None:
    x, values, places = problem(torch.float64)
    x = x[0] if not transposed else torch.randn(TOKENS, ROWS, dtype=torch.float64)
    inputs = (x.requires_grad_(), values.requires_grad_(), places, ROWS, COLS, transposed)
    torch.library.opcheck(torch.ops.lowrank_kernels.sparse_product, inputs)
    sides = [torch.randn(TOKENS, size, dtype=torch.float64) for size in (ROWS, COLS)]
    inputs = (*(side.requires_grad_() for side in sides), places, torch.float64)
    torch.library.opcheck(torch.ops.lowrank_kernels.sampled_product, inputs)


def test_no_tokens() -> None:
    x, values, places = problem(torch.float32)
    x = x[:, :0].requires_grad_()
    y = sparse_linear(x, values.requires_grad_(), places, ROWS)
    assert y.shape == (2, 0, ROWS)
    y.sum().backward()
    assert values.grad is not None
    assert not values.grad.any()


def test_nothing_of_the_weight_s_size_is_allocated() -> None:
    """Of 512 x 512 with 1 % and 3 tokens, forward and backward."""
    size = 512
    places = torch.arange(0, size * size, 100, dtype=torch.int32)
    values = torch.ones(len(places), requires_grad=True)
    x = torch.ones(3, size, requires_grad=True)
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for each in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(each, torch.Tensor) and each.layout is torch.strided:
                    largest[0] = max(largest[0], each.numel())
            return result

    with Watch():
        sparse_linear(x, values, places, size).sum().backward()
    assert largest[0] <= len(places) + size
