"""AdamW of a whole parameter by Triton, against float64; codes as in `test_triton_codes`."""

import pytest
import torch
from devices import device_of
from oracles import codes as oracle
from pairs import pairwise

from lowrank_kernels.ops import AdamScalars, Scalars, dispatch
from lowrank_kernels.ops.adamw import adamw as adamw_of_torch
from lowrank_kernels.ops.codes import ELEMENTS_A_SCALE, Stored, flat_noise
from lowrank_kernels.ops.noise import rounded_to_bfloat16

pytest.importorskip("triton")
from lowrank_kernels.ops.triton import plain
from lowrank_kernels.ops.triton.plain import adamw

DEVICE = device_of("triton")
INTERPRETED = DEVICE.type == "cpu"
# One group and many, whole programs and parts; a matrix.
SHAPES = [(1,), (255,), (256,), (700,), (4096,), (61, 83)]
SALT, STEP = 2**32 - 3, 70000
SCALARS = Scalars(AdamScalars(0.9, 0.999, 1e-6, 0.4, 0.02), 1.0, 0.125, 0.0625, STEP)
SENTINEL = 77


def on_device(scalars):
    """As a captured step has them; a learning rate may be anywhere, and of any dtype."""
    adam = scalars.adam

    def tensor(value, dtype=torch.float64, device=DEVICE):
        return torch.tensor(value, dtype=dtype, device=device)

    corrections = map(tensor, (adam.bias_correction1, adam.bias_correction2))
    return Scalars(
        AdamScalars(adam.beta1, adam.beta2, adam.eps, *corrections),
        scalars.scale,
        tensor(scalars.step_size, torch.float32, "cpu"),
        tensor(scalars.decay, torch.float32, "cpu"),
        tensor(scalars.step, torch.int32),
    )


class Whole:
    """A parameter, its gradient and its moments in a format; `gap` elements around each of them."""

    def __init__(self, shape, moments="int8", weight=torch.float32, gap=0, seed=0):
        rng = torch.Generator().manual_seed(seed + sum(shape))
        self.shape, self.moments, self.buffers = shape, moments, []
        groups = (-(-torch.Size(shape).numel() // ELEMENTS_A_SCALE),)

        def placed(tensor):
            around = torch.nan if tensor.is_floating_point() else SENTINEL
            size = tensor.numel()
            buffer = tensor.new_full((size + 2 * gap,), around, device=DEVICE)
            self.buffers.append((buffer, slice(gap, gap + size)))
            return buffer[gap : gap + size].view(tensor.shape).copy_(tensor)

        self.param = placed(torch.randn(shape, generator=rng).to(weight))
        self.grad = placed(torch.randn(shape, generator=rng).to(weight))
        if moments == "int8":
            tensors = (
                torch.randint(-127, 128, shape, generator=rng, dtype=torch.int8),
                torch.randint(0, 256, shape, generator=rng).to(torch.uint8),
                *(torch.rand(groups, generator=rng) + 0.1 for _ in "MV"),
            )
        else:
            dtype = getattr(torch, moments)
            tensors = (
                torch.randn(shape, generator=rng).to(dtype),
                torch.rand(shape, generator=rng).to(dtype),
            )
        self.stored = Stored(*map(placed, tensors))

    def all_tensors(self):
        return [self.param, *(each for each in self.stored if each is not None)]

    def step(self, scalars=SCALARS):
        adamw(self.param, self.grad, self.stored, scalars, SALT)

    def literal(self, dtype):
        """W, M and V, from what they are now."""
        adam = SCALARS.adam
        grad = self.grad.cpu().to(dtype)
        usable = grad.double().square() <= torch.finfo(torch.float32).max
        grad = grad.where(usable, 0.0)
        old = Stored(*(each if each is None else each.cpu() for each in self.stored))
        exp_avg, exp_avg_sq = old.exp_avg.double(), old.exp_avg_sq.double()
        if self.moments == "int8":
            scales = [self._spread(each) for each in old[2:]]
            exp_avg = oracle.decoded_avg(old.exp_avg, scales[0])
            exp_avg_sq = oracle.decoded_avg_sq(old.exp_avg_sq, scales[1])
        exp_avg, exp_avg_sq = exp_avg.to(dtype), exp_avg_sq.to(dtype)
        new_avg = adam.beta1 * exp_avg + (1 - adam.beta1) * grad
        new_avg_sq = adam.beta2 * exp_avg_sq + (1 - adam.beta2) * grad * grad
        exp_avg, exp_avg_sq = new_avg.where(usable, exp_avg), new_avg_sq.where(usable, exp_avg_sq)
        denominator = (exp_avg_sq / adam.bias_correction2).sqrt() + adam.eps
        direction = (exp_avg / adam.bias_correction1 / denominator).where(usable, 0.0)
        weight = self.param.cpu().to(dtype)
        return (1 - SCALARS.decay) * weight - SCALARS.step_size * direction, exp_avg, exp_avg_sq

    def _spread(self, scales):
        count = (self.param.numel(),)
        return oracle.spread(scales, count, 0, ELEMENTS_A_SCALE).view(self.shape)

    def bits(self):
        device = torch.device("cpu")
        return flat_noise(0, self.param.numel(), SALT, STEP, device).view(self.shape)


def assert_right(whole, plain_torch, exact):
    """W within twice plain torch's error and a rounding of it; codes that float64 finds, or next to
    a border as far as twice plain torch's error of a share leads.
    """
    spacing = torch.finfo(whole.param.dtype).eps
    roundings = max(spacing, 8 * oracle.EPS) * float(exact[0].abs().max())
    allowed = 2 * float((plain_torch[0] - exact[0]).norm()) + roundings
    allowed += spacing / 2 * float(exact[0].norm())
    assert float((whole.param.cpu().double() - exact[0]).norm()) <= allowed
    new = [each.cpu() for each in whole.stored if each is not None]
    if whole.moments == "int8":
        _assert_codes(whole, new, plain_torch, exact)
        return
    for place in (1, 2):
        off = 2 * float((plain_torch[place] - exact[place]).abs().max()) + 2 * oracle.EPS * float(
            exact[place].abs().max()
        )
        value = new[place - 1].double()
        if whole.moments == "float32":
            assert ((value - exact[place]).abs() <= off).all()
        elif place == 1:
            ulp = 2.0 ** (exact[1].abs().clamp(min=1e-30).log2().floor() - 7)
            # The interpreter truncates.
            assert ((value - exact[1]).abs() <= ulp * (1 if INTERPRETED else 0.5) + off).all()
        else:
            low, high = (
                rounded_to_bfloat16((exact[2] + side * off).clamp(min=0).float(), whole.bits())
                for side in (-1, 1)
            )
            assert (low <= value).all()
            assert (value <= high).all()
            assert float((low < high).float().mean()) < 0.2


def _assert_codes(whole, new, plain_torch, exact):
    for place in (1, 2):
        code, scale = new[place - 1], new[place + 1].double()
        sizes = [
            (each[place].double().abs() if place == 1 else each[place].double().sqrt())
            for each in (plain_torch, exact)
        ]
        scales = [oracle.largest(each.view(-1), 0, ELEMENTS_A_SCALE) for each in sizes]
        error = 2 * float((scales[0] - scales[1]).abs().max()) + 4 * oracle.EPS * scales[1].max()
        assert ((scale - scales[1]).abs() <= error).all()
        shares = [size / whole._spread(each) for size, each in zip(sizes, scales, strict=True)]
        off = 2 * float((shares[0] - shares[1]).abs().max()) + 4 * oracle.EPS
        if place == 1:
            low, high = oracle.avg_codes(shares[1] * exact[1].sign(), off)
        else:
            low, high = oracle.avg_sq_codes(shares[1], off, whole.bits())
        assert (low <= code).all()
        assert (code <= high).all()
        assert float((high - low).double().mean()) < 0.01


@pytest.mark.parametrize(
    ("shape", "moments", "weight", "device_scalars"),
    pairwise(
        SHAPES, ("int8", "bfloat16", "float32"), (torch.float32, torch.float16), (False, True)
    ),
    ids=str,
)
def test_against_float64(shape, moments, weight, device_scalars):
    whole = Whole(shape, moments, weight)
    plain_torch, exact = (whole.literal(dtype) for dtype in (torch.float32, torch.float64))
    whole.step(on_device(SCALARS) if device_scalars else SCALARS)
    assert_right(whole, plain_torch, exact)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU contracts sums, so that moments differ")
@pytest.mark.parametrize("moments", ["int8", "bfloat16"])
def test_moments_have_the_bits_of_the_torch_code(moments):
    whole, other = Whole((3000,), moments), Whole((3000,), moments)
    whole.step()
    adamw_of_torch(other.param, other.grad, other.stored, SCALARS, SALT)
    tensors = zip(whole.stored, other.stored, strict=True)
    for name, (one, another) in zip(Stored._fields, tensors, strict=True):
        # The interpreter truncates what is rounded to bfloat16.
        if one is not None and (moments, name) != ("bfloat16", "exp_avg"):
            assert torch.equal(one, another), name


@pytest.mark.parametrize("gap", [4096, 4099])
@pytest.mark.parametrize("moments", ["int8", "bfloat16"])
def test_nothing_is_touched_outside_and_two_runs_are_bitwise_equal(moments, gap):
    whole, twice = Whole((700,), moments, gap=gap), Whole((700,), moments)
    for each in (whole, twice):
        each.step()
    for one, other in zip(whole.all_tensors(), twice.all_tensors(), strict=True):
        assert torch.equal(one, other)
    for buffer, inside in whole.buffers:
        outside = torch.ones_like(buffer, dtype=torch.bool)
        outside[inside] = False
        if buffer.is_floating_point():
            assert buffer[outside].isnan().all()
            assert not buffer[inside].isnan().any()
        else:
            assert (buffer[outside] == SENTINEL).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_an_element_without_a_finite_square_is_only_decayed(bad):
    whole = Whole((700,))
    whole.grad[300] = bad
    before = float(whole.param[300])
    plain_torch, exact = (whole.literal(dtype) for dtype in (torch.float32, torch.float64))
    whole.step()
    assert float(whole.param[300]) == pytest.approx(before * (1 - SCALARS.decay), rel=1e-6)
    assert_right(whole, plain_torch, exact)


def test_scalars_are_where_the_kernel_reads_them_and_in_one_dtype(monkeypatch):
    """It reads any of them on a CPU; a binary is bound to the dtypes of its first launch."""
    given = []
    monkeypatch.setattr(plain.Launcher, "__call__", lambda *arguments: given.append(arguments[4]))
    whole, meta = Whole((300,)), torch.device("meta")
    parameter = (
        whole.param.to(meta),
        whole.grad.to(meta),
        Stored(*(each.to(meta) for each in whole.stored)),
    )
    adamw(*parameter, on_device(SCALARS), SALT)
    *rates, step = (each for each in given[0] if isinstance(each, torch.Tensor))
    assert [(each.device, each.dtype) for each in rates] == [(meta, torch.float64)] * 4
    assert (step.device, step.dtype) == (meta, torch.int32)


def test_a_parameter_without_elements():
    Whole((0,)).step()


def test_the_version_counts():
    """A stale graph does not go backward."""
    whole = Whole((300,))
    before = whole.param._version
    whole.step()
    assert whole.param._version > before


def test_steps_and_salts_draw_other_numbers():
    found = []
    for step, salt in ((1, 5), (2, 5), (1, 6)):
        whole = Whole((4096,))
        adamw(whole.param, whole.grad, whole.stored, SCALARS._replace(step=step), salt)
        found.append(whole.stored.exp_avg_sq)
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_only_what_auto_gives_to_triton_on_a_gpu_is_stepped_by_it(gpu, monkeypatch):
    cuda = dispatch.Kind("cuda:0", torch.bfloat16, torch.bfloat16, moments=torch.int8)
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    assert dispatch.is_stepped_by_triton(cuda)
    assert not dispatch.is_stepped_by_triton(cuda._replace(device="cpu"))
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "foreach")
    assert not dispatch.is_stepped_by_triton(cuda)
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "triton")
    assert dispatch.is_stepped_by_triton(cuda)
    gpu.faults["triton"] = "wrong"
    dispatch._chosen.cache_clear()
    assert not dispatch.is_stepped_by_triton(cuda)


def test_adamw_is_handed_to_triton_where_that_steps_it(monkeypatch):
    calls = []
    monkeypatch.setattr(plain, "adamw", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr("lowrank_kernels.ops.adamw.is_stepped_by_triton", lambda *_: True)
    whole = Whole((300,))
    before = whole.param.clone()
    adamw_of_torch(whole.param, whole.grad, whole.stored, SCALARS, SALT)
    assert [each[0] is whole.param for each in calls] == [True]
    assert torch.equal(whole.param, before)


def test_weights_of_24_bits_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(plain, "adamw", None)
    monkeypatch.setattr("lowrank_kernels.ops.adamw.is_stepped_by_triton", lambda *_: True)
    whole = Whole((300,))
    before = whole.param.bfloat16()
    weight, low_bits = before.clone(), torch.zeros(300, dtype=torch.int8, device=DEVICE)
    adamw_of_torch(weight, whole.grad, whole.stored, SCALARS, SALT, low_bits)
    assert not torch.equal(weight, before)
