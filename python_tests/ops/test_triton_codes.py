"""Operation 1 of Triton on moments in codes and in bfloat16, and the codes themselves.

A new code is right if float64, from the same old codes, finds it or a place so near to its border
that twice the error of plain torch leads there.
"""

import pytest
import torch
from devices import device_of
from oracles import codes as oracle
from oracles.low_rank import balanced_gradients, orthonormal
from pairs import pairwise

from lowrank_kernels.ops import AdamScalars, Matrices, Residual, Side, prepare
from lowrank_kernels.ops.codes import (
    FLAT_GROUPS,
    Stored,
    channel_groups,
    channel_noise,
    decoded,
    store,
)
from lowrank_kernels.ops.noise import rounded_to_bfloat16

pytest.importorskip("triton")
import triton
import triton.language as tl

from lowrank_kernels.ops import triton as kernels
from lowrank_kernels.ops.triton import addresses, config
from lowrank_kernels.ops.triton.codes import (
    decoded_avg,
    decoded_avg_sq,
    encoded_avg,
    encoded_avg_sq,
)
from lowrank_kernels.ops.triton.config import Config, Gpu, Problem, candidates, config_of, forced
from lowrank_kernels.ops.triton.noise import rounded_to_bfloat16 as rounded_by_triton

DEVICE = device_of("triton")
INTERPRETED = DEVICE.type == "cpu"
SIZE = 256
FORMS = {"galore": None, "fira": Residual(0.25, 1.0)}
ADAM = AdamScalars(0.9, 0.999, 1e-6)
SALTS, STEP = (7, 2**32 - 1, 11), 70000
SENTINEL = 77


@triton.jit
def decode_kernel(codes_ptr, scales_ptr, values_ptr, OF_AVG: tl.constexpr, SIZE: tl.constexpr):
    group, place = tl.program_id(0), tl.arange(0, SIZE)
    codes = tl.load(codes_ptr + group * SIZE + place)[None, :]
    scales = tl.load(scales_ptr + group + tl.arange(0, 1))
    values = decoded_avg(codes, scales) if OF_AVG else decoded_avg_sq(codes, scales)
    tl.store(values_ptr + group * SIZE + place[None, :], values)


@triton.jit
def encode_kernel(
    values_ptr, bits_ptr, codes_ptr, scales_ptr, OF_AVG: tl.constexpr, SIZE: tl.constexpr
):
    group, place = tl.program_id(0), tl.arange(0, SIZE)[None, :]
    values = tl.load(values_ptr + group * SIZE + place)
    if OF_AVG:
        codes, scales = encoded_avg(values)
    else:
        codes, scales = encoded_avg_sq(values, tl.load(bits_ptr + group * SIZE + place))
    tl.store(codes_ptr + group * SIZE + place, codes)
    tl.store(scales_ptr + group + tl.arange(0, 1), scales)


@triton.jit
def round_kernel(values_ptr, bits_ptr, SIZE: tl.constexpr):
    places = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    bits = tl.load(bits_ptr + places).to(tl.uint32)
    tl.store(values_ptr + places, rounded_by_triton(tl.load(values_ptr + places), bits))


def random_scales(count, rng):
    """From 1e-22 to 1e10."""
    exponents = torch.rand(count, generator=rng, dtype=torch.float64) * 32 - 22
    return (10**exponents).float()


def every_code(groups, rng):
    """Each code of M and of V in every group, and a scale a group."""
    of_avg = torch.arange(-127, 129).clamp(max=127).to(torch.int8).repeat(groups, 1)
    of_avg_sq = torch.arange(256).to(torch.uint8).repeat(groups, 1)
    scales = (random_scales(groups, rng) for _ in "MV")
    return Stored(*(each.to(DEVICE) for each in (of_avg, of_avg_sq, *scales)))


def encoded_by_triton(exp_avg, exp_avg_sq, bits):
    groups = len(exp_avg)
    new = Stored(
        torch.empty_like(exp_avg, dtype=torch.int8),
        torch.empty_like(exp_avg, dtype=torch.uint8),
        *(exp_avg.new_empty(groups) for _ in "MV"),
    )
    encode_kernel[(groups,)](exp_avg, bits, new[0], new[2], OF_AVG=True, SIZE=SIZE)
    encode_kernel[(groups,)](exp_avg_sq, bits, new[1], new[3], OF_AVG=False, SIZE=SIZE)
    return new


def encoded_by_torch(exp_avg, exp_avg_sq, bits):
    new = Stored(
        torch.empty(exp_avg.numel(), dtype=torch.int8, device=DEVICE),
        torch.empty(exp_avg.numel(), dtype=torch.uint8, device=DEVICE),
        *(exp_avg.new_empty(len(exp_avg)) for _ in "MV"),
    )
    store(new, exp_avg.view(-1), exp_avg_sq.view(-1), FLAT_GROUPS, bits.view(-1))
    return Stored(*(each.view(-1, SIZE) for each in new[:2]), *new[2:])


def assert_same(stored, other):
    for one, another in zip(stored, other, strict=True):
        assert torch.equal(one, another)


def test_v_is_rounded_to_the_bits_of_torch(rng):
    """Any float32, and those between the largest of bfloat16 and Inf, which stay finite."""
    raw = torch.randint(-(2**31), 2**31, (100 * SIZE,), generator=rng)
    raw[: 10 * SIZE] = torch.randint(0x7F7F0000, 0x7F800000, (10 * SIZE,), generator=rng)
    values = raw.int().view(torch.float32).to(DEVICE)
    values[: 5 * SIZE] *= -1
    bits = torch.randint(0, 2**16, values.shape, generator=rng, dtype=torch.int32).to(DEVICE)
    expected = rounded_to_bfloat16(values, bits)
    assert torch.equal(expected.isfinite(), values.isfinite())
    assert torch.equal(expected.bfloat16().float().nan_to_num(), expected.nan_to_num())
    round_kernel[(100,)](values, bits, SIZE=SIZE)
    assert torch.equal(values.isnan(), expected.isnan())
    assert torch.equal(values.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_codes_are_decoded_to_the_bits_of_torch(rng):
    stored = every_code(200, rng)
    for codes, scales, of_avg in ((stored[0], stored[2], True), (stored[1], stored[3], False)):
        values = torch.full(codes.shape, torch.nan, device=DEVICE)
        decode_kernel[(len(codes),)](codes, scales, values, OF_AVG=of_avg, SIZE=SIZE)
        expected = decoded(codes.view(-1), scales, FLAT_GROUPS).view(codes.shape)
        assert torch.equal(values, expected if of_avg else expected.square())


def test_what_was_decoded_is_encoded_to_the_same_codes(rng):
    """Whatever rounds V: an unchanged code is moved by at most 2 in 65536 draws."""
    stored = every_code(200, rng)
    # The square of the smallest root of a smaller scale is no normal number.
    stored.exp_avg_sq_scale.clamp_(min=1e-14)
    exp_avg = decoded(stored[0].view(-1), stored[2], FLAT_GROUPS).view(-1, SIZE)
    exp_avg_sq = decoded(stored[1].view(-1), stored[3], FLAT_GROUPS).view(-1, SIZE).square()
    for bits in (2, 2**15, 2**16 - 3):
        rounding = torch.full(exp_avg.shape, bits, dtype=torch.int32, device=DEVICE)
        got = encoded_by_triton(exp_avg, exp_avg_sq, rounding)
        assert_same(got[:3], stored[:3])
        # V is squared and rooted in between.
        torch.testing.assert_close(got[3], stored[3], rtol=1e-6, atol=0)


@pytest.mark.parametrize("sigma", [0.0, 1.0, 2.5])
def test_moments_are_encoded_to_the_bits_of_torch(rng, sigma):
    """Of groups of one size and of many, of zeros, of one element, of numbers near the smallest."""
    shape = (200, SIZE)
    sizes = (sigma * torch.randn(shape, generator=rng)).exp() * random_scales(200, rng)[:, None]
    exp_avg = sizes * torch.randn(shape, generator=rng)
    exp_avg[0], exp_avg[1, 1:], exp_avg[2, ::2] = 0.0, 0.0, 0.0
    exp_avg[3], exp_avg[4] = 1e-42, -1e-22
    bits = torch.randint(0, 2**16, shape, generator=rng, dtype=torch.int32)
    exp_avg, bits = exp_avg.to(DEVICE), bits.to(DEVICE)
    exp_avg_sq = exp_avg.square() * 0.3
    exp_avg_sq[3] = 1e-42
    of_both = [
        encoded(exp_avg, exp_avg_sq, bits) for encoded in (encoded_by_triton, encoded_by_torch)
    ]
    assert_same(*of_both)
    assert ((of_both[0].exp_avg_sq > 0) == (exp_avg_sq > 0)).all()


def moments_of(matrices):
    return [matrices.exp_avgs, matrices.exp_avg_sqs]


def scales_of(matrices):
    return [each for each in (matrices.exp_avg_scales, matrices.exp_avg_sq_scales) if each]


class Coded:
    """Equal matrices whose moments are in a format, with one gradient each.

    Channels x depth; the codes are any, the gradients such that no error is amplified.
    """

    def __init__(self, form, side, channels, depth, rank, moments="int8", count=1, seed=0):
        rng = torch.Generator().manual_seed(100 * seed + channels + depth + rank)
        self.side, self.moments, self.groups = side, moments, channel_groups(side)
        self.left = side is Side.LEFT
        shape = (depth, channels) if self.left else (channels, depth)
        low = (rank, channels) if self.left else (channels, rank)
        made = [self._one(shape, low, depth, rank, rng) for _ in range(count)]
        grads, bases, stored = (list(each) for each in zip(*made, strict=True))
        columns = [[each.to(DEVICE) for each in column] for column in zip(*stored, strict=True)]
        self.matrices = Matrices(
            side,
            FORMS[form],
            [torch.zeros(shape, device=DEVICE) for _ in range(count)],
            [grad.to(DEVICE) for grad in grads],
            [basis.to(DEVICE) for basis in bases],
            *columns[:2],
            [torch.zeros((), device=DEVICE) for _ in range(count)],
            moment_salts=SALTS[:count],
            **dict(zip(("exp_avg_scales", "exp_avg_sq_scales"), columns[2:], strict=False)),
        )

    def _one(self, shape, low, depth, rank, rng):
        basis = orthonormal(depth, rank, rng)
        (grad,) = balanced_gradients(shape, basis, self.left, 1, rng)
        if self.moments == "bfloat16":
            avg = torch.randn(low, generator=rng).bfloat16()
            stored = avg, torch.rand(low, generator=rng).bfloat16()
        else:
            avg = torch.randint(-127, 128, low, generator=rng, dtype=torch.int8)
            avg_sq = torch.randint(0, 256, low, generator=rng).to(torch.uint8)
            scales = (torch.rand(self.groups.scales(low), generator=rng) + 0.1 for _ in "MV")
            stored = avg, avg_sq, *scales
        return grad.float(), basis.float(), stored

    def stored(self, index=0):
        tensors = moments_of(self.matrices) + scales_of(self.matrices)
        return Stored(*(each[index].cpu().clone() for each in tensors))

    def literal(self, index, dtype):
        """R, M, V, N and the sums, from the moments as they are stored now."""
        matrices, old, adam = self.matrices, self.stored(index), ADAM
        grad, basis = (each[index].cpu().to(dtype) for each in (matrices.grads, matrices.bases))
        low = grad
        if not matrices.projected:
            low = basis.T @ grad if self.left else grad @ basis
        usable = low.double().square() <= torch.finfo(torch.float32).max
        low = low.where(usable, 0.0)
        exp_avg, exp_avg_sq = old[0].double(), old[1].double()
        if self.moments == "int8":
            scales = [
                oracle.spread(each, old.exp_avg.shape, self.groups.axis, self.groups.size)
                for each in old[2:]
            ]
            exp_avg = oracle.decoded_avg(old.exp_avg, scales[0])
            exp_avg_sq = oracle.decoded_avg_sq(old.exp_avg_sq, scales[1])
        exp_avg, exp_avg_sq = exp_avg.to(dtype), exp_avg_sq.to(dtype)
        new_avg = adam.beta1 * exp_avg + (1 - adam.beta1) * low
        new_avg_sq = adam.beta2 * exp_avg_sq + (1 - adam.beta2) * low * low
        exp_avg, exp_avg_sq = new_avg.where(usable, exp_avg), new_avg_sq.where(usable, exp_avg_sq)
        direction = (exp_avg / (exp_avg_sq.sqrt() + adam.eps)).where(usable, 0.0)
        if matrices.projected:
            return low, exp_avg, exp_avg_sq, direction
        axis = 0 if self.left else 1
        residual = grad - 0.25 * (basis @ low if self.left else low @ basis.T)
        sums = torch.stack([each.square().sum(axis) for each in (direction, low, residual)])
        return low, exp_avg, exp_avg_sq, direction, sums

    def project(self, step=STEP, operations=None):
        operations = operations or prepare(self.matrices, backend="triton")
        return operations.project_moments(self.matrices, ADAM, step)

    def bits(self, index, step=STEP):
        like = self.matrices.exp_avg_sqs[index].cpu()
        return channel_noise(like, self.side, SALTS[index], step)


def assert_as_accurate(got, plain, exact, name):
    """Twice plain torch's error, and eight roundings of the largest."""
    got, plain, kept = (each.double().cpu()[exact.isfinite()] for each in (got, plain, exact))
    if kept.numel():
        allowed = 2 * float((plain - kept).norm()) + 8 * oracle.EPS * float(kept.abs().max())
        assert float((got - kept).norm()) <= allowed, name


def assert_codes(coded, index, plain, exact):
    """Codes and scales of M and V as they have become."""
    axis, size = coded.groups
    new, bits = coded.stored(index), coded.bits(index)
    for place, root in ((1, torch.Tensor.abs), (2, torch.sqrt)):
        code, scale = new[place - 1], new[place + 1]
        scales = [oracle.largest(root(each[place]).double(), axis, size) for each in (plain, exact)]
        error = 2 * float((scales[0] - scales[1]).abs().max()) + 4 * oracle.EPS * scales[1].max()
        assert ((scale.double() - scales[1]).abs() <= error).all()
        shares = [
            (each[place].double() if place == 1 else each[place].double().sqrt())
            / oracle.spread(of, code.shape, axis, size)
            for each, of in zip((plain, exact), scales, strict=True)
        ]
        off = 2 * float((shares[0] - shares[1]).abs().max()) + 4 * oracle.EPS
        if place == 1:
            low, high = oracle.avg_codes(shares[1], off)
        else:
            low, high = oracle.avg_sq_codes(shares[1], off, bits)
        assert (low <= code).all()
        assert (code <= high).all()
        assert float((high - low).double().mean()) < 0.01


def assert_bfloat16(coded, index, plain, exact):
    """M to the nearest, which the interpreter truncates; V by its noise."""
    new, bits = coded.stored(index), coded.bits(index)
    off = 2 * float((plain[1] - exact[1]).abs().max()) + 4 * oracle.EPS
    spacing = 2.0 ** (exact[1].abs().clamp(min=1e-30).log2().floor() - 7)
    assert ((new[0].double() - exact[1]).abs() <= spacing * (1 if INTERPRETED else 0.5) + off).all()
    off = 2 * float((plain[2] - exact[2]).abs().max()) + oracle.EPS * float(exact[2].max())
    low, high = (
        rounded_to_bfloat16((exact[2] + side * off).clamp(min=0).float(), bits) for side in (-1, 1)
    )
    assert (low <= new[1].float()).all()
    assert (new[1].float() <= high).all()
    assert float((low < high).float().mean()) < 0.2


def small_tiles(split=1, groups=1):
    """Several pieces and tiles of directions."""
    return forced(project=Config(64 * groups, 16, 16, cuts=1, warps=4, stages=1, split=split))


CHANNELS_DEPTH_RANK = [(1, 1, 1), (5, 37, 13), (64, 20, 16), (150, 61, 18), (200, 24, 24)]


@pytest.mark.parametrize(
    ("moments", "sizes", "side", "form", "parts", "on_device"),
    pairwise(("int8", "bfloat16"), CHANNELS_DEPTH_RANK, Side, FORMS, (1, 3), (False, True)),
    ids=str,
)
def test_against_oracle(moments, sizes, side, form, parts, on_device):
    """The step as one number, or as one a matrix on the device."""
    coded = Coded(form, side, *sizes, moments, count=2)
    literal = [[coded.literal(i, d) for d in (torch.float32, torch.float64)] for i in range(2)]
    step = torch.tensor([STEP] * 2, dtype=torch.int32, device=DEVICE) if on_device else STEP
    with small_tiles(parts):
        projection = coded.project(step)
    for index, (plain, exact) in enumerate(literal):
        assert_as_accurate(projection.projected[index], plain[0], exact[0], "R")
        assert_as_accurate(projection.direction[index], plain[3], exact[3], "N")
        if projection.sums is not None:
            for slots, one, other in zip(projection.sums, plain[4], exact[4], strict=True):
                assert_as_accurate(slots[index].sum(0), one, other, "sums")
        (assert_codes if moments == "int8" else assert_bfloat16)(coded, index, plain, exact)


@pytest.mark.parametrize(("side", "form"), pairwise(Side, FORMS), ids=str)
def test_tiles_that_the_heuristics_choose(side, form):
    coded = Coded(form, side, 200, 90, 70)
    plain, exact = (coded.literal(0, dtype) for dtype in (torch.float32, torch.float64))
    projection = coded.project()
    assert_as_accurate(projection.direction[0], plain[3], exact[3], "N")
    assert_codes(coded, 0, plain, exact)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("side", list(Side))
def test_an_entry_without_a_finite_square_keeps_its_moments(side, bad):
    coded = Coded("fira", side, 150, 61, 18)
    grad = coded.matrices.grads[0]
    (grad[:, 70] if coded.left else grad[70])[3] = bad
    plain, exact = (coded.literal(0, dtype) for dtype in (torch.float32, torch.float64))
    with small_tiles():
        projection = coded.project()
    channel = projection.direction[0][:, 70] if coded.left else projection.direction[0][70]
    assert not channel.any()
    assert projection.direction.isfinite().all()
    assert_codes(coded, 0, plain, exact)


def placed(coded, gap):
    """The moments and scales of a batch as views into one buffer a role; returns the buffers."""
    buffers = []
    for tensors in (*moments_of(coded.matrices), *scales_of(coded.matrices)):
        size = tensors[0].numel()
        pitch = size + gap + (-size) % 16
        around = torch.nan if tensors[0].is_floating_point() else SENTINEL
        buffer = tensors[0].new_full((len(tensors) * pitch + gap,), around)
        outside = torch.ones_like(buffer, dtype=torch.bool)
        for index, tensor in enumerate(tensors):
            start = gap + pitch * (len(tensors) - 1 - index)
            tensors[index] = buffer[start : start + size].view(tensor.shape).copy_(tensor)
            outside[start : start + size] = False
        buffers.append((buffer, outside))
    return buffers


@pytest.mark.parametrize(
    ("gap", "unit", "parts", "side", "form"),
    [
        (4096, 16, 3, Side.LEFT, "fira"),
        (4096, 16, 1, Side.RIGHT, "galore"),
        (4099, 1, 1, Side.LEFT, "galore"),
        (4099, 1, 3, Side.RIGHT, "fira"),
    ],
)
def test_a_batch_is_its_matrices_one_by_one(gap, unit, parts, side, form):
    """Bit for bit, and no scale and no code outside of them is read or written, also where a tile
    has a group that is not there.
    """
    together, twice = (Coded(form, side, 150, 61, 18, count=3) for _ in "ab")
    buffers = placed(together, gap)
    assert {addresses.addresses_of(each).unit for each in moments_of(together.matrices)} == {unit}
    with small_tiles(parts, groups=2):
        for coded in (together, twice):
            coded.project()
        for index in range(3):
            alone = Coded(form, side, 150, 61, 18, count=3)
            names = [
                name for name in Matrices._fields if isinstance(getattr(alone.matrices, name), list)
            ]
            one = {name: getattr(alone.matrices, name)[index : index + 1] for name in names}
            one["moment_salts"] = SALTS[index : index + 1]
            alone.matrices = alone.matrices._replace(**one)
            alone.project()
            assert_same(together.stored(index), twice.stored(index))
            if INTERPRETED or unit == 16:
                assert_same(together.stored(index), alone.stored())
    for buffer, outside in buffers:
        if buffer.is_floating_point():
            assert buffer[outside].isnan().all()
            assert not buffer[~outside].isnan().any()
        else:
            assert (buffer[outside] == SENTINEL).all()


def test_a_batch_of_codes_is_wide_where_16_bytes_are():
    """16 codes, in units of which the distances are counted, are 16 bytes."""
    buffer = torch.zeros(4096, dtype=torch.int8)
    start = -buffer.data_ptr() % 16
    at = [buffer[start + place :][:64] for place in (0, 16, 24)]
    assert addresses.addresses_of([at[0], at[1]]).wide
    assert not addresses.addresses_of([at[0], at[2]]).wide
    assert not addresses.addresses_of([at[2], at[2]]).wide


@pytest.mark.parametrize("moments", ["int8", "bfloat16"])
def test_without_salts_v_is_rounded_to_the_nearest(moments, monkeypatch):
    coded = Coded("fira", Side.RIGHT, 70, 20, 18, moments)
    coded.matrices = coded.matrices._replace(moment_salts=None)
    if moments == "int8":
        literal = [coded.literal(0, dtype) for dtype in (torch.float32, torch.float64)]
        monkeypatch.setattr(
            coded, "bits", lambda _: torch.full(coded.matrices.exp_avgs[0].shape, 1 << 15)
        )
    stochastic = Coded("fira", Side.RIGHT, 70, 20, 18, moments)
    with small_tiles():
        coded.project()
        stochastic.project()
    assert not torch.equal(coded.stored().exp_avg_sq, stochastic.stored().exp_avg_sq)
    assert_same([coded.stored().exp_avg], [stochastic.stored().exp_avg])
    if moments == "int8":
        assert_codes(coded, 0, *literal)


def test_each_step_and_each_matrix_rounds_v_by_other_numbers():
    found = []
    for step, index in ((STEP, 0), (STEP + 1, 0), (STEP, 1)):
        coded = Coded("galore", Side.LEFT, 128, 20, 16)
        coded.matrices = coded.matrices._replace(moment_salts=SALTS[index : index + 1])
        with small_tiles():
            coded.project(step)
        found.append(coded.stored().exp_avg_sq)
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("moments", ["int8", "bfloat16"])
def test_moments_are_nowhere_in_float32(moments):
    """The kernel is given them as they are stored; N, R and sums are all that is allocated."""
    coded = Coded("fira", Side.RIGHT, 70, 20, 16, moments)
    operations = prepare(coded.matrices, backend="triton")
    assert type(operations) is kernels.Operations
    sizes, new = [], operations._empty
    operations._empty = lambda *size: (sizes.append(size), new(*size))[1]
    projection = coded.project(operations=operations)
    assert [len(size) for size in sizes] == [3, 3, 4]
    assert projection.direction.dtype is projection.projected.dtype is torch.float32


def test_a_tile_without_whole_groups_is_refused():
    coded = Coded("fira", Side.RIGHT, 70, 20, 16)
    smaller = forced(project=Config(32, 16, 16, cuts=0, warps=4, stages=1))
    with smaller, pytest.raises(Exception, match="in one tile"):
        coded.project()


H200 = Gpu("NVIDIA H200 (x)", 132, 227 * 1024)
A100 = Gpu("A100", 108, 163 * 1024, 80)


@pytest.mark.parametrize("gpu", [H200, A100], ids=str)
@pytest.mark.parametrize("dtypes", [("bf16", "bf16"), ("f32", "f32"), ("f32", "bf16")])
def test_every_tile_of_codes_has_whole_groups_and_room_for_them(dtypes, gpu):
    named = {"bf16": torch.bfloat16, "f32": torch.float32}
    for channels, depth, rank in ((4096, 4096, 1024), (5461, 2048, 512), (512, 4096, 128)):
        for wide, even, side in pairwise((False, True), (False, True), Side):
            one = Problem(
                side,
                channels,
                depth,
                rank,
                matrices=1,
                dtypes=tuple(named[dtype] for dtype in dtypes),
                wide=wide,
                even=even,
                moments=torch.int8,
            )
            for each in (config_of("project", one, gpu), *candidates("project", one, gpu)):
                assert each.channels % 64 == 0
                assert each.rank <= 128
                assert each.split == 1 or each.channels * each.rank <= 64 * 128
                assert each.registers > 128 or side is Side.RIGHT


def test_fewer_bytes_of_moments_are_predicted_to_take_less_time():
    times = []
    for moments in (torch.float32, torch.bfloat16, torch.int8):
        one = Problem(Side.RIGHT, 4096, 256, 128, 64, (torch.bfloat16,) * 2, moments=moments)
        tile = Config(64, 64, 64, cuts=2, warps=4, stages=3)
        times.append(config.predicted_seconds("project", one, tile, H200))
    assert times[0] > times[1] > times[2]
