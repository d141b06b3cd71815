"""Operation 1: R = P^T G (or G P), Adam's moments of R in place, the direction, channel sums.

Both sides are one problem in channel coordinates: c runs over the C channels, d over the D entries
of a channel, k over the r directions. On the left G'(c, d) = G[d, c], on the right G[c, d]: only
the strides differ.

    R(c, k) = sum_d G'(c, d) P(d, k)
    M = b1 M + (1 - b1) R,   V = b2 V + (1 - b2) R^2,   N = (M / c1) / (sqrt(V / c2) + eps)
    slots per rank tile: sum_k N^2, sum_k R^2, -(2 kappa - kappa^2) sum_k R^2 (+ sum_d G'^2 once)

Bytes, b for G and P, float32 moments: C D b + D r b + 24 C r. FLOPs: 2 C D r.

Adam is not linear, so it sees a complete sum only. With split-K the partial sums go to a workspace,
and a second kernel adds them in ascending order before the same epilogue. Sums go to one slot a
tile: no atomics, two runs give the same bits.
"""

import triton
import triton.language as tl


@triton.jit
def _adam_epilogue(
    low,  # [BC, BR], complete sums
    grad_sq,  # [BC], sums of G'^2, used by the first rank tile
    tile_k,
    channel,
    rank_index,
    inside,  # [BC, BR]
    exp_avg_ptr,
    exp_avg_sq_ptr,
    direction_ptr,
    projected_ptr,
    sums_ptr,
    channels,
    tiles,
    stride_c,
    stride_k,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    inverse_correction1,
    inverse_correction2,
    cancelled,
    SUMS: tl.constexpr,
):
    offsets = channel[:, None] * stride_c + rank_index[None, :] * stride_k
    exp_avg = tl.load(exp_avg_ptr + offsets, mask=inside, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offsets, mask=inside, other=0.0)
    # NaN and Inf fail the comparison: such an element keeps its moments and moves nothing.
    finite = tl.abs(low) < float("inf")
    low = tl.where(finite, low, 0.0)
    exp_avg = tl.where(finite, beta1 * exp_avg + one_minus_beta1 * low, exp_avg)
    exp_avg_sq = tl.where(finite, beta2 * exp_avg_sq + one_minus_beta2 * (low * low), exp_avg_sq)
    root = tl.sqrt(exp_avg_sq * inverse_correction2)
    direction = tl.where(finite & inside, exp_avg * inverse_correction1 / (root + eps), 0.0)
    tl.store(exp_avg_ptr + offsets, exp_avg, mask=inside)
    tl.store(exp_avg_sq_ptr + offsets, exp_avg_sq, mask=inside)
    tl.store(direction_ptr + offsets, direction, mask=inside)
    tl.store(projected_ptr + offsets, low, mask=inside)
    if SUMS:
        low_sq = tl.sum(tl.where(inside, low * low, 0.0), axis=1)
        residual_sq = tl.where(tile_k == 0, grad_sq, 0.0) - cancelled * low_sq
        # tl.cast and not .to: the JIT passes an argument that is 1 as a plain int.
        slot = sums_ptr + tl.cast(tile_k, tl.int64) * channels + channel
        plane = tl.cast(tiles, tl.int64) * channels
        valid = channel < channels
        tl.store(slot, tl.sum(direction * direction, axis=1), mask=valid)
        tl.store(slot + plane, low_sq, mask=valid)
        tl.store(slot + 2 * plane, residual_sq, mask=valid)


@triton.jit
def project_kernel(
    grad_ptr,
    basis_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    direction_ptr,
    projected_ptr,
    sums_ptr,  # [3, tiles, C]
    partial_ptr,  # [SPLIT, C, r], SPLIT > 1 only
    partial_sq_ptr,  # [SPLIT, C], SPLIT > 1 only
    channels,
    depth,
    rank,
    tiles,
    stride_gc,
    stride_gd,
    stride_pd,
    stride_pk,
    stride_c,
    stride_k,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    inverse_correction1,
    inverse_correction2,
    cancelled,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    SUMS: tl.constexpr,
    SPLIT: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    # Rank tiles are neighbours in the grid: they read the same rows of G, which then hit in L2.
    tile_k = tl.program_id(0) % tiles
    tile_c = tl.program_id(0) // tiles
    part = tl.program_id(1)
    channel = tile_c.to(tl.int64) * BC + tl.arange(0, BC)
    rank_index = tile_k.to(tl.int64) * BR + tl.arange(0, BR)
    entry = tl.arange(0, BD).to(tl.int64)

    low = tl.zeros((BC, BR), dtype=tl.float32)
    grad_sq = tl.zeros((BC,), dtype=tl.float32)
    for block in range(part, tl.cdiv(depth, BD), SPLIT):
        d = tl.cast(block, tl.int64) * BD + entry
        grad = tl.load(
            grad_ptr + channel[:, None] * stride_gc + d[None, :] * stride_gd,
            mask=(channel[:, None] < channels) & (d[None, :] < depth),
            other=0.0,
        )
        basis = tl.load(
            basis_ptr + d[:, None] * stride_pd + rank_index[None, :] * stride_pk,
            mask=(d[:, None] < depth) & (rank_index[None, :] < rank),
            other=0.0,
        )
        low = tl.dot(grad.to(OPERAND), basis.to(OPERAND), low, input_precision=PRECISION)
        if SUMS:
            wide = grad.to(tl.float32)
            grad_sq += tl.sum(wide * wide, axis=1)

    inside = (channel[:, None] < channels) & (rank_index[None, :] < rank)
    if SPLIT == 1:
        _adam_epilogue(
            low,
            grad_sq,
            tile_k,
            channel,
            rank_index,
            inside,
            exp_avg_ptr,
            exp_avg_sq_ptr,
            direction_ptr,
            projected_ptr,
            sums_ptr,
            channels,
            tiles,
            stride_c,
            stride_k,
            beta1,
            one_minus_beta1,
            beta2,
            one_minus_beta2,
            eps,
            inverse_correction1,
            inverse_correction2,
            cancelled,
            SUMS,
        )
    else:
        row = part.to(tl.int64) * channels + channel
        tl.store(partial_ptr + row[:, None] * rank + rank_index[None, :], low, mask=inside)
        if SUMS:
            once = (channel < channels) & (tile_k == 0)
            tl.store(partial_sq_ptr + row, grad_sq, mask=once)


@triton.jit
def finish_split_kernel(
    exp_avg_ptr,
    exp_avg_sq_ptr,
    direction_ptr,
    projected_ptr,
    sums_ptr,
    partial_ptr,
    partial_sq_ptr,
    channels,
    rank,
    tiles,
    stride_c,
    stride_k,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    inverse_correction1,
    inverse_correction2,
    cancelled,
    SUMS: tl.constexpr,
    SPLIT: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
):
    tile_k = tl.program_id(0) % tiles
    tile_c = tl.program_id(0) // tiles
    channel = tile_c.to(tl.int64) * BC + tl.arange(0, BC)
    rank_index = tile_k.to(tl.int64) * BR + tl.arange(0, BR)
    inside = (channel[:, None] < channels) & (rank_index[None, :] < rank)

    low = tl.zeros((BC, BR), dtype=tl.float32)
    grad_sq = tl.zeros((BC,), dtype=tl.float32)
    for part in range(SPLIT):
        row = tl.cast(part, tl.int64) * channels + channel
        offsets = row[:, None] * rank + rank_index[None, :]
        low += tl.load(partial_ptr + offsets, mask=inside, other=0.0)
        if SUMS:
            grad_sq += tl.load(partial_sq_ptr + row, mask=channel < channels, other=0.0)
    _adam_epilogue(
        low,
        grad_sq,
        tile_k,
        channel,
        rank_index,
        inside,
        exp_avg_ptr,
        exp_avg_sq_ptr,
        direction_ptr,
        projected_ptr,
        sums_ptr,
        channels,
        tiles,
        stride_c,
        stride_k,
        beta1,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        eps,
        inverse_correction1,
        inverse_correction2,
        cancelled,
        SUMS,
    )
