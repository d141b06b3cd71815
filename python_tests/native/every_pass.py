"""Runs every pass on fixed inputs and prints the instruction set and a digest of all that it wrote.

    python every_pass.py _native.so

Without torch, which takes minutes to import in a simulated processor; any OpenMP runtime will do.
"""

import ctypes
import hashlib
import random
import struct
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader

ROWS, COLS = 37, 1100  # more than a chunk of 1024, and odd in the other direction
FLOAT32, BFLOAT16 = 0, 1
CODES = 2  # of moments, whose other formats are those
ADAM = {
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-6,
    "bias_correction1": 0.5,
    "bias_correction2": 0.25,
}


def load(path):
    ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
    loader = ExtensionFileLoader("_native", path)
    module = module_from_spec(spec_from_loader("_native", loader))
    loader.exec_module(module)
    return module


def floats(count, scale=1.0):
    return (ctypes.c_float * count)(*(scale * random.gauss(0, 1) for _ in range(count)))


def squares(count, scale=1.0):
    return (ctypes.c_float * count)(*(scale * random.gauss(0, 1) ** 2 for _ in range(count)))


def halves(count):
    """bfloat16, as the upper halves of floats."""
    words = (struct.unpack("<I", struct.pack("<f", random.gauss(0, 1)))[0] for _ in range(count))
    return (ctypes.c_uint16 * count)(*(word >> 16 for word in words))


def at(*arrays):
    return [ctypes.addressof(array) for array in arrays]


def run(native, channels_are_rows):
    """Every array that was written."""
    size, channels = ROWS * COLS, ROWS if channels_are_rows else COLS
    whole = {"rows": ROWS, "cols": COLS, "channels_are_rows": channels_are_rows, "threads": 1}
    product, projected, direction = halves(size), floats(size), floats(size)
    exp_avg, exp_avg_sq = floats(size, 0.1), squares(size, 0.01)
    sums = [floats(channels) for _ in range(3)]
    native.adam_moments(
        product=(at(product), BFLOAT16, COLS),
        projected=at(projected),
        exp_avg=at(exp_avg),
        exp_avg_sq=at(exp_avg_sq),
        direction=at(direction),
        direction_sq=at(sums[0]),
        projected_sq=at(sums[1]),
        **ADAM,
        **whole,
    )
    written = [projected, exp_avg, exp_avg_sq, direction, *sums[:2]]
    for dtype, make, salts in (
        (FLOAT32, floats, None),
        (BFLOAT16, halves, None),
        (BFLOAT16, halves, [7]),
    ):
        param, grad, product, combined = (make(size) for _ in range(4))
        residual_sq, factor, limiter_norm = floats(channels), floats(channels), squares(1)
        native.residual_sums(
            matrix=(at(grad), dtype, COLS),
            residual_sq=at(residual_sq),
            projected_sq=at(sums[1]),
            kappa=0.25,
            **whole,
        )
        native.channel_scale(
            direction_sq=at(sums[0]),
            projected_sq=at(sums[1]),
            residual_sq=at(residual_sq),
            limiter_norm=at(limiter_norm),
            factor=at(factor),
            channels=channels,
            threads=1,
        )
        native.combine(
            direction=at(direction),
            projected=at(projected),
            factor=at(factor),
            combined=(at(combined), dtype, COLS),
            scale=0.25,
            rho_kappa=0.25,
            **whole,
        )
        native.update(
            param=(at(param), dtype, COLS),
            product=(at(product), dtype, COLS),
            grad=(at(grad), dtype, COLS),
            factor=at(factor),
            step_size=1e-2,
            decay=1e-3,
            rho=1.0,
            salts=salts,
            step=3,
            first_row=0,
            first_col=0,
            **whole,
        )
        written += [param, combined, factor, residual_sq, limiter_norm]
    return written


def low_bit_moments(size, scales, format):
    """M and V, and what a pass wants to know of them."""
    if format == BFLOAT16:
        exp_avg, exp_avg_sq = halves(size), halves(size)
        for i, half in enumerate(exp_avg_sq):
            exp_avg_sq[i] = half & 0x7FFF
        arrays = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    else:
        arrays = {
            "exp_avg": (ctypes.c_int8 * size)(*random.choices(range(-127, 128), k=size)),
            "exp_avg_sq": (ctypes.c_uint8 * size)(*random.choices(range(256), k=size)),
            "exp_avg_scale": squares(scales),
            "exp_avg_sq_scale": squares(scales),
        }
    places = {name: at(array) for name, array in arrays.items()}
    return list(arrays.values()), {**places, "format": format, "moment_salts": [7], "step": 3}


def run_low_bit(native, channels_are_rows):
    """Every array that the passes over moments in fewer bits wrote."""
    size, written = ROWS * COLS, []
    scales = -(-ROWS // 64) * COLS if channels_are_rows else ROWS * -(-COLS // 64)
    for format in (BFLOAT16, CODES):
        projected, direction = floats(size, 0.1), floats(size)
        arrays, moments = low_bit_moments(size, scales, format)
        native.adam_moments(
            product=(at(projected), FLOAT32, COLS),
            projected=at(projected),
            direction=at(direction),
            direction_sq=None,
            projected_sq=None,
            rows=ROWS,
            cols=COLS,
            channels_are_rows=channels_are_rows,
            threads=1,
            **ADAM,
            **moments,
        )
        written += [direction, *arrays]
        for dtype, make in ((FLOAT32, floats), (BFLOAT16, halves)):
            param, grad = make(size), make(size)
            arrays, moments = low_bit_moments(size, -(-size // 256), format)
            native.adamw(
                param=(at(param), dtype, size),
                grad=(at(grad), dtype, size),
                elements=size,
                step_size=1e-2,
                decay=1e-3,
                threads=1,
                **ADAM,
                **moments,
            )
            written += [param, *arrays]
    return written


def main():
    native = load(sys.argv[1])
    random.seed(0)
    digest = hashlib.sha256()
    for channels_are_rows in (False, True):
        for array in run(native, channels_are_rows) + run_low_bit(native, channels_are_rows):
            digest.update(bytes(array))
    print(native.build_info()["cpu_capability"], digest.hexdigest())


if __name__ == "__main__":
    main()
