"""Conversions and stochastic rounding of the compiled passes, over all 16-bit values.

`update` with nothing to add reads a product of any dtype into a float32 weight, and `combine` with
a scale of 1 writes a float32 direction in any dtype: together they are the conversions.
"""

import pytest
import torch
from guarded import CODES, DEVICES, SIDES, assert_same_bits, place
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_kernels import _native
from lowrank_kernels.ops import Side
from lowrank_kernels.ops.reference import stochastically_rounded

HALVES = [torch.bfloat16, torch.float16]


def of(matrix):
    return [matrix.data_ptr()], CODES[matrix.dtype], matrix.shape[1]


def every(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def update(param, product, rows_are_channels=True, device="cpu", **overrides):
    _native.update(
        **{
            "param": of(param),
            "product": of(product),
            "grad": None,
            "factor": None,
            "rows": param.shape[0],
            "cols": param.shape[1],
            "channels_are_rows": rows_are_channels,
            "step_size": -1.0,
            "decay": 0.0,
            "rho": 0.0,
            "salts": None,
            "step": 0,
            "first_row": 0,
            "first_col": 0,
            **place(device),
            **overrides,
        }
    )
    return param


def stored(values, dtype, device="cpu"):
    """Float32 values as a pass writes them in another dtype."""
    rows, cols = values.shape
    combined = torch.empty(rows, cols, dtype=dtype, device=device)
    _native.combine(
        direction=[values.data_ptr()],
        projected=[values.data_ptr()],
        factor=None,
        combined=of(combined),
        rows=rows,
        cols=cols,
        channels_are_rows=True,
        scale=1.0,
        rho_kappa=0.0,
        **place(device),
    )
    return combined


def assert_equal_or_both_nan(actual, expected):
    assert torch.equal(actual.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert_same_bits([actual[number]], [expected[number]])


@pytest.mark.parametrize("flush", [False, True], ids=["", "flush_denormal"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_16_bit_value_becomes_its_float32(dtype, flush):
    if flush and not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        halves = every(dtype).view(64, 1024)
        direction = torch.zeros(64, 1024)
        # Through the moments, which only drop what has no finite square.
        moments = [torch.zeros(64, 1024) for _ in range(3)]
        sums = torch.empty(2, 64)
        _native.adam_moments(
            product=of(halves),
            projected=[moments[0].data_ptr()],
            exp_avg=[moments[1].data_ptr()],
            exp_avg_sq=[moments[2].data_ptr()],
            direction=[direction.data_ptr()],
            direction_sq=[sums[0].data_ptr()],
            projected_sq=[sums[1].data_ptr()],
            rows=64,
            cols=1024,
            channels_are_rows=True,
            beta1=0.9,
            beta2=0.999,
            eps=1e-6,
            bias_correction1=1.0,
            bias_correction2=1.0,
            threads=1,
        )
    finally:
        torch.set_flush_denormal(False)
    values = halves.float()
    expected = torch.where(values.square().isfinite(), values, 0.0)
    assert_same_bits([moments[0]], [expected])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_nan_and_infinities_are_read_as_such(dtype):
    halves = every(dtype).view(64, 1024)
    read = update(torch.zeros(64, 1024), halves)
    assert torch.equal(read.isnan(), halves.isnan())
    assert torch.equal(read.nan_to_num(7.0), halves.float().nan_to_num(7.0))


@DEVICES
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_16_bit_value_is_written_as_itself(dtype, device):
    halves = every(dtype).view(64, 1024).to(device)
    assert_equal_or_both_nan(stored(halves.float(), dtype, device), halves)


@DEVICES
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_of_all_that_lies_between_is_that_of_torch(dtype, device):
    """Each value, the middle to the next, and one float32 to either side of both."""
    values = every(dtype).float()
    following = every(dtype).view(torch.int16).add(1).view(dtype).float()
    middles = ((values.double() + following.double()) / 2).float()
    edges = torch.cat([values, middles])
    bits = edges.view(torch.int32)
    near = torch.cat([edges, (bits + 1).view(torch.float32), (bits - 1).view(torch.float32)])
    near = near[torch.randperm(near.numel(), generator=torch.Generator().manual_seed(0))]
    near = near.view(-1, 1024).to(device)
    assert_equal_or_both_nan(stored(near, dtype, device), near.to(dtype))


@DEVICES
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_of_random_bits_is_that_of_torch(dtype, device, rng):
    bits = torch.randint(-(2**31), 2**31, (1000, 1001), generator=rng)
    values = bits.to(torch.int32).view(torch.float32).to(device)
    assert_equal_or_both_nan(stored(values, dtype, device), values.to(dtype))


@DEVICES
@SIDES
@settings(max_examples=50)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 70),
    salt=st.integers(0, 2**31 - 1),
    step=st.integers(0, 2**31 - 1),
    seed=st.integers(0, 2**32),
)
def test_stochastic_rounding_has_the_bits_of_the_reference(
    rows_are_channels, device, rows, cols, salt, step, seed
):
    """The weight is held in the product: bfloat16 weights of 0 and any float32 update."""
    rng = torch.Generator().manual_seed(seed)
    values = torch.randint(-(2**31), 2**31, (rows, cols), generator=rng)
    values = values.to(torch.int32).view(torch.float32).to(device)
    side = Side.RIGHT if rows_are_channels else Side.LEFT
    expected = stochastically_rounded(values, side, salt, step).to(torch.bfloat16)
    if device == "cuda":  # There the product has the dtype of the weight.
        values = values.to(torch.bfloat16)
        expected = stochastically_rounded(values.float(), side, salt, step).to(torch.bfloat16)
    zeros = torch.zeros(rows, cols, dtype=torch.bfloat16, device=device)
    rounded = update(zeros, values, rows_are_channels, device, salts=(salt,), step=step)
    assert torch.equal(rounded.isnan(), expected.isnan())
    assert torch.equal(rounded.nan_to_num(), expected.nan_to_num())


def test_stochastic_rounding_keeps_inf_and_nan():
    """What tells these apart lies in the bits that are dropped, or would carry into the sign."""
    bits = [0x7F800000, -0x800000, 0x7F800001, 0x7FFFFFFF, -0x7FFFFF, -1]
    values = torch.tensor(bits, dtype=torch.int32).view(torch.float32).repeat(16, 1)
    rounded = update(torch.zeros(16, 6).bfloat16(), values, salts=(3,), step=5)
    assert torch.equal(rounded[:, :2].float(), values[:, :2])
    assert rounded[:, 2:].isnan().all()


def test_what_is_finite_stays_finite(rng):
    """Between the largest of bfloat16 and Inf."""
    raw = torch.randint(0x7F7F0000, 0x7F800000, (20, 1000), generator=rng)
    values = raw.int().view(torch.float32)
    values[10:] *= -1
    rounded = update(torch.zeros(20, 1000).bfloat16(), values, salts=(3,), step=5)
    largest = torch.finfo(torch.bfloat16).max
    assert torch.equal(rounded.float(), values.sign() * largest)


@SIDES
def test_noise_of_a_part_is_that_of_its_place(rows_are_channels, rng):
    values = torch.randn(50, 1100, generator=rng)
    noise = {"salts": (11,), "step": 5}
    whole = update(torch.zeros_like(values).bfloat16(), values, rows_are_channels, **noise)
    part = values[20:, 30:].contiguous()
    cut = update(
        torch.zeros_like(part).bfloat16(),
        part,
        rows_are_channels,
        **noise,
        first_row=20,
        first_col=30,
    )
    assert torch.equal(cut, whole[20:, 30:])


def test_noise_wants_bfloat16_weights_and_a_salt_a_matrix():
    weight, product = torch.zeros(3, 5), torch.ones(3, 5)
    with pytest.raises(ValueError, match="salts are for a bfloat16 param only"):
        update(weight, product, salts=(1,), step=1)
    weight = weight.bfloat16()
    with pytest.raises(ValueError, match="salts must have 1 values, got 2"):
        update(weight, product, salts=(1, 2), step=1)
    for salt, step in ((-1, 1), (1, 2**32)):
        with pytest.raises(TypeError):
            update(weight, product, salts=(salt,), step=step)
    assert not weight.any()
