"""Operation 3: one product, the residual, decay and the rounding of W, in one pass over W.

In the channel coordinates of operation 1:

    B(c, k) = scale N(c, k) - rho kappa phi'_c R(c, k)
    W'(c, d) <- keep (W'(c, d) - s (sum_k B(c, k) P(d, k) + rho phi'_c G'(c, d)))

and for GaLore sum_k scale N(c, k) P(d, k). Half precision takes B from `combine`, or for GaLore
rounded N from operation 1, straight into the product. In float32 B is formed on its way into it.

Bytes a matrix, b for W, G, P and B: 3 C D b (GaLore 2 C D b) + D r b + b C r, float32 8 C r. FLOPs:
2 C D r. W is read and written once.

Matrices and tiles come in the reverse of operation 1's order: what of G it read last is still in
the L2 cache when this kernel reads G again.
"""

import triton
import triton.language as tl

from .device import first_of, locate, piece, scalar
from .noise import noise, noise_key, rounded_to_bfloat16


@triton.jit
def _stepped(
    weight,
    update,
    grad,  # if RESIDUAL
    factor,
    scale,
    step,
    keep,
    key,
    channel,
    d,
    RESIDUAL: tl.constexpr,
    NOISE: tl.constexpr,
):
    """A tile of W after the step, in float32."""
    if RESIDUAL:
        # A skipped channel has factor 0, and 0 * NaN would still be NaN.
        grad = tl.where(factor[:, None] != 0.0, grad.to(tl.float32), 0.0)
        update += factor[:, None] * grad
    else:
        update *= scale
    weight = keep * (weight.to(tl.float32) - step * update)
    if NOISE:
        weight = rounded_to_bfloat16(weight, noise(key, channel, d))
    return weight


@triton.jit
def _load(pointer, strides, c, d, inside):
    offsets = c[:, None] * strides[0] + d[None, :] * strides[1]
    return tl.load(pointer + offsets, mask=inside, other=0.0)


@triton.jit
def _inside_grad(inside, sizes, first_c, first_d, c, d, PADDED: tl.constexpr):
    """Padded rows are read in whole lines, past their ends."""
    if PADDED:
        inside = (c < sizes[0] - first_c)[:, None] & (d < sizes[1] - first_d)[None, :]
    return inside


@triton.jit(do_not_specialize=["scale", "step_size", "decay", "noise_step"])
def update_kernel(
    low_ptr,  # [B, shape of R, rows padded or not]: N if FORMS or not RESIDUAL, else B
    projected_ptr,  # [B, shape of R], if FORMS
    factor_ptr,  # [B, C], if RESIDUAL
    salts,  # [B], if NOISE
    grads_ptr,  # if RESIDUAL
    grads_offsets,
    scale,
    step_size,
    decay,
    noise_step,
    grads_unit,  # all from here on is equal in launches of a kind
    weights,  # Triton generates a launcher with a local of its own called `params`
    bases,
    weight_strides,  # of c and d
    grad_strides,  # of c and d
    grad_sizes,  # in c and d, with the padding, if PADDED
    basis_strides,  # of d and k
    low_strides,  # of matrices, c and k
    low_sizes,  # in c and k, with the padding
    channels,
    depth,
    rank,
    rho,
    kappa,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FORMS: tl.constexpr,
    PADDED: tl.constexpr,
    DEVICE_SCALARS: tl.constexpr,
    NOISE: tl.constexpr,
    DEVICE_STEP: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    CUTS: tl.constexpr,
):
    tiles_d = tl.cdiv(depth, BD)
    tiles_c = tl.cdiv(channels, BC)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    tile_d = tile % tiles_d
    tile_c = tile // tiles_d % tiles_c
    matrix = tile // tiles_d // tiles_c

    first_c = tile_c.to(tl.int64) * BC
    first_d = tile_d.to(tl.int64) * BD
    c, d, k = tl.arange(0, BC), tl.arange(0, BD), tl.arange(0, BR)
    valid = c < channels - first_c
    inside_d = (d < depth - first_d)[None, :]
    low_ptr += matrix.to(tl.int64) * low_strides[0] + first_c * low_strides[1]
    projected_ptr += matrix.to(tl.int64) * low_strides[0] + first_c * low_strides[1]
    low_offsets = c[:, None] * low_strides[1] + k[None, :] * low_strides[2]
    low_inside_c = (c < low_sizes[0] - first_c)[:, None]
    basis_ptr = locate(bases, matrix) + first_d * basis_strides[0]
    basis_offsets = d[None, :] * basis_strides[0] + k[:, None] * basis_strides[1]

    factor = tl.zeros((BC,), dtype=tl.float32)
    if RESIDUAL:
        factor_ptr += matrix.to(tl.int64) * channels + first_c
        factor = rho * tl.load(factor_ptr + c, mask=valid, other=0.0)
    total = tl.zeros((BC, BD), dtype=tl.float32)
    for start in range(0, rank, BR):
        first_k = tl.cast(start, tl.int64)
        inside = low_inside_c & (k < low_sizes[1] - first_k)[None, :]
        low = tl.load(low_ptr + first_k * low_strides[2] + low_offsets, mask=inside, other=0.0)
        if FORMS:
            projected = tl.load(
                projected_ptr + first_k * low_strides[2] + low_offsets, mask=inside, other=0.0
            )
            low = scale * low - kappa * factor[:, None] * projected
        basis = tl.load(
            basis_ptr + first_k * basis_strides[1] + basis_offsets,
            mask=inside_d & (k < rank - first_k)[:, None],
            other=0.0,
        )
        total = tl.dot(low.to(OPERAND), basis.to(OPERAND), total, input_precision=PRECISION)

    weight_ptr = locate(weights, matrix) + first_c * weight_strides[0] + first_d * weight_strides[1]
    if RESIDUAL:
        grad_ptr = first_of(grads_ptr, grads_offsets, grads_unit, matrix)
        grad_ptr += first_c * grad_strides[0] + first_d * grad_strides[1]
    step = scalar(step_size, matrix, DEVICE_SCALARS)
    keep = 1.0 - scalar(decay, matrix, DEVICE_SCALARS)
    key = step
    if NOISE:
        key = noise_key(salts, noise_step, matrix, DEVICE_STEP)
    # A piece at a time: whole tiles of W and G would spill. Loads of the next piece stand before
    # the store of this one, which they could not pass: for the compiler they may overlap.
    WIDTH: tl.constexpr = BD >> CUTS
    piece_d = tl.arange(0, WIDTH)
    inside = valid[:, None] & (piece_d < depth - first_d)[None, :]
    next_weight = _load(weight_ptr, weight_strides, c, piece_d, inside)
    next_grad = next_weight
    if RESIDUAL:
        readable = _inside_grad(inside, grad_sizes, first_c, first_d, c, piece_d, PADDED)
        next_grad = _load(grad_ptr, grad_strides, c, piece_d, readable)
    for index in tl.static_range(1 << CUTS):
        update = piece(total, index, CUTS, BC, BD)
        this_d, this_inside, weight, grad = piece_d, inside, next_weight, next_grad
        if index + 1 < 1 << CUTS:
            piece_d = (index + 1) * WIDTH + tl.arange(0, WIDTH)
            inside = valid[:, None] & (piece_d < depth - first_d)[None, :]
            next_weight = _load(weight_ptr, weight_strides, c, piece_d, inside)
            if RESIDUAL:
                readable = _inside_grad(inside, grad_sizes, first_c, first_d, c, piece_d, PADDED)
                next_grad = _load(grad_ptr, grad_strides, c, piece_d, readable)
        weight = _stepped(
            weight,
            update,
            grad,
            factor,
            scale,
            step,
            keep,
            key,
            first_c + c,
            first_d + this_d,
            RESIDUAL,
            NOISE,
        )
        offsets = c[:, None] * weight_strides[0] + this_d[None, :] * weight_strides[1]
        tl.store(weight_ptr + offsets, weight.to(weight_ptr.dtype.element_ty), mask=this_inside)


@triton.jit(do_not_specialize=["scale", "step_size", "decay", "noise_step"])
def resident_update_kernel(
    low_ptr,  # [B, shape of R, rows padded or not]: N
    projected_ptr,  # [B, shape of R], if RESIDUAL
    factor_ptr,  # [B, C], if RESIDUAL
    salts,  # [B], if NOISE
    grads_ptr,  # if RESIDUAL
    grads_offsets,
    scale,
    step_size,
    decay,
    noise_step,
    grads_unit,  # all from here on is equal in launches of a kind
    weights,
    bases,
    weight_strides,  # of c and d
    grad_strides,  # of c and d
    grad_sizes,  # in c and d, with the padding, if PADDED
    basis_strides,  # of d and k
    low_strides,  # of matrices, c and k
    low_sizes,  # in c and k, with the padding
    channels,
    depth,
    rank,
    rho,
    kappa,
    parts,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FORMS: tl.constexpr,
    PADDED: tl.constexpr,
    DEVICE_SCALARS: tl.constexpr,
    NOISE: tl.constexpr,
    DEVICE_STEP: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Of a rank that fits into one tile: B stays, and tiles of P, W and G pass by."""
    tiles_c = tl.cdiv(channels, BC)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    matrix = tile // tiles_c
    part = tl.program_id(1)

    first_c = (tile % tiles_c).to(tl.int64) * BC
    c, d, k = tl.arange(0, BC), tl.arange(0, BD), tl.arange(0, BR)
    valid = c < channels - first_c
    inside_k = k < rank
    inside = (c < low_sizes[0] - first_c)[:, None] & (k < low_sizes[1])[None, :]
    low_first = matrix.to(tl.int64) * low_strides[0] + first_c * low_strides[1]
    low_offsets = c[:, None] * low_strides[1] + k[None, :] * low_strides[2]
    low = tl.load(low_ptr + low_first + low_offsets, mask=inside, other=0.0)
    factor = tl.zeros((BC,), dtype=tl.float32)
    if RESIDUAL:
        factor_ptr += matrix.to(tl.int64) * channels + first_c
        factor = rho * tl.load(factor_ptr + c, mask=valid, other=0.0)
    if FORMS:
        projected = tl.load(projected_ptr + low_first + low_offsets, mask=inside, other=0.0)
        low = scale * low - kappa * factor[:, None] * projected
    low = low.to(OPERAND)

    basis_ptr = locate(bases, matrix)
    weight_ptr = locate(weights, matrix) + first_c * weight_strides[0]
    grad_ptr = weight_ptr
    if RESIDUAL:
        grad_ptr = first_of(grads_ptr, grads_offsets, grads_unit, matrix)
        grad_ptr += first_c * grad_strides[0]
    step = scalar(step_size, matrix, DEVICE_SCALARS)
    keep = 1.0 - scalar(decay, matrix, DEVICE_SCALARS)
    key = step
    if NOISE:
        key = noise_key(salts, noise_step, matrix, DEVICE_STEP)
    for block in tl.range(part, tl.cdiv(depth, BD), parts, num_stages=STAGES):
        first_d = tl.cast(block, tl.int64) * BD
        inside_d = d < depth - first_d
        within = valid[:, None] & inside_d[None, :]
        basis = tl.load(
            basis_ptr
            + first_d * basis_strides[0]
            + d[None, :] * basis_strides[0]
            + k[:, None] * basis_strides[1],
            mask=inside_d[None, :] & inside_k[:, None],
            other=0.0,
        )
        weights_here = weight_ptr + first_d * weight_strides[1]
        weight = _load(weights_here, weight_strides, c, d, within)
        grad = weight
        if RESIDUAL:
            readable = _inside_grad(within, grad_sizes, first_c, first_d, c, d, PADDED)
            grad = _load(grad_ptr + first_d * grad_strides[1], grad_strides, c, d, readable)
        update = tl.dot(low, basis.to(OPERAND), input_precision=PRECISION)
        weight = _stepped(
            weight,
            update,
            grad,
            factor,
            scale,
            step,
            keep,
            key,
            first_c + c,
            first_d + d,
            RESIDUAL,
            NOISE,
        )
        offsets = c[:, None] * weight_strides[0] + d[None, :] * weight_strides[1]
        tl.store(weights_here + offsets, weight.to(weight_ptr.dtype.element_ty), mask=within)
