"""The kernel bench refuses to time what is wrong, and shows who is slower."""

import json
import types

import pytest
import torch

from bench import hybrid, kernels, timing
from bench.cases import Case, check, make_inputs
from lowrank_kernels.ops import load, native, reference

CPU = torch.device("cpu")


class FakeClock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def takes(self, *seconds):
        """A candidate that takes so long, in turn."""

        def run(turn):
            self.now += seconds[turn % len(seconds)]

        return run


def test_rounds_are_interleaved_and_begin_with_another_candidate_each():
    order = []
    candidates = {name: lambda turn, name=name: order.append((name, turn)) for name in "abc"}
    times = timing.interleaved(candidates, CPU, rounds=3)
    assert [len(samples.seconds) for samples in times.values()] == [3, 3, 3]
    rounds = [order[start : start + 3] for start in range(0, len(order), 3)]
    assert [{turn for _, turn in each} for each in rounds] == [{0}, {1}, {2}, {3}, {4}]
    assert [{name for name, _ in each} for each in rounds] == [set("abc")] * 5
    assert {each[0][0] for each in rounds} == set("abc")


def test_a_slower_peer_shows_as_slower():
    clock = FakeClock()
    candidates = {"fast": clock.takes(1.0, 1.2), "slow": clock.takes(2.0, 2.4)}
    times = timing.interleaved(candidates, CPU, rounds=8, clock=clock)
    assert times["fast"].median == pytest.approx(1.1)
    assert times["slow"].median == pytest.approx(2.2)
    assert times["fast"].spread == pytest.approx(0.1 / 1.1)


def test_the_floor_is_the_larger_of_traffic_and_arithmetic():
    rates = timing.Rates(bytes_per_second=100.0, flops_per_second=1000.0)
    assert rates.floor(500.0, 1000.0) == 5.0
    assert rates.floor(100.0, 7000.0) == 7.0


def test_rates_are_the_best_that_was_seen(monkeypatch):
    seconds = {"copy": [4.0, 3.0], "in place": [2.0, 5.0], "product": [8.0, 1.0]}
    samples = {name: timing.Samples(values) for name, values in seconds.items()}
    monkeypatch.setattr(timing, "interleaved", lambda *_, **__: samples)
    rates = timing.measure_rates(CPU, torch.float32, quick=True)
    assert rates == timing.Rates(2 * 4 * 2**16 / 2.0, 2 * 256**3 / 1.0)
    one, other = timing.Rates(1.0, 4.0), timing.Rates(3.0, 2.0)
    assert timing.best(one, other) == timing.Rates(3.0, 4.0)


def test_bytes_and_flops_of_a_square_of_7b():
    """G, W 33.6 MB and P 8.4 MB in bfloat16, each low-rank matrix 16.8 MB in float32."""
    full, basis, low = 2 * 4096**2, 2 * 4096 * 1024, 4 * 4096 * 1024
    fira = Case(4096, 4096, 1024, "bf16", "fira", 3).traffic()
    galore = Case(4096, 4096, 1024, "bf16", "galore", 3).traffic()
    flops = 3 * 2 * 4096**2 * 1024
    assert fira["project_moments"] == (3 * (full + basis + 6 * low), flops)
    assert galore["project_moments"] == (3 * (full + basis + 5 * low), flops)
    assert fira["channel_scale"] == (3 * 16 * 4096, 0)
    assert galore["channel_scale"] == (0, 0)
    assert fira["back_project_update"] == (3 * (3 * full + basis + 2 * low), flops)
    assert galore["back_project_update"] == (3 * (2 * full + basis + low), flops)
    assert fira["step"] == tuple(map(sum, zip(*list(fira.values())[:3], strict=True)))


def sabotaged(operation, spoil):
    """The native backend with one operation that spoils its result."""

    def wrong(self, matrices, *rest):
        result = getattr(native.Operations, operation)(self, matrices, *rest)
        return spoil(result, matrices)

    operations = type("Sabotaged", (native.Operations,), {operation: wrong})
    return types.SimpleNamespace(Operations=operations, batch_size=native.batch_size)


def spoil_direction(projection, _):
    projection.direction[0, 0] *= 1.01
    return projection


def spoil_factor(factor, _):
    return factor * 1.001


def spoil_weight(_, matrices):
    matrices.params[0][3, 4] += 0.01


SABOTAGE = [
    ("project_moments", spoil_direction, "direction"),
    ("channel_scale", spoil_factor, "factor"),
    ("back_project_update", spoil_weight, "param"),
]


@pytest.mark.parametrize("method", ["galore", "fira"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_right_backends_pass_the_check(shape, dtype, method):
    case = Case(*shape, 16, dtype, method, 2)
    modules = {"native": native, "foreach": load("foreach"), "torch": hybrid}
    assert check(case, modules, make_inputs(case, CPU, 0)) == {name: [] for name in modules}


@pytest.mark.parametrize(("operation", "spoil", "output"), SABOTAGE)
def test_a_wrong_kernel_is_named_and_not_timed(operation, spoil, output, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = Case(96, 64, 16, "fp32", "fira", 1)
    modules = {"native": sabotaged(operation, spoil), "torch": hybrid}
    rates = timing.Rates(1e9, 1e9)
    rows = kernels.bench_case(case, modules, CPU, rates, rounds=1)
    assert [row["operation"] for row in rows] == [*kernels.OPERATIONS, "step"]
    for row in rows:
        assert output in row["wrong"]["native"]
        assert "native" not in row["results"]
        assert row["results"]["torch"]["ms"] > 0


def test_a_wrong_update_is_seen_in_half_precision():
    """Beside weights that a usual step hardly moves, their rounding would hide it."""

    class TooLong(native.Operations):
        def back_project_update(self, matrices, projection, factor, scalars):
            longer = scalars._replace(step_size=1.1 * scalars.step_size)
            super().back_project_update(matrices, projection, factor, longer)

    case = Case(96, 64, 16, "bf16", "fira", 1)
    module = types.SimpleNamespace(Operations=TooLong)
    assert check(case, {"wrong": module}, make_inputs(case, CPU, 0)) == {"wrong": ["param"]}


def test_the_command_writes_a_record_and_fails_on_a_wrong_kernel(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    out = tmp_path / "kernels.json"
    command = ["--device", "cpu", "--quick", "--dtypes", "fp32", "--methods", "fira"]
    kernels.main([*command, "--out", str(out)])
    record = json.loads(out.read_text())
    assert record["environment"]["threads"] == torch.get_num_threads()
    assert record["rates"]["fp32"]["flops_per_second"] > 0
    row = record["rows"][0]
    best = row["results"]["native"]
    assert best["share_of_floor"] == pytest.approx(row["floor_ms"] / best["ms"])
    assert set(record["rows"][3]["results"]) == {"native", "foreach", "torch", "torch fused AdamW"}

    wrong = sabotaged("channel_scale", spoil_factor)
    monkeypatch.setattr(kernels, "load", lambda name: wrong if name == "native" else load(name))
    with pytest.raises(SystemExit, match="wrong results, so no time: native"):
        kernels.main(command)
    assert "WRONG: factor" in capsys.readouterr().out


def test_interpreted_kernels_are_checked_and_not_timed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = Case(96, 64, 16, "fp32", "fira", 1)
    rows = kernels.bench_case(case, {"reference": reference}, CPU, timing.Rates(1, 1), 1)
    assert all(not row["results"] and not row["wrong"] for row in rows)


def test_a_missing_rival_is_named(monkeypatch, capsys):
    answers = {**kernels.backends(), "native": (False, "it was built without its CUDA half")}
    monkeypatch.setattr(kernels, "backends", lambda: answers)
    command = ["--device", "cpu", "--quick", "--dtypes", "fp32", "--backend", "reference"]
    kernels.main([*command, "--methods", "galore"])
    assert "without its CUDA half" in " ".join(capsys.readouterr().out.split())
