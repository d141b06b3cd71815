"""Moments in 8 bits and in bfloat16: the laws of the codes, their rounding, and their noise."""

import pytest
import torch

from lowrank_kernels.ops import Side
from lowrank_kernels.ops.codes import (
    FLAT_GROUPS,
    Groups,
    Stored,
    channel_groups,
    channel_noise,
    flat_noise,
    loaded,
    new_stored,
    store,
)

GROUPS = [Groups(0, 64), Groups(1, 64), FLAT_GROUPS]
SHAPES = [(1, 1), (64, 3), (65, 130), (7, 300), (0, 5), (5, 0)]
CPU = torch.device("cpu")


def spread_moments(shape, seed=0, sigma=2.5):
    """M and V of channels whose scales differ as a lognormal variable does."""
    rng = torch.Generator().manual_seed(seed)
    root = torch.randn(shape, generator=rng).mul(sigma).exp()
    return torch.randn(shape, generator=rng) * root, root.square()


@pytest.mark.parametrize("scale", [1e-17, 1e-7, 1.0, 3.7e5, 1e10])
@pytest.mark.parametrize("groups", [Groups(0, 255), Groups(1, 255)], ids=["rows", "columns"])
def test_every_code_is_its_own(groups, scale):
    """Decoded and encoded again, each code comes back, and with it the scale, to the bit."""
    scales = scale * torch.rand(40, dtype=torch.float64).add(0.5).float()
    scales = scales.unsqueeze(groups.axis)
    signed = torch.arange(-127, 128).to(torch.int8)
    unsigned = torch.arange(1, 256).to(torch.uint8)
    spread = (codes.unsqueeze(1 - groups.axis) for codes in (signed, unsigned))
    shape = (255, 40) if groups.axis == 0 else (40, 255)
    exp_avg, exp_avg_sq = (codes.expand(shape).clone() for codes in spread)
    before = Stored(exp_avg, exp_avg_sq, scales, scales)
    after = new_stored(shape, torch.int8, CPU, groups)
    store(after, *loaded(before, groups), groups)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_hold_what_they_are_meant_to(shape, groups):
    """Each group's largest exactly, all else within half a code, 0 as 0 and nothing else as 0."""
    exp_avg, exp_avg_sq = spread_moments(shape)
    if exp_avg.numel() > 1:
        exp_avg.view(-1)[0] = exp_avg_sq.view(-1)[0] = 0.0
    stored = new_stored(shape, torch.int8, CPU, groups)
    store(stored, exp_avg, exp_avg_sq, groups)
    mean, square = loaded(stored, groups)
    assert stored.exp_avg_scale.shape == groups.scales(shape)
    assert not mean[exp_avg == 0].any()
    assert torch.equal(square == 0, exp_avg_sq == 0)
    # A root's code is 1 where the nearest were 0.
    for wide, found, largest, error in (
        (exp_avg, mean, 127, 0.5),
        (exp_avg_sq.sqrt(), square.sqrt(), 255, 1.0),
    ):
        for part, held in zip(parts(wide, groups), parts(found, groups), strict=True):
            top = part.abs().amax(-1, keepdim=True)
            assert torch.equal(held.abs().amax(-1, keepdim=True), top)
            places, codes = ((x.abs() / top).nan_to_num().sqrt() * largest for x in (part, held))
            assert float((places - codes).abs().max()) < error + 1e-3


def parts(matrix, groups):
    """Groups along the last axis, of which the last may be short."""
    if groups.axis is None:
        matrix = matrix.reshape(1, -1)
    elif groups.axis == 0:
        matrix = matrix.T
    return [part for part in matrix.split(groups.size, 1) if part.numel()]


def averages(dtype, sigma):
    """V / V_exact in the mean over the second half of 4,000 steps at beta2 = 0.999, and 1 / sqrt of
    it: with noise, to the nearest, and with noise and scales in bfloat16.
    """
    shape, beta2, steps = (64, 24), 0.999, 4000
    groups, rng = channel_groups(Side.RIGHT), torch.Generator().manual_seed(1)
    root = torch.randn(shape, generator=rng).mul(sigma).exp()
    exact, arms = torch.zeros(shape), ("noise", "nearest", "short scales")
    held = {arm: new_stored(shape, dtype, CPU, groups) for arm in arms}
    ratios = {arm: [] for arm in arms}
    for step in range(1, steps + 1):
        square = (torch.randn(shape, generator=rng) * root).square()
        exact = beta2 * exact + (1 - beta2) * square
        bits = channel_noise(exact, Side.RIGHT, 7, step)
        for arm, stored in held.items():
            exp_avg, exp_avg_sq = loaded(stored, groups)
            new = beta2 * exp_avg_sq + (1 - beta2) * square
            store(stored, exp_avg, new, groups, None if arm == "nearest" else bits)
            if arm == "short scales" and dtype is torch.int8:
                stored.exp_avg_sq_scale.copy_(stored.exp_avg_sq_scale.bfloat16())
            if step > steps // 2 and step % 50 == 0:
                ratios[arm].append(loaded(stored, groups)[1] / exact)
    stacks = {arm: torch.stack(found) for arm, found in ratios.items()}
    return {arm: (float(x.mean()), float(x.rsqrt().mean())) for arm, x in stacks.items()}


def test_an_average_of_four_thousand_steps_keeps_its_mean():
    """A step moves V by less than half a code: to the nearest most of it stays, and a short scale
    does not decay.
    """
    found = averages(torch.int8, sigma=0.0)
    assert abs(found["noise"][0] - 1) < 0.01
    assert abs(found["nearest"][0] - 1) > 0.05
    assert abs(found["short scales"][0] - 1) > 0.05


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_of_channels_of_other_scales_the_inverse_root_keeps_its_mean(dtype):
    """What N is formed with; small entries of V are too large in the mean, by what they scatter."""
    assert abs(averages(dtype, sigma=1.0)["noise"][1] - 1) < 0.01


def test_noise_of_parts_is_that_of_the_whole():
    whole = flat_noise(0, 1000, 3, 5, CPU)
    assert torch.equal(flat_noise(512, 300, 3, 5, CPU), whole[512:812])
    right = channel_noise(torch.empty(40, 30), Side.RIGHT, 3, 5)
    left = channel_noise(torch.empty(30, 40), Side.LEFT, 3, torch.tensor(5, dtype=torch.int32))
    assert torch.equal(left.T, right)
    assert int(whole.min()) >= 0
    assert int(whole.max()) < 2**16


def test_the_format_does_not_change():
    """State is saved in it: these numbers are a file format."""
    noise = channel_noise(torch.empty(2, 3), Side.RIGHT, 12345, 678)
    assert noise.tolist() == [[52320, 954, 36520], [59368, 16721, 59330]]
    assert flat_noise(256, 4, 12345, 678, CPU).tolist() == [59368, 16721, 59330, 25778]
    stored, groups = new_stored((3, 2), torch.int8, CPU, Groups(0, 64)), Groups(0, 64)
    exp_avg = torch.tensor([[0.5, -1e-9], [-0.125, 3.0], [0.0, 2.0]])
    exp_avg_sq = torch.tensor([[1e-12, 4.0], [1.0, 0.25], [0.0, 9.0]])
    store(stored, exp_avg, exp_avg_sq, groups, torch.full((3, 2), 0x1234, dtype=torch.int32))
    assert stored.exp_avg.tolist() == [[127, 0], [-64, 127], [0, 104]]
    assert stored.exp_avg_sq.tolist() == [[1, 208], [255, 104], [0, 255]]
    assert stored.exp_avg_scale.tolist() == [[0.5, 3.0]]
    assert stored.exp_avg_sq_scale.tolist() == [[1.0, 3.0]]
