"""The tuner picks the fastest right configuration, goes on where it stopped, and touches no state.

Times are invented, and the kernels run in Triton's interpreter.
"""

import json

import pytest
import torch

from bench.cases import Case
from bench.timing import Samples

pytest.importorskip("triton")
from bench import tune
from lowrank_kernels.ops import load
from lowrank_kernels.ops.triton import config as choices
from lowrank_kernels.ops.triton import tuned

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's small shapes")
CASE = Case(48, 40, 16, "fp32", "fira", 1)


@pytest.fixture
def make_tuner(tmp_path, monkeypatch):
    """A tuner whose table is the one that the launchers use, with invented times."""
    path = tmp_path / "gpu.json"
    monkeypatch.setattr(tuned, "path_of", lambda name: path)
    monkeypatch.setattr(tune, "copies_beyond_cache", lambda *_: 2)
    tuned.table_of.cache_clear()
    for choice in (choices._project_choice, choices._update_choice):
        choice.cache_clear()

    def make(cost, turns=0):
        def timer(runs):
            for run in runs.values():
                for turn in range(turns):
                    run(turn)
            return {name: Samples([float(cost(name))]) for name in runs}

        return tune.Tuner(torch.device("cpu"), path, timer)

    yield make
    tuned.table_of.cache_clear()
    for choice in (choices._project_choice, choices._update_choice):
        choice.cache_clear()


def small_is_fast(candidate):
    """The smallest tiles with most stages win; 2 matrices a group."""
    if isinstance(candidate, int):
        return candidate * (1 + abs(candidate - 2))
    split = getattr(candidate, "split", 1)
    return candidate.channels * 1000 + candidate.depth + 100 * split - candidate.stages


def test_the_fastest_configuration_goes_into_the_table_and_is_used(make_tuner):
    tuner = make_tuner(small_is_fast, turns=1)
    lines = list(tuner.tune(CASE, count=4))
    assert len(lines) == 3
    problem = tuned.Problem(CASE.side, 48, 40, 16, 1, (torch.float32,) * 2)
    for kind in ("project", "update"):
        candidates = getattr(choices, f"{kind}_candidates")(problem, tuner.gpu)
        best = min(candidates, key=small_is_fast)
        assert len(candidates) > 2
        choices._project_choice.cache_clear()
        choices._update_choice.cache_clear()
        assert getattr(choices, f"{kind}_config")(problem, tuner.gpu) == best
    matrix = torch.ones(48, 40)
    assert load("triton").group_size(matrix, matrix, 16) == 2
    assert choices.project_source(problem, tuner.gpu).startswith("tuned")


def test_a_second_run_measures_only_what_is_missing(make_tuner, monkeypatch):
    monkeypatch.setattr(tune, "check", lambda *_: {"triton": []})
    list(make_tuner(small_is_fast).tune(CASE, count=4))
    again = make_tuner(lambda candidate: pytest.fail("measured again"))
    assert list(again.tune(CASE, count=4)) == []
    del again.table["update"][tuned.problem_key(again._problem(CASE))]
    once = make_tuner(small_is_fast)
    once.table = again.table
    assert [line.split()[0] for line in once.tune(CASE, count=4)] == ["update"]


def test_a_wrong_configuration_is_reported_and_left_out(make_tuner, monkeypatch, capsys):
    tuner = make_tuner(small_is_fast)

    def check(*_):
        wrong = choices._forced_project and choices._forced_project.stages == 4
        return {"triton": ["direction"] if wrong else []}

    monkeypatch.setattr(tune, "check", check)
    list(tuner.tune(CASE, count=4))
    entry = json.loads(tuner.path.read_text())["project"]
    assert all(config["stages"] < 4 for config in entry.values())
    assert "WRONG, left out: project" in capsys.readouterr().err


def test_nothing_is_forced_afterwards_and_inputs_of_the_check_are_untouched(make_tuner):
    tuner = make_tuner(small_is_fast, turns=1)
    inputs = tune.make_inputs(CASE, torch.device("cpu"), 0)
    before = inputs.to()
    problem = tuner._problem(CASE)
    tuner._measure("project", CASE, inputs, choices.project_candidates(problem, tuner.gpu)[:2])
    for old, new in zip(before, inputs, strict=True):
        assert all(map(torch.equal, old, new))
    assert choices._forced_project is None


def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit) as stop:
        tune.main([])
    assert stop.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err
