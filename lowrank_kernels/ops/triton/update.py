"""Operation 3: one product, the residual, decay and the rounding of W, in one pass over W.

In the channel coordinates of operation 1:

    B(c, k) = scale N(c, k) - rho kappa phi'_c R(c, k)        (GaLore: scale N)
    W'(c, d) <- keep (W'(c, d) - s (sum_k B(c, k) P(d, k) + rho phi'_c G'(c, d)))

Bytes, b for W, G and P: 3 C D b (GaLore 2 C D b) + D r b + 8 C r. FLOPs: 2 C D r. W is read and
written once, B is formed in registers on its way into the product.
"""

import triton
import triton.language as tl


@triton.jit
def update_kernel(
    param_ptr,
    grad_ptr,
    basis_ptr,
    direction_ptr,
    projected_ptr,
    factor_ptr,
    channels,
    depth,
    rank,
    tiles_d,
    stride_wc,
    stride_wd,
    stride_gc,
    stride_gd,
    stride_pd,
    stride_pk,
    stride_c,
    stride_k,
    scale,
    rho,
    rho_kappa,
    step_size,
    keep,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    tile_d = tl.program_id(0) % tiles_d
    tile_c = tl.program_id(0) // tiles_d
    channel = tile_c.to(tl.int64) * BC + tl.arange(0, BC)
    d = tile_d.to(tl.int64) * BD + tl.arange(0, BD)
    entry_k = tl.arange(0, BR).to(tl.int64)
    valid = channel < channels

    factor = tl.zeros((BC,), dtype=tl.float32)
    if RESIDUAL:
        factor = tl.load(factor_ptr + channel, mask=valid, other=0.0)
    total = tl.zeros((BC, BD), dtype=tl.float32)
    for start in range(0, rank, BR):
        k = start + entry_k
        low_offsets = channel[:, None] * stride_c + k[None, :] * stride_k
        low_mask = valid[:, None] & (k[None, :] < rank)
        combined = scale * tl.load(direction_ptr + low_offsets, mask=low_mask, other=0.0)
        if RESIDUAL:
            low = tl.load(projected_ptr + low_offsets, mask=low_mask, other=0.0)
            combined -= rho_kappa * factor[:, None] * low
        basis = tl.load(
            basis_ptr + d[None, :] * stride_pd + k[:, None] * stride_pk,
            mask=(d[None, :] < depth) & (k[:, None] < rank),
            other=0.0,
        )
        total = tl.dot(combined.to(OPERAND), basis.to(OPERAND), total, input_precision=PRECISION)

    inside = valid[:, None] & (d[None, :] < depth)
    if RESIDUAL:
        grad_offsets = channel[:, None] * stride_gc + d[None, :] * stride_gd
        grad = tl.load(grad_ptr + grad_offsets, mask=inside, other=0.0).to(tl.float32)
        # A skipped channel has factor 0, and 0 * NaN would still be NaN.
        used = tl.where(factor[:, None] != 0.0, grad, 0.0)
        total += rho * factor[:, None] * used
    weight_offsets = channel[:, None] * stride_wc + d[None, :] * stride_wd
    weight = tl.load(param_ptr + weight_offsets, mask=inside, other=0.0).to(tl.float32)
    weight = keep * (weight - step_size * total)
    tl.store(param_ptr + weight_offsets, weight.to(param_ptr.dtype.element_ty), mask=inside)
