"""Runs and comparisons, whole: what they leave, and that stopping them changes nothing."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import pretrain
from bench.data import prepare
from bench.optimizers import METHODS, PROJECTED
from bench.picture import Comparison, draw, smooth
from bench.settings import Job, parse
from bench.summary import summarize, write_record
from bench.train import Run, schedule, train
from lowrank_kernels import GaLoreAdamW
from lowrank_kernels.optim.projected_gradient import ProjectedGradient

# Not other people's packages: whether their state survives is their affair.
CONTINUED = [name for name, method in METHODS.items() if method.train and not method.packages]

ROOT = Path(__file__).parents[2]
MEASURED = ("train_loss", "validation", "weights_digest", "state_bytes")


@pytest.fixture
def setting(tiny, tmp_path):
    """Settings, data folder and data summary of a tiny run."""
    settings = parse(tiny).settings
    data = prepare(settings.data, "bytes", 0, settings.seq_len + 1, tmp_path / "data")
    return settings, tmp_path / "data", data


def measured(record: dict) -> dict:
    return {name: json.loads(json.dumps(record[name])) for name in MEASURED}


@pytest.mark.parametrize("optimizer", CONTINUED)
def test_stopped_and_continued_is_bitwise_uninterrupted(optimizer, setting, tmp_path, monkeypatch):
    settings, folder, data = setting
    job = Job(optimizer, 0.01, 0)
    whole = train(settings, job, folder, data.vocab_size, tmp_path / "whole")

    advance = Run.advance

    def advance_until_killed(run):
        if run.step == 7:
            raise KeyboardInterrupt
        advance(run)

    monkeypatch.setattr(Run, "advance", advance_until_killed)
    with pytest.raises(KeyboardInterrupt):
        train(settings, job, folder, data.vocab_size, tmp_path / "parts")
    assert torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)
    taken = []
    monkeypatch.setattr(Run, "advance", lambda run: (taken.append(run.step), advance(run)))
    torch.rand(3)
    parts = train(settings, job, folder, data.vocab_size, tmp_path / "parts")
    assert taken == list(range(5, 12))
    assert measured(parts) == measured(whole)
    assert not (tmp_path / "parts" / "checkpoint.pt").exists()


def test_a_run_begins_with_the_weights_that_another_has_left(setting, tmp_path):
    settings, folder, data = setting
    job = Job("galore", 0.01, 0)
    first = train(replace(settings, keep_weights=True), job, folder, data.vocab_size, tmp_path)
    tuned = replace(settings, weights=str(tmp_path / "weights.pt"))
    again = Run(tuned, replace(job, seed=5), folder, data.vocab_size)
    assert again.validate() == first["validation"][-1][1]
    again.advance()
    assert again.history.train_loss[0] < 0.9 * first["train_loss"][0]


def test_optimizers_share_weights_and_batches(setting):
    settings, folder, data = setting
    losses = {}
    for name in CONTINUED:
        run = Run(settings, Job(name, 0.0, 3), folder, data.vocab_size)
        for _ in range(2):
            run.advance()
        losses[name] = tuple(run.history.train_loss)
    assert len(set(losses.values())) == 1
    assert losses["adamw"][0] != losses["adamw"][1]


@pytest.mark.parametrize("arm", PROJECTED)
def test_projected_arms_train_by_r_as_galore_does_by_whole_gradients(arm, setting, monkeypatch):
    """Only the first bases differ, and from the gradient not even those; without clipping, which
    goes by another norm.
    """
    settings, folder, data = setting
    settings = replace(settings, clip=0.0)
    seen = []
    step = GaLoreAdamW.step

    def watched(self):
        grads = [p.grad for group in self.param_groups if "rank" in group for p in group["params"]]
        seen.append(sum(isinstance(grad, ProjectedGradient) for grad in grads))
        step(self)

    monkeypatch.setattr(GaLoreAdamW, "step", watched)
    ends = []
    for name in ("galore", f"galore-{arm}"):
        run = Run(settings, Job(name, 0.02, 0), folder, data.vocab_size)
        for _ in range(6):
            run.advance()
        ends.append(run.history.train_loss)
    # 28 matrices; of T = 4 a quarter has its basis renewed in a step, the first one has no other.
    whole, projected = seen[:6], seen[6:]
    assert whole == [0] * 6
    assert projected[0] == 28
    assert all(0 < count < 28 for count in projected[1:])
    assert ends[0][0] == ends[1][0]
    if arm == "projected-gradient":
        assert ends[0] == pytest.approx(ends[1], rel=1e-4)
    else:
        assert ends[0][1:] != pytest.approx(ends[1][1:], rel=1e-4)


def test_micro_batches_add_up_to_the_batch(setting):
    settings, folder, data = setting
    ends = []
    for micro_batch in (4, 1):
        changed = replace(settings, micro_batch=micro_batch)
        run = Run(changed, Job("adamw", 0.01, 0), folder, data.vocab_size)
        for _ in range(3):
            run.advance()
        ends.append((run.history.train_loss, run.validate()))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-4)
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-4)


def test_bf16_runs_have_bf16_gradients_and_weights(setting):
    settings, folder, data = setting
    run = Run(replace(settings, dtype="bf16"), Job("fira", 0.01, 0), folder, data.vocab_size)
    run.advance()
    record = run.record()
    assert record["weight_bytes"] == 2 * record["parameters"]
    assert sum(record["backends"].values()) == 4 * 7
    assert math.isfinite(run.validate())


def test_under_autocast_products_are_in_bfloat16_and_weights_are_not(setting):
    settings, folder, data = setting
    losses, job = [], Job("galore", 0.01, 0)
    for autocast in (False, True):
        run = Run(replace(settings, autocast=autocast), job, folder, data.vocab_size)
        run.advance()
        losses.append(run.history.train_loss[0])
        assert {p.dtype for p in run.model.parameters()} == {torch.float32}
        assert run.model.lm_head(torch.ones(1, run.model.config.hidden_size)).dtype is torch.float32
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.01)


def test_adamw_state_is_two_moments(setting):
    settings, folder, data = setting
    run = Run(settings, Job("adamw", 0.01, 0), folder, data.vocab_size)
    run.advance()
    record = run.record()
    tensors = len(list(run.model.parameters()))
    # And a step counter a tensor.
    assert record["state_bytes"] == 8 * record["parameters"] + 4 * tensors


def test_schedule():
    factors = [schedule(step, 100, 10) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert factors == sorted(factors[:10]) + sorted(factors[10:], reverse=True)
    assert factors[99] == pytest.approx(0.1, abs=1e-3)


def test_smooth_keeps_a_constant():
    assert smooth([2.0] * 100) == pytest.approx([2.0] * 100)


def record(optimizer: str, lr: float, seed: int, loss: float) -> dict:
    return {
        **{"optimizer": optimizer, "lr": lr, "seed": seed, "parameters": 10, "weight_bytes": 40},
        **{"state_bytes": 80, "peak_bytes": 100, "validation": [[6, 3.0], [12, loss]]},
        **{"train_loss": [4.0, loss], "step_seconds": [2.0, 2.0], "optimizer_seconds": [1.0, 1.0]},
    }


def test_best_rate_is_the_best_mean_and_never_a_diverged_one(setting, tmp_path):
    settings, _, data = setting
    settings = replace(settings, lrs={"adamw": [0.3, 0.1, 0.2]}, seeds=[0, 1])
    records = [
        *(record("adamw", 0.1, 0, 2.0), record("adamw", 0.1, 1, 2.2)),
        *(record("adamw", 0.2, 0, 1.8), record("adamw", 0.2, 1, 2.6)),
        *(record("adamw", 0.3, 0, 1.0), record("adamw", 0.3, 1, math.nan)),
    ]
    summaries = summarize(records, settings, data)
    assert [summary.best for summary in summaries] == [False, True, False]
    assert summaries[1].loss == pytest.approx(2.1)
    assert summaries[1].deviation == pytest.approx(0.02**0.5)
    assert summaries[1].at_edge
    assert summaries[1].tokens_per_second == 4 * 16 / 2
    write_record(records, settings, data, tmp_path / "record.json")
    assert json.loads((tmp_path / "record.json").read_text())["summary"][0]["loss"] is None
    few = replace(settings, lrs={"adamw": [0.3]})
    draw(Comparison(records[4:], few, data, "a device"), tmp_path / "picture.png")


def test_best_point_of_a_rate_and_a_scale(setting, tmp_path):
    settings, _, data = setting
    lrs, scales = {"muon": [0.1, 0.2], "adamw": [0.1]}, {"muon": [0.2, 0.4, 0.8]}
    settings = replace(settings, lrs=lrs, scales=scales, seeds=[0])
    losses = {(0.1, 0.2): 3.0, (0.1, 0.4): 2.0, (0.1, 0.8): 2.5}
    losses |= {(0.2, 0.2): 2.2, (0.2, 0.4): 2.1, (0.2, 0.8): 2.4}
    records = [record("muon", lr, 0, loss) | {"scale": s} for (lr, s), loss in losses.items()]
    records.append(record("adamw", 0.1, 0, 2.3))
    summaries = summarize(records, settings, data)
    best = {summary.optimizer: summary for summary in summaries if summary.best}
    assert (best["muon"].lr, best["muon"].scale, best["muon"].rates) == (0.1, 0.4, "0.1, scale 0.4")
    # Of the rate, of which two were tried; the scale lies inside.
    assert best["muon"].at_edge
    assert not best["adamw"].at_edge
    assert len(summaries) == 7
    draw(Comparison(records, settings, data, "a device"), tmp_path / "picture.png")


def records_of(out: Path) -> list[dict]:
    return [measured(run) for run in json.loads((out / "pretrain.json").read_text())["runs"]]


# The first run of a comparison, as its process is killed in the middle.
KILLED = """
import os, signal, sys
from bench import pretrain, train

def advance_until_killed(run, advance=train.Run.advance):
    if run.step == 11:
        os.kill(os.getpid(), signal.SIGKILL)
    advance(run)

train.Run.advance = advance_until_killed
command = pretrain.parse(sys.argv[1:])
data = pretrain.start(command)
job = pretrain.plan(command.settings.lrs, command.settings.seeds)[0]
folder = command.out / "work" / "runs" / job.name
pretrain._train(command, job, command.out / "work" / "data", data.vocab_size, folder)
"""


def test_comparison_end_to_end_whole_and_killed(tiny, tmp_path, capfd):
    """The killed one has its second run from the whole one: what is finished is not run again."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = ["--optimizers", "adamw,fira", "--lr", "1e-2", *tiny, "--out"]
    command = [sys.executable, "-m", "bench.pretrain", *arguments, str(whole)]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for line in ("training: 5 files", "adamw-lr0.01-seed0 6/12", "perplexity"):
        assert line in output
    assert re.search(r"│ fira +│ +0.01 │ +\d", output)
    assert (whole / "pretrain.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((whole / "pretrain.json").read_text())
    assert saved["environment"]["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert saved["settings"]["rank"] == 8
    assert [len(run["train_loss"]) for run in saved["runs"]] == [12, 12]
    assert all(run["peak_bytes"] > run["weight_bytes"] for run in saved["runs"])

    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments, str(parts)], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    adamw, fira = (f"work/runs/{name}-lr0.01-seed0" for name in ("adamw", "fira"))
    assert torch.load(parts / adamw / "checkpoint.pt", weights_only=True)
    shutil.copytree(whole / fira, parts / fira)
    capfd.readouterr()
    pretrain.main([*arguments, str(parts), "--resume"])
    output = capfd.readouterr().out
    assert "adamw-lr0.01-seed0 12/12" in output
    assert "adamw-lr0.01-seed0 6/12" not in output
    assert "fira-lr0.01-seed0 12/12" not in output
    assert records_of(parts) == records_of(whole)
