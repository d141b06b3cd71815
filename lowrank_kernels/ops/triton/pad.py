"""A copy of G in half precision whose rows begin at multiples of 16 bytes.

Rows of 5461 elements begin anywhere. Operations 1 and 3 would load them by elements, of which
nothing is copied asynchronously: the copy, 2 C D b bytes a matrix, costs less. The padding is zero.
"""

import triton
import triton.language as tl

from .device import first_of


@triton.jit
def pad_rows_kernel(
    copy_ptr,  # [B, rows, padded]
    grads_ptr,
    grads_offsets,
    grads_unit,  # all from here on is equal in launches of a kind
    rows,
    length,  # of a row
    pitch,  # from a row to the next
    padded,  # length, and pitch, of the copy's rows
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(padded, BLOCK)
    block = tl.program_id(0) % blocks
    row = tl.program_id(0) // blocks % rows
    matrix = tl.program_id(0) // blocks // rows
    column = block * BLOCK + tl.arange(0, BLOCK)
    grad_ptr = first_of(grads_ptr, grads_offsets, grads_unit, matrix)
    grad_ptr += tl.cast(row, tl.int64) * pitch
    grad = tl.load(grad_ptr + column, mask=column < length, other=0.0)
    copy_ptr += (tl.cast(matrix, tl.int64) * rows + row) * padded
    tl.store(copy_ptr + column, grad, mask=column < padded)
