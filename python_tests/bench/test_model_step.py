"""Whole-model steps: right before timed, everybody named, state and floors as counted by hand."""

import json
from types import SimpleNamespace

import pytest
import torch

from bench import model_step
from bench.model_step import Problem
from bench.optimizers import METHODS
from bench.timing import Rates
from lowrank_kernels.ops import native

CPU = torch.device("cpu")
QUICK = ["--device", "cpu", "--quick", "--dtypes", "fp32"]


def test_every_optimizer_is_in_the_record_or_named_as_missing(tmp_path, capsys):
    out = tmp_path / "record.json"
    model_step.main([*QUICK, "--out", str(out)])
    record = json.loads(out.read_text())
    (row,) = record["rows"]
    expected = set(METHODS) - set(model_step.NOT_HERE)
    assert set(row["results"]) | set(record["missing"]) == expected
    assert set(row["fresh"]) == set(row["results"])
    assert record["missing"]["flashoptim"]
    printed = " ".join(capsys.readouterr().out.split())
    for name in expected:
        assert name in printed
    for name in ("adamw", "galore", "fira"):
        share = row["results"][name]["share_of_floor"]
        assert share == pytest.approx(row["floor_ms"][name] / row["results"][name]["ms"])
    # AdamW: two moments and a step counter a tensor; in place, so without a workspace.
    adamw, parameters = row["results"]["adamw"], 9_000_000
    assert adamw["state_bytes"] == 8 * row["parameters"] + 4 * (4 * 9 + 3)
    assert adamw["workspace_bytes"] < 0.01 * adamw["state_bytes"]
    assert row["results"]["adamw-master"]["state_bytes"] == pytest.approx(
        1.5 * adamw["state_bytes"], rel=0.01
    )
    assert row["results"]["fira"]["state_bytes"] < adamw["state_bytes"] < parameters
    sizes = [row["results"][f"fira{f}"]["state_bytes"] for f in ("", "-bf16", "-8bit")]
    assert sizes == sorted(sizes, reverse=True)
    assert {"galore-torch-8bit", "adamw-factored-8bit"} <= expected
    assert not {"fira-moved", "fira-8bit-nearest", "adamw-split-8bit"} & expected


def test_wrong_codes_are_reported_and_not_timed(monkeypatch, tmp_path):
    """Scales of M that are off by a twentieth, in one of the two backends."""
    right = model_step.started

    def slightly_wrong(name, groups, backend):
        optimizer = right(name, groups, backend)
        for state in optimizer.state.values():
            if backend == "native" and "exp_avg_scale" in state:
                state["exp_avg_scale"].mul_(1.05)
        return optimizer

    monkeypatch.setattr(model_step, "started", slightly_wrong)
    out = tmp_path / "r.json"
    with pytest.raises(SystemExit, match="ours is not the reference's step"):
        model_step.main([*QUICK, "--optimizers", "galore,galore-8bit", "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert set(row["wrong"]) == {"galore-8bit"}
    assert set(row["results"]) == {"galore"}


def test_a_wrong_step_is_reported_and_not_timed(monkeypatch, capsys, tmp_path):
    right = native.Operations.back_project_update

    def slightly_wrong(self, matrices, projection, factor, scalars):
        wrong = scalars._replace(scale=1.001 * scalars.scale)
        right(self, matrices, projection, factor, wrong)

    monkeypatch.setattr(native.Operations, "back_project_update", slightly_wrong)
    command = [*QUICK, "--optimizers", "adamw,fira", "--out", str(tmp_path / "r.json")]
    with pytest.raises(SystemExit, match="ours is not the reference's step"):
        model_step.main(command)
    assert "WRONG" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert set(row["results"]) == {"adamw"}


def test_a_peer_slowed_on_purpose_shows_as_slower(monkeypatch, tmp_path):
    """By far more than what a busy machine does to it."""
    step = torch.optim.AdamW.step

    def twenty_times(self, closure=None):
        for _ in range(20):
            step(self, closure)

    found = []
    for each in (step, twenty_times):
        monkeypatch.setattr(torch.optim.AdamW, "step", each)
        out = tmp_path / "record.json"
        model_step.main([*QUICK, "--optimizers", "adamw,fira", "--out", str(out)])
        (row,) = json.loads(out.read_text())["rows"]
        found.append(row["results"]["adamw"]["ms"] / row["results"]["fira"]["ms"])
    assert found[1] > 4 * found[0]


def test_ranks_up_to_the_full_one_change_the_state(tmp_path):
    out = tmp_path / "record.json"
    command = [*QUICK, "--ranks", "16,full", "--optimizers", "galore", "--out", str(out)]
    model_step.main(command)
    low, full = json.loads(out.read_text())["rows"]
    assert (low["rank"], full["rank"]) == (16, 128)
    assert full["results"]["galore"]["state_bytes"] > low["results"]["galore"]["state_bytes"]


def test_the_floor_of_a_step_by_hand():
    """60M in bf16: copies only, at a byte a second."""
    problem = Problem("60m", 128, "bf16")
    hidden, ffn, layers, r = 512, 1376, 8, 128
    found = model_step.floors(problem, Rates(bytes_per_second=1.0, flops_per_second=1e30))
    rest = 2 * 32_000 * hidden + (2 * layers + 1) * hidden
    projected = layers * (4 * hidden**2 + 3 * hidden * ffn)
    assert found["adamw"] == 14 * (rest + projected)

    def galore(large: int) -> float:
        """G twice read for W's sake, W read and written; P twice; M, V both ways, N both ways."""
        full, basis, low = 2 * large * hidden, 2 * hidden * r, 4 * large * r
        return (full + basis + 5 * low) + (2 * full + basis + low)

    assert found["galore"] == rest * 22 + layers * (4 * galore(hidden) + 3 * galore(ffn))


def test_what_does_not_fit_is_named(monkeypatch):
    def too_large(name, groups, backend):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model_step, "started", too_large)
    options = SimpleNamespace(backend="native", quick=True, rounds=1)
    row = model_step.bench_problem(Problem("9m", 32, "fp32", 64), ["adamw"], CPU, options)
    assert row["missing"] == {"adamw": "does not fit"}
    assert row["results"] == {}
