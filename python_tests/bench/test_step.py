"""The step bench holds ours against the official optimizers before it times anybody."""

import json
from statistics import geometric_mean

import pytest
import torch

from bench import step
from bench.cases import Case
from bench.optimizers import Method
from lowrank_kernels.ops import Side, native

CPU = torch.device("cpu")
OFFICIAL_HERE = all(
    step.OPTIMIZERS[name].obstacle("cpu") is None for name in step.PACKAGES.values()
)
needs_official = pytest.mark.skipif(not OFFICIAL_HERE, reason="needs the official packages")
QUICK = ["--device", "cpu", "--quick"]


def test_the_cases_are_the_published_ones_on_both_sides():
    options = type("Options", (), {"quick": False, "methods": ["fira"], "dtypes": ["fp32"]})
    found = {((c.rows, c.cols), c.rank, c.side) for c in step.cases(options)}
    left, right = Side.LEFT, Side.RIGHT
    square, tall, small = (2048, 2048), (5461, 2048), (1376, 512)
    assert found == {
        *((square, rank, side) for rank in (512, 128) for side in (left, right)),
        *((shape, rank, right) for shape, rank in ((tall, 512), (small, 128))),
        *((shape[::-1], rank, left) for shape, rank in ((tall, 512), (small, 128))),
    }


@needs_official
@pytest.mark.parametrize("method", step.PACKAGES)
@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
def test_both_optimizers_of_a_case_have_its_side_and_its_rank(method, proj_type):
    case = Case(96, 64, 16, "fp32", method, 1, proj_type)
    weight, grad = torch.zeros(96, 64), torch.randn(96, 64)
    ours = step.Trained(step.OURS, case, weight, grad, "native")
    official = step.Trained(step.OFFICIAL, case, weight, grad, "native")
    shape = (16, 64) if case.side is Side.LEFT else (96, 16)
    for trained in (ours, official):
        assert trained.optimizer.state[trained.weight]["exp_avg"].shape == shape
    assert step.distance(case, "native", CPU) < 1e-6


def test_a_wrong_step_is_reported_and_not_timed(monkeypatch, capsys):
    right = native.Operations.back_project_update

    def slightly_wrong(self, matrices, projection, factor, scalars):
        wrong = scalars._replace(scale=1.001 * scalars.scale)
        right(self, matrices, projection, factor, wrong)

    monkeypatch.setattr(native.Operations, "back_project_update", slightly_wrong)
    with pytest.raises(SystemExit, match="ours is not the official step"):
        step.main([*QUICK, "--dtypes", "fp32", "--methods", "galore"])
    assert "WRONG" in capsys.readouterr().out


def test_without_the_official_packages_the_reference_is_who_is_right(monkeypatch, tmp_path, capsys):
    absent = Method(lambda *_: pytest.fail("it is not here"), packages=("no_such_package",))
    monkeypatch.setitem(step.OPTIMIZERS, "fira-official", absent)
    out = tmp_path / "step.json"
    step.main([*QUICK, "--dtypes", "fp32", "--methods", "fira", "--out", str(out)])
    record = json.loads(out.read_text())
    assert record["missing"] == {"fira-official": "no_such_package is not installed"}
    for row in record["rows"]:
        assert row["against"] == "reference"
        assert set(row["results"]) == {step.OURS, *step.RIVALS} - {step.OFFICIAL}
    assert "no_such_package is not installed" in " ".join(capsys.readouterr().out.split())

    right = native.Operations.back_project_update

    def slightly_wrong(self, matrices, projection, factor, scalars):
        right(self, matrices, projection, factor, scalars._replace(scale=1.001 * scalars.scale))

    monkeypatch.setattr(native.Operations, "back_project_update", slightly_wrong)
    with pytest.raises(SystemExit, match="or the reference's"):
        step.main([*QUICK, "--dtypes", "fp32", "--methods", "fira"])


@needs_official
def test_the_record_holds_every_rival_and_their_means(tmp_path):
    out = tmp_path / "step.json"
    step.main([*QUICK, "--dtypes", "fp32,bf16", "--out", str(out)])
    record = json.loads(out.read_text())
    assert len(record["rows"]) == 2 * 2 * 2
    for row in record["rows"]:
        own = row["results"][step.OURS]["ms"]
        assert set(row["results"]) == {step.OURS, *step.RIVALS}
        for rival in step.RIVALS:
            assert row["times_faster"][rival] == pytest.approx(row["results"][rival]["ms"] / own)
    fira = [row["times_faster"]["official"] for row in record["rows"] if row["method"] == "fira"]
    assert record["geometric_means"]["fira"]["official"] == pytest.approx(geometric_mean(fira))
