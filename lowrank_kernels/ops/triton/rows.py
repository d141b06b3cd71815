"""Some rows of a matrix times their weights: one pass where torch takes four."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def scaled_rows_kernel(  # type: ignore[no-untyped-def]
    out_ptr,  # [count, columns]
    x_ptr,  # [rows, columns]
    index_ptr,  # [count], int32
    weights_ptr,  # [count], float32
    columns,
    pitch,  # from a row of x to the next
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    source = tl.cast(tl.load(index_ptr + row), tl.int64) * pitch
    found = tl.load(x_ptr + source + column, mask=mask).to(tl.float32)
    scaled = found * tl.load(weights_ptr + row)
    target = tl.cast(row, tl.int64) * columns
    tl.store(out_ptr + target + column, scaled.to(out_ptr.dtype.element_ty), mask=mask)


def scaled_rows(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """See `ops.rows`; x has its rows' elements side by side."""
    count, columns = len(index), x.shape[1]
    out = torch.empty(count, columns, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    grid = count, triton.cdiv(columns, BLOCK), 1
    launch.by_jit(
        scaled_rows_kernel,
        grid,
        (out, x, index, weights, columns, x.stride(0)),
        {"BLOCK": BLOCK, "num_warps": 4},
    )
    return out
