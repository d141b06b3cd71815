import os

import pytest
import torch

from lowrank_kernels.cli import selftest
from lowrank_kernels.ops import native
from lowrank_kernels.ops.selfcheck import METHODS


def test_every_available_backend_passes(json_of):
    facts = json_of("selftest")
    assert facts["passed"]
    tried = {
        tuple(case[key] for key in ("backend", "dtype", "method", "side"))
        for case in facts["cases"]
        if case["device"] == "cpu"
    }
    served = {"reference": 2, "native": 2, "triton": 0 if torch.cuda.is_available() else 1}
    for backend, dtypes in served.items():
        assert sum(each[0] == backend for each in tried) == dtypes * len(METHODS) * 2


def spoil(monkeypatch, operation, change):
    """The operation of `native` with another result."""
    right = getattr(native.Operations, operation)
    monkeypatch.setattr(native.Operations, operation, lambda *args: change(right(*args)))


def scaled(result):
    return 1.01 * result


def scaled_projection(result):
    return result._replace(direction=1.01 * result.direction)


@pytest.mark.parametrize("operation", ["project_moments", "channel_scale"])
def test_a_result_that_is_off_by_a_hundredth_is_wrong(command, monkeypatch, operation):
    spoil(monkeypatch, operation, scaled_projection if operation == "project_moments" else scaled)
    status, out, _ = command("selftest")
    assert status == 1
    wrong = [line for line in out.splitlines() if line.endswith("WRONG")]
    assert wrong
    assert all(line.startswith("native") for line in wrong)
    assert f"{len(wrong)} wrong" in out
    both = {line.split()[2] for line in wrong} == {"float32", "bfloat16"}
    assert both or operation == "channel_scale"


def test_a_wrong_backend_is_found_although_another_is_asked_for(command, monkeypatch):
    monkeypatch.setenv("LOWRANK_BACKEND", "reference")
    right = native.Operations.back_project_update

    def update(*args):
        *others, scalars = args
        right(*others, scalars._replace(step_size=1.01 * scalars.step_size))

    monkeypatch.setattr(native.Operations, "back_project_update", update)
    assert command("selftest")[0] == 1
    assert os.environ["LOWRANK_BACKEND"] == "reference"


def test_an_override_that_stops_every_step_stops_the_self_test(refused, monkeypatch):
    monkeypatch.setenv("LOWRANK_BACKEND", "foo")
    assert "LOWRANK_BACKEND='foo' is not one of auto" in refused("selftest")
    monkeypatch.setenv("LOWRANK_BACKEND", "native")
    monkeypatch.setattr(native, "import_error", "no such file")
    assert "LOWRANK_BACKEND='native' cannot run here" in refused("selftest")


def test_a_gpu_has_shapes_besides_those_of_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    shapes = {"cpu": set(), "cuda:0": set()}
    for case in selftest._cases():
        shapes[case.device].add((case.shape, case.rank))
    assert shapes["cuda:0"] - shapes["cpu"] == set(selftest.PIPELINED)


def test_runs_that_differ_are_told(command, monkeypatch):
    runs = []

    def turned(factor):
        runs.append(factor)
        return factor * (1 + 2**-23 * (len(runs) // 2 % 2))

    spoil(monkeypatch, "channel_scale", turned)
    out = command("selftest")[1]
    assert "WRONG: two runs differ" in out


def test_a_nan_is_wrong(command, monkeypatch):
    spoil(monkeypatch, "channel_scale", lambda factor: factor * float("nan"))
    assert command("selftest")[0] == 1


def test_an_unavailable_backend_is_named_with_its_reason(command, json_of, monkeypatch):
    monkeypatch.setattr(native, "import_error", "no such file")
    status, out, _ = command("selftest")
    assert status == 0
    assert "native: not tried, the compiled module does not load: no such file" in out
    assert "no such file" in json_of("selftest")["unavailable"]["native"]
