"""What the backends share of products with a basis, and of what such a product takes as it is."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .contract import Side
from .dry import planned_memory

# Of a GPU's memory, for what a batch keeps between its operations: a launch, and its Python, serves
# as many matrices as that allows. Where no GPU is asked, one of 24 GB is meant.
WORKSPACE_SHARE = 128
SMALL_GPU_BYTES = 24 * 2**30

# Devices on which products in half precision are many times as fast as in float32.
FAST_IN_HALF = {"cuda"}


def project(grad: Tensor, basis: Tensor, side: Side, out: Tensor | None = None) -> Tensor:
    """P^T G on the left, G P on the right."""
    left, right = (basis.T, grad) if side is Side.LEFT else (grad, basis)
    return torch.mm(left, right, out=out)


def factors(projected: Tensor, basis: Tensor, side: Side) -> tuple[Tensor, Tensor]:
    """P and X on the left, X and P^T on the right, whose product is back(X)."""
    return (basis, projected) if side is Side.LEFT else (projected, basis.T)


def product_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Of the products with a gradient or for a weight: CPUs hardly have any in float16."""
    return torch.float32 if dtype is torch.float16 and device_type == "cpu" else dtype


# The smallest number whose square is not finite.
_SQUARE_OVERFLOWS = {torch.float32: 2.0**64, torch.float64: 2.0**512}


def squarable(low: Tensor) -> Tensor:
    """1 where the square of an entry is finite, else 0.

    Floats: torch's passes over booleans take five times as long on a CPU.
    """
    size = low.abs()
    return torch.lt(size, _SQUARE_OVERFLOWS[low.dtype], out=size)


def rows_are_dense(matrix: Tensor) -> bool:
    """A pass can walk along its rows: elements of one are adjacent, and rows do not overlap."""
    (rows, cols), (row_stride, col_stride) = matrix.shape, matrix.stride()
    return (col_stride == 1 or cols <= 1) and (row_stride >= cols or rows <= 1)


def rows_or_columns_are_dense(matrix: Tensor) -> bool:
    """BLAS takes it as it is, without a copy."""
    return rows_are_dense(matrix) or rows_are_dense(matrix.T)


def fast_in_half(grad: Tensor, basis: Tensor, device_type: str) -> bool:
    """Whether products of these can be in half precision, and had better be."""
    dtype = grad.dtype
    return (
        device_type in FAST_IN_HALF
        and dtype.itemsize < 4
        and dtype is basis.dtype
        and dtype is product_dtype(dtype, device_type)
        and rows_or_columns_are_dense(grad)
    )


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """As torch.stack, but one tensor is not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def matrices_in_workspace(device: torch.device, matrix_bytes: int) -> int:
    """Matrices a batch on a GPU that keeps so many bytes for each, at least 1."""
    planned = planned_memory() if device.type == "meta" else None
    workspace = _workspace_bytes(device) if planned is None else planned // WORKSPACE_SHARE
    return max(1, workspace // max(1, matrix_bytes))


@functools.cache
def _workspace_bytes(device: torch.device) -> int:
    """The meta device stands for the current GPU, as in `plan`."""
    if device.type == "meta" and torch.cuda.is_available():
        device = torch.device("cuda")
    if device.type != "cuda":
        return SMALL_GPU_BYTES // WORKSPACE_SHARE
    return torch.cuda.get_device_properties(device).total_memory // WORKSPACE_SHARE
