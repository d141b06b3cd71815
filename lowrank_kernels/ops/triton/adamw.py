"""AdamW of a whole parameter in one pass over memory, with moments in any format.

    M = b1 M + (1 - b1) G,   V = b2 V + (1 - b2) G^2,   N = (M / c1) / (sqrt(V / c2) + eps)
    W <- (1 - decay) W - step_size N

Bytes an element, w for W and g for G: 2 w + g + 8 in bfloat16, 2 w + g + 4.0625 in codes.

A program has whole groups of codes, in whose largest elements their scales are found.
"""

import triton
import triton.language as tl

from .adam import adam
from .codes import decoded_avg, decoded_avg_sq, encoded_avg, encoded_avg_sq
from .device import scalar
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
        "step_size",
        "decay",
        "noise_step",
    ]
)
def adamw_kernel(
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    exp_avg_scale_ptr,  # if CODED
    exp_avg_sq_scale_ptr,  # if CODED
    salt_ptr,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    bias_correction1,
    bias_correction2,
    step_size,
    decay,
    noise_step,
    elements,  # all from here on is equal in launches of a kind
    DEVICE_CORRECTIONS: tl.constexpr,
    DEVICE_RATES: tl.constexpr,
    DEVICE_STEP: tl.constexpr,
    CODED: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    first_group = tl.program_id(0).to(tl.int64) * GROUPS
    first = first_group * GROUP
    group, place = tl.arange(0, GROUPS), tl.arange(0, GROUP)
    offsets = group[:, None] * GROUP + place[None, :]
    inside = offsets < elements - first
    inside_groups = group * GROUP < elements - first

    exp_avg = tl.load(exp_avg_ptr + first + offsets, mask=inside, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + first + offsets, mask=inside, other=0.0)
    if CODED:
        avg_scales = exp_avg_scale_ptr + first_group + group
        avg_sq_scales = exp_avg_sq_scale_ptr + first_group + group
        exp_avg = decoded_avg(exp_avg, tl.load(avg_scales, mask=inside_groups, other=0.0))
        exp_avg_sq = decoded_avg_sq(
            exp_avg_sq, tl.load(avg_sq_scales, mask=inside_groups, other=0.0)
        )
    exp_avg, exp_avg_sq = exp_avg.to(tl.float32), exp_avg_sq.to(tl.float32)
    grad = tl.load(grad_ptr + first + offsets, mask=inside, other=0.0).to(tl.float32)
    _, exp_avg, exp_avg_sq, direction = adam(
        grad,
        exp_avg,
        exp_avg_sq,
        inside,
        beta1,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        eps,
        bias_correction1,
        bias_correction2,
        0,
        DEVICE_CORRECTIONS,
    )
    keep = 1.0 - scalar(decay, 0, DEVICE_RATES)
    weight = tl.load(param_ptr + first + offsets, mask=inside, other=0.0).to(tl.float32)
    weight = weight * keep - scalar(step_size, 0, DEVICE_RATES) * direction
    tl.store(param_ptr + first + offsets, weight.to(param_ptr.dtype.element_ty), mask=inside)

    bits = noise(noise_key(salt_ptr, noise_step, 0, DEVICE_STEP), first_group + group, place)
    if CODED:
        exp_avg, new_avg_scale = encoded_avg(exp_avg)
        exp_avg_sq, new_avg_sq_scale = encoded_avg_sq(exp_avg_sq, bits)
        tl.store(avg_scales, new_avg_scale, mask=inside_groups)
        tl.store(avg_sq_scales, new_avg_sq_scale, mask=inside_groups)
    elif exp_avg_sq_ptr.dtype.element_ty == tl.bfloat16:
        exp_avg_sq = rounded_to_bfloat16(exp_avg_sq, bits)
    exp_avg = exp_avg.to(exp_avg_ptr.dtype.element_ty)
    exp_avg_sq = exp_avg_sq.to(exp_avg_sq_ptr.dtype.element_ty)
    tl.store(exp_avg_ptr + first + offsets, exp_avg, mask=inside)
    tl.store(exp_avg_sq_ptr + first + offsets, exp_avg_sq, mask=inside)
