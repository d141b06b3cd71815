"""B of operation 3 in half precision, formed once: its product reads it once for each depth tile.

    B(c, k) = scale N(c, k) - rho kappa phi'_c R(c, k)

Bytes a matrix, b for B: (8 + b) C r.

Where the rows of B are padded, the padding is zero, so that operation 3 reads whole lines of it.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["scale"])
def combine_kernel(
    combined_ptr,  # [B, shape of R, rows padded]
    direction_ptr,  # [B, shape of R]
    projected_ptr,  # [B, shape of R]
    factor_ptr,  # [B, C]
    scale,
    combined_strides,  # of matrices, c and k; all from here on is equal in launches of a kind
    combined_sizes,  # in c and k, with the padding
    low_strides,  # of c and k
    channels,
    rank,
    weight_of_projected,  # rho kappa
    BC: tl.constexpr,
    BR: tl.constexpr,
):
    tiles_c = tl.cdiv(channels, BC)
    tiles_k = tl.cdiv(rank, BR)
    tile = tl.program_id(0)
    first_k = tl.cast(tile % tiles_k, tl.int64) * BR
    first_c = tl.cast(tile // tiles_k % tiles_c, tl.int64) * BC
    matrix = tl.cast(tile // tiles_k // tiles_c, tl.int64)

    c, k = tl.arange(0, BC), tl.arange(0, BR)
    valid = c < channels - first_c
    inside = valid[:, None] & (k < rank - first_k)[None, :]
    low_first = matrix * channels * rank + first_c * low_strides[0] + first_k * low_strides[1]
    low_offsets = c[:, None] * low_strides[0] + k[None, :] * low_strides[1]
    factor = tl.load(factor_ptr + matrix * channels + first_c + c, mask=valid, other=0.0)
    direction = tl.load(direction_ptr + low_first + low_offsets, mask=inside, other=0.0)
    projected = tl.load(projected_ptr + low_first + low_offsets, mask=inside, other=0.0)
    combined = scale * direction - weight_of_projected * factor[:, None] * projected

    combined_ptr += matrix * combined_strides[0]
    combined_ptr += first_c * combined_strides[1] + first_k * combined_strides[2]
    offsets = c[:, None] * combined_strides[1] + k[None, :] * combined_strides[2]
    within = (c < combined_sizes[0] - first_c)[:, None] & (k < combined_sizes[1] - first_k)[None, :]
    tl.store(combined_ptr + offsets, combined.to(combined_ptr.dtype.element_ty), mask=within)
