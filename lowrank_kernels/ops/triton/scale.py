"""Operation 2: channel factors under the norm-growth limiter, all on the device.

    phi_c = |N_c| / (|R_c| + 1e-8),   nu^2 = sum_c phi_c^2 |e_c|^2,   phi' = lambda phi

One program a matrix: the limiter needs every channel before it scales the first one. It reads the
slots of operation 1, 3 tiles C floats: 2.1 MB at 11008 channels and rank 1024, in L2.
"""

import triton
import triton.language as tl


@triton.jit
def _slot_sum(slots_ptr, tiles, channels, channel, inside, BC: tl.constexpr):
    """Adds the rank tiles' slots in ascending order."""
    total = tl.zeros((BC,), dtype=tl.float32)
    for tile in range(tiles):
        offset = tl.cast(tile, tl.int64) * channels
        total += tl.load(slots_ptr + offset + channel, mask=inside, other=0.0)
    return total


@triton.jit
def _channel_factor(
    direction_ptr,
    projected_ptr,
    residual_ptr,
    tiles,
    channels,
    channel,
    inside,
    norm_eps,
    BC: tl.constexpr,
):
    direction_sq = _slot_sum(direction_ptr, tiles, channels, channel, inside, BC)
    projected_sq = _slot_sum(projected_ptr, tiles, channels, channel, inside, BC)
    residual_sq = _slot_sum(residual_ptr, tiles, channels, channel, inside, BC)
    phi = tl.sqrt(direction_sq) / (tl.sqrt(projected_sq) + norm_eps)
    # Rounding can leave a channel in the span a little below 0; NaN has to stay.
    residual_sq = tl.where(residual_sq < 0.0, 0.0, residual_sq)
    scaled_sq = phi * phi * residual_sq
    usable = inside & (tl.abs(scaled_sq) < float("inf"))
    return tl.where(usable, phi, 0.0), tl.where(usable, scaled_sq, 0.0)


@triton.jit
def channel_scale_kernel(
    direction_ptr,  # slots of operation 1, [tiles, C] each
    projected_ptr,
    residual_ptr,
    factor_ptr,  # [C]
    limiter_norm_ptr,  # one element, in place
    channels,
    tiles,
    growth_bound,
    norm_eps,
    BC: tl.constexpr,
):
    lane = tl.arange(0, BC).to(tl.int64)
    scaled_sq = tl.zeros((BC,), dtype=tl.float32)
    for start in range(0, channels, BC):
        channel = start + lane
        inside = channel < channels
        phi, term = _channel_factor(
            direction_ptr,
            projected_ptr,
            residual_ptr,
            tiles,
            channels,
            channel,
            inside,
            norm_eps,
            BC,
        )
        tl.store(factor_ptr + channel, phi, mask=inside)
        scaled_sq += term
    norm = tl.sqrt(tl.sum(scaled_sq, axis=0))

    previous = tl.load(limiter_norm_ptr)
    growth = norm / (previous + norm_eps)
    limit = tl.where(previous > 0.0, growth_bound / tl.maximum(growth, growth_bound), 1.0)
    limited = limit * norm
    storable = (limited > 0.0) & (limited < float("inf"))
    tl.store(limiter_norm_ptr, tl.where(storable, limited, previous))

    tl.debug_barrier()  # the factors written above are read again
    for start in range(0, channels, BC):
        channel = start + lane
        inside = channel < channels
        phi = tl.load(factor_ptr + channel, mask=inside, other=0.0)
        tl.store(factor_ptr + channel, limit * phi, mask=inside)
