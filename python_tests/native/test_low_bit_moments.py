"""Operation 1 of `_native` on moments in bfloat16 and in codes: the bits of `ops.codes`, the law of
the codes in float64, and its borders.
"""

import pytest
import torch
from formats import (
    ADAM,
    Fenced,
    FencedMoments,
    assert_same,
    assert_same_moments,
    powers,
    random_gradient,
    random_moments,
    stepped,
)
from guarded import DEVICES, SIDES, place

from lowrank_kernels import _native
from lowrank_kernels.ops import AdamScalars, Matrices, Residual, prepare
from lowrank_kernels.ops.codes import channel_groups, channel_noise
from lowrank_kernels.ops.contract import Side

FORMATS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
# Groups of 64 and tiles of 64, of 256 and of 2048 elements, with and without a rest.
SHAPES = [(1, 1), (37, 61), (64, 64), (130, 67), (3, 5000), (5000, 3), (200, 2100), (0, 5), (5, 0)]
SALT, STEP = 2**31 - 9, 12


def side_of(rows_are_channels):
    return Side.RIGHT if rows_are_channels else Side.LEFT


class Problem:
    """One matrix with moments in a format, each array between sentinels."""

    def __init__(self, shape, rows_are_channels, dtype, seed=0, device="cpu"):
        self.device = device
        self.rng = torch.Generator().manual_seed(seed)
        self.shape, self.right, self.side = shape, rows_are_channels, side_of(rows_are_channels)
        self.groups = channel_groups(self.side)
        self.moments = FencedMoments(random_moments(shape, dtype, self.groups, self.rng), device)
        self.projected = Fenced.around(random_gradient(shape, self.rng), device)
        self.direction = Fenced.around(torch.zeros(shape), device)
        channels = shape[0 if rows_are_channels else 1]
        self.sums = [Fenced.around(torch.zeros(channels), device) for _ in range(2)]

    def arguments(self, salt=SALT, **overrides):
        return {
            "product": (self.projected.addresses, 0, self.shape[1]),
            "projected": self.projected.addresses,
            "direction": self.direction.addresses,
            "direction_sq": self.sums[0].addresses,
            "projected_sq": self.sums[1].addresses,
            "rows": self.shape[0],
            "cols": self.shape[1],
            "channels_are_rows": self.right,
            **ADAM,
            **self.moments.arguments(salt, STEP),
            **place(self.device),
            **overrides,
        }

    def expected(self, salt=SALT):
        """New moments, N and R, before `run`."""
        stored, bits = self.moments.stored, None
        if salt is not None:
            bits = channel_noise(stored.exp_avg_sq.cpu(), self.side, salt, STEP)
        return stepped(self.projected.view, stored, self.groups, bits, ADAM)

    def run(self, salt=SALT, **overrides):
        """What was written."""
        _native.adam_moments(**self.arguments(salt, **overrides))
        fences = (self.projected, self.direction, *self.sums)
        for fence in (*fences, self.moments):
            fence.assert_nothing_else_was_written()
        written = [tensor for tensor in self.moments.stored if tensor is not None]
        return [*written, *(fence.view for fence in fences)]


@DEVICES
@FORMATS
@SIDES
@pytest.mark.parametrize("salt", [SALT, None], ids=["noise", "nearest"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_has_the_bits_of_torch(shape, salt, rows_are_channels, dtype, device):
    problem = Problem(shape, rows_are_channels, dtype, device=device)
    stored, direction, projected = problem.expected(salt)
    problem.run(salt)
    assert_same_moments(problem.moments.stored, stored)
    assert_same(problem.direction.view, direction)
    assert_same(problem.projected.view, projected)
    axis = 1 if rows_are_channels else 0
    for total, terms in zip(problem.sums, (direction, projected), strict=True):
        exact = terms.double().square().sum(axis)
        # A rounding of each square and of each sum; squares may be subnormal.
        error = (shape[axis] + 1) * (2**-24 * exact + 2**-149)
        finite = exact <= torch.finfo(torch.float32).max
        assert ((total.view.cpu().double() - exact).abs() <= error)[finite].all()


@DEVICES
@SIDES
def test_v_stays_finite_in_bfloat16(rows_are_channels, device):
    """Of the largest squares, a thousandth of the way to Inf, and with the bits of torch."""
    problem = Problem((200, 300), rows_are_channels, torch.bfloat16, device=device)
    problem.moments.stored.exp_avg_sq.fill_(torch.finfo(torch.bfloat16).max)
    problem.projected.view.fill_(2.0**64 - 2.0**40)
    stored, _, _ = problem.expected()
    assert stored.exp_avg_sq.isfinite().all()
    problem.run()
    assert_same_moments(problem.moments.stored, stored)


@SIDES
def test_what_is_encoded_again_stays(rows_are_channels):
    """Nothing of R is finite: all codes stay, and scales too, as a code is the largest of each."""
    shape = (64 * 40, 50) if rows_are_channels else (50, 64 * 40)
    problem = Problem(shape, rows_are_channels, torch.int8)
    exp_avg, exp_avg_sq, *scales = stored = problem.moments.stored
    largest = slice(None, None, 64)
    every = (largest, slice(None)) if rows_are_channels else (slice(None), largest)
    exp_avg[every], exp_avg_sq[every] = -127, 255
    for scale in scales:
        # The square of a smaller root is subnormal.
        scale.copy_(powers(tuple(scale.shape), -14, 10, problem.rng))
    problem.projected.view.fill_(torch.nan)
    before = [tensor.clone() for tensor in stored]
    problem.run(salt=None)
    for now, then in zip(stored, before, strict=True):
        assert_same(now, then)


@FORMATS
@SIDES
@pytest.mark.parametrize("shape", [(37, 61), (300, 2100), (2100, 300)], ids=str)
def test_bits_do_not_depend_on_threads_or_sums(shape, rows_are_channels, dtype):
    alone = Problem(shape, rows_are_channels, dtype).run()
    for threads in (2, 3, 64):
        others = Problem(shape, rows_are_channels, dtype).run(threads=threads)
        for one, other in zip(alone, others, strict=True):
            assert_same(other, one)
        without = Problem(shape, rows_are_channels, dtype)
        unsummed = without.run(threads=threads, direction_sq=None, projected_sq=None)
        for one, other in zip(alone[:-2], unsummed[:-2], strict=True):
            assert_same(other, one)


@FORMATS
@SIDES
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shape", [(37, 61), (3, 4000), (130, 200)], ids=str)
def test_a_group_has_the_bits_of_its_matrices(shape, threads, rows_are_channels, dtype):
    salts = [SALT + index for index in range(5)]
    made = lambda: [Problem(shape, rows_are_channels, dtype, seed) for seed in range(5)]  # noqa: E731
    apart = [one.run(salt) for one, salt in zip(made(), salts, strict=True)]
    together = made()
    each = [one.arguments(salt) for one, salt in zip(together, salts, strict=True)]
    lists = {
        name: [place for one in each for place in one[name]]
        for name, value in each[0].items()
        if isinstance(value, list)
    }
    product = (lists["projected"], 0, shape[1])
    _native.adam_moments(**each[0] | lists | {"product": product, "threads": threads})
    for one, expected in zip(together, apart, strict=True):
        sums = [total.view for total in one.sums]
        written = [*one.moments.stored, one.projected.view, one.direction.view, *sums]
        for tensor, value in zip([t for t in written if t is not None], expected, strict=True):
            assert_same(tensor, value)


def places(sizes, scales, codes):
    """Where codes lie that stand for sizes, in units of 2^-16."""
    return 2**16 * codes * (sizes / scales.where(scales > 0, 1)).clamp(min=0).sqrt()


def assert_codes(codes, exact, plain, terms, bits, least, largest):
    """That of the exact size, or a neighbour where twice torch's error reaches over its border.

    Args:
        codes: magnitudes, int32.
        exact: sizes in float64.
        plain: sizes in float32.
        terms: of what they are sums, without signs: eight roundings of it are allowed, too.
        bits: what rounds.
        least: the code of what is next to nothing.
        largest: the code of the largest of a group, a column.
    """
    scale = exact.amax(0, keepdim=True)
    error = 2 * (plain.double() - exact).abs() + 8 * 2**-24 * terms
    error = error + exact * 8 * 2**-24
    low, high = (places(exact + sign * error, scale, largest) + 2 * sign for sign in (-1, 1))
    low, high = ((bound.clamp(min=0) + bits).floor() // 2**16 for bound in (low, high))
    low, high = low.clamp(least, largest), high.clamp(least, largest)
    assert ((codes >= low) & (codes <= high)).all()
    # Nothing is learned of a wide interval, and most are none.
    assert (low == high).double().mean() > 0.9


@SIDES
@pytest.mark.parametrize("salt", [SALT, None], ids=["noise", "nearest"])
@pytest.mark.parametrize("channels", [1, 63, 64])
def test_codes_are_those_of_float64(channels, salt, rows_are_channels, rng):
    """A step of one group a direction, from the same codes, by the law as it is written down."""
    shape = (channels, 700) if rows_are_channels else (700, channels)
    problem = Problem(shape, rows_are_channels, torch.int8)
    stored = problem.moments.stored
    stored.exp_avg_scale.copy_(powers(tuple(stored.exp_avg_scale.shape), -6, 2, rng))
    stored.exp_avg_sq_scale.copy_(stored.exp_avg_scale)
    gradient = torch.randn(shape, generator=rng) * powers((1, 1), -3, -3, rng)
    problem.projected.view.copy_(gradient)

    def upright(tensor):
        """Channels down."""
        return tensor if rows_are_channels else tensor.T

    q, p, a, b = (upright(tensor).clone() for tensor in stored)
    bits = torch.full_like(q, 2**15, dtype=torch.int64)
    if salt is not None:
        bits = upright(channel_noise(stored.exp_avg_sq, problem.side, salt, STEP)).long()
    direction = problem.run(salt)[5]
    beta1, beta2, eps, correction1, correction2 = ADAM.values()

    def of(dtype):
        r, share, root = upright(gradient).to(dtype), q.to(dtype) / 127, p.to(dtype) / 255
        old, old_sq = share * share.abs() * a.to(dtype), (root * root * b.to(dtype)).square()
        m, v = beta1 * old + (1 - beta1) * r, beta2 * old_sq + (1 - beta2) * r * r
        n = m / correction1 / ((v / correction2).sqrt() + eps)
        return m, v.sqrt(), n, beta1 * old.abs() + (1 - beta1) * r.abs()

    exact, plain = of(torch.float64), of(torch.float32)
    new_q, new_p, new_a, new_b = map(upright, stored)
    assert_codes(new_q.abs().int(), exact[0].abs(), plain[0].abs(), exact[3], 2**15, 0, 127)
    assert_codes(new_p.int(), exact[1], plain[1], exact[1], bits, 1, 255)
    assert (new_q.sign() * exact[0].sign() >= 0).all()
    assert (new_p >= 1).all()
    of_scales = ((new_a, exact[0], plain[0]), (new_b, exact[1], plain[1]))
    values = [(s, x.abs().amax(0, True), y.abs().amax(0, True)) for s, x, y in of_scales]
    for got, value, coarse in (*values, (upright(direction), exact[2], plain[2])):
        allowed = 2 * (coarse.double() - value).norm() + 8 * 2**-24 * value.abs().max()
        assert (got.double() - value).norm() <= allowed


@FORMATS
def test_products_of_other_dtypes_are_read_where_they_lie(dtype):
    made = [Problem((70, 90), True, dtype) for _ in range(2)]
    product = random_gradient((70, 96), made[0].rng).bfloat16()
    made[0].projected.view.copy_(product[:, :90])
    alone = made[0].run()
    for one, other in zip(alone, made[1].run(product=([product.data_ptr()], 1, 96)), strict=True):
        assert_same(one, other)


def rejected():
    for name in ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"):
        yield torch.int8, {name: [0]}, f"{name} is a null pointer"
        yield torch.int8, {name: []}, f"{name} must have 1 addresses, got 0"
    yield torch.int8, {"exp_avg_scale": None}, "exp_avg_scale and exp_avg_sq_scale go with codes"
    yield torch.int8, {"exp_avg_sq_scale": [3]}, "exp_avg_sq_scale is not aligned to 4 bytes"
    yield torch.bfloat16, {"exp_avg_sq": [3]}, "exp_avg_sq is not aligned to 2 bytes"
    yield torch.bfloat16, {"exp_avg_scale": [64]}, "exp_avg_scale and exp_avg_sq_scale go with"
    yield torch.float32, {"moment_salts": [1]}, "moment_salts are for fewer than 32 bits"
    yield torch.int8, {"moment_salts": [1, 2]}, "moment_salts must have 1 values, got 2"
    yield torch.int8, {"format": 3}, "format must be 0, 1 or 2, got 3"


@pytest.mark.parametrize(("dtype", "arguments", "match"), list(rejected()))
def test_bad_argument_is_named_and_nothing_is_written(dtype, arguments, match):
    problem = Problem((70, 5), True, dtype)
    before = [None if one is None else one.clone() for one in problem.moments.stored]
    with pytest.raises(ValueError, match=match):
        problem.run(None, **arguments)
    for now, then in zip(problem.moments.stored, before, strict=True):
        if then is not None:
            assert_same(now, then)


@pytest.mark.parametrize("first", ["exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"])
@pytest.mark.parametrize("second", ["projected", "exp_avg_scale", "direction"])
def test_overlapping_arrays_are_named(first, second):
    problem = Problem((128, 5), True, torch.int8)
    places = problem.arguments()
    if first != second:
        with pytest.raises(ValueError, match=f"{first}.*{second}|{second}.*{first}"):
            problem.run(**{first: places[second]})


@FORMATS
@SIDES
@pytest.mark.parametrize("channels", [0, 130])
def test_the_backend_hands_over_scales_salts_and_step(channels, rows_are_channels, dtype, rng):
    """A batch whose products are exact: by a basis of ones and zeros."""
    shape, salts = (channels, 5) if rows_are_channels else (5, channels), (SALT, 7, 2**32 - 1)
    side, groups = side_of(rows_are_channels), channel_groups(side_of(rows_are_channels))
    moments = [random_moments(shape, dtype, groups, rng) for _ in salts]
    gradients = [torch.randn(shape, generator=rng) for _ in salts]
    lists = [list(tensors) for tensors in zip(*moments, strict=True)]
    scales = lists[2:] if dtype is torch.int8 else ((), ())
    params, bases = ([torch.zeros(shape) for _ in salts], [torch.eye(5) for _ in salts])
    norms = [torch.zeros(()) for _ in salts]
    residual = Residual(0.25, 1.0)
    matrices = Matrices(
        side, residual, params, gradients, bases, *lists[:2], norms, None, *scales, salts
    )
    expected = []
    for stored, gradient, salt in zip(moments, gradients, salts, strict=True):
        bits = channel_noise(stored.exp_avg_sq, side, salt, STEP)
        expected.append(stepped(gradient, stored, groups, bits, ADAM))
    operations = prepare(matrices, backend="native")
    projection = operations.project_moments(matrices, AdamScalars(**ADAM), STEP)
    assert projection.direction.dtype is projection.projected.dtype is torch.float32
    for index, (stored, direction, projected) in enumerate(expected):
        assert_same_moments(moments[index], stored)
        assert_same(projection.direction[index], direction)
        assert_same(projection.projected[index], projected)
