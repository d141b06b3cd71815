"""What Python costs a step: who is in the record, and whether a step's calls are all of them."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import host
from bench.calls import Way, followed
from bench.models import PRESETS
from bench.replay import recorded_operations, recorded_passes
from lowrank_kernels import backends

ROOT = Path(__file__).parents[2]
SIZE = host.Size(blocks=1, hidden=16, ffn=24, rank=4)
TINY = ["--quick", "--dtypes", "fp32", "--hidden", "16", "--ffn", "24", "--rank", "4"]
NAMES = ("fira", "galore", "adamw", "adamw-foreach")
needs_native = pytest.mark.skipif(
    not backends()["native"][0], reason="the compiled module was not built"
)


@needs_native
def test_every_step_is_in_the_record_with_its_calls_and_what_is_left(tmp_path, capsys):
    out = tmp_path / "record.json"
    host.main([*TINY, "--backends", "reference,native", "--out", str(out)])
    record = json.loads(out.read_text())
    found = {(row["optimizer"], row["backend"], row["gradients"]) for row in record["rows"]}
    ours = {(method, each) for method in ("fira", "galore") for each in ("reference", "native")}
    assert found == {
        (*who, where)
        for who in ours | {("adamw", None), ("adamw-foreach", None)}
        for where in ("in place", "moved")
    }
    for row in record["rows"]:
        times = row["us_a_matrix"]
        assert times["python"] == pytest.approx(times["step"] - times["calls"], abs=1e-6)
        step, calls = (row["results"][name]["ms"] for name in ("step", "calls"))
        stepped = row["matrices"] * row["steps"]
        assert times["step"] == pytest.approx(1e3 * step / stepped)
        assert times["calls"] == pytest.approx(1e3 * calls / stepped)
        assert (row["matrices"], row["steps"]) == (14, 5)
        assert row["calls"] > 0
    assert record["ways"]["fira"]["named"]["calls"] < record["ways"]["fira"]["all"]["calls"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in NAMES)


def test_triton_is_called_up_to_its_launches(tmp_path):
    """In a process of its own, because TRITON_INTERPRET, which the other tests set, replaces it."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    out = tmp_path / "record.json"
    command = [sys.executable, "-m", "bench.host", *TINY, "--backends", "triton", "--out", out]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    record = json.loads(out.read_text())
    # Three kinds of matrices, three launches for Fira and two for GaLore.
    launches = {row["optimizer"]: row["calls"] for row in record["rows"] if row["backend"]}
    assert launches == {"fira": 9, "galore": 6}
    assert record["missing"] == {}


def launches_of(model, method):
    """Of a step of the real matrices on an H200, batch by batch; nothing has data."""
    tools = pytest.importorskip("bench.triton_compile")
    from bench.predict import cases

    target = next(target for target in tools.TARGETS if target.capability == 90)
    count = 0
    for name, case, matrices in cases((model,), method):
        if name == f"{model} r{PRESETS[model].rank}":
            full, rest = divmod(matrices, case.matrices)
            for size in [case.matrices] * full + [rest] * (rest > 0):
                shape, residual = (case.rows, case.cols), tools.FIRA if case.residual else None
                batch = tools.Case("", shape, case.rank, size, "bf16", "", residual)
                count += len(tools.launches(target, batch))
    return count


# 60M has kernels that form B themselves, 1B padded copies; 1B and 7B several batches a shape.
LAUNCHES = {
    ("60m", "fira"): 10,
    ("1b", "fira"): 22,
    ("7b", "fira"): 64,
    ("60m", "galore"): 6,
    ("1b", "galore"): 12,
    ("7b", "galore"): 32,
}


@pytest.mark.parametrize(("model", "method"), LAUNCHES)
def test_launches_of_a_model_on_an_h200(model, method):
    assert launches_of(model, method) == LAUNCHES[model, method]


def test_stand_ins_are_launched_as_the_model_would_be(tmp_path):
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    out = tmp_path / "record.json"
    options = ["--models", "60m,1b,7b", "--dtypes", "bf16", "--rounds", "1", "--steps", "1"]
    command = [sys.executable, "-m", "bench.host", *options, "--backends", "triton", "--out", out]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    record = json.loads(out.read_text())
    rows = [row for row in record["rows"] if row["backend"]]
    assert {(row["model"], row["optimizer"]): row["calls"] for row in rows} == LAUNCHES
    sizes = {row["model"]: (row["matrices"], row["blocks"], row["ffn"] % 16) for row in rows}
    assert sizes == {"60m": (56, 8, 0), "1b": (168, 24, 15), "7b": (224, 32, 0)}
    assert record["batches_of"] == {"gpu": "NVIDIA H200", "bytes": 139 * 2**30}


def test_without_triton_it_is_named_as_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    out = tmp_path / "record.json"
    host.main([*TINY, "--backends", "triton", "--methods", "fira", "--out", str(out)])
    record = json.loads(out.read_text())
    assert set(record["missing"]) == {"triton"}
    assert {row["optimizer"] for row in record["rows"]} == {"adamw", "adamw-foreach"}


@needs_native
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["fira", "galore"])
def test_the_calls_of_a_step_alone_give_the_weights_of_the_step(method, dtype):
    """So nothing that computes is missing among them."""
    params = host.parameters(SIZE, dtype)
    gradients = host.Gradients(params)
    gradients.stay()
    optimizer = host.ours(method, "native", params, SIZE.rank)
    optimizer.step()
    written = [*params]
    written += [optimizer.state[param]["exp_avg"] for param in params]
    written += [optimizer.state[param]["exp_avg_sq"] for param in params]
    if method == "fira":
        written += [optimizer.state[param]["limiter_norm"] for param in params]
    before = [tensor.detach().clone() for tensor in written]
    calls = recorded_passes(optimizer.step)
    after = [tensor.detach().clone() for tensor in written]
    with torch.no_grad():
        torch._foreach_copy_(written, before)
    calls.run()
    for found, expected, old in zip(written, after, before, strict=True):
        torch.testing.assert_close(found.detach(), expected, rtol=0, atol=0)
        assert not torch.equal(expected, old)


def test_operations_that_compute_are_recorded_and_views_are_not():
    left, right = torch.ones(3, 3), torch.ones(3, 3)

    def run():
        whole = torch.empty(2, 3)
        view = left.T[:2]
        torch.mm(view, right, out=whole)
        total = whole + view
        total.mul_(2)
        left.add_(total.sum())

    calls = recorded_operations(run)
    assert len(calls) == 5
    before = left.clone()
    calls.run()
    assert not torch.equal(left, before)


def test_gradients_that_move_lie_elsewhere_with_the_same_values():
    params = host.parameters(SIZE, "bf16")
    gradients = host.Gradients(params)
    gradients.stay()
    stayed, values = [p.grad.data_ptr() for p in params], [p.grad.clone() for p in params]
    kept, places = [], set()
    for turn in range(5):
        gradients.move(turn)
        kept.append([param.grad for param in params])
        places.add(params[0].grad.data_ptr())
        for param, place, value in zip(params, stayed, values, strict=True):
            assert param.grad.data_ptr() != place
            assert torch.equal(param.grad, value)
    assert len(places) == 5


PACKAGE = {
    "first": "from . import second\ndef outer():\n    return second.inner() + sum(numbers())\n"
    "def numbers():\n    yield 1\n    yield 2\n",
    "second": "def inner():\n    return leaf() + (lambda: leaf())()\ndef leaf():\n    return 1\n",
}


def test_calls_are_counted_by_hand(tmp_path, monkeypatch):
    folder = tmp_path / "followed_package"
    folder.mkdir()
    for name, text in {"__init__": "", **PACKAGE}.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    outer = importlib.import_module("followed_package.first").outer
    # outer | inner, leaf, leaf | numbers, which goes on twice
    assert followed(outer, package=folder) == Way(functions=4, files=2, changes=2, calls=5)
    with_lambda = followed(outer, package=folder, nameless=True)
    assert with_lambda == Way(functions=5, files=2, changes=2, calls=6)
    assert followed(outer, package=folder / "elsewhere") == Way(0, 0, 0, 0)


def test_a_budget_holds_each_count():
    budget = Way(4, 2, 2, 5)
    assert budget.within(budget)
    for place in range(4):
        more = [*budget]
        more[place] += 1
        assert not Way(*more).within(budget)
