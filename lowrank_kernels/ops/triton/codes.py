"""Moments as codes of 8 bits, as `ops.codes` has them, bit for bit.

A group, which shares a scale, lies along axis 1. Roots and quotients are rounded to the nearest,
and no product is added to anything, so that no contraction changes a bit.
"""

import triton
import triton.language as tl


@triton.jit
def _decoded(codes, scales, LARGEST: tl.constexpr):
    share = codes.to(tl.float32) * (1.0 / LARGEST)
    return share * tl.abs(share) * tl.expand_dims(scales, 1)


@triton.jit
def decoded_avg(codes, scales):
    """M."""
    return _decoded(codes, scales, 127)


@triton.jit
def decoded_avg_sq(codes, scales):
    """V."""
    root = _decoded(codes, scales, 255)
    return root * root


@triton.jit
def _encoded(sizes, bits, LARGEST: tl.constexpr):
    scales = tl.max(sizes, axis=1)
    divisors = tl.expand_dims(tl.where(scales > 0.0, scales, 1.0), 1)
    roots = tl.sqrt_rn(tl.div_rn(sizes, divisors))
    return ((roots * (LARGEST * 65536.0)).to(tl.int32) + bits) >> 16, scales


@triton.jit
def encoded_avg(exp_avg):
    """Codes of M, and their scales."""
    codes, scales = _encoded(tl.abs(exp_avg), 0x8000, 127)
    return tl.where(exp_avg < 0.0, -codes, codes).to(tl.int8), scales


@triton.jit
def encoded_avg_sq(exp_avg_sq, bits):
    """Codes of V, rounded by 16 bits an element, and their scales."""
    codes, scales = _encoded(tl.sqrt_rn(exp_avg_sq), bits.to(tl.int32), 255)
    return tl.where(exp_avg_sq > 0.0, tl.maximum(codes, 1), 0).to(tl.uint8), scales
