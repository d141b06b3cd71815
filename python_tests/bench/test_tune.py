"""The tuner tells times of right configurations, goes on where it stopped, and touches no state.

Times are invented, and the kernels run in Triton's interpreter.
"""

import json
import types

import pytest
import torch

from bench.cases import Case
from bench.record import Journal
from bench.timing import Samples

pytest.importorskip("triton")
from bench import tune
from lowrank_kernels.ops.triton import config as choices

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's small shapes")
CASE = Case(48, 40, 16, "fp32", "fira", 1)


@pytest.fixture
def make_tuner(tmp_path, monkeypatch):
    """A tuner with invented times, and a record."""
    monkeypatch.setattr(tune, "input_sets", lambda first, _: [first, first.to()])

    def make(cost, turns=0):
        def timer(runs):
            for run in runs.values():
                for turn in range(turns):
                    run(turn)
            return {name: Samples([float(cost(name))]) for name in runs}

        return tune.Tuner(torch.device("cpu"), timer), Journal(tmp_path / "tune.json", "tune")

    return make


def small_is_fast(candidate):
    """The smallest tiles with most stages win; 2 matrices a batch."""
    if isinstance(candidate, int):
        return candidate * (1 + abs(candidate - 2))
    return candidate.channels * 1000 + candidate.depth + 100 * candidate.split - candidate.stages


def rows_of(folder):
    """What was written, by kind."""
    rows = json.loads((folder / "tune.json").read_text())["rows"]
    return {row["kind"]: row["times"] for row in rows}


def test_the_record_begins_with_the_fastest(make_tuner, tmp_path):
    tuner, journal = make_tuner(small_is_fast, turns=1)
    lines = list(tune.fill(tuner, journal, CASE, count=4))
    assert [line.split()[0] for line in lines] == ["project", "update", "batch"]
    rows = rows_of(tmp_path)
    for kind in ("project", "update"):
        candidates = tuner.candidates(kind, CASE)
        best = min(candidates, key=small_is_fast)
        assert len(candidates) > 2
        assert rows[kind][0] == {"ms": 1e3 * small_is_fast(best), **best._asdict()}
    assert rows["batch"][0]["matrices"] == 2


def always_right(monkeypatch):
    monkeypatch.setattr(tune.Oracle, "wrong", lambda *_: [])


def test_a_second_run_measures_only_what_is_missing(make_tuner, monkeypatch):
    always_right(monkeypatch)
    list(tune.fill(*make_tuner(small_is_fast), CASE, count=4))
    tuner, journal = make_tuner(lambda candidate: pytest.fail("measured again"))
    assert list(tune.fill(tuner, journal, CASE, count=4)) == []
    tuner, journal = make_tuner(small_is_fast)
    journal.drop(lambda row: row["kind"] == "update")
    (line,) = tune.fill(tuner, journal, CASE, count=4)
    assert line.startswith("update")


def with_wrong(monkeypatch, is_wrong):
    """The modules stand for their configurations, some of which err."""
    monkeypatch.setattr(
        tune.Oracle, "wrong", lambda _, module: ["direction"] if is_wrong(module.config) else []
    )
    make = tune.with_config

    def marked(kind, config):
        module = make(kind, config)
        module.config = config
        return module

    monkeypatch.setattr(tune, "with_config", marked)


def test_a_wrong_configuration_is_reported_and_left_out(make_tuner, monkeypatch, capsys, tmp_path):
    with_wrong(monkeypatch, lambda config: config.stages == 4)
    list(tune.fill(*make_tuner(small_is_fast), CASE, count=4))
    assert all(config["stages"] < 4 for config in rows_of(tmp_path)["project"])
    assert "WRONG, left out: project" in capsys.readouterr().err


def test_where_no_configuration_is_right_the_record_says_so(make_tuner, monkeypatch, tmp_path):
    with_wrong(monkeypatch, lambda config: True)
    first, *_ = tune.fill(*make_tuner(small_is_fast), CASE, count=4)
    assert "no configuration is right" in first
    assert rows_of(tmp_path)["project"] == []


def test_a_configuration_that_raises_is_left_out(make_tuner, monkeypatch, capsys):
    make = tune.with_config

    def raising(kind, config):
        return make(kind, config) if config.stages < 4 else types.SimpleNamespace()

    monkeypatch.setattr(tune, "with_config", raising)
    tuner, _ = make_tuner(small_is_fast)
    assert all(time["stages"] < 4 for time in tuner.times("project", CASE, 4))
    assert "AttributeError" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["fira", "galore"])
def test_candidates_are_of_the_problems_that_the_backend_has(method):
    case = Case(40, 48, 16, "bf16", method, 3)
    found = tune.problems_of(case)
    assert set(found) == set(tune.TILES)
    for problem in found.values():
        sizes = problem.channels, problem.depth, problem.rank, problem.matrices
        assert sizes == (48, 40, 16, 3)
        assert problem.side is case.side
        assert problem.dtypes == (torch.bfloat16,) * 2
        assert problem.wide


def test_ahead_every_configuration_takes_a_step(monkeypatch):
    """In this process here, where the interpreter stands for the compiler."""
    taken = []

    class Pool:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def starmap_async(self, function, todo, chunksize):
            taken.extend(todo)
            for one in todo:
                function(*one)
            return types.SimpleNamespace(wait=lambda seconds: None)

    context = types.SimpleNamespace(Pool=lambda processes: Pool())
    monkeypatch.setattr(tune.multiprocessing, "get_context", lambda _: context)
    steps = []
    step = tune.Candidate.step
    monkeypatch.setattr(tune.Candidate, "step", lambda *each: steps.append(step(*each)))
    cpu = torch.device("cpu")
    found = tune.Tuner(cpu, None).candidates("project", CASE)[:2]
    tune.compile_ahead([(CASE, "project", one) for one in found], cpu, seconds=1)
    assert len(steps) == len(taken) == 2


def test_nothing_is_forced_afterwards_and_inputs_of_the_check_are_untouched(make_tuner):
    tuner, _ = make_tuner(small_is_fast, turns=1)
    inputs = tune.make_inputs(CASE, torch.device("cpu"), 0)
    before = inputs.to()
    candidates = tuner.candidates("project", CASE)
    tuner._measure("project", CASE, inputs, candidates[:2])
    for old, new in zip(before, inputs, strict=True):
        assert all(map(torch.equal, old, new))
    assert not choices._forced.get()


def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit) as stop:
        tune.main([])
    assert stop.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err
