"""Which backend is chosen, for which reason, and how a user overrides it."""

import logging

import pytest
import torch

from lowrank_kernels import BackendUnavailable, FiraAdamW, backends
from lowrank_kernels.ops import choose, requested_backend
from lowrank_kernels.ops import dispatch as dispatch_module
from lowrank_kernels.ops.dispatch import Kind, choose_kind

FLOAT, DOUBLE, BF16 = torch.float32, torch.float64, torch.bfloat16


@pytest.fixture(autouse=True)
def fresh_choices(monkeypatch):
    monkeypatch.delenv("LOWRANK_BACKEND", raising=False)
    choose_kind.cache_clear()
    yield
    choose_kind.cache_clear()


def small_optimizer(dtype=FLOAT, **options):
    weight = torch.nn.Parameter(torch.ones(8, 6, dtype=dtype))
    weight.grad = torch.randn(8, 6, dtype=dtype, generator=torch.Generator().manual_seed(0))
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
        ("auto", Kind("cuda", BF16, BF16), "foreach", "measured on a GPU"),
    ],
)
def test_choice_and_reason(request_, kind, backend, reason):
    choice = choose_kind(request_, kind)
    assert choice.backend == backend
    assert reason in choice.reason


def test_every_available_backend_is_reached_by_name():
    for name, (available, reason) in backends().items():
        assert reason
        if available:
            optimizer = small_optimizer(backend=name)
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
