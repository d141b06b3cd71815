"""Operation 1: R = P^T G (or G P), Adam's moments of R in place, the direction, channel sums.

Both sides are one problem in channel coordinates: c runs over the C channels, d over the D entries
of a channel, k over the r directions. On the left G'(c, d) = G[d, c], on the right G[c, d]: only
the strides differ.

    R(c, k) = sum_d G'(c, d) P(d, k)
    M = b1 M + (1 - b1) R,   V = b2 V + (1 - b2) R^2,   N = (M / c1) / (sqrt(V / c2) + eps)
    channel sums, a slot a rank tile: sum_k N^2,   sum_k R^2,
                                      sum_d G'^2 - (2 kappa - kappa^2) sum_k R^2

Bytes a matrix, b for G and P, float32 moments: C D b + D r b + 24 C r. FLOPs: 2 C D r.

Adam is not linear, so it has to see complete sums. Where the reduction is split, each part stores
its sums and is counted; the part that arrives last adds all of them, its own too, in ascending
order, and alone goes on to Adam. Which part that is changes no bit, nor does any atomic add floats.

M and V are read and written as they are stored, and are float32 in registers only: in bfloat16
they are 8 of the 24 bytes above in place of 16, in codes (see `ops.codes`) 4.25. The channels of a
direction that share a scale are in one tile.

Where REREAD, the squares have a load of G of their own: see `rereads_gradients`.
"""

import triton
import triton.language as tl

from .adam import adam
from .codes import decoded_avg, decoded_avg_sq, encoded_avg, encoded_avg_sq
from .device import arrives_last, first_of, locate, piece
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
def project_kernel(
    direction_ptr,  # [B, shape of R], in operation 3's precision and its rows padded unless SUMS
    projected_ptr,  # [B, shape of R]
    sums_ptr,  # [3, B, rank tiles, C], if SUMS
    partial_ptr,  # [tiles, parts, BC, BR], if SPLIT
    partial_sq_ptr,  # [tiles, parts, BC], if SPLIT
    grads_ptr,
    grads_offsets,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    bias_correction1,
    bias_correction2,
    noise_step,  # if NOISE
    arrived_ptr,  # [tiles], if SPLIT; all from here on is equal in launches of a kind
    grads_unit,
    bases,
    exp_avgs,
    exp_avg_sqs,
    exp_avg_scales,  # if GROUP
    exp_avg_sq_scales,  # if GROUP
    salts,  # [B], if NOISE
    grad_strides,  # of c and d
    grad_sizes,  # in c and d, with the padding
    basis_strides,  # of d and k
    low_strides,  # of c and k
    scale_strides,  # of groups and k, if GROUP
    direction_strides,  # of matrices, c and k
    direction_sizes,  # in c and k, with the padding
    channels,
    depth,
    rank,
    parts,
    cancelled,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    SUMS: tl.constexpr,
    SPLIT: tl.constexpr,
    REREAD: tl.constexpr,
    DEVICE_SCALARS: tl.constexpr,
    GROUP: tl.constexpr,  # channels that share a scale; 0 where moments are no codes
    NOISE: tl.constexpr,
    DEVICE_STEP: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    CUTS: tl.constexpr,
):
    # Rank tiles are neighbours in the grid: they read the same rows of G, which then hit in L2.
    tiles_k = tl.cdiv(rank, BR)
    tiles_c = tl.cdiv(channels, BC)
    tile = tl.program_id(0)
    tile_k = tile % tiles_k
    tile_c = tile // tiles_k % tiles_c
    matrix = tile // tiles_k // tiles_c
    part = tl.program_id(1)

    # Tiles begin at 64-bit scalars; offsets within them have 32 bits, which saves registers.
    first_c = tile_c.to(tl.int64) * BC
    first_k = tile_k.to(tl.int64) * BR
    c, k, d = tl.arange(0, BC), tl.arange(0, BR), tl.arange(0, BD)
    inside_c = (c < channels - first_c)[:, None]
    inside_grad = (c < grad_sizes[0] - first_c)[:, None]
    inside_k = (k < rank - first_k)[None, :]
    grad_ptr = first_of(grads_ptr, grads_offsets, grads_unit, matrix)
    grad_ptr += first_c * grad_strides[0]
    basis_ptr = locate(bases, matrix) + first_k * basis_strides[1]
    grad_offsets = c[:, None] * grad_strides[0] + d[None, :] * grad_strides[1]
    basis_offsets = d[:, None] * basis_strides[0] + k[None, :] * basis_strides[1]

    low = tl.zeros((BC, BR), dtype=tl.float32)
    grad_sq = tl.zeros((BC,), dtype=tl.float32)
    for block in range(part, tl.cdiv(depth, BD), parts):
        first_d = tl.cast(block, tl.int64) * BD
        inside_d = d < depth - first_d
        tile_ptr = grad_ptr + first_d * grad_strides[1] + grad_offsets
        inside = inside_grad & (d < grad_sizes[1] - first_d)[None, :]
        grad = tl.load(tile_ptr, mask=inside, other=0.0)
        basis = tl.load(
            basis_ptr + first_d * basis_strides[0] + basis_offsets,
            mask=inside_d[:, None] & inside_k,
            other=0.0,
        )
        low = tl.dot(grad.to(OPERAND), basis.to(OPERAND), low, input_precision=PRECISION)
        if SUMS:  # noqa: SIM102, one condition is the compiler's
            # Each rank tile squares its share of the blocks.
            if block % tiles_k == tile_k:
                if REREAD:
                    # By another policy, or the compiler would make one load of the two.
                    grad = tl.load(tile_ptr, mask=inside, other=0.0, eviction_policy="evict_first")
                wide = grad.to(tl.float32)
                grad_sq += tl.sum(wide * wide, axis=1)

    complete = True
    if SPLIT:
        place = tile.to(tl.int64) * parts
        own = (place + part) * BC
        low_offsets = c[:, None] * BR + k[None, :]
        tl.store(partial_ptr + own * BR + low_offsets, low)
        tl.store(partial_sq_ptr + own + c, grad_sq)
        complete = arrives_last(arrived_ptr + tile, parts)
        if complete:
            low = tl.zeros((BC, BR), dtype=tl.float32)
            grad_sq = tl.zeros((BC,), dtype=tl.float32)
            for other in range(parts):
                addend = (place + other) * BC
                low += tl.load(partial_ptr + addend * BR + low_offsets, cache_modifier=".cg")
                grad_sq += tl.load(partial_sq_ptr + addend + c, cache_modifier=".cg")
    if complete:
        low_first = first_c * low_strides[0] + first_k * low_strides[1]
        stacked_first = matrix.to(tl.int64) * channels * rank + low_first
        exp_avg_ptr = locate(exp_avgs, matrix) + low_first
        exp_avg_sq_ptr = locate(exp_avg_sqs, matrix) + low_first
        if GROUP:
            tl.static_assert(BC % GROUP == 0, "a group of channels is in one tile")
            group = tl.arange(0, BC // GROUP)
            scale_first = first_c // GROUP * scale_strides[0] + first_k * scale_strides[1]
            exp_avg_scale_ptr = locate(exp_avg_scales, matrix) + scale_first
            exp_avg_sq_scale_ptr = locate(exp_avg_sq_scales, matrix) + scale_first
            inside_group = (group * GROUP < channels - first_c)[:, None]
        projected_ptr += stacked_first
        if SUMS:
            direction_ptr += stacked_first
        else:
            direction_ptr += matrix.to(tl.int64) * direction_strides[0]
            direction_ptr += first_c * direction_strides[1] + first_k * direction_strides[2]
            direction_inside_c = (c < direction_sizes[0] - first_c)[:, None]
        # A piece at a time: whole tiles of M, V, N and R would spill.
        WIDTH: tl.constexpr = BR >> CUTS
        direction_sq = tl.zeros((BC, WIDTH), dtype=tl.float32)
        low_sq = tl.zeros((BC, WIDTH), dtype=tl.float32)
        if GROUP:
            GROUPS: tl.constexpr = (BC // GROUP, GROUP, WIDTH)  # a group's channels in axis 1
        for index in tl.static_range(1 << CUTS):
            low_piece = piece(low, index, CUTS, BC, BR)
            if index * WIDTH < direction_sizes[1] - first_k:
                piece_k = index * WIDTH + tl.arange(0, WIDTH)
                offsets = c[:, None] * low_strides[0] + piece_k[None, :] * low_strides[1]
                inside = inside_c & (piece_k < rank - first_k)[None, :]
                exp_avg = tl.load(exp_avg_ptr + offsets, mask=inside, other=0.0)
                exp_avg_sq = tl.load(exp_avg_sq_ptr + offsets, mask=inside, other=0.0)
                if GROUP:
                    scales = group[:, None] * scale_strides[0] + piece_k[None, :] * scale_strides[1]
                    inside_scales = inside_group & (piece_k < rank - first_k)[None, :]
                    scale = tl.load(exp_avg_scale_ptr + scales, mask=inside_scales, other=0.0)
                    exp_avg = decoded_avg(tl.reshape(exp_avg, GROUPS), scale)
                    exp_avg = tl.reshape(exp_avg, (BC, WIDTH))
                    scale = tl.load(exp_avg_sq_scale_ptr + scales, mask=inside_scales, other=0.0)
                    exp_avg_sq = decoded_avg_sq(tl.reshape(exp_avg_sq, GROUPS), scale)
                    exp_avg_sq = tl.reshape(exp_avg_sq, (BC, WIDTH))
                exp_avg, exp_avg_sq = exp_avg.to(tl.float32), exp_avg_sq.to(tl.float32)
                new, exp_avg, exp_avg_sq, direction = adam(
                    low_piece,
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
                    DEVICE_SCALARS,
                )
                if not GROUP:
                    if NOISE:
                        # In here, for in front of the loop it makes large tiles spill.
                        key = noise_key(salts, noise_step, matrix, DEVICE_STEP)
                        bits = noise(key, first_c + c, first_k + piece_k)
                        exp_avg_sq = rounded_to_bfloat16(exp_avg_sq, bits)
                    moment: tl.constexpr = exp_avg_ptr.dtype.element_ty
                    tl.store(exp_avg_ptr + offsets, exp_avg.to(moment), mask=inside)
                    tl.store(exp_avg_sq_ptr + offsets, exp_avg_sq.to(moment), mask=inside)
                tl.store(projected_ptr + offsets, new, mask=inside)
                if SUMS:
                    tl.store(direction_ptr + offsets, direction, mask=inside)
                else:
                    placed = c[:, None] * direction_strides[1]
                    placed += piece_k[None, :] * direction_strides[2]
                    with_padding = (piece_k < direction_sizes[1] - first_k)[None, :]
                    tl.store(
                        direction_ptr + placed,
                        direction.to(direction_ptr.dtype.element_ty),
                        mask=direction_inside_c & with_padding,
                    )
                direction_sq += direction * direction
                low_sq += new * new
                # Last and one after the other, for codes take registers.
                if GROUP:
                    codes, scale = encoded_avg(tl.reshape(exp_avg, GROUPS))
                    codes = tl.reshape(codes, (BC, WIDTH))
                    tl.store(exp_avg_ptr + offsets, codes, mask=inside)
                    tl.store(exp_avg_scale_ptr + scales, scale, mask=inside_scales)
                    bits = tl.full((BC, WIDTH), 0x8000, dtype=tl.uint32)
                    if NOISE:
                        key = noise_key(salts, noise_step, matrix, DEVICE_STEP)
                        bits = noise(key, first_c + c, first_k + piece_k)
                    bits = tl.reshape(bits, GROUPS)
                    codes, scale = encoded_avg_sq(tl.reshape(exp_avg_sq, GROUPS), bits)
                    codes = tl.reshape(codes, (BC, WIDTH))
                    tl.store(exp_avg_sq_ptr + offsets, codes, mask=inside)
                    tl.store(exp_avg_sq_scale_ptr + scales, scale, mask=inside_scales)
        if SUMS:
            slot = matrix.to(tl.int64) * tiles_k + tile_k
            slot_ptr = sums_ptr + slot * channels + first_c + c
            plane = (tl.num_programs(0) // tiles_c).to(tl.int64) * channels  # B rank tiles C
            valid = c < channels - first_c
            channel_low_sq = tl.sum(low_sq, axis=1)
            tl.store(slot_ptr, tl.sum(direction_sq, axis=1), mask=valid)
            tl.store(slot_ptr + plane, channel_low_sq, mask=valid)
            tl.store(slot_ptr + 2 * plane, grad_sq - cancelled * channel_low_sq, mask=valid)
