"""Operation 1 of gradients that arrive projected: Adam's moments of R in place, and the direction.

In the channel coordinates of `project`, without its product and its sums. Bytes a matrix, b for R
as it comes and n for N, float32 moments: (20 + b + n) C r; of moments in bfloat16 and in codes see
there. A program has the channels of one group, which share a scale where moments are codes.
"""

import triton
import triton.language as tl

from .adam import adam
from .codes import decoded_avg, decoded_avg_sq, encoded_avg, encoded_avg_sq
from .device import first_of, locate
from .noise import noise, noise_key, rounded_to_bfloat16


@triton.jit(
    do_not_specialize=[
        "beta1",
        "one_minus_beta1",
        "beta2",
        "one_minus_beta2",
        "eps",
        "bias_correction1",
        "bias_correction2",
        "noise_step",
    ]
)
def moments_kernel(
    direction_ptr,  # [B, shape of R], in operation 3's precision, of which half has its rows padded
    projected_ptr,  # [B, shape of R], without what is left out
    grads_ptr,  # R
    grads_offsets,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    bias_correction1,
    bias_correction2,
    noise_step,  # if NOISE
    grads_unit,  # all from here on is equal in launches of a kind
    exp_avgs,
    exp_avg_sqs,
    exp_avg_scales,  # if CODED
    exp_avg_sq_scales,  # if CODED
    salts,  # [B], if NOISE
    low_strides,  # of c and k
    scale_strides,  # of groups and k, if CODED
    direction_strides,  # of matrices, c and k
    direction_sizes,  # in c and k, with the padding
    channels,
    rank,
    DEVICE_SCALARS: tl.constexpr,
    CODED: tl.constexpr,
    NOISE: tl.constexpr,
    DEVICE_STEP: tl.constexpr,
    BC: tl.constexpr,  # a group
    BR: tl.constexpr,
):
    tiles_c = tl.cdiv(channels, BC)
    tiles_k = tl.cdiv(rank, BR)
    tile = tl.program_id(0)
    group = tl.cast(tile // tiles_k % tiles_c, tl.int64)
    first_c = group * BC
    first_k = tl.cast(tile % tiles_k, tl.int64) * BR
    matrix = tl.cast(tile // tiles_k // tiles_c, tl.int64)

    # Codes have an axis of groups in front, which is of one here: [1, BC, BR].
    c, k = tl.arange(0, BC), tl.arange(0, BR)
    inside = ((c < channels - first_c)[:, None] & (k < rank - first_k)[None, :])[None]
    offsets = (c[:, None] * low_strides[0] + k[None, :] * low_strides[1])[None]
    low_first = first_c * low_strides[0] + first_k * low_strides[1]
    exp_avg_ptr = locate(exp_avgs, matrix) + low_first
    exp_avg_sq_ptr = locate(exp_avg_sqs, matrix) + low_first
    exp_avg = tl.load(exp_avg_ptr + offsets, mask=inside, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offsets, mask=inside, other=0.0)
    if CODED:
        scale_first = group * scale_strides[0] + first_k * scale_strides[1]
        exp_avg_scale_ptr = locate(exp_avg_scales, matrix) + scale_first
        exp_avg_sq_scale_ptr = locate(exp_avg_sq_scales, matrix) + scale_first
        scales, inside_scales = (k * scale_strides[1])[None, :], (k < rank - first_k)[None, :]
        scale = tl.load(exp_avg_scale_ptr + scales, mask=inside_scales, other=0.0)
        exp_avg = decoded_avg(exp_avg, scale)
        scale = tl.load(exp_avg_sq_scale_ptr + scales, mask=inside_scales, other=0.0)
        exp_avg_sq = decoded_avg_sq(exp_avg_sq, scale)
    low_ptr = first_of(grads_ptr, grads_offsets, grads_unit, matrix) + low_first
    low = tl.load(low_ptr + offsets, mask=inside, other=0.0)
    low, exp_avg, exp_avg_sq, direction = adam(
        low.to(tl.float32),
        exp_avg.to(tl.float32),
        exp_avg_sq.to(tl.float32),
        inside,
        beta1,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        eps,
        bias_correction1,
        bias_correction2,
        matrix,
        DEVICE_SCALARS,
    )
    projected_ptr += matrix * channels * rank + low_first
    tl.store(projected_ptr + offsets, low, mask=inside)
    direction_ptr += matrix * direction_strides[0]
    direction_ptr += first_c * direction_strides[1] + first_k * direction_strides[2]
    placed = (c[:, None] * direction_strides[1] + k[None, :] * direction_strides[2])[None]
    within_c, within_k = c < direction_sizes[0] - first_c, k < direction_sizes[1] - first_k
    within = (within_c[:, None] & within_k[None, :])[None]
    tl.store(direction_ptr + placed, direction.to(direction_ptr.dtype.element_ty), mask=within)

    bits = tl.full((1, BC, BR), 0x8000, dtype=tl.uint32)
    if NOISE:
        key = noise_key(salts, noise_step, matrix, DEVICE_STEP)
        bits = noise(key, first_c + c, first_k + k)[None]
    if CODED:
        exp_avg, scale = encoded_avg(exp_avg)
        tl.store(exp_avg_scale_ptr + scales, scale, mask=inside_scales)
        exp_avg_sq, scale = encoded_avg_sq(exp_avg_sq, bits)
        tl.store(exp_avg_sq_scale_ptr + scales, scale, mask=inside_scales)
    elif NOISE:
        exp_avg_sq = rounded_to_bfloat16(exp_avg_sq, bits)
    exp_avg = exp_avg.to(exp_avg_ptr.dtype.element_ty)
    exp_avg_sq = exp_avg_sq.to(exp_avg_sq_ptr.dtype.element_ty)
    tl.store(exp_avg_ptr + offsets, exp_avg, mask=inside)
    tl.store(exp_avg_sq_ptr + offsets, exp_avg_sq, mask=inside)
