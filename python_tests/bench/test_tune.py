"""The tuner tells times of right configurations, goes on where it stopped, and touches no state.

Times are invented, and the kernels run in Triton's interpreter.
"""

import json

import pytest
import torch

from bench.cases import Case
from bench.timing import Samples

pytest.importorskip("triton")
from bench import tune
from lowrank_kernels.ops.triton import config as choices

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's small shapes")
CASE = Case(48, 40, 16, "fp32", "fira", 1)


@pytest.fixture
def make_tuner(tmp_path, monkeypatch):
    """A tuner with invented times."""
    monkeypatch.setattr(tune, "copies_beyond_cache", lambda *_: 2)

    def make(cost, turns=0):
        def timer(runs):
            for run in runs.values():
                for turn in range(turns):
                    run(turn)
            return {name: Samples([float(cost(name))]) for name in runs}

        return tune.Tuner(torch.device("cpu"), tmp_path / "tune.json", {"bench": "tune"}, timer)

    return make


def small_is_fast(candidate):
    """The smallest tiles with most stages win; 2 matrices a batch."""
    if isinstance(candidate, int):
        return candidate * (1 + abs(candidate - 2))
    return candidate.channels * 1000 + candidate.depth + 100 * candidate.split - candidate.stages


def rows_of(tuner):
    """What was written, by kind."""
    return {row["kind"]: row["times"] for row in json.loads(tuner.path.read_text())["rows"]}


def test_the_record_begins_with_the_fastest(make_tuner):
    tuner = make_tuner(small_is_fast, turns=1)
    lines = list(tuner.tune(CASE, count=4))
    assert [line.split()[0] for line in lines] == ["project", "update", "batch"]
    rows = rows_of(tuner)
    for kind in ("project", "update"):
        candidates = choices.candidates(kind, tuner.problem(CASE), tuner.gpu)
        best = min(candidates, key=small_is_fast)
        assert len(candidates) > 2
        assert rows[kind][0] == {"ms": 1e3 * small_is_fast(best), **best._asdict()}
    assert rows["batch"][0]["matrices"] == 2


def test_a_second_run_measures_only_what_is_missing(make_tuner, monkeypatch):
    monkeypatch.setattr(tune, "check", lambda *_: {"triton": []})
    list(make_tuner(small_is_fast).tune(CASE, count=4))
    again = make_tuner(lambda candidate: pytest.fail("measured again"))
    assert list(again.tune(CASE, count=4)) == []
    once = make_tuner(small_is_fast)
    once.rows = [row for row in again.rows if row["kind"] != "update"]
    assert [line.split()[0] for line in once.tune(CASE, count=4)] == ["update"]


def test_a_wrong_configuration_is_reported_and_left_out(make_tuner, monkeypatch, capsys):
    tuner = make_tuner(small_is_fast)

    def check(*_):
        wrong = "project" in choices._forced and choices._forced["project"].stages == 4
        return {"triton": ["direction"] if wrong else []}

    monkeypatch.setattr(tune, "check", check)
    list(tuner.tune(CASE, count=4))
    assert all(config["stages"] < 4 for config in rows_of(tuner)["project"])
    assert "WRONG, left out: project" in capsys.readouterr().err


def test_nothing_is_forced_afterwards_and_inputs_of_the_check_are_untouched(make_tuner):
    tuner = make_tuner(small_is_fast, turns=1)
    inputs = tune.make_inputs(CASE, torch.device("cpu"), 0)
    before = inputs.to()
    candidates = choices.candidates("project", tuner.problem(CASE), tuner.gpu)
    tuner._measure("project", CASE, inputs, candidates[:2])
    for old, new in zip(before, inputs, strict=True):
        assert all(map(torch.equal, old, new))
    assert not choices._forced


def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit) as stop:
        tune.main([])
    assert stop.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err
