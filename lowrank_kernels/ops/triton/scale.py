"""Operation 2: channel factors under the norm-growth limiter, all on the device.

    phi_c = |N_c| / (|R_c| + 1e-8),   nu^2 = sum_c phi_c^2 |e_c|^2,   phi' = lambda phi

What is stored, and the bound where nothing is, take sum_c max(|phi_c R_c|^2, 1): see
`reference.channel_scale`.

The limiter needs every channel before it scales the first one: the programs of a matrix write phi
and their shares of both sums, and the one that arrives last adds those in ascending order and
multiplies phi by lambda. Bytes a matrix: 12 C for each rank tile of operation 1, and 12 C.
"""

import triton
import triton.language as tl

from ..reference import SQUARE_SHARE
from .device import arrives_last, locate

# Squares are added as `reference` adds them, so that no sum of finite ones is infinite.
_SHARE = tl.constexpr(SQUARE_SHARE)
_UNIT = tl.constexpr(SQUARE_SHARE**-0.5)


@triton.jit
def _slot_sum(slots_ptr, tiles, channels, channel, inside, BC: tl.constexpr):
    """Adds the rank tiles' slots in ascending order."""
    total = tl.zeros((BC,), dtype=tl.float32)
    for tile in range(tiles):
        offset = tl.cast(tile, tl.int64) * channels
        total += tl.load(slots_ptr + offset + channel, mask=inside, other=0.0)
    return total


@triton.jit
def channel_scale_kernel(
    direction_ptr,  # slots of operation 1, [B, tiles, C] each
    projected_ptr,
    residual_ptr,
    factor_ptr,  # [B, C]
    share_ptr,  # [2, B, programs a matrix]
    arrived_ptr,  # [B]; all from here on is equal in launches of a kind
    limiter_norms,  # one element a matrix, in place
    channels,
    tiles,
    growth_bound,
    norm_eps,
    storable_share,
    nothing_stored,
    BC: tl.constexpr,
    SWEEP: tl.constexpr,
):
    programs = tl.cdiv(channels, BC)
    matrix = tl.program_id(0) // programs
    program = tl.program_id(0) % programs
    channel = program * BC + tl.arange(0, BC)
    inside = channel < channels
    first_slot = matrix.to(tl.int64) * tiles * channels
    direction_sq = _slot_sum(direction_ptr + first_slot, tiles, channels, channel, inside, BC)
    projected_sq = _slot_sum(projected_ptr + first_slot, tiles, channels, channel, inside, BC)
    residual_sq = _slot_sum(residual_ptr + first_slot, tiles, channels, channel, inside, BC)
    phi = tl.sqrt(direction_sq) / (tl.sqrt(projected_sq) + norm_eps)
    # Rounding can leave a channel in the span a little below 0; NaN has to stay.
    residual_sq = tl.where(residual_sq < 0.0, 0.0, residual_sq)
    scaled_sq = phi * phi * residual_sq
    usable = tl.abs(scaled_sq) < float("inf")
    ordinary_sq = phi * phi * projected_sq
    large = (ordinary_sq > 1.0) & (ordinary_sq < float("inf"))
    ordinary_sq = tl.where(usable & (phi > 0.0), tl.where(large, ordinary_sq, 1.0), 0.0)
    factor_ptr += tl.cast(matrix, tl.int64) * channels
    ordinary_ptr = share_ptr + tl.num_programs(0) + tl.cast(matrix, tl.int64) * programs
    share_ptr += tl.cast(matrix, tl.int64) * programs
    tl.store(factor_ptr + channel, tl.where(usable, phi, 0.0), mask=inside)
    scaled_sq = tl.where(usable & inside, scaled_sq * _SHARE, 0.0)
    tl.store(share_ptr + program, tl.sum(scaled_sq, axis=0))
    ordinary_sq = tl.where(inside, ordinary_sq * _SHARE, 0.0)
    tl.store(ordinary_ptr + program, tl.sum(ordinary_sq, axis=0))

    if arrives_last(arrived_ptr + matrix, programs):
        total = 0.0
        ordinary = 0.0
        for other in range(programs):
            total += tl.load(share_ptr + other, cache_modifier=".cg")
            ordinary += tl.load(ordinary_ptr + other, cache_modifier=".cg")
        norm = tl.sqrt(total) * _UNIT
        limiter_norm_ptr = locate(limiter_norms, matrix)
        previous = tl.load(limiter_norm_ptr)
        # Each warp loads it for itself, and one of them stores the next one there.
        tl.debug_barrier()
        growth = norm / (previous + norm_eps)
        ordinary = tl.sqrt(ordinary) * _UNIT
        bounded = tl.where(norm > ordinary, ordinary / norm, 1.0)
        limit = growth_bound / tl.maximum(growth, growth_bound)
        limit = tl.where(previous > 0.0, limit, tl.where(previous < 0.0, bounded, 1.0))
        limited = limit * norm
        storable = (limited > 0.0) & (limited < float("inf"))
        storable = storable & (norm > storable_share * ordinary)
        kept = tl.where((previous == 0.0) & (ordinary > 0.0), nothing_stored, previous)
        tl.store(limiter_norm_ptr, tl.where(storable, limited, kept))
        # One program for all channels waits for each of its rounds: few of them.
        for start in range(0, channels, SWEEP):
            swept = start + tl.arange(0, SWEEP)
            phis = tl.load(
                factor_ptr + swept, mask=swept < channels, other=0.0, cache_modifier=".cg"
            )
            tl.store(factor_ptr + swept, limit * phis, mask=swept < channels)
