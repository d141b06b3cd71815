"""Adam's rule, as all kernels have it that step moments."""

import triton
import triton.language as tl

from .device import scalar


@triton.jit
def adam(
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
    matrix,
    DEVICE_SCALARS: tl.constexpr,
):
    """The gradient as it was taken, new M and V, and N, which is 0 outside; all in float32.

    An entry whose square is not finite keeps its moments and moves nothing.
    """
    finite = grad * grad < float("inf")
    grad = tl.where(finite, grad, 0.0)
    new_avg = beta1 * exp_avg + one_minus_beta1 * grad
    new_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (grad * grad)
    exp_avg = tl.where(finite, new_avg, exp_avg)
    exp_avg_sq = tl.where(finite, new_avg_sq, exp_avg_sq)
    # In here, for in front of operation 1's loop they make large tiles spill.
    inverse1 = 1.0 / scalar(bias_correction1, matrix, DEVICE_SCALARS)
    inverse2 = 1.0 / scalar(bias_correction2, matrix, DEVICE_SCALARS)
    direction = exp_avg * inverse1 / (tl.sqrt(exp_avg_sq * inverse2) + eps)
    return grad, exp_avg, exp_avg_sq, tl.where(finite & inside, direction, 0.0)
