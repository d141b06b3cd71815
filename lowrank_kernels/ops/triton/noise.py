"""Random bits from a counter, as `ops.noise` has them, bit for bit."""

import triton
import triton.language as tl

# Of bfloat16.
_LARGEST = tl.constexpr(2.0**128 - 2.0**120)


@triton.jit
def _mix(value):
    """lowbias32; unsigned."""
    value = (value ^ (value >> 16)) * 0x7FEB352D
    value = (value ^ (value >> 15)) * 0x846CA68B
    return value ^ (value >> 16)


@triton.jit
def noise_key(salts, step, matrix, DEVICE_STEP: tl.constexpr):
    """Of one matrix of a batch, whose steps are one number or one int32 a matrix on the device."""
    if DEVICE_STEP:
        step = tl.load(step + matrix)
    salt = tl.load(salts + matrix).to(tl.uint32)
    return _mix(salt + _mix(tl.cast(step, tl.uint32)))


@triton.jit
def noise(key, channels, places):
    """16 bits for each channel and place in it."""
    row = _mix(key + channels.to(tl.uint32))
    return _mix(row[:, None] + places.to(tl.uint32)[None, :]) & 0xFFFF


@triton.jit
def rounded_to_bfloat16(values, bits):
    """float32 of which bfloat16 loses nothing; what is finite stays so."""
    raw = values.to(tl.uint32, bitcast=True)
    rounded = ((raw + bits) & 0xFFFF0000).to(tl.float32, bitcast=True)
    rounded = tl.clamp(rounded, -_LARGEST, _LARGEST)
    return tl.where(tl.abs(values) < float("inf"), rounded, values)
