"""Which backend is chosen, for which reason, and how a user overrides it."""

import logging

import pytest
import torch

from lowrank_kernels import BackendUnavailable, FiraAdamW, backends
from lowrank_kernels.ops import choose, requested_backend
from lowrank_kernels.ops import dispatch as dispatch_module

FLOAT, DOUBLE, BF16 = torch.float32, torch.float64, torch.bfloat16


@pytest.fixture(autouse=True)
def fresh_choices(monkeypatch):
    monkeypatch.delenv("LOWRANK_BACKEND", raising=False)
    choose.cache_clear()
    yield
    choose.cache_clear()


def small_optimizer(dtype=FLOAT, **options):
    weight = torch.nn.Parameter(torch.ones(8, 6, dtype=dtype))
    weight.grad = torch.randn(8, 6, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return FiraAdamW([{"params": [("w", weight)], "rank": 2}], lr=0.1, **options)


@pytest.mark.parametrize(
    ("request_", "device", "dtype", "backend", "reason"),
    [
        ("auto", "cpu", FLOAT, "native", "compiled"),
        ("auto", "cpu", BF16, "native", "compiled"),
        ("auto", "cpu", DOUBLE, "reference", "float64"),
        ("auto", "mps", FLOAT, "reference", "mps"),
        ("reference", "cpu", FLOAT, "reference", "asked for"),
        ("native", "cpu", BF16, "native", "asked for"),
        ("auto", "cuda", BF16, "reference", "measured on a GPU"),
    ],
)
def test_choice_and_reason(request_, device, dtype, backend, reason):
    choice = choose(request_, device, dtype, dtype)
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
    with pytest.raises(ValueError, match="auto, reference, native, triton"):
        requested_backend("fast")


def test_named_backend_that_does_not_serve_a_dtype_is_refused_before_anything_changes():
    optimizer = small_optimizer(DOUBLE, backend="native")
    with pytest.raises(ValueError, match="float64"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled, not interpreted")
def test_interpreted_kernels_serve_float32_only():
    """The interpreter multiplies the bit patterns of bf16."""
    assert choose("triton", "cpu", FLOAT, FLOAT).backend == "triton"
    with pytest.raises(ValueError, match="triton backend has no bfloat16 here"):
        choose("triton", "cpu", BF16, BF16)
    with pytest.raises(ValueError, match="not on cuda"):
        choose("triton", "cuda", FLOAT, FLOAT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_says_what_it_lacks(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(BackendUnavailable, match="no CUDA device"):
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
        "cpu float64 weights, float64 gradients: reference backend (the native backend has no"
        " float64 here)"
    ]
    assert sum("native backend (compiled" in r.getMessage() for r in caplog.records) == 1


def test_missing_compiled_module_is_reported(monkeypatch):
    monkeypatch.setattr(dispatch_module.native, "import_error", "no such file")
    choice = choose("auto", "cpu", FLOAT, FLOAT)
    assert choice == ("reference", "the compiled module does not load: no such file")
    with pytest.raises(BackendUnavailable, match="no such file"):
        requested_backend("native")
