"""The kernel that steps moments from a given R: tiles, formats, padding, batches, places.

Rows of moments in codes and in bfloat16 are as in `test_triton_codes`.
"""

import pytest
import torch
from devices import device_of
from ops.test_triton_codes import (
    ADAM,
    INTERPRETED,
    SALTS,
    SENTINEL,
    STEP,
    Coded,
    assert_as_accurate,
    assert_bfloat16,
    assert_codes,
    assert_same,
    placed,
)
from pairs import pairwise

from lowrank_kernels.ops import AdamScalars, Matrices, Side, prepare
from lowrank_kernels.ops import triton as kernels

# Interpreted or compiled, the kernels have to do the same.
pytestmark = pytest.mark.gpu

DEVICE = device_of("triton")
# Of one group of channels or more, whole or not; of one tile of directions or more.
CHANNELS_RANK = [(1, 1), (5, 13), (64, 64), (150, 18), (200, 70)]


@pytest.fixture(autouse=True)
def poisoned_workspaces():
    """torch fills what it does not initialize with NaN in this mode."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def given(side, channels, rank, moments="int8", count=1, grad_dtype=torch.float32):
    """Equal matrices, with R in the place of their gradients."""
    coded = Coded("galore", side, channels, rank + 3, rank, moments, count)
    low = [
        coded.literal(index, torch.float64)[0].to(DEVICE, grad_dtype).contiguous()
        for index in range(count)
    ]
    coded.matrices = coded.matrices._replace(grads=low, projected=True)
    return coded


@pytest.mark.parametrize(
    ("moments", "sizes", "side", "grad_dtype", "on_device"),
    pairwise(
        ("int8", "bfloat16"),
        CHANNELS_RANK,
        Side,
        (torch.float32, torch.bfloat16, torch.float16),
        (False, True),
    ),
    ids=str,
)
def test_against_oracle(moments, sizes, side, grad_dtype, on_device):
    """The step as one number, or as one a matrix on the device."""
    coded = given(side, *sizes, moments, 2, grad_dtype)
    literal = [[coded.literal(i, d) for d in (torch.float32, torch.float64)] for i in range(2)]
    step = torch.tensor([STEP] * 2, dtype=torch.int32, device=DEVICE) if on_device else STEP
    projection = coded.project(step)
    for index, (plain, exact) in enumerate(literal):
        assert torch.equal(projection.projected[index].double().cpu(), exact[0])
        assert_as_accurate(projection.direction[index], plain[3], exact[3], "N")
        (assert_codes if moments == "int8" else assert_bfloat16)(coded, index, plain, exact)


@pytest.mark.parametrize("side", list(Side))
def test_corrections_on_the_device_are_those_of_each_matrix(side):
    numbers, tensors = (given(side, 70, 18, count=2) for _ in "ab")
    corrections = [(0.1, 0.001), (0.19, 0.002)]
    operations = prepare(tensors.matrices, backend="triton")
    placed_there = (
        torch.tensor(each).double().to(DEVICE) for each in zip(*corrections, strict=True)
    )
    adam = AdamScalars(0.9, 0.999, 1e-6, *placed_there)
    found = operations.project_moments(tensors.matrices, adam, STEP)
    operations = prepare(numbers.matrices, backend="triton")
    stored = [numbers.stored(index) for index in range(2)]
    for index, correction in enumerate(corrections):
        for old, tensor in zip(stored[index], moments_and_scales(numbers, index), strict=True):
            tensor.copy_(old)
        adam = AdamScalars(0.9, 0.999, 1e-6, *correction)
        one = operations.project_moments(numbers.matrices, adam, STEP)
        assert torch.equal(found.direction[index], one.direction[index])
        assert_same(numbers.stored(index), tensors.stored(index))


def moments_and_scales(coded, index):
    m = coded.matrices
    lists = (m.exp_avgs, m.exp_avg_sqs, m.exp_avg_scales, m.exp_avg_sq_scales)
    return [each[index] for each in lists]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("side", list(Side))
def test_an_entry_without_a_finite_square_keeps_its_moments(side, bad):
    coded = given(side, 150, 18)
    place = (3, 70) if coded.left else (70, 3)
    coded.matrices.grads[0][place] = bad
    plain, exact = (coded.literal(0, dtype) for dtype in (torch.float32, torch.float64))
    projection = coded.project()
    assert float(projection.direction[0][place]) == float(projection.projected[0][place]) == 0
    assert_as_accurate(projection.direction[0], plain[3], exact[3], "N")
    assert_codes(coded, 0, plain, exact)


@pytest.mark.parametrize("moments", ["int8", "bfloat16", "float32"])
@pytest.mark.parametrize(
    ("gap", "side"), [(4096, Side.LEFT), (4096, Side.RIGHT), (4099, Side.LEFT), (4099, Side.RIGHT)]
)
def test_a_batch_is_its_matrices_one_by_one(gap, side, moments):
    """Bit for bit, and nothing outside of them is read or written."""

    def three():
        coded = given(side, 150, 70, "bfloat16" if moments == "float32" else moments, 3)
        if moments == "float32":
            wide = [[x.float() for x in each] for each in coded.matrices[5:7]]
            coded.matrices = coded.matrices._replace(
                exp_avgs=wide[0], exp_avg_sqs=wide[1], moment_salts=None
            )
        return coded

    together = three()
    buffers = [*placed(together, gap), *placed_list(together.matrices.grads, gap)]
    found = together.project()
    for index in range(3):
        alone = three()
        names = [
            name for name in Matrices._fields if isinstance(getattr(alone.matrices, name), list)
        ]
        one = {name: getattr(alone.matrices, name)[index : index + 1] for name in names}
        if alone.matrices.moment_salts:
            one["moment_salts"] = SALTS[index : index + 1]
        alone.matrices = alone.matrices._replace(**one)
        projection = alone.project()
        if INTERPRETED or gap == 4096:
            assert_same(
                *(filter(torch.is_tensor, x) for x in (together.stored(index), alone.stored()))
            )
            assert torch.equal(found.direction[index], projection.direction[0])
            assert torch.equal(found.projected[index], projection.projected[0])
    for buffer, outside in buffers:
        if buffer.is_floating_point():
            assert buffer[outside].isnan().all()
            assert not buffer[~outside].isnan().any()
        else:
            assert (buffer[outside] == SENTINEL).all()


def placed_list(tensors, gap):
    """As `placed`, for one list."""
    size = tensors[0].numel()
    buffer = tensors[0].new_full((len(tensors) * (size + gap) + gap,), torch.nan)
    outside = torch.ones_like(buffer, dtype=torch.bool)
    for index, tensor in enumerate(tensors):
        start = gap + index * (size + gap)
        tensors[index] = buffer[start : start + size].view(tensor.shape).copy_(tensor)
        outside[start : start + size] = False
    return [(buffer, outside)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("side", list(Side))
def test_it_is_one_launch_whose_direction_operation_3_multiplies_as_it_is(side, dtype, monkeypatch):
    """In half precision rounded, its rows padded with zeros."""
    coded = given(side, 37, 18, count=2)
    m = coded.matrices
    m = m._replace(params=[x.to(dtype) for x in m.params], bases=[x.to(dtype) for x in m.bases])
    log, call = [], kernels.Launcher.__call__

    def logged(launcher, kind, stream, tensors, scalars, rest):
        log.append((launcher._kernel.__name__, tensors[0]))
        return call(launcher, kind, stream, tensors, scalars, rest)

    monkeypatch.setattr(kernels.Launcher, "__call__", logged)
    projection = prepare(m, backend="triton").project_moments(m, ADAM, STEP)
    ((name, direction),) = log
    assert name == "moments_kernel"
    low = m.exp_avgs[0].shape
    rows = low[1] if dtype is torch.float32 else -(-low[1] // 16) * 16
    assert (direction.shape, direction.dtype) == ((2, low[0], rows), dtype)
    assert not direction[..., low[1] :].any()
    assert projection.direction.data_ptr() == direction.data_ptr()
    assert projection.direction.shape[1:] == low
    assert projection.grads is None
