"""A backend is tried on the device before it is trusted: what is found out, and what is left alone.

On a CPU `native` stands for kernels on a GPU.
"""

import gc
import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank_kernels.ops import Matrices, Side, Size, native, reference, selfcheck
from lowrank_kernels.ops.contract import basis_shape, projected_shape, rank_axis
from lowrank_kernels.ops.dispatch import CapturedStream, Kind
from lowrank_kernels.ops.selfcheck import (
    PIPELINED,
    Case,
    cases_of,
    fault_in,
    judge,
    start_of,
)

CPU, FLOAT, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
# As `PIPELINED`, where the size is of no matter.
SMALL = (((32, 192), 16), ((192, 32), 16))


def fault_of(backend, device, dtype, **kind):
    return selfcheck.fault_of(backend, device, Kind(str(device), dtype, dtype, **kind))


def forget():
    fault_in.cache_clear()
    selfcheck._expected.cache_clear()


@pytest.fixture(autouse=True)
def nothing_is_known():
    forget()
    yield
    forget()


@pytest.fixture
def spoil(monkeypatch):
    """Gives an operation of `native` another result."""

    def change(operation, wrong):
        right = getattr(native.Operations, operation)
        monkeypatch.setattr(native.Operations, operation, lambda *args: wrong(right(*args)))

    return change


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
@pytest.mark.parametrize("backend", ["reference", "foreach", "native"])
def test_backends_that_are_right(backend, dtype, caplog):
    assert fault_of(backend, CPU, dtype) is None
    assert not caplog.records


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled, not interpreted")
def test_interpreted_kernels_are_right_in_float32_and_wrong_in_bfloat16(monkeypatch):
    """The interpreter, which is slow, multiplies the bit patterns of bf16."""
    pytest.importorskip("triton")
    monkeypatch.setattr(selfcheck, "PIPELINED", SMALL)
    assert fault_of("triton", CPU, FLOAT) is None
    assert "triton fails its check on cpu in bfloat16: " in fault_of("triton", CPU, BF16)


def test_wrong_numbers_are_told_once(spoil, caplog):
    spoil("channel_scale", lambda factor: 1.1 * factor)
    first, second = (fault_of("native", CPU, FLOAT) for _ in range(2))
    assert first == second
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"{first}; backend='auto' does without it"
    start = "native fails its check on cpu in float32: fira, 320 x 1024, rank 128: weight is off by"
    assert first.startswith(start)
    assert first.endswith("e-07 is right")


def test_a_fault_is_one_of_its_dtype(monkeypatch):
    right = native.Operations.channel_scale

    def channel_scale(self, matrices, sums):
        off = 1.5 if matrices.grads[0].dtype is BF16 else 1.0
        return off * right(self, matrices, sums)

    monkeypatch.setattr(native.Operations, "channel_scale", channel_scale)
    assert fault_of("native", CPU, FLOAT) is None
    assert fault_of("native", CPU, BF16) is not None


def test_a_nan_is_wrong(spoil):
    spoil("channel_scale", lambda factor: factor * float("nan"))
    assert "weight is off by nan" in fault_of("native", CPU, FLOAT)


def test_runs_that_differ_in_a_bit_are_wrong(spoil):
    runs = []

    def turn(result):
        runs.append(len(runs))
        result.direction[0, 0, 0] *= 1 + 2**-23 * runs[-1]
        return result

    spoil("project_moments", turn)
    found = fault_of("native", CPU, FLOAT)
    assert found.endswith("fira, 320 x 1024, rank 128: two runs differ")


def test_only_a_long_reduction_is_wrong(monkeypatch):
    """As kernels are whose pipelined loop is wrong: a short one has no pipeline."""
    right = native.Operations.project_moments

    def project_moments(self, matrices, adam, step=0):
        if matrices.side is Side.LEFT:
            matrices.grads[0][1020:].zero_()
        return right(self, matrices, adam, step)

    monkeypatch.setattr(native.Operations, "project_moments", project_moments)
    assert "fira, 1024 x 320, rank 128: weight is off" in fault_of("native", CPU, BF16)


def test_what_a_compiler_raises_is_a_fault(spoil):
    def fail(_):
        raise OSError("out of resource: shared memory\n" + 1000 * "x ")

    spoil("project_moments", fail)
    found = fault_of("native", CPU, FLOAT)
    assert "rank 128: OSError: out of resource: shared memory" in found
    assert len(found) < 400
    assert "\n" not in found


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no room"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["torch", "Triton", "cuBLAS"],
)
def test_no_memory_is_no_fault(error, monkeypatch):
    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(native.Operations, "project_moments", fail)
        with pytest.raises(type(error)) as raised:
            fault_of("native", CPU, FLOAT)
    assert raised.value is error
    assert fault_of("native", CPU, FLOAT) is None


def test_an_error_of_plain_torch_is_none_of_the_kernels(monkeypatch):
    """As without CUBLAS_WORKSPACE_CONFIG, where torch is to be deterministic."""

    def fail(*_):
        raise RuntimeError("set CUBLAS_WORKSPACE_CONFIG")

    with monkeypatch.context() as patch:
        patch.setattr(reference.Operations, "project_moments", fail)
        with pytest.raises(RuntimeError, match="CUBLAS_WORKSPACE_CONFIG"):
            fault_of("native", CPU, FLOAT)
    assert fault_of("native", CPU, FLOAT) is None


@pytest.fixture
def h200(monkeypatch):
    """Triton's launcher cuts as for a GPU that is not there."""
    kernels = pytest.importorskip("lowrank_kernels.ops.triton")
    gpu = kernels.config.Gpu("NVIDIA H200", 132, 227 * 1024, 90)
    monkeypatch.setattr(kernels, "gpu_of", lambda _: gpu)
    return kernels


SIZES = [
    Size(512, 512, 128, Side.RIGHT),
    Size(2048, 2048, 512, Side.RIGHT),
    Size(2048, 5461, 512, Side.LEFT),
    Size(5461, 2048, 512, Side.RIGHT),
    Size(4096, 11008, 1024, Side.LEFT),
    Size(40, 30, 7, Side.LEFT),  # read by elements, as the odd case
]


def batch_on_meta(shape, rank, side, method, count, dtype):
    low, basis = projected_shape(shape, side, rank), basis_shape(shape, side, rank)
    projected = method == "projected"
    shapes = (shape, low if projected else shape, basis, low, low, ())
    dtypes = (dtype, dtype, dtype, FLOAT, FLOAT, FLOAT)
    tensors = [torch.empty(s, dtype=d, device="meta") for s, d in zip(shapes, dtypes, strict=True)]
    lists = ([tensor] * count for tensor in tensors)
    return Matrices(side, selfcheck.METHODS[method], *lists, projected=projected)


@pytest.mark.parametrize("method", selfcheck.METHODS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_runs_is_what_is_checked(size, method, h200):
    """The tiles of a batch, and all that its launches are compiled for but addresses."""

    def kinds(shape, rank, side, count):
        batch = batch_on_meta(shape, rank, side, method, count, BF16)
        operations = h200.Operations(batch)
        rows = operations._rows
        even = [number % 16 == 0 for number in (*shape, rank)]
        return operations.tiles, rows and rows.padded % 16 == 0, even

    kind = Kind("cuda", BF16, BF16, size=size, projected=method == "projected")
    cases = [
        case
        for case in cases_of("triton", CPU, kind)
        if case.launch.tiles and case.method == method
    ]
    checked = []
    for case in cases:
        assert max(case.shape) > 1024
        assert case.shape[1 - rank_axis(case.side)] > h200.SCALE_BLOCK
        one, three = case.launch.tiles
        with h200.forced(project=one, update=three):
            checked.append(kinds(case.shape, case.rank, case.side, selfcheck.MATRICES))
    for count in (1, 2, 16, 128):
        if count * size.rows * size.cols >= h200.PAD_FROM:
            tiles, *others = kinds((size.rows, size.cols), size.rank, size.side, count)
            assert [tiles, *others] in map(list, checked)


def test_all_kernels_and_the_largest_tiles_are_among_what_is_checked(h200):
    found = {
        size: [
            case.launch.tiles
            for case in cases_of("triton", CPU, Kind("cuda", BF16, BF16, size=size))
            if case.launch.tiles
        ]
        for size in SIZES
    }
    assert any(three.resident for _, three in found[SIZES[0]])
    assert any(one[:2] == (128, 256) for one, _ in found[SIZES[3]])
    assert any(one.split > 1 for pairs in found.values() for one, _ in pairs)
    assert any(one.registers < 255 for pairs in found.values() for one, _ in pairs)
    assert max(map(len, found.values())) < 10


def test_a_tile_that_is_wrong_is_one_of_its_sizes(h200, monkeypatch):
    right = selfcheck.judge(Case("reference", "cpu", FLOAT, "fira", *SMALL[0], Side.RIGHT))

    def judge(case):
        wrong = case.launch.tiles and case.launch.tiles[1].resident
        return right._replace(error=1.0) if wrong else right

    monkeypatch.setattr(selfcheck, "judge", judge)
    found = fault_of("triton", CPU, BF16, size=SIZES[0])
    assert found.startswith("triton fails its check on cpu in bfloat16: fira, 528 x 1040, rank 128")
    assert fault_of("triton", CPU, BF16, size=SIZES[1]) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled, not interpreted")
def test_interpreted_kernels_are_right_with_the_tiles_of_a_size(monkeypatch):
    pytest.importorskip("triton")
    for name, least in (("CHANNELS", 48), ("DEPTH", 96), ("RANK", 16)):
        monkeypatch.setattr(selfcheck, name, least)
    for size, capturable in ((SIZES[0], False), (SIZES[-1], True)):
        assert fault_of("triton", CPU, FLOAT, size=size, capturable=capturable) is None


@pytest.mark.parametrize(("weights", "grads"), [(BF16, FLOAT), (FLOAT, BF16)])
def test_dtypes_that_differ_are_checked_together(weights, grads, spoil):
    kind = Kind("cpu", weights, grads)
    assert selfcheck.fault_of("native", CPU, kind) is None
    fault_in.cache_clear()
    spoil("channel_scale", lambda factor: 2.0 * factor)
    names = [str(dtype).removeprefix("torch.") for dtype in (weights, grads)]
    found = selfcheck.fault_of("native", CPU, kind)
    assert found.startswith("native fails its check on cpu in {} with {} gradients".format(*names))


def test_nothing_is_tried_while_a_stream_is_captured(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        patch.setattr(selfcheck, "judge", lambda _: pytest.fail("tried"))
        with pytest.raises(CapturedStream):
            fault_of("native", CPU, FLOAT)
    assert fault_of("native", CPU, FLOAT) is None


def test_random_numbers_stay_as_they_are():
    before = torch.get_rng_state()
    fault_of("native", CPU, FLOAT)
    assert torch.get_rng_state().equal(before)


def test_the_callers_settings_change_nothing(monkeypatch):
    monkeypatch.setattr(selfcheck, "PIPELINED", SMALL)
    right, seen = judge(Case("native", "cpu", FLOAT, "fira", *SMALL[0], Side.RIGHT)), []
    settings = (
        torch.autocast("cpu", torch.bfloat16),
        torch.device("meta"),
        FakeTensorMode(),
        torch.inference_mode(),
    )
    judge_now = selfcheck.judge
    for setting in settings:
        forget()
        with pytest.MonkeyPatch.context() as patch, setting:
            patch.setattr(selfcheck, "judge", lambda case: seen.append(judge_now(case)) or seen[-1])
            assert fault_of("native", CPU, FLOAT) is None
        assert seen[0] == right
        seen.clear()


def test_the_default_dtype_changes_nothing():
    case = Case("native", "cpu", FLOAT, "fira", *PIPELINED[0], Side.RIGHT)
    right = judge(case)
    forget()
    torch.set_default_dtype(torch.float64)
    try:
        assert judge(case) == right
    finally:
        torch.set_default_dtype(torch.float32)


def test_no_tensor_is_left(spoil):
    def tensors():
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    before = tensors()
    fault_of("native", CPU, FLOAT)
    spoil("channel_scale", lambda factor: 1.1 * factor)
    assert fault_of("native", CPU, BF16) is not None
    assert tensors() == before


@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("size", [*PIPELINED, *selfcheck.ODD])
def test_no_projected_gradient_is_near_zero(size, side):
    """Its direction would hang on one rounding, and the error of a case on that direction."""
    start = start_of(Case("reference", "cpu", BF16, "fira", *size, side))
    for grad in start.grads:
        low = start.basis.T @ grad if side is Side.LEFT else grad @ start.basis
        assert low.abs().min() > 0.9
    given = start_of(Case("reference", "cpu", BF16, "projected", *size, side)).grads
    assert all(grad.shape == low.shape and grad.abs().min() > 0.9 for grad in given)


def test_gradients_that_come_projected_are_a_check_of_their_own(spoil):
    kind = Kind("cpu", BF16, FLOAT, projected=True)
    assert {case.method for case in cases_of("native", CPU, kind)} == {"projected"}
    assert selfcheck.fault_of("native", CPU, kind) is None
    forget()
    spoil("project_moments", lambda each: each._replace(direction=1.1 * each.direction))
    assert "float32 gradients: projected, " in selfcheck.fault_of("native", CPU, kind)


@pytest.mark.parametrize("method", selfcheck.METHODS)
@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("size", PIPELINED)
def test_what_a_gpu_is_asked_besides_passes_on_a_cpu(size, side, method):
    for dtype in (FLOAT, BF16):
        assert judge(Case("foreach", "cpu", dtype, method, *size, side)).passed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [FLOAT, BF16, torch.float16])
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_kernels_on_a_gpu_pass_and_leave_its_memory(backend, dtype):
    if backend == "native" and not native.build_info()["cuda"]:
        pytest.skip("built without the CUDA half")
    device, state = torch.device("cuda", 0), torch.cuda.get_rng_state(0)
    assert fault_of(backend, device, dtype) is None
    held = torch.cuda.memory_allocated(0)
    fault_in.cache_clear()
    assert fault_of(backend, device, dtype) is None
    assert torch.cuda.memory_allocated(0) == held
    assert torch.cuda.get_rng_state(0).equal(state)
