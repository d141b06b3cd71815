"""Equal tuning: what is tried, in which order, with how many runs; and a comparison, whole."""

import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM  # noqa: F401  once, for all processes that are forked

from bench import family, pretrain
from bench.family import Search, Start, course
from bench.figures import FIGURES, Records
from bench.settings import Job, parse
from bench.tables import family_marks, tried_text

ROOT = Path(__file__).parents[2]


def run_of(job, loss):
    return {
        "optimizer": job.optimizer,
        "train_loss": [loss, loss],
        "validation": [[2, loss]],
    }


def searched(start, search, loss_of, seeds=(0, 1, 2), at_a_time=100):
    """The finished course and the jobs in the order in which they were run."""
    runs, order = {}, []
    while (found := course(start, search, list(seeds), runs)).missing:
        for trial in found.missing[:at_a_time]:
            runs[trial] = run_of(trial.job, loss_of(trial.job))
            order.append(trial.job)
    return found, order


def bowl(lr, scale=None, diverges=math.inf):
    def loss_of(job):
        if job.lr >= diverges:
            return math.nan
        far = math.log2(job.lr / lr) ** 2
        return 1.5 + 0.01 * far + (0 if scale is None else 0.01 * math.log2(job.scale / scale) ** 2)

    return loss_of


def test_the_best_is_inside_and_the_other_seeds_are_run_there():
    found, order = searched(Start("adamw", 1e-3, None), Search(2.0, 0, 9), bowl(8e-3))
    assert [job.lr for job in order[:3]] == [1e-3, 5e-4, 2e-3]
    assert [job.lr for job in order[3:6]] == [4e-3, 8e-3, 16e-3]
    assert order[6:] == [Job("adamw", 8e-3, 1), Job("adamw", 8e-3, 2)]
    assert Search(2.0, 0, 9).bracketed(found.tried)


def test_a_scale_is_bracketed_too_and_never_with_more_runs_than_the_budget():
    start, loss_of = Start("muon", 4e-3, 0.4), bowl(8e-3, 0.2)
    found, order = searched(start, Search(2.0, 0, 20), loss_of)
    assert (found.best.lr, found.best.scale) == (8e-3, 0.2)
    assert [(job.lr, job.scale) for job in order if job.seed == 0] == [
        *((4e-3, 0.4), (2e-3, 0.4), (8e-3, 0.4), (16e-3, 0.4)),
        *((8e-3, 0.2), (8e-3, 0.8)),
        *((4e-3, 0.2), (16e-3, 0.2), (8e-3, 0.1)),
    ]
    few, order = searched(start, Search(2.0, 0, 7), loss_of)
    assert len([job for job in order if job.seed == 0]) == len(few.tried) == 7
    assert not Search(2.0, 0, 7).bracketed(few.tried)


@pytest.mark.parametrize("at_a_time", [1, 2, 3])
def test_the_search_does_not_depend_on_the_number_of_workers(at_a_time):
    start, search, loss_of = Start("muon", 1e-3, 0.1), Search(2.0, 1, 12), bowl(3e-3, 0.3)
    together, _ = searched(start, search, loss_of)
    found, order = searched(start, search, loss_of, at_a_time=at_a_time)
    assert (found.tried, found.best) == (together.tried, together.best)
    assert len(set(order)) == len(order)


def test_half_steps_come_after_whole_ones():
    found, order = searched(Start("adamw", 1e-3, None), Search(2.0, 1, 9), bowl(2.8e-3))
    assert [job.lr for job in order if job.seed == 0] == [
        *(1e-3, 5e-4, 2e-3),
        4e-3,
        *(1.41e-3, 2.83e-3),
    ]
    assert found.best.lr == 2.83e-3


def test_what_diverges_is_tried_lower_and_loses():
    found, _ = searched(Start("adamw", 0.1, None), Search(2.0, 0, 9), bowl(0.1, diverges=0.04))
    assert found.best.lr == 0.025
    assert found.tried[(0,)] == math.inf
    lost, _ = searched(Start("adamw", 0.1, None), Search(2.0, 0, 4), bowl(0.1, diverges=0.0))
    assert lost.best.lr == min(0.1 * 2.0**place for (place,) in lost.tried)


def test_shorter_runs_find_the_rate_and_full_ones_are_made_of_every_seed():
    runs, search = {}, Search(2.0, 0, 9, steps=300)
    while (found := course(Start("adamw", 1e-3, None), search, [0, 1], runs)).missing:
        runs |= {trial: run_of(trial.job, bowl(1e-3)(trial.job)) for trial in found.missing}
    assert [(trial.job.lr, trial.job.seed) for trial in runs if trial.steps] == [
        *((1e-3, 0), (5e-4, 0), (2e-3, 0)),
    ]
    assert [(trial.job.lr, trial.job.seed) for trial in runs if not trial.steps] == [
        *((1e-3, 0), (1e-3, 1)),
    ]
    settings = parse(["--steps", "800", "--warmup", "80"]).settings
    short = family.of_length(settings, 300)
    assert (short.steps, short.warmup, short.eval_every) == (300, 30, 30)
    assert not settings.differences(asdict(replace(short, steps=800, warmup=80, eval_every=80)))


def test_differences_are_paired_by_seed():
    found = family.mean_and_difference({0: 1.5, 1: 1.6, 2: 1.4}, {0: 1.6, 1: 1.7, 2: 1.5})
    assert found["loss"] == pytest.approx(1.5)
    assert found["loss_error"] == pytest.approx(0.1 / math.sqrt(3))
    assert found["difference"] == pytest.approx(-0.1)
    assert found["difference_error"] == pytest.approx(0.0, abs=1e-12)
    assert family.mean_and_difference({0: math.inf}, {0: 1.0})["loss"] == math.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "0"], "--budget and --workers are 1 at least"),
        (["--tune-steps", "800"], "--tune-steps is less than the 800 steps of a run"),
        (["--against", "soap"], "--against soap is not among adamw"),
        (["--same-time-as", "soap"], "--same-time-as soap is not among adamw"),
    ],
)
def test_mistakes_end_with_a_message(arguments, message, capsys):
    with pytest.raises(SystemExit):
        family.parse(arguments)
    assert message in capsys.readouterr().err


COMMAND = ["--optimizers", "adamw,muon,galore@4", "--budget", "3", "--workers", "2"]


def told(out):
    record = json.loads((out / "family.json").read_text())
    digests = {json.dumps([r[k] for k in ("optimizer", "lr", "scale", "seed")]): r["weights_digest"]
               for r in record["runs"]}  # fmt: skip
    return record, digests


def forked(job, command, data, folder):
    """As `begun`, without the seconds that a new process takes to import."""
    place = command.out / "work" / "data"
    process = multiprocessing.get_context("fork").Process(
        target=pretrain._train, args=(command, job, place, data.vocab_size, folder)
    )
    process.start()
    return process


def test_comparison_whole_and_in_parts_and_with_one_more(tiny, tmp_path, capsys, monkeypatch):
    """Stopped by its time, and gone on with; then with another method."""
    monkeypatch.setattr(family, "begun", forked)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = [*COMMAND, *tiny, "--against", "muon", "--seeds", "0,1", "--out"]
    family.main([*arguments, str(whole)])
    printed = capsys.readouterr().out
    record, digests = told(whole)
    assert {row["optimizer"] for row in record["summary"]} == {"adamw", "muon", "galore@4"}
    for row in record["summary"]:
        assert len(row["tried"]) == 3
        assert len(row["losses"]) == 2
        assert row["finished"]
        assert row["difference"] is not None
        assert row["step_ms"] > 0
        assert row["optimizer"] in printed
    assert not (whole / "work" / "tuning").exists()
    # Three of one seed and one of the other.
    assert len(record["runs"]) == 3 * 4
    rows = {row["optimizer"]: row for row in record["summary"]}
    assert rows["muon"]["difference"] == 0
    assert [rows[name]["scale"] is None for name in ("adamw", "muon", "galore@4")] == [
        True,
        False,
        False,
    ]
    assert {each["lr"] for each in rows["adamw"]["tried"]} == {5e-4, 1e-3, 2e-3}
    # Matrices of rank 4 have half of the moments of rank 8.
    assert rows["galore@4"]["state_bytes"] < rows["adamw"]["state_bytes"]
    assert (whole / "family.png").read_bytes().startswith(b"\x89PNG")

    with pytest.raises(SystemExit) as ended:
        family.main([*arguments, str(parts), "--seconds", "0"])
    assert ended.value.code == family.UNFINISHED
    family.main([*arguments, str(parts)])
    assert told(parts)[1] == digests
    with pytest.raises(SystemExit, match=r"another comparison: rank was 8, is 9$"):
        family.main([*arguments, str(parts), "--rank", "9"])
    more = [word.replace("galore@4", "galore@4,adamw-split") for word in arguments]
    family.main([*more, str(parts)])
    again = told(parts)
    assert digests.items() <= again[1].items()
    assert len(again[1]) == len(digests) + 4

    os.rename(whole / "family.json", tmp_path / "family-nano.json")
    text = FIGURES["family"](Records(tmp_path))
    assert "| muon | " in text
    assert "python -m bench.family" in text
    shutil.copy(parts / "family.json", tmp_path / "family-nano-4k.json")
    text = FIGURES["family_sizes"](Records(tmp_path))
    assert [line.count("|") for line in text.splitlines() if line.startswith("|")] == [4] * 6
    assert len([line for line in text.splitlines() if line.startswith("| galore@4 | ")]) == 1


def test_others_get_the_time_of_one(tmp_path, tiny, monkeypatch):
    """As many steps as that takes, of every seed; the same again with the next command."""
    monkeypatch.setattr(family, "begun", forked)
    # By the clock a step would take another time in every run.
    speeds = {"adamw": 0.5, "muon": 1.0, "galore@4": 0.25}
    monkeypatch.setattr(family, "step_seconds", lambda run, _: speeds[run["optimizer"]])
    arguments = [*COMMAND, *tiny, "--seeds", "0,1", "--same-time-as", "adamw"]
    for _ in range(2):
        family.main([*arguments, "--out", str(tmp_path)])
    record, _ = told(tmp_path)
    rows = {row["optimizer"]: row for row in record["summary"]}
    steps = record["settings"]["steps"]
    assert rows["adamw"]["timed"] is None
    assert rows["muon"]["timed"]["steps"] == steps // 2
    assert rows["galore@4"]["timed"]["steps"] == 2 * steps
    for name in ("muon", "galore@4"):
        timed = rows[name]["timed"]
        assert timed["as"] == "adamw"
        assert len(timed["losses"]) == 2
        assert timed["loss"] not in rows[name]["losses"]
        runs = [r for r in record["runs"] if (r["optimizer"], r["steps"]) == (name, timed["steps"])]
        assert {run["lr"] for run in runs} == {rows[name]["lr"]}
        assert [run["loss"] for run in runs] == timed["losses"]
    os.rename(tmp_path / "family.json", tmp_path / "family-nano-time.json")
    lines = FIGURES["family_time"](Records(tmp_path)).splitlines()
    ends = {line.split(" | ")[0]: line.split(" | ")[-1] for line in lines if line.startswith("|")}
    assert ends["| optimizer"] == "in the time of adamw |"
    assert ends["| muon"].endswith(f"{steps // 2} steps |")
    assert ends["| adamw"] == " |"


def test_a_run_that_fails_is_named(tiny, tmp_path):
    """And others go on with the next command."""
    program = (
        "import sys; from bench import family\n"
        "family.begun.__globals__['_train'] = sys.exit\n"
        "family.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, "--optimizers", "adamw", *tiny, "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 1
    assert "adamw-lr0.001-seed0 ended with status 1; the same command goes on" in done.stderr


def test_marks_and_what_was_tried():
    row = {
        "tried": [
            {"lr": 0.01, "scale": None, "loss": 1.5},
            {"lr": 0.02, "scale": 0.4, "loss": None},
        ],
        "bracketed": False,
        "finished": True,
    }
    assert family_marks(row) == "edge"
    assert tried_text(row) == "0.01: 1.500; 0.02, 0.4: diverged; edge"
