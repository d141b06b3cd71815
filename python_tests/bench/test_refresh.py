"""The refresh bench measures what it says, and refuses a basis that is not orthonormal."""

import json

import pytest
import torch

from bench import gradients, refresh
from bench.settings import parse
from lowrank_kernels.subspace.range_finders import RANGE_FINDERS


def test_the_record_holds_every_range_finder(tmp_path, capsys):
    out = tmp_path / "refresh.json"
    refresh.main(["--device", "cpu", "--quick", "--dtypes", "fp32", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["finder"] for row in rows] == 2 * [refresh.SVD, *refresh.FINDERS]
    exact = rows[0]
    for row in rows[:5]:
        ratio = exact["ms"] / row["ms"]
        assert row["times_faster_than_svd"] == pytest.approx(ratio)
    shares = {row["finder"]: row["captured"] for row in rows[:5]}
    assert shares["random"] < 0.6 < 0.95 < shares["randomized"] <= 1.0001
    assert "captured" in capsys.readouterr().out


def test_a_skew_basis_fails(monkeypatch):
    right = RANGE_FINDERS["power"]

    def skew(request):
        found = right(request)
        return found._replace(bases=found.bases * 1.001)

    monkeypatch.setitem(RANGE_FINDERS, "power", skew)
    with pytest.raises(SystemExit, match="power on synthetic fp32 is not orthonormal to 1e-05"):
        refresh.main(["--device", "cpu", "--quick", "--dtypes", "fp32"])


def test_saved_gradients_are_those_of_the_training(tiny, tmp_path):
    settings = parse([*tiny, "--optimizers", "galore"]).settings
    from bench.data import prepare

    data = prepare(settings.data, "bytes", 0, settings.seq_len + 1, tmp_path / "data")
    found = gradients.collect(settings, tmp_path / "data", data.vocab_size, [1, 3], layer=1)
    assert set(found) == {f"{m} at {at}" for m in gradients.MATRICES for at in (1, 3)}
    for grad in found.values():
        assert grad.dim() == 2
        assert grad.abs().sum() > 0
    assert not torch.equal(found["q_proj at 1"], found["q_proj at 3"])
    file = tmp_path / "gradients.pt"
    torch.save({"rank": 8, "gradients": found}, file)
    refresh.main(["--device", "cpu", "--quick", "--dtypes", "fp32", "--gradients", str(file)])


def test_too_little_of_a_real_gradient_fails(tmp_path, monkeypatch):
    monkeypatch.setitem(RANGE_FINDERS, "randomized", RANGE_FINDERS["random"])
    torch.save({"rank": 8, "gradients": {"q_proj at 1": torch.randn(40, 40)}}, tmp_path / "g.pt")
    command = ["--device", "cpu", "--quick", "--dtypes", "fp32"]
    with pytest.raises(SystemExit, match=r"randomized on q_proj at 1 captured 0\.[2-8]"):
        refresh.main([*command, "--gradients", str(tmp_path / "g.pt")])
