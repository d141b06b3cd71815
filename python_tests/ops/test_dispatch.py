"""Which backend is chosen, for which reason, and how a user overrides it."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from devices import device_of
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank_kernels import BackendUnavailable, FiraAdamW, backends
from lowrank_kernels.ops import Side, Size, choose, native, requested_backend, selfcheck, times
from lowrank_kernels.ops import dispatch as dispatch_module
from lowrank_kernels.ops.dispatch import Kind, choose_kind
from lowrank_kernels.optim.workspace import planned_workspace

FLOAT, DOUBLE, BF16 = torch.float32, torch.float64, torch.bfloat16
SQUARE, SMALL = Size(4096, 4096, 1024, Side.RIGHT), Size(512, 512, 128, Side.RIGHT)
NATIVE_FIRST = "predicted: native 201 us, triton 258 us (4096 x 4096, rank 1024, NVIDIA H200)"


@pytest.fixture(autouse=True)
def nobody_asked(monkeypatch, fresh_choices):
    monkeypatch.delenv("LOWRANK_BACKEND", raising=False)


@pytest.fixture(autouse=True)
def known_times(monkeypatch):
    predicted = [(SQUARE, 258, 201), (SMALL, 3, 18)]
    rows = [
        times.Times("NVIDIA H200", BF16, size, "predicted", {"triton": triton, "native": native})
        for size, triton, native in predicted
    ]
    monkeypatch.setattr(times, "table", lambda: rows)


def small_optimizer(dtype=FLOAT, device="cpu", **options):
    weight = torch.nn.Parameter(torch.ones(8, 6, dtype=dtype, device=device))
    weight.grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).to(weight)
    return FiraAdamW([{"params": [("w", weight)], "rank": 2}], lr=0.1, **options)


@pytest.mark.parametrize(
    ("request_", "kind", "backend", "reason"),
    [
        ("auto", Kind("cpu", FLOAT, FLOAT), "native", "compiled"),
        ("auto", Kind("cpu", BF16, BF16), "native", "compiled"),
        ("auto", Kind("cpu", DOUBLE, DOUBLE), "reference", "float64"),
        ("auto", Kind("cuda", DOUBLE, DOUBLE), "reference", "float64"),
        ("foreach", Kind("cpu", DOUBLE, DOUBLE), "foreach", "asked for"),
        ("auto", Kind("mps", FLOAT, FLOAT), "foreach", "mps"),
        ("auto", Kind("cpu", BF16, BF16, capturable=True), "foreach", "capturable"),
        ("reference", Kind("cpu", FLOAT, FLOAT), "reference", "asked for"),
        ("native", Kind("cpu", BF16, BF16), "native", "asked for"),
        ("auto", Kind("xpu:1", BF16, BF16), "foreach", "not on xpu"),
    ],
)
def test_choice_and_reason(request_, kind, backend, reason):
    choice = choose_kind(request_, kind)
    assert choice.backend == backend
    assert reason in choice.reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_for_a_gpu_that_is_not_there_are_predicted(monkeypatch):
    monkeypatch.setattr(dispatch_module, "_triton_fault", lambda: None)
    none = "there is no CUDA device here to check kernels on; "
    square, small = Kind("cuda", BF16, BF16, size=SQUARE), Kind("cuda", BF16, BF16, size=SMALL)
    assert choose_kind("auto", square) == ("native", none + NATIVE_FIRST)
    assert choose_kind("auto", small).backend == "triton"
    assert choose_kind("auto", square._replace(capturable=True)).backend == "triton"
    dispatch_module._chosen.cache_clear()
    monkeypatch.setattr(dispatch_module, "_triton_fault", lambda: "triton is not installed")
    assert choose_kind("auto", small).backend == "native"
    assert choose_kind("auto", square._replace(capturable=True)).backend == "foreach"


def test_a_gpu_gets_what_is_fastest_for_a_size(gpu, caplog):
    caplog.set_level(logging.INFO, "lowrank_kernels")
    choices = [choose_kind("auto", Kind("cuda:1", BF16, BF16, size=s)) for s in (SQUARE, SMALL)]
    assert [choice.backend for choice in choices] == ["native", "triton"]
    sizes = [record.getMessage().split(":")[1] for record in caplog.records]
    ending = "bfloat16 weights, bfloat16 gradients, 4096 x 4096, rank 1024"
    assert sizes[0].endswith(ending)
    assert choices[0].reason == NATIVE_FIRST
    unknown = choose_kind("auto", Kind("cuda", FLOAT, FLOAT))
    assert unknown == ("triton", "predicted by the number of launches")


def test_a_gpu_has_an_index_and_a_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", "GPU {}".format)
    assert dispatch_module._gpu_of("cuda") == (torch.device("cuda:2"), "GPU 2")
    assert dispatch_module._gpu_of("cuda:0") == (torch.device("cuda:0"), "GPU 0")


def test_what_was_measured_is_told_as_measured(gpu, monkeypatch):
    rows = [times.table()[0]._replace(source="measured", us={"native": 90, "triton": 80})]
    monkeypatch.setattr(times, "table", lambda: rows)
    backend, reason = choose_kind("auto", Kind("cuda:1", BF16, BF16, size=SQUARE))
    assert (backend, reason.partition(" us")[0]) == ("triton", "measured: triton 80")


def test_what_does_not_serve_is_passed_over_with_its_reason(gpu):
    kind = Kind("cuda", BF16, BF16, capturable=True, size=SQUARE)
    backend, reason = choose_kind("auto", kind)
    host = "the native backend takes its scalars from the host, so it is not capturable"
    assert (backend, reason) == ("triton", f"{NATIVE_FIRST}; {host}")
    choice = choose_kind("auto", kind._replace(strides="too far apart"))
    assert choice == ("foreach", f"{host}; too far apart")


def test_kernels_are_checked_where_nobody_named_them(gpu):
    choose_kind("native", Kind("cuda", BF16, BF16))
    assert gpu.checks == []
    for size in (SQUARE, SQUARE, SMALL, SQUARE._replace(rank=512)):
        choose_kind("auto", Kind("cuda", BF16, BF16, size=size))
    assert set(gpu.checks) == {
        ("native", "cuda:0", BF16, BF16),
        ("triton", "cuda:0", BF16, BF16),
    }
    gpu.checks.clear()
    choose_kind("auto", Kind("cuda:1", BF16, FLOAT, size=SMALL))
    assert gpu.checks == [("triton", "cuda:1", BF16, FLOAT)]


def test_kernels_that_fail_are_passed_over_and_warned_of_once(gpu, monkeypatch, caplog):
    right = native.Operations.channel_scale
    monkeypatch.setattr(native.Operations, "channel_scale", lambda *args: 1.1 * right(*args))
    kinds = [Kind("cuda", BF16, BF16, size=s) for s in (SQUARE, SQUARE._replace(rank=1000))]
    for kind in kinds:
        backend, reason = choose_kind("auto", kind)
        assert backend == "triton"
        assert "; native fails its check on cpu in bfloat16: fira, 320 x 1024" in reason
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert "weight is off by" in warning.getMessage()
    assert choose_kind("native", kinds[0]) == ("native", "asked for by name")

    gpu.faults["triton"] = "triton fails as well"
    backend, reason = choose_kind("auto", kinds[0]._replace(size=SMALL))
    assert backend == "foreach"
    assert reason.startswith("triton fails as well; native fails its check")


def test_nothing_new_is_trusted_while_a_stream_is_captured(gpu, monkeypatch, caplog):
    known, new = Kind("cuda", BF16, BF16, size=SQUARE), Kind("cuda", FLOAT, FLOAT)
    before = choose_kind("auto", known)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        del gpu.faults["triton"]
        assert choose_kind("auto", known) == before
        for _ in range(2):
            captured = choose_kind("auto", new)
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert warning.getMessage() == (
        "cuda float32 weights, float32 gradients: foreach backend (kernels cannot be checked while"
        " a stream is captured)"
    )
    assert captured == ("foreach", "kernels cannot be checked while a stream is captured")
    gpu.faults["triton"] = None
    assert choose_kind("auto", new).backend == "triton"


def test_threads_that_ask_at_once_wait_for_one_check(gpu, monkeypatch):
    known, checks = selfcheck.fault_of, []

    def slow(*asked):
        checks.append(asked)
        time.sleep(0.1)
        return known(*asked)

    monkeypatch.setattr(selfcheck, "fault_of", slow)
    kind = Kind("cuda", BF16, BF16, size=SMALL)
    with ThreadPoolExecutor(3) as pool:
        choices = list(pool.map(choose_kind, 3 * ["auto"], 3 * [kind]))
    assert len(checks) == 1
    assert choices == 3 * choices[:1]


def test_a_report_tells_of_kernels_that_failed(gpu):
    """On tensors that say that they are on a GPU."""
    gpu.faults["triton"] = "triton fails its check: off by 0.5"
    with FakeTensorMode():
        weight = torch.nn.Parameter(torch.empty(512, 512, dtype=BF16, device="cuda:1"))
        optimizer = FiraAdamW([{"params": [("w", weight)], "rank": 128}])
        (row,) = optimizer.explain()
    assert row["backend"] == "native"
    assert row["reason"].startswith("predicted: triton 3 us, native 18 us")
    assert row["reason"].endswith("; triton fails its check: off by 0.5")
    assert gpu.checks == [("triton", "cuda:1", BF16, BF16), ("native", "cuda:1", BF16, BF16)]


@pytest.mark.parametrize(("size", "backend"), [(SQUARE, "native"), (SMALL, "triton")])
def test_a_workspace_is_planned_for_what_a_size_gets(gpu, size, backend):
    def planned(backend):
        weight = torch.nn.Parameter(torch.empty(size.rows, size.cols, dtype=BF16, device="meta"))
        optimizer = FiraAdamW([{"params": [weight], "rank": size.rank}], backend=backend)
        return planned_workspace(optimizer, "cuda").step

    named = {name: planned(name) for name in ("native", "triton")}
    assert named["native"] != named["triton"]
    assert planned("auto") == named[backend]


def test_every_available_backend_is_reached_by_name():
    for name, (available, reason) in backends().items():
        assert reason
        if available:
            optimizer = small_optimizer(device=device_of(name), backend=name)
            optimizer.step()
            assert optimizer.explain()[0]["backend"] == name
        else:
            with pytest.raises(BackendUnavailable, match=name):
                small_optimizer(backend=name)


def test_environment_variable_overrides_the_argument(monkeypatch):
    optimizer = small_optimizer(backend="native")
    monkeypatch.setenv("LOWRANK_BACKEND", "reference")
    assert optimizer.explain()[0]["backend"] == "reference"
    monkeypatch.setenv("LOWRANK_BACKEND", "cuda")
    with pytest.raises(ValueError, match="LOWRANK_BACKEND='cuda' is not one of auto, reference"):
        small_optimizer()


def test_unknown_backend_lists_the_known_ones():
    with pytest.raises(ValueError, match="auto, reference, foreach, native, triton"):
        requested_backend("fast")


def test_named_backend_that_does_not_serve_a_dtype_is_refused_before_anything_changes():
    optimizer = small_optimizer(DOUBLE, backend="native")
    with pytest.raises(ValueError, match="float64"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled, not interpreted")
def test_interpreted_kernels_serve_float32_only():
    """The interpreter multiplies the bit patterns of bf16."""
    assert choose("triton", torch.ones(2, 2)).backend == "triton"
    with pytest.raises(ValueError, match="triton backend has no bfloat16 here"):
        choose("triton", torch.ones(2, 2, dtype=BF16))
    with pytest.raises(ValueError, match="not on cuda"):
        choose_kind("triton", Kind("cuda", FLOAT, FLOAT))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_says_what_it_lacks(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(BackendUnavailable, match="no CUDA device"):
        requested_backend("triton")
    monkeypatch.setattr(dispatch_module, "_triton_version", lambda: (3, 2))
    with pytest.raises(BackendUnavailable, match=r"triton 3.2 is too old: 3.3 is needed"):
        requested_backend("triton")
    monkeypatch.setattr(dispatch_module, "_triton_is_installed", lambda: False)
    with pytest.raises(BackendUnavailable, match="pip install triton"):
        requested_backend("triton")


def test_slow_path_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="lowrank_kernels"):
        for _ in range(3):
            small_optimizer(DOUBLE).step()
            small_optimizer(FLOAT).step()
    slow = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert [r.getMessage() for r in slow] == [
        "cpu float64 weights, float64 gradients: reference backend (float64 is left to the"
        " specification)"
    ]
    assert sum("native backend (compiled" in r.getMessage() for r in caplog.records) == 1


def test_missing_compiled_module_is_reported(monkeypatch):
    monkeypatch.setattr(dispatch_module.native, "import_error", "no such file")
    choice = choose("auto", torch.ones(2, 2))
    assert choice == ("foreach", "the compiled module does not load: no such file")
    with pytest.raises(BackendUnavailable, match="no such file"):
        requested_backend("native")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled, not interpreted")
def test_the_report_says_where_the_tiles_come_from():
    pytest.importorskip("triton")
    reason = small_optimizer(backend="triton").explain()[0]["reason"]
    assert reason == "asked for by name; project: heuristic tiles, update: heuristic tiles"
    assert small_optimizer(backend="native").explain()[0]["reason"] == "asked for by name"
