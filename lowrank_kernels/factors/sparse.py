"""Products with a sparse matrix whose places are fixed and whose values are trained.

S is rows x cols with values v at places row * cols + col, which are sorted:

    y = x S^T                           sparse_product(..., transposed=False)
    dx = H S                            sparse_product(..., transposed=True)
    dv = those entries of H^T x         sampled_product

Each is the gradient of the others, so that all of them have derivatives of every order. None forms
a matrix of rows x cols. They are operations of their own, since compilers do not trace torch's
sparse tensors. Rows and columns are found anew of the places in each, which takes some percent of a
product's time: kept, they would take more bytes than values and places together.

torch multiplies sparse matrices in float32 and float64 on every device that it does it on; half
precision is computed in float32.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..linears import without_autocast

# It and its methods have no annotations.
_LIBRARY: Any = torch.library.Library("lowrank_kernels", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "sparse_product(Tensor x, Tensor values, Tensor places, int rows, int cols, bool transposed)"
    " -> Tensor"
)
_LIBRARY.define(
    "sampled_product(Tensor heads, Tensor x, Tensor places, ScalarType dtype) -> Tensor"
)


def sparse_linear(x: Tensor, values: Tensor, places: Tensor, rows: int) -> Tensor:
    """x S^T, in the dtype of x.

    Args:
        x: ... x cols, floating point.
        values: k, floating point.
        places: k, int32, sorted and different, row * cols + col.
        rows: of S.
    """
    flat = x.reshape(-1, x.shape[-1])
    y = torch.ops.lowrank_kernels.sparse_product(flat, values, places, rows, x.shape[-1], False)
    return y.view(*x.shape[:-1], rows)


def _sparse_product(
    x: Tensor, values: Tensor, places: Tensor, rows: int, cols: int, transposed: bool
) -> Tensor:
    """x S^T of t x cols, or x S of t x rows."""
    wide = torch.promote_types(torch.promote_types(x.dtype, values.dtype), torch.float32)
    row, col = _rows_and_columns(places, cols)
    if transposed:
        order = col.argsort(stable=True)
        row, col, values = col[order], row[order], values[order]
        rows, cols = cols, rows
    # A sparse matrix times rows of t neighbours each is what torch does best.
    with without_autocast(x.device):
        product = _csr(row, col, values.to(wide), rows, cols) @ x.mT.to(wide).contiguous()
    return product.mT.to(x.dtype).contiguous()


def _sampled_product(heads: Tensor, x: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:
    """Entries of heads^T x, of t x rows and t x cols, at some places."""
    wide = torch.promote_types(torch.promote_types(heads.dtype, x.dtype), torch.float32)
    rows, cols = heads.shape[1], x.shape[1]
    row, col = _rows_and_columns(places, cols)
    pattern = _csr(row, col, torch.zeros(len(places), dtype=wide, device=x.device), rows, cols)
    left, right = (each.mT.to(wide).contiguous() for each in (heads, x))
    with without_autocast(x.device):
        sampled = torch.sparse.sampled_addmm(pattern, left, right.mT, beta=0.0)
    return sampled.values().to(dtype)


def _rows_and_columns(places: Tensor, cols: int) -> tuple[Tensor, Tensor]:
    row = torch.div(places, cols, rounding_mode="floor")
    return row, places - row * cols


def _csr(row: Tensor, col: Tensor, values: Tensor, rows: int, cols: int) -> Tensor:
    """Of entries whose rows are sorted."""
    edges = torch.arange(rows + 1, dtype=row.dtype, device=row.device)
    with warnings.catch_warnings():  # that sparse matrices are in beta
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(
            torch.searchsorted(row, edges, out_int32=True),
            col,
            values,
            (rows, cols),
            check_invariants=False,
        )


def _shape_of_product(
    x: Tensor, values: Tensor, places: Tensor, rows: int, cols: int, transposed: bool
) -> Tensor:
    return x.new_empty(x.shape[0], cols if transposed else rows)


def _shape_of_sample(heads: Tensor, x: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(places.shape, dtype=dtype)


def _keep_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, places, ctx.rows, ctx.cols, ctx.transposed = inputs
    needs_values = ctx.needs_input_grad[1]
    ctx.save_for_backward(x if needs_values else None, values)
    # Places never change, but DDP writes the same ones to them in every pass.
    ctx.places = places


def _of_product(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values = ctx.saved_tensors
    needs_x, needs_values, *_ = ctx.needs_input_grad
    of_x = of_values = None
    if needs_x:
        of_x = torch.ops.lowrank_kernels.sparse_product(
            grad, values, ctx.places, ctx.rows, ctx.cols, not ctx.transposed
        )
    if needs_values:
        sides = (x, grad) if ctx.transposed else (grad, x)
        of_values = torch.ops.lowrank_kernels.sampled_product(*sides, ctx.places, values.dtype)
    return of_x, of_values, None, None, None, None


def _keep_sample(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    heads, x, ctx.places, _ = inputs
    ctx.save_for_backward(heads, x)


def _of_sample(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    heads, x = ctx.saved_tensors
    size = heads.shape[1], x.shape[1]
    product = torch.ops.lowrank_kernels.sparse_product
    needs_heads, needs_x, *_ = ctx.needs_input_grad
    of_heads = product(x, grad, ctx.places, *size, False) if needs_heads else None
    of_x = product(heads, grad, ctx.places, *size, True) if needs_x else None
    return of_heads, of_x, None, None


for _name, _does, _shape, _backward, _keep in (
    ("sparse_product", _sparse_product, _shape_of_product, _of_product, _keep_product),
    ("sampled_product", _sampled_product, _shape_of_sample, _of_sample, _keep_sample),
):
    _LIBRARY.impl(_name, _does, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lowrank_kernels::{_name}", _shape, lib=_LIBRARY)
    torch.library.register_autograd(
        f"lowrank_kernels::{_name}", _backward, setup_context=_keep, lib=_LIBRARY
    )
