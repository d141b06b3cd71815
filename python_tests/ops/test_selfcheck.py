"""A backend is tried on the device before it is trusted: what is found out, and what is left alone.

On a CPU `native` stands for kernels on a GPU.
"""

import gc
import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank_kernels.ops import Side, native, selfcheck
from lowrank_kernels.ops.dispatch import CapturedStream
from lowrank_kernels.ops.selfcheck import PIPELINED, Case, fault_of, judge, start_of

CPU, FLOAT, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
# As `PIPELINED`, where the size is of no matter.
SMALL = (((32, 192), 16), ((192, 32), 16))


@pytest.fixture(autouse=True)
def nothing_is_known():
    fault_of.cache_clear()
    yield
    fault_of.cache_clear()


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
    start = "native fails its check on cpu in float32: fira, 256 x 1024, rank 128: weight is off by"
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
    assert found.endswith("fira, 256 x 1024, rank 128: two runs differ")


def test_only_a_long_reduction_is_wrong(monkeypatch):
    """As kernels are whose pipelined loop is wrong: a short one has no pipeline."""
    right = native.Operations.project_moments

    def project_moments(self, matrices, adam):
        if matrices.side is Side.LEFT:
            matrices.grads[0][1020:].zero_()
        return right(self, matrices, adam)

    monkeypatch.setattr(native.Operations, "project_moments", project_moments)
    assert "fira, 1024 x 256, rank 128: weight is off" in fault_of("native", CPU, BF16)


def test_what_a_compiler_raises_is_a_fault(spoil):
    def fail(_):
        raise OSError("out of resource: shared memory\n" + 1000 * "x ")

    spoil("project_moments", fail)
    found = fault_of("native", CPU, FLOAT)
    assert "rank 128: OSError: out of resource: shared memory" in found
    assert len(found) < 400
    assert "\n" not in found


def test_no_memory_is_no_fault(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(native.Operations, "project_moments", fail)
        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            fault_of("native", CPU, FLOAT)
    assert fault_of("native", CPU, FLOAT) is None


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
        fault_of.cache_clear()
        with pytest.MonkeyPatch.context() as patch, setting:
            patch.setattr(selfcheck, "judge", lambda case: seen.append(judge_now(case)) or seen[-1])
            assert fault_of("native", CPU, FLOAT) is None
        assert seen[0] == right
        seen.clear()


def test_the_default_dtype_changes_nothing():
    case = Case("native", "cpu", FLOAT, "fira", *PIPELINED[0], Side.RIGHT)
    right = judge(case)
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
    fault_of.cache_clear()
    assert fault_of(backend, device, dtype) is None
    assert torch.cuda.memory_allocated(0) == held
    assert torch.cuda.get_rng_state(0).equal(state)
